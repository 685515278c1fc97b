"""
The clocks of a pool: one for deadlines, one for durations.

Deadlines use the clock of the event loop. That clock may jump, as under freezegun.
`Clock` absorbs each backward jump, so a stored "not before" time never moves further
away. No other module needs to care.

Durations use `time.perf_counter`. The clock of uvloop moves in steps of 1 ms.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import anyio


if TYPE_CHECKING:
    from collections.abc import Iterator


__all__ = ["Clock", "TimeSource"]


ROUNDING = 1e-6
"""Seconds. The sum of two large times may be wrong by less than this."""


class TimeSource(Protocol):
    """An object that has the current time, as each event loop of asyncio does."""

    def time(self) -> float:
        """Return the time in seconds."""
        ...


class Clock:
    """
    The clock of one event loop, without its backward jumps.

    Strictly private. If the loop's clock goes back, this clock stands still for that
    moment and goes on from there. Scopes from `deadline` keep their remaining time.
    For use in the thread of the loop, except `peek`.

    Attributes:
        source: The clock of the loop. The object and not its bound method, because
            freezegun replaces the method.
        skew: The sum of all backward jumps so far, in seconds.
        last: What `now` returned last.
    """

    __slots__ = ("_deadlines", "last", "skew", "source")

    # An attribute of a class, because freezegun replaces those of modules.
    perf_counter = staticmethod(time.perf_counter)

    def __init__(self, source: TimeSource) -> None:
        self.source = source
        self.skew = 0.0
        self.last = source.time()
        self._deadlines: dict[anyio.CancelScope, float] = {}

    def now(self) -> float:
        """Return the time in seconds; never less than before."""
        now = self.source.time() + self.skew
        if now < self.last:
            return self._went_back(now)
        self.last = now
        return now

    def peek(self) -> float:
        """Return the time in seconds; from any thread."""
        return max(self.last, self.source.time() + self.skew)

    @contextmanager
    def deadline(self, at: float) -> Iterator[anyio.CancelScope]:
        """Enter a cancel scope that ends at the time *at* of this clock."""
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
        # Otherwise the event loop waits until its clock reaches the old time again.
        for scope, at in list(self._deadlines.items()):
            scope.deadline = self._loop_time(at)
        return self.last

    def _loop_time(self, at: float) -> float:
        # Rounded up: a task that wakes before *at* would go to sleep at once again.
        return at - self.skew + ROUNDING if self.skew else at
