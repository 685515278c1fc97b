"""
Where a pool lives: its event loop, and the task that hosts its work.

The two backends differ here and nowhere else above the transport.
"""

from __future__ import annotations

import asyncio
import contextvars
from threading import get_ident
from typing import TYPE_CHECKING, Any

from anyio.lowlevel import current_token

from fastapi_topaz._fork import current as process
from fastapi_topaz.exceptions import PoolError


if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


__all__ = ["Home"]


class Home:
    """
    The process and the event loop that a pool was opened in.

    Strictly private.

    Attributes:
        now: Returns the time of the loop, in seconds; cheaper than
            `anyio.current_time()`, which looks up the backend each time.
    """

    __slots__ = ("_current", "_native", "_pid", "_task", "_thread", "now")

    def __init__(self) -> None:
        self._native: Any = current_token().native_token
        self._pid = process.pid
        self._thread = get_ident()
        self._task: Any = None
        self._current: Callable[[], object]
        self.now: Callable[[], float]
        if isinstance(self._native, asyncio.AbstractEventLoop):
            self._current = asyncio.get_running_loop
            self.now = self._native.time
        else:
            # Here and not above: asyncio applications need no trio installed.
            import trio  # noqa: PLC0415

            self._current = trio.lowlevel.current_trio_token
            # Of the clock itself, because trio.current_time() works in trio only, and a
            # pool may be looked at from any thread.
            self.now = trio.lowlevel.current_clock().current_time

    def check(self, pool: object) -> None:
        """
        Return if the caller is at home.

        Raises:
            PoolError: This is another process or another event loop.
        """
        if not self.is_here():
            raise self._strange(pool)

    def is_here(self) -> bool:
        """Say whether this is the process and the event loop of the pool."""
        try:
            return self._current() is self._native and self._pid == process.pid
        except RuntimeError:  # no loop, or one of the other backend
            return False

    def is_near(self) -> bool:
        """
        Say whether this is the process and the thread of the pool.

        Enough for what waits for nothing, and half as dear as `is_here`.
        """
        return get_ident() == self._thread and self._pid == process.pid

    def is_forked(self) -> bool:
        """Say whether this process was forked from that of the pool."""
        return bool(self._pid != process.pid)

    def is_gone(self) -> bool:
        """Say whether the loop was closed without ending its tasks."""
        return (
            not self.is_forked()
            and isinstance(self._native, asyncio.AbstractEventLoop)
            and self._native.is_closed()
        )

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
    ) -> None:
        """
        Run *function* in a task that belongs to no caller.

        A request that happens to open the pool must not take it along when it is
        cancelled. *function* must not raise: on trio that would end the run. *on_end*
        is called when the task has ended, even if it never began: asyncio.run cancels
        tasks that have not had a turn yet.
        """
        if isinstance(self._native, asyncio.AbstractEventLoop):
            # Held, because the loop itself keeps only weak references to tasks;
            # and with an empty context, or it would keep the request's.
            self._task = self._native.create_task(
                function(),
                name="fastapi_topaz pool",
                context=contextvars.Context(),
            )
            self._task.add_done_callback(lambda _task: on_end())
        else:
            import trio  # noqa: PLC0415

            async def run() -> None:
                try:
                    await function()
                finally:
                    on_end()

            self._task = trio.lowlevel.spawn_system_task(run, name="fastapi_topaz pool")

    def _strange(self, pool: object) -> PoolError:
        if self.is_forked():
            return PoolError(
                f"{pool} was opened in process {self._pid} and is used in process "
                f"{process.pid}, which was forked from it; gRPC connections do "
                "not survive a fork, so open the pool in each worker, in the lifespan "
                "or a startup hook"
            )
        try:
            here = repr(current_token().native_token)
        except RuntimeError:
            here = "no event loop"
        return PoolError(
            f"{pool} is open on the event loop {self._native!r} and is used on "
            f"{here}; close it there first, or give each loop a pool of its own"
        )
