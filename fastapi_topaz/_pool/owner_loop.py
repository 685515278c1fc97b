"""
Where a pool lives: its event loop, and the task that hosts its work.

The two backends differ here and nowhere else above the transport.
"""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from threading import current_thread, get_ident
from typing import TYPE_CHECKING, Any

from anyio.lowlevel import current_token

from fastapi_topaz._fork import current as process
from fastapi_topaz._pool.clock import Clock
from fastapi_topaz._pool.interrupts import protect
from fastapi_topaz.exceptions import PoolMisuse


if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    import trio


__all__ = ["OwnerLoop"]


NEVER = 10.0 * 365 * 86400
"""Seconds. Longer than any process runs, and not too long for any loop."""


class _Destroyed:
    """A callback that does nothing, until the last reference to it is dropped."""

    __slots__ = ("_then",)

    def __init__(self, then: Callable[[], object]) -> None:
        self._then = then

    def __call__(self) -> None:
        pass

    def __del__(self) -> None:
        self._then()


class _TrioTime:
    """The clock of a trio run; works in any thread, unlike `trio.current_time()`."""

    __slots__ = ("_clock",)

    def __init__(self, clock: trio.abc.Clock) -> None:
        self._clock = clock

    def time(self) -> float:
        return self._clock.current_time()


class OwnerLoop:
    """
    The process and the event loop that a pool was opened in.

    Strictly private.

    Attributes:
        clock: The clock of the loop; cheaper than `anyio.current_time()`, which looks
            up the backend each time.
    """

    __slots__ = (
        *("_current", "_native", "_pid", "_task", "_thread", "_timer", "_where"),
        "clock",
    )

    def __init__(self) -> None:
        self._native: Any = current_token().native_token
        self._pid = process.pid
        self._thread = get_ident()
        self._where = current_thread().name
        self._task: Any = None
        self._timer: weakref.ref[asyncio.TimerHandle] | None = None
        self._current: Callable[[], object]
        if isinstance(self._native, asyncio.AbstractEventLoop):
            self._current = asyncio.get_running_loop
            self.clock = Clock(self._native)
        else:
            # Here and not above: asyncio applications need no trio installed.
            import trio  # noqa: PLC0415

            self._current = trio.lowlevel.current_trio_token
            self.clock = Clock(_TrioTime(trio.lowlevel.current_clock()))

    def check(self, pool: object) -> None:
        """
        Return if the caller is at home.

        Raises:
            PoolMisuse: This is another process or another event loop.
        """
        if not self.is_current_loop():
            raise self._strange(pool)

    def is_current_loop(self) -> bool:
        """Say whether this is the process and the event loop of the pool."""
        try:
            return self._current() is self._native and self._pid == process.pid
        except RuntimeError:  # no loop, or one of the other backend
            return False

    def is_current_thread(self) -> bool:
        """
        Say whether this is the process and the thread of the pool.

        Enough for what waits for nothing, and half as dear as `is_current_loop`.
        """
        return get_ident() == self._thread and self._pid == process.pid

    def is_forked(self) -> bool:
        """Say whether this process was forked from that of the pool."""
        return bool(self._pid != process.pid)

    def is_closed(self) -> bool:
        """Say whether the loop was closed without ending its tasks."""
        return (
            not self.is_forked()
            and isinstance(self._native, asyncio.AbstractEventLoop)
            and self._native.is_closed()
        )

    def coroutine(self) -> object:
        """Return the coroutine that the running task consists of."""
        if isinstance(self._native, asyncio.AbstractEventLoop):
            task = asyncio.current_task()
            return None if task is None else task.get_coro()
        import trio  # noqa: PLC0415

        return trio.lowlevel.current_task().coro

    def call_soon(self, function: Callable[[], object]) -> None:
        """
        Have *function* called on the loop, from any thread; never if it has ended.

        *function* must not raise: on trio that would end the run.
        """
        try:
            if isinstance(self._native, asyncio.AbstractEventLoop):
                # Without the context of whoever happens to call.
                context = contextvars.Context()
                self._native.call_soon_threadsafe(function, context=context)
            else:
                self._native.run_sync_soon(function)
        except RuntimeError:
            pass

    def spawn(
        self,
        function: Callable[[], Coroutine[Any, Any, None]],
        on_end: Callable[[], object],
        on_loop_closed: Callable[[], object],
    ) -> None:
        """
        Run *function* in a task that belongs to no caller.

        A request that happens to open the pool must not take it along when it is
        cancelled. *function* must not raise: on trio that would end the run. *on_end*
        is called when the task has ended, even if it never began: asyncio.run cancels
        tasks that have not had a turn yet. *on_loop_closed* is called if the loop is
        closed before the task has ended, in the thread that closes it.
        """
        if isinstance(self._native, asyncio.AbstractEventLoop):
            # Held, because the loop itself keeps only weak references to tasks;
            # and with an empty context, or it would keep the request's.
            self._task = self._native.create_task(
                function(),
                name="fastapi_topaz pool",
                context=contextvars.Context(),
            )
            # The loop drops its timers when it is closed. Nothing else tells of that.
            timer = self._native.call_later(
                NEVER, _Destroyed(on_loop_closed), context=contextvars.Context()
            )
            # Not the timer itself, because it would keep the object.
            self._timer = weakref.ref(timer)
            del timer

            def ended(_task: object) -> None:
                on_end()
                self.stop_watching()

            self._task.add_done_callback(ended)
        else:
            import trio  # noqa: PLC0415

            protect()

            async def run() -> None:
                try:
                    await function()
                finally:
                    on_end()

            self._task = trio.lowlevel.spawn_system_task(run, name="fastapi_topaz pool")

    def stop_watching(self) -> None:
        """Leave no timer behind: the pool has nothing any more that a loop ends."""
        timer = None if self._timer is None else self._timer()
        if timer is not None:
            timer.cancel()

    def _strange(self, pool: object) -> PoolMisuse:
        if self.is_forked():
            return PoolMisuse(
                f"{pool} was opened in process {self._pid} and is used in process "
                f"{process.pid}, which was forked from it; gRPC connections do "
                "not survive a fork, so open the pool in each worker, in the lifespan "
                "or a startup hook"
            )
        try:
            here = _described(current_token().native_token, current_thread().name)
        except RuntimeError:
            here = "no event loop"
        return PoolMisuse(
            f"{pool} is open on {_described(self._native, self._where)} and is used "
            f"on {here}; close the pool on its own loop first, or give each loop a "
            "pool of its own (a TestClient without `with` has a loop for each request)"
        )


def _described(loop: Any, thread: str) -> str:
    """Return what tells *loop* from another one of the same class."""
    name, state = "of trio", ""
    if isinstance(loop, asyncio.AbstractEventLoop):
        name = type(loop).__name__
        state = "running, " if loop.is_running() else "not running, "
        if loop.is_closed():
            state = "closed, "
    return f"the event loop {name} {id(loop):#x} ({state}thread {thread!r})"
