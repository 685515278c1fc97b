"""
The clocks of a pool: one for deadlines, one for durations.

Deadlines use the clock of the event loop. That clock may jump, as under freezegun.
`Clock` absorbs each backward jump, so a stored "not before" time never moves further
away. No other module has to handle jumps.

Durations use `Clock.stopwatch`. That is the same clock if it is exact. Otherwise it is
`time.perf_counter`, because the clock of uvloop moves in steps of 1 ms. If an exact
clock jumps ahead, the duration under way includes the jump.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import anyio


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


__all__ = ["Clock", "TimeSource", "time_limit"]


ROUNDING = 1e-6
"""Seconds. The rounding error of the sum of two large times is less than this."""


def time_limit(timeout: float | None) -> anyio.CancelScope:
    """Return a cancel scope for the next *timeout* seconds; None means no limit."""
    return anyio.move_on_after(timeout)


READINGS = 4
"""The readings that are compared. A clock in steps cannot step between all of them."""


class TimeSource(Protocol):
    """An object that returns the current time. Each event loop of asyncio is one."""

    def time(self) -> float:
        """Return the time in seconds."""
        ...


class Clock:
    """
    The clock of one event loop, without its backward jumps.

    Strictly private. If the loop's clock goes back, this clock returns its last time
    once more and continues from there. Scopes from `deadline` keep their remaining
    time. Only `peek` may be called outside the thread of the loop.

    Attributes:
        source: The clock of the loop. It is the object and not its bound method,
            because freezegun replaces the method.
        skew: The sum of all backward jumps so far, in seconds.
        last: The last result of `now`, in seconds.
        is_exact: Whether the first readings of the loop's clock all differed. Then one
            reading serves deadlines and durations: a reading is 3 % of a lease.
    """

    __slots__ = ("_deadlines", "is_exact", "last", "skew", "source")

    # An attribute of the class, because freezegun replaces attributes of modules.
    perf_counter = staticmethod(time.perf_counter)

    def __init__(self, source: TimeSource) -> None:
        self.source = source
        self.skew = 0.0
        self.last = source.time()
        self._deadlines: dict[anyio.CancelScope, float] = {}
        readings = [source.time() for _ in range(READINGS)]
        self.is_exact = all(one < other for one, other in pairwise(readings))

    @property
    def stopwatch(self) -> Callable[[], float]:
        """The function that returns seconds for durations: `now`, if that is exact."""
        # Not an attribute: that would be a cycle, which keeps the event loop alive.
        return self.now if self.is_exact else self.perf_counter

    def now(self) -> float:
        """Return the time in seconds. It never decreases."""
        now = self.source.time() + self.skew
        if now < self.last:
            return self._went_back(now)
        self.last = now
        return now

    def peek(self) -> float:
        """Return the time in seconds, without a change of the clock. Thread-safe."""
        return max(self.last, self.source.time() + self.skew)

    @contextmanager
    def deadline(self, at: float) -> Iterator[anyio.CancelScope]:
        """Enter a cancel scope that is cancelled at the time *at* of this clock."""
        with anyio.CancelScope(deadline=self._loop_time(at)) as scope:
            self._deadlines[scope] = at
            try:
                yield scope
            finally:
                del self._deadlines[scope]

    async def sleep(self, delay: float) -> None:
        """Sleep for *delay* seconds."""
        with self.deadline(self.now() + delay):
            await anyio.sleep_forever()

    def _went_back(self, now: float) -> float:
        self.skew += self.last - now
        # The event loop stores deadlines in its own time. So they move too. Otherwise
        # each scope waits longer, by the size of the jump.
        for scope, at in list(self._deadlines.items()):
            scope.deadline = self._loop_time(at)
        return self.last

    def _loop_time(self, at: float) -> float:
        # Rounded up. Otherwise a task may wake just before *at*, and must sleep again.
        return at - self.skew + ROUNDING if self.skew else at
