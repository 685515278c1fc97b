"""
gRPC for trio: a link that lives on the loop thread, driven from trio tasks.

Nothing here blocks trio's thread. A call costs one wake-up in each direction:
`call_soon_threadsafe` to start it, `run_sync_soon` when it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from fastapi_topaz._transport._channel import PROBE
from fastapi_topaz._transport._link import Link
from fastapi_topaz._transport._loop_thread import LoopThread


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastapi_topaz._options import AuthorizerOptions
    from fastapi_topaz._transport._base import Metadata


__all__ = ["BridgedLink"]


T = TypeVar("T")


class _Exchange:
    """One trio task that waits for something the loop thread does for it."""

    __slots__ = ("_abandoned", "_task", "_token")

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._task = trio.lowlevel.current_task()
        self._abandoned = False

    def report(self, *_: object) -> None:
        """Wake the trio task; called in the loop thread."""
        try:  # noqa: SIM105  (once for each call, and two calls less)
            self._token.run_sync_soon(self._wake)
        except trio.RunFinishedError:
            pass  # nobody left to tell

    def _wake(self) -> None:
        if not self._abandoned:
            trio.lowlevel.reschedule(self._task)


class _Call(_Exchange):
    """One RPC. A cancelled caller leaves at once; the RPC is cancelled after it."""

    __slots__ = ("_arguments", "_call", "_error", "_link", "_thread")

    def __init__(self, link: Link, thread: LoopThread, *arguments: Any) -> None:
        super().__init__()
        self._link = link
        self._thread = thread
        self._arguments = arguments
        self._call: Any = None
        self._error: BaseException | None = None

    async def run(self) -> bytes:
        try:
            self._thread.call_soon(self._start)
        except RuntimeError:  # the loop is closed
            raise self._link.lost(self._arguments[0]) from None
        await trio.lowlevel.wait_task_rescheduled(self._abort)
        if self._error is not None:
            raise self._error
        # Given away, because the frame of an error that somebody keeps would keep
        # this exchange, and with the call its socket.
        call, self._call = self._call, None
        try:
            return self._link.finish(call, self._arguments[0])
        finally:
            del call

    def _start(self) -> None:
        if self._abandoned:
            return
        try:
            self._call = self._link.start(self.report, *self._arguments)
        except BaseException as error:  # noqa: BLE001  (raised again in trio)
            self._error = error
            self.report()

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._abandoned = True
        with contextlib.suppress(RuntimeError):  # loop closed, the call with it
            self._thread.call_soon(self._cancel)
        return trio.lowlevel.Abort.SUCCEEDED

    def _cancel(self) -> None:
        if self._call is not None:
            self._call.cancel("cancelled by the caller")


class _Forward(_Exchange):
    """One coroutine run on the loop thread. A cancelled caller waits for its end."""

    __slots__ = ("_running", "_thread")

    def __init__(self, thread: LoopThread) -> None:
        super().__init__()
        self._thread = thread
        self._running: asyncio.Task[Any] | None = None

    async def run(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        raise_cancel: Callable[[], object] | None = None

        def start() -> None:
            self._running = asyncio.ensure_future(coroutine())
            self._running.add_done_callback(self.report)

        async def coroutine() -> T:
            return await function(*args)

        def abort(raise_: Callable[[], object]) -> trio.lowlevel.Abort:
            nonlocal raise_cancel
            raise_cancel = raise_
            # Suppressed: the loop has ended, and by that what ran in it.
            with contextlib.suppress(RuntimeError):
                self._thread.call_soon(lambda: self._running and self._running.cancel())
            # What was begun has to be ended before the caller goes on: a
            # connection that nobody owns would stay open for ever.
            return trio.lowlevel.Abort.FAILED

        self._thread.call_soon(start)
        await trio.lowlevel.wait_task_rescheduled(abort)
        assert self._running is not None  # noqa: S101  (start ran before report)
        if self._running.cancelled() and raise_cancel is not None:
            raise_cancel()
        result: T = self._running.result()
        return result


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


class BridgedLink:
    """
    A link on the loop thread; the `Connection` of a pool on trio.

    Strictly private.
    """

    def __init__(self, link: Link, thread: LoopThread) -> None:
        self._link = link
        self._thread = thread
        self._closed = False
        self.judge = link.judge
        self.is_lost = link.is_lost
        self.look_closely = link.look_closely
        self.peer = link.peer

    def __repr__(self) -> str:
        return f"<Bridged{repr(self._link)[1:]}"

    @classmethod
    async def open(
        cls,
        options: AuthorizerOptions,
        timeout: float,
    ) -> BridgedLink:
        """Connect; see `Link.open`."""
        thread = LoopThread.hold()
        try:
            link = await _Forward(thread).run(Link.open, options, timeout)
        except BaseException:
            await _let_go(thread)
            raise
        return cls(link, thread)

    async def call(
        self,
        method: str,
        request: bytes,
        *,
        timeout: float | None,
        metadata: Metadata,
    ) -> bytes:
        """Make one call and return its response."""
        exchange = _Call(self._link, self._thread, method, request, timeout, metadata)
        return await exchange.run()

    async def probe(self, timeout: float, /) -> None:
        """Ask the authorizer for its version; see `Link.probe`."""
        if self._closed:
            raise self._link.lost(PROBE)
        await _Forward(self._thread).run(self._link.probe, timeout)

    async def close(self, grace: float, /) -> None:
        """Close the channel; see `Link.close`."""
        if self._closed:
            return
        self._closed = True
        try:
            await _Forward(self._thread).run(self._link.close, grace)
        finally:
            await _let_go(self._thread)
