"""
The connection that the pool uses: a socket, perhaps TLS, and the state of HTTP/2.

This module is the same for asyncio and trio. The I/O layers `asyncio_io` and `trio_io`
add the waits: for the socket, for a deadline, and for the end of a call.
"""

from __future__ import annotations

import abc
import contextlib
import ssl
from typing import TYPE_CHECKING, Any, Final

import anyio
import grpc

from fastapi_topaz import _fork
from fastapi_topaz._http2.failures import closed_under, not_sent
from fastapi_topaz._http2.stream import Stream
from fastapi_topaz._http2.successors import Successors
from fastapi_topaz._rpc.clock import monotonic
from fastapi_topaz._rpc.statuses import (
    EndedCall,
    Ending,
    ending,
    is_from_service,
    lacks_status,
    verdict,
)
from fastapi_topaz.exceptions import ConnectFailed


if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine

    from fastapi_topaz._http2.connection import ClientConnection
    from fastapi_topaz._http2.requests import RequestBlocks
    from fastapi_topaz._http2.tls import TlsSession
    from fastapi_topaz._pool.connector import Verdict
    from fastapi_topaz._rpc.metadata import Metadata
    from fastapi_topaz._rpc.target import Target


__all__ = ["NativeConnection", "Wire"]


_UNPROCESSED: Final = {Ending.GOAWAY, Ending.NOT_SENT}
"""How a call ends that the server did not process because its connection ended."""

_READ: Final = 65_536
"""The most bytes of one read: more than a burst of 100 responses of Topaz."""


class Wire:
    """
    A non-blocking socket, with TLS if *tls* is given.

    No method waits. `read` reads the bytes that have arrived. `write` sends as many
    bytes as fit into the socket's buffer.
    """

    __slots__ = ("_sock", "_tls", "_unsent", "core")

    def __init__(
        self, sock: socket.socket, core: ClientConnection, tls: TlsSession | None
    ) -> None:
        self._sock = sock
        self._tls = tls
        self._unsent: memoryview | None = None
        self.core = core

    @property
    def tls(self) -> TlsSession | None:
        """The TLS session, or None."""
        return self._tls

    @property
    def is_open(self) -> bool:
        """Whether the socket is not closed on this side."""
        return self._sock.fileno() >= 0

    def fileno(self) -> int:
        """Return the file descriptor, or -1 if the socket is closed."""
        return self._sock.fileno()

    def receive(self) -> bytes | None:
        """
        Return the bytes that have arrived, or None if there are none.

        Raises:
            OSError: The connection has ended.
        """
        try:
            data = self._sock.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return None
        if not data:
            raise ConnectionResetError("the server closed the connection")
        return data

    def read(self) -> None:
        """Process the bytes that have arrived. Calls end with their connection."""
        try:
            self.take()
        except OSError as error:  # also one of TLS
            self.core.lose(str(error))

    def take(self) -> bool:
        """
        Process the bytes that have arrived. Return whether there were any.

        Raises:
            OSError: The connection has ended.
        """
        data = self.receive()
        if data is None:
            return False
        if self._tls is None:
            self.core.receive(data, monotonic())
        else:
            self.core.receive(self._tls.received(data), monotonic())
            self._tls.raise_end()
        return True

    def take_early(self) -> None:
        """
        Take what came together with the end of the TLS handshake.

        Raises:
            OSError: The connection has ended.
        """
        if self._tls is None:
            return
        if early := self._tls.received_early():
            self.core.receive(early, monotonic())
        self._tls.raise_end()

    def write(self) -> bool:
        """
        Send the queued bytes. Return whether the socket's buffer is full.

        The rest stays in the core until there is room. If the connection ended, so do
        its calls.
        """
        try:
            return self.push()
        except OSError as error:
            if not isinstance(error, ssl.SSLError):
                self._take_last()
            self.core.lose(str(error))
            return False

    def _take_last(self) -> None:
        """
        Take what came before the server closed the connection.

        A write can fail before that is read. It may be answers, or a GOAWAY that says
        which calls the server did not process.
        """
        with contextlib.suppress(OSError):
            while self.core.failure is None and self.take():
                pass

    def push(self) -> bool:
        """
        Send the queued bytes. Return whether the socket's buffer is full.

        Raises:
            OSError: The connection has ended.
        """
        while True:
            if self._unsent is None:
                data = self.core.take_output()
                if self._tls is not None:
                    if data:
                        self._tls.encrypt(data)
                    data = self._tls.to_send()
                if not data:
                    return False
                self._unsent = memoryview(data)
            try:
                sent = self._sock.send(self._unsent)
            except (BlockingIOError, InterruptedError):
                return True
            except OSError:
                self._unsent = None
                raise
            if sent < len(self._unsent):
                self._unsent = self._unsent[sent:]
                self.core.sent_some(monotonic())
                return True
            self._unsent = None

    def close(self) -> None:
        """Close the socket without waiting. Bytes that do not fit are dropped."""
        if not self.is_open:
            return
        if self._tls is not None and self._tls.is_established:
            self.write()
            self._tls.say_close()
        self.write()
        self._sock.close()

    def drop(self) -> None:
        """Close the socket without sending anything."""
        self._sock.close()


class NativeConnection(abc.ABC):
    """
    An HTTP/2 connection that carries gRPC calls.

    Strictly private. The pool expects the interface that
    `fastapi_topaz._pool.connector.Connector` describes.
    """

    __slots__ = (
        "__weakref__",
        "_blocks",
        "_closed",
        "_core",
        "_peer",
        "_pid",
        "_quiet",
        "_successors",
        "_target",
        "_wire",
        "reopen",
    )

    def __init__(
        self, wire: Wire, target: Target, blocks: RequestBlocks, peer: str
    ) -> None:
        self._wire = wire
        self._core = wire.core
        self._target = target
        self._blocks = blocks
        self._peer = peer
        self._closed = False
        self._pid = _fork.current.pid
        # Set when the last call ends while `close` waits for it.
        self._quiet: anyio.Event | None = None
        self._successors: Successors[NativeConnection] | None = None
        self.reopen: Callable[[], Coroutine[Any, Any, NativeConnection]] | None = None
        """Opens a successor if the server ends this connection."""

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return (
            f"<{type(self).__name__} to {self._target.url} {state} "
            f"calls={len(self._core.streams)}>"
        )

    @property
    def peer(self) -> str | None:
        """The address of the server, such as `ipv4:127.0.0.1:8282`."""
        return self._peer

    @property
    def max_streams(self) -> float:
        """The most concurrent calls that the server allows on this connection."""
        return self._core.max_concurrent_streams

    # -- calls ------------------------------------------------------------------

    @abc.abstractmethod
    async def call(
        self,
        method: str,
        request: bytes,
        *,
        timeout: float | None,
        metadata: Metadata,
    ) -> bytes:
        """
        Make one unary-unary call that ends within *timeout* seconds.

        Raises:
            grpc.aio.AioRpcError: The call ended with a status other than OK.
            ConnectionLost: The connection was closed during the call.
            ValueError: *method* cannot be sent.
        """

    def _begin(
        self,
        method: str,
        request: bytes,
        timeout: float | None,
        metadata: Metadata,
        wake: Callable[[], object],
    ) -> Stream:
        """Begin a call. *wake* is called when it ends."""
        if self._closed:
            raise closed_under(method, self._target.url)
        block, size = self._blocks.block(method, timeout, metadata)
        now = monotonic()
        deadline = None if timeout is None else now + timeout
        stream = Stream(block, size, request, deadline, wake)
        self._core.begin(stream, method, now)
        return stream

    @property
    def _sends_again(self) -> bool:
        """Whether calls that the server did not process are sent once more."""
        return self.reopen is not None and not self._closed

    def _is_sent_again(self, error: EndedCall) -> bool:
        """Return whether to send the call that ended with *error* once more."""
        return error.how in _UNPROCESSED and self._sends_again

    async def _send_again(
        self, method: str, request: bytes, timeout: float | None, metadata: Metadata
    ) -> bytes:
        """Send a call that the server did not process on another connection."""
        if self._successors is None:
            assert self.reopen is not None  # noqa: S101
            self._successors = Successors(self._target.url, self.reopen, self._host)
        try:
            return await self._successors.call(method, request, timeout, metadata)
        finally:
            if self._quiet is not None:
                self._call_ended()

    @abc.abstractmethod
    def _host(self, successor: NativeConnection) -> None:
        """Start the tasks of *successor*, if it needs any."""

    @staticmethod
    def _result(stream: Stream) -> bytes:
        """Return the response of *stream*, which has ended, or raise its error."""
        outcome = stream.outcome
        if type(outcome) is bytes:
            return outcome
        # An error refers to its frames, and one of them to the stream. So the stream
        # must not refer to the error: only the garbage collector frees such a cycle.
        stream.outcome = stream.response.outcome = None
        assert isinstance(outcome, Exception)  # noqa: S101
        try:
            raise outcome
        finally:
            del outcome

    # -- health -----------------------------------------------------------------

    def judge(self, error: BaseException, /) -> Verdict | None:
        """Return the verdict on the connection for *error*, which a call raised."""
        return verdict(error, self.is_lost)

    def is_lost(self) -> bool:
        """Return whether the connection ended, or the server sent GOAWAY."""
        return not self._core.takes_calls

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
            raise ConnectFailed(
                f"cannot connect to {self._target.url}: the gRPC server there "
                f"{self._target.unserved}",
                permanent=True,
            )

    async def _ask(self, timeout: float, metadata: Metadata) -> grpc.StatusCode:
        """Return the status of a probe, if it is from the service."""
        if not (self._core.takes_calls or self._closed):
            # The response of a successor would say nothing about this connection.
            raise not_sent(
                self._target.probe,
                self._target.url,
                self._core.failure or "it takes no more calls",
            )
        try:
            await self.call(self._target.probe, b"", timeout=timeout, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if is_from_service(error):
                return error.code()
            if not lacks_status(error) or ending(error) is Ending.CUT_OFF:
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
        """Close the connection when its calls have ended, or after *grace* seconds."""
        self._closed = True
        try:
            if grace > 0 and self.has_calls:
                self._quiet = anyio.Event()
                with anyio.move_on_after(grace):
                    await self._quiet.wait()
        finally:
            self.cut_off()

    @property
    def has_calls(self) -> bool:
        """Whether a call has not ended."""
        if self._successors is not None and self._successors.has_calls:
            return True
        return self._core.has_calls

    def _call_ended(self) -> None:
        """Let `close` continue if the last call has ended."""
        if self._quiet is not None and not self.has_calls:
            self._quiet.set()

    def cut_off(self) -> None:
        """Close the connection at once. All its calls end as lost."""
        if self._pid != _fork.current.pid:
            # A forked process shares the socket, and the epoll of the event loop. A
            # GOAWAY or a change of the epoll would break the connection of the parent.
            self.abandon()
            return
        self._closed = True
        if self._successors is not None:
            self._successors.cut_off()
        self._end()

    def _end(self) -> None:
        """End all calls as lost, send the queued bytes, and close the socket."""
        self._core.shut_down()
        self._detach()
        self._wire.close()

    @abc.abstractmethod
    def _detach(self) -> None:
        """Remove the socket from the event loop before it is closed."""

    def abandon(self) -> None:
        """Close the socket without waiting, because the event loop was closed."""
        self._closed = True
        if self._successors is not None:
            self._successors.abandon()
        # No caller is woken, because the event loop is closed.
        self._core.forget_calls()
        self._wire.drop()
