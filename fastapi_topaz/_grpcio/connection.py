"""One gRPC channel that owns one TCP connection."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from fastapi_topaz import _fork
from fastapi_topaz._grpcio.calls import Calls
from fastapi_topaz._grpcio.channel import READY, open_channel, until_ready
from fastapi_topaz._grpcio.failures import (
    connect_timed_out,
    ended,
    out_of_time,
    unserved,
)
from fastapi_topaz._rpc.clock import left, monotonic
from fastapi_topaz._rpc.statuses import (
    EndedCall,
    Ending,
    NotSent,
    is_from_service,
    lacks_status,
    too_large,
    verdict,
)
from fastapi_topaz.exceptions import ConnectFailed, ConnectionLost


if TYPE_CHECKING:
    from fastapi_topaz._pool.connector import Verdict
    from fastapi_topaz._rpc.metadata import Metadata
    from fastapi_topaz._rpc.target import Target


__all__ = ["GrpcConnection"]


_NOTICED = 0.05
"""Seconds within which a channel notices that its socket was closed."""


class GrpcConnection:
    """
    One gRPC channel to a server; the `Connection` of a pool on asyncio.

    Strictly private.
    """

    peer = None
    """grpc.aio does not tell the address of the server."""

    def __init__(self, channel: grpc.aio.Channel, target: Target) -> None:
        self._channel = channel
        self._target = target
        self._metadata = tuple(target.metadata)
        self._calls = Calls()
        self._closed = False
        self._lost = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return (
            f"<GrpcConnection to {self._target.url} {state} calls={len(self._calls)}>"
        )

    @classmethod
    async def open(cls, target: Target, timeout: float) -> GrpcConnection:
        """
        Connect, and return when the connection is ready for calls.

        Raises:
            ConnectFailed: It did not become ready within *timeout* seconds.
            ValueError: A file with certificates, or with the key, cannot be used.
        """
        channel = open_channel(target, timeout)
        _fork.watch(channel)
        try:
            async with asyncio.timeout(timeout):
                await until_ready(channel, target)
        except BaseException as error:  # noqa: BLE001  (raised again)
            # If the loop was closed, GeneratorExit comes. Then nothing can be awaited,
            # and the destructor of the channel closes it.
            if not isinstance(error, GeneratorExit):
                await channel.close()
            _fork.forget(channel)
            # The pool keeps its last error. Its frames must not keep the channel.
            del channel
            if isinstance(error, TimeoutError):
                raise connect_timed_out(target, timeout) from None
            raise error.with_traceback(None)  # noqa: B904  (the same error)
        return cls(channel, target)

    # -- calls ------------------------------------------------------------------

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

        Raises:
            grpc.aio.AioRpcError: The call ended with a status other than OK.
            ConnectionLost: The connection was closed during the call.
        """
        if self._closed:
            raise self._closed_under(method)
        limit = self._target.max_message_bytes
        if len(request) > limit:
            raise too_large(method, self._target.url, len(request), limit)
        deadline = None if timeout is None else monotonic() + timeout
        if self.is_lost():
            await self._connect_again(method, timeout)
        # Bytes in, bytes out: if a serializer raises, grpc.aio sends an empty request.
        outcome = await self._calls.outcome(
            self._channel.unary_unary(method)(
                request, timeout=left(deadline), metadata=(*self._metadata, *metadata)
            )
        )
        if isinstance(outcome, bytes):
            return outcome
        if outcome is None:
            raise self._closed_under(method)
        error = ended(outcome, deadline)
        try:
            # A proxy may quote the end of a connection of its own. Then this one is not
            # lost. The channel may notice the end later than the call: without this
            # wait, a probe would make it connect again, and the pool would not know.
            is_cut = error.how in {Ending.GOAWAY, Ending.CUT_OFF}
            ended_here = is_cut and await self._is_lost_soon(deadline)
            if resent or not ended_here or error.how is not Ending.GOAWAY:
                raise error
        finally:
            # An error refers to its frames. A frame that refers to the error makes a
            # cycle, which only the garbage collector frees.
            del error, outcome
        rest = left(deadline)
        return await self.call(
            method, request, timeout=rest, metadata=metadata, resent=True
        )

    async def _connect_again(self, method: str, timeout: float | None) -> None:
        """
        Connect for a call of *method*, within *timeout* seconds.

        A server may end a connection between its lease and the call. A call on such a
        channel makes gRPC connect again and again without a pause, if the server hangs
        up each time. This connects once.

        Raises:
            grpc.aio.AioRpcError: There is no connection, or not in time.
            ConnectionLost: The connection was closed here.
        """
        try:
            async with asyncio.timeout(timeout):
                await until_ready(self._channel, self._target)
        except TimeoutError:
            raise out_of_time() from None
        # UsageError if the channel is closed meanwhile.
        except (ConnectFailed, grpc.aio.UsageError) as error:
            why = str(error)
        else:
            return
        if self._closed:
            raise self._closed_under(method)
        raise NotSent(method, self._target.url, why)

    def _closed_under(self, method: str) -> ConnectionLost:
        return ConnectionLost(
            f"the call {method} to {self._target.url} ended without an answer: the "
            "connection was closed under it, or the server broke the protocol"
        )

    # -- health -----------------------------------------------------------------

    def judge(self, error: BaseException, /) -> Verdict | None:
        """Return the verdict on the connection for *error*, which a call raised."""
        return verdict(error, self.is_lost)

    def is_lost(self) -> bool:
        """
        Return whether the socket is closed, or the server has sent GOAWAY.

        The channel would connect again by itself, perhaps to another server. So a lost
        connection stays lost. The state is read and not watched: if a process forks
        while gRPC watches a channel, the child may crash.
        """
        if self._closed or self._channel.get_state() is not READY:
            self._lost = True
        return self._lost

    async def _is_lost_soon(self, deadline: float | None) -> bool:
        """
        Return whether the connection is lost, also if the channel is late.

        This ends at *deadline*, which is one of `monotonic()`.
        """
        for _ in range(10):
            if self.is_lost() or left(deadline) == 0:
                break
            await asyncio.sleep(_NOTICED / 10)
        return self.is_lost()

    async def probe(self, timeout: float, metadata: Metadata = (), /) -> None:
        """
        Make the call `probe` of the target. Any `grpc-status` of the service is enough.

        Raises:
            grpc.aio.AioRpcError: No response within *timeout* seconds, no connection,
                or a response that is not from the service: UNAVAILABLE, or one without
                a `grpc-status`.
            ConnectionLost: The connection was closed during the call.
        """
        await self._ask(timeout, metadata)

    async def greet(self, timeout: float, metadata: Metadata = (), /) -> None:
        """
        Probe the server for the first time.

        Raises:
            grpc.aio.AioRpcError, ConnectionLost: See `probe`.
            ConnectFailed: The server does not serve the probe.
        """
        if await self._ask(timeout, metadata) is grpc.StatusCode.UNIMPLEMENTED:
            raise unserved(self._target)

    async def _ask(self, timeout: float, metadata: Metadata) -> grpc.StatusCode:
        """Return the status of a probe, if it is from the service."""
        try:
            await self.call(self._target.probe, b"", timeout=timeout, metadata=metadata)
        except EndedCall as error:
            if is_from_service(error):
                return error.code()
            if not lacks_status(error):
                raise
            if error.how is Ending.CUT_OFF and self.is_lost():
                raise
            details = error.details()
        else:
            return grpc.StatusCode.OK
        # Outside the handler, so that the error of the call is not its context.
        raise EndedCall(
            Ending.STATUS,
            grpc.StatusCode.UNAVAILABLE,
            f"an answer without a gRPC status: {details}",
        )

    # -- closing ----------------------------------------------------------------

    async def close(self, grace: float, /) -> None:
        """Close the channel when its calls have ended, or after *grace* seconds."""
        self._closed = True
        try:
            if grace > 0:
                await self._calls.until_quiet(grace)
        finally:
            self._calls.cut_off()
            # Without a grace this does not wait, so it cannot be cancelled.
            await self._channel.close()
            _fork.forget(self._channel)
        await self._calls.until_reported()

    def abandon(self) -> None:
        """Close the channel without waiting, because its event loop was closed."""
        self._closed = True
        self._calls.abandon()
        _fork.forget(self._channel)
        # close() of grpc.aio is a coroutine. The destructor of the channel closes it.
        del self._channel
