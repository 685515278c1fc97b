"""
gRPC for trio: a connection that lives on the loop thread, driven from trio tasks.

Nothing here blocks trio's thread. A call is begun in it, and its end comes through the
loop thread, which costs one wake-up of each.

The loop thread wakes a task of trio when its operation has ended. If Ctrl-C raised
KeyboardInterrupt between the begin of the operation and the wait, the task would be
awake already, and trio aborts the program. So these functions are protected: trio
raises it when the task waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import TYPE_CHECKING, Any, TypeVar

import grpc.aio
import trio

from fastapi_topaz._grpcio.call import is_direct
from fastapi_topaz._grpcio.calls import LAST_CALLS
from fastapi_topaz._grpcio.connection import GrpcConnection
from fastapi_topaz._grpcio.loop_thread import LoopThread
from fastapi_topaz._rpc.clock import left
from fastapi_topaz._rpc.statuses import Ending, ending


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastapi_topaz._grpcio.call import Call
    from fastapi_topaz._rpc.metadata import Metadata
    from fastapi_topaz._rpc.target import Target


__all__ = ["TrioGrpcConnection"]


T = TypeVar("T")


class _Waiter:
    """One trio task that waits for the end of its call, or gives up waiting."""

    __slots__ = ("_task", "call")

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
        self.call: Call

    def wake(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._task = None
        self.take().cancel("cancelled by the caller")
        return trio.lowlevel.Abort.SUCCEEDED

    def take(self) -> Call:
        """Return the call, and hold it no more: the frames of an error would."""
        call = self.call
        del self.call
        return call


class _Forward:
    """One coroutine run on the loop thread. A cancelled caller waits for its end."""

    __slots__ = ("_running", "_thread")

    def __init__(self, thread: LoopThread) -> None:
        self._thread = thread
        self._running: asyncio.Task[Any] | None = None

    @trio.lowlevel.enable_ki_protection
    async def run(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        # Otherwise the loop thread may finish the call before it sees the cancellation.
        await trio.lowlevel.checkpoint_if_cancelled()
        token = trio.lowlevel.current_trio_token()
        task = trio.lowlevel.current_task()
        raise_cancel: Callable[[], object] | None = None

        def start() -> None:
            self._running = asyncio.ensure_future(coroutine())
            self._running.add_done_callback(report)

        def report(_running: object) -> None:
            with contextlib.suppress(trio.RunFinishedError):  # nobody left to tell
                token.run_sync_soon(trio.lowlevel.reschedule, task)

        async def coroutine() -> T:
            return await function(*args)

        def cancel() -> None:
            # Read once: the other thread lets go of it when it has ended.
            running = self._running
            if running is not None:
                running.cancel()

        def abort(raise_: Callable[[], object]) -> trio.lowlevel.Abort:
            nonlocal raise_cancel
            raise_cancel = raise_
            # Suppressed: the loop has ended, and by that what ran in it.
            with contextlib.suppress(RuntimeError):
                self._thread.call_soon(cancel)
            # What was begun has to be ended before the caller goes on: a
            # connection that nobody owns would stay open for ever.
            return trio.lowlevel.Abort.FAILED

        self._thread.call_soon(start)
        await trio.lowlevel.wait_task_rescheduled(abort)
        running, self._running = self._running, None
        assert running is not None  # noqa: S101  (it ran before report)
        try:
            if running.cancelled() and raise_cancel is not None:
                raise_cancel()
            result: T = running.result()
            return result
        finally:
            # It keeps the error it ended with, whose frames would keep it.
            del running


async def _let_go(thread: LoopThread) -> None:
    """Give the loop thread back, and see it end if nobody else holds it."""
    token = trio.lowlevel.current_trio_token()
    ended = trio.Event()

    def on_exit() -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(ended.set)

    if thread.let_go(on_exit):
        with trio.CancelScope(shield=True):
            await ended.wait()
        # The thread has nothing left to do; trio.to_thread would leave a worker.
        thread.join()


class TrioGrpcConnection:
    """
    A connection on the loop thread; the `Connection` of a pool on trio.

    Strictly private.
    """

    def __init__(
        self, link: GrpcConnection, thread: LoopThread, target: Target
    ) -> None:
        self._link = link
        self._thread = thread
        self._target = target
        # The calls of trio's thread. The loop thread has a book of its own.
        self._calls = link.new_calls(target)
        self.judge = link.judge
        self.is_lost = link.is_lost
        self.refresh_liveness = link.refresh_liveness
        self.peer = link.peer

    def __repr__(self) -> str:
        state = "closed" if self._calls.closed else "open"
        calls = len(self._calls)
        return f"<TrioGrpcConnection to {self._target.url} {state} calls={calls}>"

    @classmethod
    async def open(
        cls,
        target: Target,
        timeout: float,
    ) -> TrioGrpcConnection:
        """Connect; see `GrpcConnection.open`."""
        thread = LoopThread.hold()
        try:
            link = await _Forward(thread).run(GrpcConnection.open, target, timeout)
        except BaseException:
            await _let_go(thread)
            raise
        return cls(link, thread, target)

    @trio.lowlevel.enable_ki_protection
    async def call(
        self,
        method: str,
        request: bytes,
        *,
        timeout: float | None,
        metadata: Metadata,
        resent: bool = False,
    ) -> bytes:
        """Make one call and return its response; see `GrpcConnection.call`."""
        if self._calls.closed:
            raise self._calls.lost(method)
        if not is_direct():
            ask = functools.partial(
                self._link.call, method, request, timeout=timeout, metadata=metadata
            )
            return await _Forward(self._thread).run(ask)
        if self.is_lost():
            connect = functools.partial(self._link.connect_again, method, timeout)
            timeout = await _Forward(self._thread).run(connect)
        waiter = _Waiter()
        waiter.call = self._thread.lend(
            self._calls.begin, waiter.wake, method, request, timeout, metadata
        )
        await trio.lowlevel.wait_task_rescheduled(waiter.abort)
        call = waiter.take()
        try:
            return self._calls.result(call, method)
        except grpc.aio.AioRpcError as error:
            if resent or ending(error) is not Ending.GOAWAY:
                raise
            if not await _Forward(self._thread).run(self._link.is_lost_soon):
                raise
            rest = left(call.deadline)
        finally:
            del call
        return await self.call(
            method, request, timeout=rest, metadata=metadata, resent=True
        )

    async def probe(self, timeout: float, metadata: Metadata = (), /) -> None:
        """Ask the authorizer for its version; see `GrpcConnection.probe`."""
        if self._calls.closed:
            raise self._calls.lost(self._target.probe)
        await _Forward(self._thread).run(self._link.probe, timeout, metadata)

    async def greet(self, timeout: float, metadata: Metadata = (), /) -> None:
        """Probe the authorizer for the first time; see `GrpcConnection.greet`."""
        if self._calls.closed:
            raise self._calls.lost(self._target.probe)
        await _Forward(self._thread).run(self._link.greet, timeout, metadata)

    async def close(self, grace: float, /) -> None:
        """Close the channel; see `GrpcConnection.close`."""
        if self._calls.closed:
            return
        self._calls.closed = True
        try:
            if grace > 0 and is_direct():
                await self._until_quiet(grace)
            elif grace > 0:
                await _Forward(self._thread).run(self._link.until_quiet, grace)
        finally:
            self._calls.cut_off()
            # Cancelled before its first step, the closing would not take place.
            with trio.CancelScope(shield=True):
                try:
                    await _Forward(self._thread).run(self._link.close, 0)
                    # Else their last events come when no loop is left to pass them on.
                    await self._until_quiet(LAST_CALLS)
                finally:
                    await _let_go(self._thread)

    async def _until_quiet(self, timeout: float) -> None:
        if self._calls:
            quiet = trio.Event()
            self._calls.when_quiet(quiet.set)
            with trio.move_on_after(timeout):
                await quiet.wait()
