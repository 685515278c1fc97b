"""
The clock of a pool, for deadlines and for durations: that of its event loop.

On uvloop it is the clock behind that of the loop. A clock may jump, as under freezegun.
`Clock` absorbs each backward jump, so a stored "not before" time never moves further
away. No other module has to handle jumps. If the clock jumps ahead, the durations under
way include the jump.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import anyio


if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator


__all__ = ["Clock", "TimeSource", "clock_of", "time_limit"]


ROUNDING = 1e-6
"""Seconds. The rounding error of the sum of two large times is less than this."""


SAME = 1.0
"""Seconds. Two readings of one clock, one after the other, differ by less than this."""


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


_UVLOOP = "uvloop.loop"


class _Exact:
    """The clock of which uvloop shows only the milliseconds."""

    # An attribute of a class, because freezegun replaces attributes of modules. Not
    # time.monotonic(), which is the same on Linux: time-machine 2 changes it in place.
    time = staticmethod(time.perf_counter)


def clock_of(loop: asyncio.AbstractEventLoop) -> Clock:
    """
    Return the clock for *loop*. On Linux it is exact on uvloop, too.

    uvloop rounds the system's monotonic clock down to 1 ms, and its timers have the
    same steps. On Linux, the pool reads that clock itself. A task that wakes at its
    deadline never reads an earlier time.
    """
    if not any(each.__module__ == _UVLOOP for each in type(loop).__mro__):
        return Clock(loop)
    return Clock(_Exact() if _may_read_behind(loop) else loop, steps=1000)


def _may_read_behind(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether the clock of *loop*, one of uvloop, is a rounded `_Exact`."""
    return (
        sys.platform == "linux"  # elsewhere they may be different clocks
        and getattr(type(loop).time, "__module__", None) == _UVLOOP
        # Unless a test library had replaced it when this module was imported.
        and _Exact.time.__module__ == "time"
        and abs(loop.time() - _Exact.time()) < SAME
    )


class Clock:
    """
    The clock of one event loop, without its backward jumps.

    Strictly private. If the loop's clock goes back, this clock returns its last time
    once more and continues from there. Scopes from `deadline` keep their remaining
    time. Only `peek` may be called outside the thread of the loop.

    Args:
        source: The clock of the loop, or the one behind it.
        steps: The steps that the loop's timers make in a second. Deadlines are rounded
            up to a step. Otherwise the loop would spin until the step ends. None: the
            timers are exact.

    Attributes:
        source: The clock that is read, plus the sum of its backward jumps so far. It is
            the object and not its bound method, because freezegun replaces the method.
        last: The last result of `now`, in seconds.
    """

    __slots__ = ("_deadlines", "_loop", "_skew", "_steps", "last", "source")

    def __init__(self, source: TimeSource, steps: int | None = None) -> None:
        self.source = self._loop = source
        self._skew = 0.0
        self._steps = steps
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
        if self._skew:
            # Rounded up. Otherwise a task may wake just before *at*, and must sleep
            # again.
            at += ROUNDING - self._skew
        if self._steps is not None and at * self._steps < math.inf:
            at = math.ceil(at * self._steps) / self._steps
        return at
