"""
One gRPC channel that owns one TCP connection.

Everything here runs on the asyncio loop that opened the connection: the application's
own, or that of the loop thread when the application runs on trio.

If a channel of grpc.aio is closed, each task that awaits a call gets CancelledError,
although it was not cancelled. Here it gets `ConnectionLost`. `call` also corrects the
other differences from what callers expect.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from fastapi_topaz import _fork
from fastapi_topaz._grpcio.call import is_direct
from fastapi_topaz._grpcio.calls import Calls
from fastapi_topaz._grpcio.channel import (
    close_without_loop,
    open_channel,
    until_ready,
    until_reported,
)
from fastapi_topaz._grpcio.closed_loop import take_last_events
from fastapi_topaz._grpcio.failures import (
    connect_timed_out,
    each_failed,
    hung_up,
    out_of_time,
    unserved,
)
from fastapi_topaz._grpcio.peer import Peer
from fastapi_topaz._rpc.clock import left, monotonic
from fastapi_topaz._rpc.statuses import (
    Ending,
    ending,
    is_from_service,
    lacks_status,
    verdict,
)
from fastapi_topaz.exceptions import ConnectFailed


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._pool.connector import Verdict
    from fastapi_topaz._rpc.metadata import Metadata
    from fastapi_topaz._rpc.target import Target


__all__ = ["GrpcConnection"]


_READY = grpc.ChannelConnectivity.READY.value[0]

_NOTICED = 0.05
"""Seconds within which a channel notices that its socket was closed."""


class GrpcConnection:
    """
    One gRPC channel to an authorizer; the `Connection` of a pool on asyncio.

    Strictly private.
    """

    def __init__(self, channel: Any, peer: Peer, target: Target) -> None:
        self._channel = channel
        self._peer = peer
        self.peer = peer.address()
        self._url = target.url
        self._target = target
        self._loop = asyncio.get_running_loop()
        self._connecting: asyncio.Task[str | None] | None = None
        self._calls = self.new_calls(target)
        # Twice for each call: get_state() takes four times as long as what it asks.
        self._check: Callable[[bool], int]
        if is_direct():
            core: Any = channel._channel  # noqa: SLF001
            self._check = core.check_connectivity_state
        else:
            self._check = lambda connect: channel.get_state(connect).value[0]
        self._lost = False

    def __repr__(self) -> str:
        state = "closed" if self._calls.closed else "open"
        return f"<GrpcConnection to {self._url} {state} calls={len(self._calls)}>"

    @classmethod
    async def open(
        cls,
        target: Target,
        timeout: float,
    ) -> GrpcConnection:
        """
        Connect, and return when the connection is ready for calls.

        Raises:
            ConnectFailed: It did not become ready within *timeout* seconds.
            ValueError: A file with certificates, or with the key, cannot be used.
        """
        loop = asyncio.get_running_loop()
        channel, peer = Peer.of_new(lambda: open_channel(target, timeout))
        _fork.watch(channel)
        link: GrpcConnection | None = None
        try:
            async with asyncio.timeout(timeout):
                await until_ready(channel, target)
            # This takes 0.3 ms. By then it shows if the server hangs up.
            link = cls(channel, peer, target)
            if link.is_lost():
                raise hung_up(target)
        except BaseException as error:  # noqa: BLE001  (raised again)
            tried = peer.tried() if isinstance(error, Exception) else []
            if isinstance(error, GeneratorExit):
                take_last_events(loop)
                close_without_loop(channel)
            else:
                await channel.close()
            _fork.forget(channel)
            # The pool keeps its last error; its frames must not keep the channel.
            del channel, link
            if isinstance(error, TimeoutError):
                raise connect_timed_out(target, timeout, tried) from None
            if isinstance(error, ConnectFailed) and len(tried) > 1:
                # Its own frames, which the new one keeps as context, hold the channel.
                error.with_traceback(None)
                raise each_failed(error, target, tried) from None
            raise error.with_traceback(None)  # noqa: B904  (the same error)
        return link

    # -- calls ------------------------------------------------------------------

    def new_calls(self, target: Target) -> Calls:
        """Return a book of calls on this connection, for one thread to make them in."""
        return Calls(self._channel, target)

    async def call(
        self,
        method: str,
        request: bytes,
        *,
        timeout: float | None,
        metadata: Metadata,
        resent: bool = False,
    ) -> bytes:
        """
        Make one call and return its response.

        gRPC's own retries are off. So a call that the server has not processed, because
        it sent GOAWAY, is sent once more here.
        """
        if self.is_lost():
            timeout = await self.connect_again(method, timeout)
        ended = self._loop.create_future()

        def wake() -> None:
            if not ended.done():
                ended.set_result(None)

        call = self._calls.begin(wake, method, request, timeout, metadata)
        try:
            await ended
            return self._calls.result(call, method)
        except asyncio.CancelledError:
            call.cancel("cancelled by the caller")
            raise
        except grpc.aio.AioRpcError as error:
            if resent or ending(error) is not Ending.GOAWAY:
                raise
            # A proxy may quote the words of a GOAWAY that it got itself.
            if not await self.is_lost_soon():
                raise
            rest = left(call.deadline)
        finally:
            del call
        return await self.call(
            method, request, timeout=rest, metadata=metadata, resent=True
        )

    async def connect_again(self, method: str, timeout: float | None) -> float | None:
        """
        Connect for a call of *method*, and return the rest of its *timeout*.

        A server may end a connection between its lease and the call. A call that is
        begun then makes the channel connect, without a pause. If the server hangs up
        each time, one call makes dozens of connections. This makes one at most.

        Raises:
            grpc.aio.AioRpcError: There is no connection, or not in time.
            ConnectionLost: The connection is closed.
        """
        if self._calls.closed:
            raise self._calls.lost(method)
        # One task for all callers. It is not cancelled with one of them, because that
        # closes the channel.
        connecting = self._connecting
        if connecting is None or connecting.done():
            connecting = self._loop.create_task(self._until_ready())
            self._connecting = connecting
        deadline = None if timeout is None else monotonic() + timeout
        await asyncio.wait([connecting], timeout=timeout)
        if not connecting.done():
            raise out_of_time()
        if (why := connecting.result()) is not None:
            raise self._calls.not_sent(method, why)
        return left(deadline)

    async def _until_ready(self) -> str | None:
        """Return when the channel is ready, or why it is not."""
        try:
            await until_ready(self._channel, self._target)
        # The other one, if the channel is closed meanwhile.
        except (ConnectFailed, grpc.aio.UsageError) as error:
            return str(error)
        return None

    def judge(self, error: BaseException, /) -> Verdict | None:
        """Return what *error*, raised by a call, says of the connection itself."""
        if isinstance(error, grpc.aio.AioRpcError) and ending(error) is Ending.GOAWAY:
            # The channel may be READY again on another socket.
            self.refresh_liveness()
        return verdict(error, self.is_lost)

    def is_lost(self) -> bool:
        """
        Say whether the socket is gone, or the server has said GOAWAY.

        The channel would make a new connection by itself, perhaps to another server. It
        is asked and not watched: with a watch under way, a process forked from this one
        crashes at random in gRPC, also if it never uses it.
        """
        # Never set to False: on trio two threads do this.
        if self._calls.closed or self._check(False) != _READY:
            self._lost = True
        return self._lost

    def refresh_liveness(self) -> None:
        """
        Find out whether the channel went on to another socket unseen.

        After GOAWAY the calls that were under way may bring it there at once.
        """
        if self._peer.is_gone():
            self._lost = True

    # -- probing and closing ----------------------------------------------------

    async def probe(self, timeout: float, metadata: Metadata = (), /) -> None:
        """
        Ask the authorizer for its version; any `grpc-status` of its own will do.

        Raises:
            grpc.aio.AioRpcError: No answer within *timeout* seconds, no connection,
                or an answer that is not the authorizer's own: UNAVAILABLE, or one
                without a `grpc-status`.
            ConnectionLost: The connection was closed meanwhile.
        """
        await self._ask(timeout, metadata)

    async def greet(self, timeout: float, metadata: Metadata = (), /) -> None:
        """
        Probe the authorizer for the first time.

        Raises:
            grpc.aio.AioRpcError, ConnectionLost: See `probe`.
            ConnectFailed: The server answers that it is no authorizer.
        """
        if await self._ask(timeout, metadata) is grpc.StatusCode.UNIMPLEMENTED:
            raise unserved(self._target)

    async def _ask(self, timeout: float, metadata: Metadata) -> grpc.StatusCode:
        """Return the status of a probe, if it is the authorizer's own."""
        try:
            await self.call(self._target.probe, b"", timeout=timeout, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if is_from_service(error):
                return error.code()
            if not lacks_status(error):
                raise
            if ending(error) is Ending.CUT_OFF and await self.is_lost_soon():
                raise
            details = error.details()
        else:
            return grpc.StatusCode.OK
        # Not in the handler: the error of gRPC adds nothing to this one.
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.UNAVAILABLE,
            grpc.aio.Metadata(),
            grpc.aio.Metadata(),
            details=f"an answer without a gRPC status: {details}",
        )

    async def is_lost_soon(self) -> bool:
        """Say whether the connection is lost, also if the channel is late to notice."""
        for _ in range(10):
            if self.is_lost():
                return True
            await asyncio.sleep(_NOTICED / 10)
        self.refresh_liveness()
        return self._lost

    async def close(self, grace: float, /) -> None:
        """Close the channel after *grace* seconds, or once its calls have ended."""
        self._calls.closed = True
        try:
            if grace > 0:
                await self.until_quiet(grace)
        finally:
            # Before the channel closes, because close() cancels what it finds in
            # flight in the way that leaks.
            self._calls.cut_off()
            await self._channel.close()
            _fork.forget(self._channel)
            if self._calls:
                await until_reported(self._when_quiet())
            if self._connecting is not None:
                await until_reported(self._connecting)

    def abandon(self) -> None:
        """Close the channel without waiting, because its event loop was closed."""
        take_last_events(self._loop)
        self._calls.abandon()
        close_without_loop(self._channel)
        _fork.forget(self._channel)

    async def until_quiet(self, timeout: float) -> None:
        """Return when the last call has ended, or after *timeout* seconds."""
        if self._calls:
            await asyncio.wait([self._when_quiet()], timeout=timeout)

    def _when_quiet(self) -> asyncio.Future[None]:
        quiet = self._loop.create_future()
        self._calls.when_quiet(lambda: quiet.set_result(None))
        return quiet
