"""
The event loop that a pool belongs to, and the host task that does its work there.

Above the transport, only this module treats asyncio and trio differently.
"""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from functools import partial
from threading import current_thread, get_ident
from typing import TYPE_CHECKING, Any

from anyio.lowlevel import current_token

from fastapi_topaz._fork import current as process
from fastapi_topaz._pool.clock import Clock, clock_of
from fastapi_topaz._pool.interrupts import protect
from fastapi_topaz.exceptions import PoolMisuse


if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    import trio


__all__ = ["OwnerLoop", "coroutine_of"]


NEVER = 10.0 * 365 * 86400
"""Seconds (ten years). No process runs so long, and every loop accepts the delay."""


class _Destroyed:
    """A callback that calls *then* when it is destroyed, not when it is called."""

    __slots__ = ("_then",)

    def __init__(self, then: Callable[[], object]) -> None:
        self._then = then

    def __call__(self) -> None:
        pass

    def __del__(self) -> None:
        self._then()


class _TrioTime:
    """The clock of a trio run. Unlike `trio.current_time()`, it works in any thread."""

    __slots__ = ("time",)

    def __init__(self, clock: trio.abc.Clock) -> None:
        self.time = clock.current_time


def coroutine_of(task: Any) -> object:
    """Return the coroutine of a *task* of asyncio or trio, or None for None."""
    # Not by its class: a task factory of asyncio may make tasks of any class.
    get_coro = getattr(task, "get_coro", None)
    return getattr(task, "coro", None) if get_coro is None else get_coro()


class OwnerLoop:
    """
    The process and the event loop in which a pool was opened.

    Strictly private.

    Attributes:
        clock: The clock of the loop. It is faster than `anyio.current_time()`, which
            looks up the backend in each call.
        current: Returns the running event loop, as `native`; raises RuntimeError if
            there is none of this backend.
        native: The event loop of asyncio, or the token of trio's run.
        pid: The process ID.
        task: Returns the running task. None if asyncio knows none.
        thread: The identifier of the loop's thread.
    """

    __slots__ = (
        *("_task", "_timer", "_where"),
        *("clock", "current", "native", "pid", "task", "thread"),
    )

    def __init__(self) -> None:
        self.native: Any = current_token().native_token
        self.pid = process.pid
        self.thread = get_ident()
        self._where = current_thread().name
        self._task: Any = None
        self._timer: weakref.ref[asyncio.TimerHandle] | None = None
        self.task: Callable[[], object]
        self.current: Callable[[], object]
        if isinstance(self.native, asyncio.AbstractEventLoop):
            self.task = partial(asyncio.current_task, self.native)
            self.current = asyncio.get_running_loop
            self.clock = clock_of(self.native)
        else:
            # Imported here, because applications on asyncio do not need trio.
            import trio  # noqa: PLC0415

            self.task = trio.lowlevel.current_task
            self.current = trio.lowlevel.current_trio_token
            self.clock = Clock(_TrioTime(trio.lowlevel.current_clock()))

    def check(self, pool: object) -> None:
        """
        Check that the caller runs in the process and on the event loop of the pool.

        Raises:
            PoolMisuse: The caller runs in another process or on another event loop.
        """
        if not self.is_current_loop():
            raise self._strange(pool)

    def is_current_loop(self) -> bool:
        """Return whether the caller is in the pool's process and on its event loop."""
        try:
            return self.current() is self.native and self.pid == process.pid
        except RuntimeError:  # no running loop, or a loop of the other backend
            return False

    def is_forked(self) -> bool:
        """Return whether this process was forked from the process of the pool."""
        return bool(self.pid != process.pid)

    def check_new_loop(self, pool: object) -> None:
        """
        Check, after a fork, that the caller runs on another event loop than the pool.

        Raises:
            PoolMisuse: The caller runs on the inherited event loop. Its epoll belongs
                to the parent as well, so neither process could use it.
        """
        if current_token().native_token is self.native:
            raise PoolMisuse(
                f"{pool} was opened in process {self.pid}, and process {process.pid}, "
                "which was forked from it, still runs the event loop of its parent; "
                "start a new event loop in the child, or fork in a thread"
            )

    def is_closed(self) -> bool:
        """
        Return whether the event loop is closed. False on trio and after a fork.

        asyncio can close a loop before its tasks have ended. They never run again.
        """
        return (
            not self.is_forked()
            and isinstance(self.native, asyncio.AbstractEventLoop)
            and self.native.is_closed()
        )

    def call_soon(self, function: Callable[[], object]) -> None:
        """
        Schedule a call of *function* on the loop. Thread-safe.

        If the loop has ended, or belongs to the parent process, *function* is never
        called. It must not raise: on trio an exception would end the run.
        """
        if self.is_forked():
            return  # the pipe that wakes the loop is the parent's
        try:
            if isinstance(self.native, asyncio.AbstractEventLoop):
                # An empty context: otherwise *function* runs in the caller's context.
                context = contextvars.Context()
                self.native.call_soon_threadsafe(function, context=context)
            else:
                self.native.run_sync_soon(function)
        except RuntimeError:
            pass

    def spawn(
        self,
        function: Callable[[], Coroutine[Any, Any, None]],
        on_end: Callable[[], object],
        on_loop_closed: Callable[[], object],
    ) -> None:
        """
        Run *function* in a new task that belongs to no caller.

        If the request that opens the pool is cancelled, the pool must stay open.

        Args:
            function: Must not raise: on trio an exception would end the run.
            on_end: Called when the task has ended, even if it never began.
                asyncio.run() cancels tasks that have not had a turn yet.
            on_loop_closed: Called if the loop is closed before the task has ended,
                in the thread that closes the loop.
        """
        if isinstance(self.native, asyncio.AbstractEventLoop):
            # Empty, because the task and the timer live longer than the request that
            # opened the pool, and would keep its context alive.
            context = contextvars.Context()
            # A reference is kept, because the loop keeps only weak references to tasks.
            self._task = self.native.create_task(
                function(), name="fastapi_topaz pool", context=context
            )
            # A loop that is closed drops its timers. There is no other signal that a
            # loop was closed, so the destruction of this timer is the signal.
            timer = self.native.call_later(
                NEVER, _Destroyed(on_loop_closed), context=context
            )
            # A weak reference, because a strong one would keep the callback alive after
            # the loop has dropped the timer.
            self._timer = weakref.ref(timer)
            del timer

            def ended(_task: object) -> None:
                on_end()
                self.stop_watching()

            self._task.add_done_callback(ended, context=context)
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
        """Cancel the timer of `spawn`: a closed pool has nothing to clean up."""
        timer = None if self._timer is None else self._timer()
        if timer is not None:
            timer.cancel()

    def _strange(self, pool: object) -> PoolMisuse:
        if self.is_forked():
            return PoolMisuse(
                f"{pool} was opened in process {self.pid} and is used in process "
                f"{process.pid}, which was forked from it; gRPC connections do "
                "not survive a fork, so open the pool in each worker, in the lifespan "
                "or a startup hook"
            )
        try:
            here = _described(current_token().native_token, current_thread().name)
        except RuntimeError:
            here = "no event loop"
        return PoolMisuse(
            f"{pool} is open on {_described(self.native, self._where)} and is used "
            f"on {here}; close the pool on its own loop first, or give each loop a "
            "pool of its own (a TestClient without `with` has a loop for each request)"
        )


def _described(loop: Any, thread: str) -> str:
    """Return text that tells *loop* apart from other loops of its class."""
    name, state = "of trio", ""
    if isinstance(loop, asyncio.AbstractEventLoop):
        name = type(loop).__name__
        state = "running, " if loop.is_running() else "not running, "
        if loop.is_closed():
            state = "closed, "
    return f"the event loop {name} {id(loop):#x} ({state}thread {thread!r})"
