"""
The clock of a pool, for deadlines and for durations: that of its event loop.

That clock may jump, as under freezegun. `Clock` absorbs each backward jump, so a stored
"not before" time never moves further away. No other module has to handle jumps. If the
clock jumps ahead, the durations under way include the jump.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import anyio


if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator


__all__ = ["Clock", "TimeSource", "exact", "time_limit"]


ROUNDING = 1e-6
"""Seconds. The rounding error of the sum of two large times is less than this."""


def time_limit(timeout: float | None) -> anyio.CancelScope:
    """Return a cancel scope for the next *timeout* seconds; None means no limit."""
    return anyio.move_on_after(timeout)


class TimeSource(Protocol):
    """An object that returns the current time. Each event loop of asyncio is one."""

    def time(self) -> float:
        """Return the time in seconds."""
        ...


class _Ahead:
    """A clock that is *skew* seconds ahead of *loop*, the clock of a loop."""

    def __init__(self, loop: TimeSource, skew: float) -> None:
        self._loop = loop
        self._skew = skew

    def time(self) -> float:
        return self._loop.time() + self._skew


class _Monotonic:
    """The clock that uvloop reads once in each turn of its loop."""

    # An attribute of a class, because freezegun replaces attributes of modules.
    time = staticmethod(time.monotonic)


def exact(loop: asyncio.AbstractEventLoop) -> TimeSource:
    """
    Return the clock of *loop*; for uvloop, the clock behind it.

    uvloop's own clock stands still during a turn of the loop, and moves in steps of
    1 ms. It is never ahead of the clock behind it. So whatever wakes at a deadline
    finds that the deadline has passed. Only on Linux are both known to be one clock.
    """
    is_uvloop = getattr(type(loop).time, "__module__", None) == "uvloop.loop"
    return _Monotonic() if is_uvloop and sys.platform == "linux" else loop


class Clock:
    """
    The clock of one event loop, without its backward jumps.

    Strictly private. If the loop's clock goes back, this clock returns its last time
    once more and continues from there. Scopes from `deadline` keep their remaining
    time. Only `peek` may be called outside the thread of the loop.

    Attributes:
        source: The clock of the loop, plus the sum of its backward jumps so far. It is
            the object and not its bound method, because freezegun replaces the method.
        last: The last result of `now`, in seconds.
    """

    __slots__ = ("_deadlines", "_loop", "_skew", "last", "source")

    def __init__(self, source: TimeSource) -> None:
        self.source = self._loop = source
        self._skew = 0.0
        self.last = source.time()
        self._deadlines: dict[anyio.CancelScope, float] = {}

    def now(self) -> float:
        """Return the time in seconds. It never decreases."""
        now = self.source.time()
        if now < self.last:
            return self._went_back(now)
        self.last = now
        return now

    def peek(self) -> float:
        """Return the time in seconds, without a change of the clock. Thread-safe."""
        return max(self.last, self.source.time())

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
        self._skew += self.last - now
        self.source = _Ahead(self._loop, self._skew)
        # The event loop stores deadlines in its own time. So they move too. Otherwise
        # each scope waits longer, by the size of the jump.
        for scope, at in list(self._deadlines.items()):
            scope.deadline = self._loop_time(at)
        return self.last

    def _loop_time(self, at: float) -> float:
        # Rounded up. Otherwise a task may wake just before *at*, and must sleep again.
        return at - self._skew + ROUNDING if self._skew else at
