"""
One gRPC channel that owns one TCP connection.

Everything here runs on the asyncio loop that opened the link: the application's
own, or that of the loop thread when the application runs on trio.

Closing a channel of grpc.aio raises CancelledError in whoever awaits a call, although
nobody cancelled them. Here that is `ConnectionLost`. What else is unlike what callers
expect, `_call` sees to.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from fastapi_topaz import _fork
from fastapi_topaz._transport._base import Verdict
from fastapi_topaz._transport._call import begin
from fastapi_topaz._transport._channel import (
    PROBE,
    READY,
    open_channel,
    until_ready,
)
from fastapi_topaz._transport._failures import (
    connect_timed_out,
    is_cut_off,
    is_refused_stream,
)
from fastapi_topaz._transport._peer import Peer
from fastapi_topaz.exceptions import ConnectionLost


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._options import AuthorizerOptions
    from fastapi_topaz._transport._base import Metadata
    from fastapi_topaz._transport._call import Call


__all__ = ["Link"]


# An answer with any other status was sent by the server itself: it is alive.
_NOT_ALIVE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})

# Nobody here has cancelled a call that ends CANCELLED: a server does that as it stops.
_GOING = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})

LAST_CALLS = 1.0
"""Seconds that calls which were cut off get to end by themselves."""


class Link:
    """
    One gRPC channel to an authorizer; the `Connection` of a pool on asyncio.

    Strictly private.
    """

    def __init__(
        self, channel: grpc.aio.Channel, peer: Peer, options: AuthorizerOptions
    ) -> None:
        self._channel = channel
        self._peer = peer
        self.peer = peer.address()
        self._target = options.url
        self._metadata = options.metadata
        self._loop = asyncio.get_running_loop()
        # Calls in flight, and whom their end is told.
        self._calls: dict[Call, Callable[[], None]] = {}
        self._closed = False
        self._lost = False
        self._quiet: asyncio.Event | None = None

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Link to {self._target} {state} calls={len(self._calls)}>"

    @classmethod
    async def open(
        cls,
        options: AuthorizerOptions,
        timeout: float,
    ) -> Link:
        """
        Connect, and return when the connection is ready for calls.

        Raises:
            ConnectFailed: It did not become ready within *timeout* seconds.
            ValueError: The certificate file cannot be read.
        """
        channel, peer = Peer.of_new(lambda: open_channel(options, timeout))
        _fork.watch(channel)
        try:
            async with asyncio.timeout(timeout):
                await until_ready(channel, options)
        except BaseException as error:  # noqa: BLE001  (raised again)
            await channel.close()
            _fork.forget(channel)
            # The pool keeps its last error; its frames must not keep the channel.
            del channel
            if isinstance(error, TimeoutError):
                raise connect_timed_out(options, timeout) from None
            raise error.with_traceback(None)  # noqa: B904  (the same error)
        return cls(channel, peer, options)

    # -- calls ------------------------------------------------------------------

    def start(
        self,
        on_end: Callable[[], None],
        method: str,
        request: bytes,
        timeout: float | None,
        metadata: Metadata,
    ) -> Call:
        """
        Begin a call; *on_end* is called when it has ended.

        Raises:
            ConnectionLost: The link is closed.
        """
        if self._closed:
            raise self.lost(method)
        # Noted, because the call makes the channel connect anew: it may be READY again
        # before anybody asks.
        self.is_lost()
        metadata = (*self._metadata, *metadata) if metadata else self._metadata
        call = begin(self._channel, method, request, timeout, metadata, self._ended)
        self._calls[call] = on_end
        return call

    def finish(self, call: Call, method: str) -> bytes:
        """
        Return the response of *call*, which has ended; callable from any thread.

        Raises:
            grpc.aio.AioRpcError: The call ended with another status than OK.
            ConnectionLost: The link was closed under the call.
        """
        outcome = call.outcome()
        # The frames of an error live as long as somebody keeps it, and a call in
        # one of them keeps its socket open, even that of a closed channel.
        del call
        if isinstance(outcome, bytes):
            return outcome
        # OK without a message gRPC lets pass, but nothing was answered.
        raise self.lost(method) if outcome is None else outcome

    async def call(
        self,
        method: str,
        request: bytes,
        *,
        timeout: float | None,
        metadata: Metadata,
    ) -> bytes:
        """Make one call and return its response."""
        ended = self._loop.create_future()

        def wake() -> None:
            if not ended.done():
                ended.set_result(None)

        call = self.start(wake, method, request, timeout, metadata)
        try:
            await ended
            return self.finish(call, method)
        except asyncio.CancelledError:
            call.cancel("cancelled by the caller")
            raise
        finally:
            del call

    def judge(self, error: BaseException, /) -> Verdict | None:
        """Return what *error*, raised by a call, says of the connection itself."""
        if isinstance(error, ConnectionLost):
            return Verdict.BROKEN
        if not isinstance(error, grpc.aio.AioRpcError):
            return None
        code = error.code()
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Verdict.SILENT
        if code not in _GOING or is_refused_stream(error):
            return Verdict.ANSWERED
        if is_cut_off(error) or self.is_lost():
            return Verdict.BROKEN
        return Verdict.UNAVAILABLE

    def is_lost(self) -> bool:
        """
        Say whether the socket is gone, or the server has said GOAWAY.

        The channel would make a new connection by itself, perhaps to another server. It
        is asked and not watched: with a watch under way, a process forked from this one
        crashes at random in gRPC, also if it never uses it.
        """
        # Never set to False: on trio two threads do this.
        if self._closed or self._channel.get_state() is not READY:
            self._lost = True
        return self._lost

    def look_closely(self) -> None:
        """
        Find out whether the channel went on to another socket unseen.

        After GOAWAY the calls that were under way may bring it there at once.
        """
        if self._peer.is_gone():
            self._lost = True

    def _ended(self, call: Call) -> None:
        self._calls.pop(call)()
        if self._quiet is not None and not self._calls:
            self._quiet.set()

    def lost(self, method: str) -> ConnectionLost:
        """Return the error of a call whose connection was closed."""
        return ConnectionLost(
            f"the call {method} to {self._target} ended without an answer: the "
            "connection was closed under it, or the server broke the protocol"
        )

    # -- probing and closing ----------------------------------------------------

    async def probe(self, timeout: float, /) -> None:
        """
        Ask the authorizer for its version; any answer of its own will do.

        Raises:
            grpc.aio.AioRpcError: No answer within *timeout* seconds, or no
                connection.
            ConnectionLost: The link was closed meanwhile.
        """
        try:
            await self.call(PROBE, b"", timeout=timeout, metadata=())
        except grpc.aio.AioRpcError as error:
            if error.code() in _NOT_ALIVE and not is_refused_stream(error):
                raise

    async def close(self, grace: float, /) -> None:
        """Close the channel after *grace* seconds, or once its calls have ended."""
        self._closed = True
        try:
            if grace > 0:
                await self._until_quiet(grace)
        finally:
            # Before the channel closes, because close() cancels what it finds in
            # flight in the way that leaks.
            for call in self._calls:
                call.cancel("connection closed")
            await self._channel.close()
            # Else their last events reach another loop, once this one is closed.
            await self._until_quiet(LAST_CALLS)
            _fork.forget(self._channel)

    async def _until_quiet(self, timeout: float) -> None:
        if self._calls:
            self._quiet = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._quiet.wait()
