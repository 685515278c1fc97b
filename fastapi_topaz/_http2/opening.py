"""Opens a connection to a target: addresses, TLS and settings, on asyncio and trio."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

import anyio
from anyio.lowlevel import current_token

from fastapi_topaz._http2.addresses import parse
from fastapi_topaz._http2.asyncio_io import AsyncioConnection
from fastapi_topaz._http2.connection import ClientConnection
from fastapi_topaz._http2.dialing import FailedAddresses, Race
from fastapi_topaz._http2.failures import (
    NO_HTTP2_IN_TLS,
    Cause,
    HandshakeFailed,
    each_failed,
    timed_out,
    unresolved,
)
from fastapi_topaz._http2.requests import RequestBlocks
from fastapi_topaz._http2.rpc_connection import Wire
from fastapi_topaz._http2.tls import TlsSession, tls_context
from fastapi_topaz.exceptions import ConnectFailed


if TYPE_CHECKING:
    import socket

    from fastapi_topaz._http2.addresses import Address
    from fastapi_topaz._http2.rpc_connection import NativeConnection
    from fastapi_topaz._rpc.target import Target


__all__ = ["NativeOpener"]


_SHARE: Final = 0.95
"""The part of the timeout of the pool after which the opener reports its own error."""


class NativeOpener:
    """
    Opens connections to one target, and remembers which addresses failed.

    Args:
        target: The server.

    Raises:
        ValueError: The url of *target* is malformed, or needs gRPC's core.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        try:
            self._endpoint = parse(target.url)
        except ValueError as error:
            raise ValueError(
                f"url {target.url!r} cannot be used with transport='native': {error}"
            ) from None
        authority = target.authority or target.server_name or self._endpoint.authority
        self._blocks = RequestBlocks(
            authority, target.metadata, is_tls=not target.insecure
        )
        self._server_name = target.server_name or self._endpoint.certificate_host
        self._failed = FailedAddresses()
        self._opened: WeakSet[NativeConnection] = WeakSet()

    def validate(self) -> None:
        """
        Check the configuration for errors that no retry can fix.

        Raises:
            ValueError: A file with certificates, or with the key, cannot be used.
            ConnectFailed: There are no trusted root certificates.
        """
        if not self._target.insecure:
            tls_context(self._target)

    async def open(self, timeout: float) -> NativeConnection:
        """
        Return a new connection that is ready for calls.

        If the server ends the connection, a call that was not processed opens another.

        Raises:
            ConnectFailed: There was no connection within *timeout* seconds.
        """
        connection = await self._open(timeout)
        connection.reopen = partial(self._open, timeout)
        return connection

    async def _open(self, timeout: float) -> NativeConnection:
        greet = partial(self._greet, self._context())
        race: Race[Wire] | None = None
        with anyio.move_on_after(timeout * _SHARE):
            try:
                addresses = await self._endpoint.resolve()
            except OSError as failure:
                raise each_failed(self._target, [(None, failure)]) from failure
            race = Race(self._failed.order(addresses, self._in_use()), greet)
            try:
                won = await race.run()
            finally:
                for address, error in race.failures:
                    self._failed.add(address, error)
                for address in race.overtaken:
                    self._failed.add(address)
            if won is None:
                raise each_failed(self._target, race.failures)
            return self._connection(*won)
        if race is None:
            raise unresolved(self._target, timeout)
        for address in race.pending:
            self._failed.add(address)
        raise timed_out(self._target, timeout, race.failures, race.pending)

    def _in_use(self) -> Counter[str]:
        """Return the number of working connections to each address, by its text."""
        return Counter(str(each.peer) for each in self._opened if not each.is_lost())

    def _context(self) -> ssl.SSLContext | None:
        if self._target.insecure:
            return None
        try:
            return tls_context(self._target)
        except ValueError as error:
            raise ConnectFailed(str(error), reason="tls", permanent=True) from error

    async def _greet(self, context: ssl.SSLContext | None, sock: socket.socket) -> Wire:
        """Make the handshakes of TLS and HTTP/2 on *sock*."""
        core = ClientConnection(
            self._target.url, max_message=self._target.max_message_bytes
        )
        tls = None
        if context is not None:
            tls = TlsSession(context, self._server_name)
            await _shake_hands(sock, tls)
        wire = Wire(sock, core, tls)
        await _exchange_settings(wire)
        return wire

    def _connection(self, wire: Wire, address: Address) -> NativeConnection:
        """Return the connection over *wire*, which is ready."""
        self._failed.remove(address)
        # Calls of a frozen server are repeated, and should not reach it again.
        wire.core.on_silence = partial(self._failed.add, address)
        make: type[NativeConnection] = AsyncioConnection
        if not isinstance(current_token().native_token, asyncio.AbstractEventLoop):
            # Imported here, because asyncio applications need not install trio.
            from fastapi_topaz._http2.trio_io import TrioConnection  # noqa: PLC0415

            make = TrioConnection
        connection = make(wire, self._target, self._blocks, address.text)
        self._opened.add(connection)
        return connection


async def _shake_hands(sock: socket.socket, tls: TlsSession) -> None:
    """
    Make the TLS handshake.

    Raises:
        OSError: It failed, also an `ssl.SSLError`.
        HandshakeFailed: The server does not speak HTTP/2 in TLS.
    """
    while True:
        try:
            tls.handshake()
        except ssl.SSLError:
            # An alert tells the server why. If the server is gone, the error here is
            # still the reason.
            with contextlib.suppress(OSError):
                await _send(sock, tls.to_send())
            raise
        try:
            await _send(sock, tls.to_send())
        except OSError:
            # The server may have said why, before it closed the connection.
            tls.received(_received(sock))
            tls.handshake()
            tls.raise_end()
            raise
        if tls.is_established:
            break
        await anyio.wait_readable(sock)
        tls.received(_received(sock))
    if tls.protocol != "h2":
        raise HandshakeFailed(Cause("tls", True, NO_HTTP2_IN_TLS))


def _received(sock: socket.socket) -> bytes:
    """
    Return what *sock* has, or nothing if it has nothing now.

    Raises:
        OSError: The connection has ended.
    """
    try:
        data = sock.recv(65_536)
    except BlockingIOError:
        return b""
    if not data:
        raise ConnectionResetError("the server closed the connection")
    return data


async def _send(sock: socket.socket, data: bytes) -> None:
    while data:
        try:
            data = data[sock.send(data) :]
        except BlockingIOError:
            await anyio.wait_writable(sock)


async def _exchange_settings(wire: Wire) -> None:
    """
    Exchange SETTINGS until both sides have acknowledged them (RFC 9113, section 3.4).

    Raises:
        OSError: The connection ended.
        HandshakeFailed: The server does not speak HTTP/2, or has sent GOAWAY.
    """
    core = wire.core
    try:
        # What came with the end of the TLS handshake.
        wire.take_early()
        while core.takes_calls and not core.is_ready:
            while wire.push():
                await anyio.wait_writable(wire)
            await anyio.wait_readable(wire)
            wire.take()
        wire.push()
    except ssl.SSLError:
        raise
    except OSError:
        # The server may have said why. With TLS 1.3 it does so after the handshake if
        # it wants a client certificate.
        if core.takes_calls:
            wire.take()
        if core.takes_calls:
            raise
    if not core.takes_calls:
        failed = HandshakeFailed(_no_http2(core))
        wire.write()  # this connection may have a GOAWAY of its own to say
        raise failed


def _no_http2(core: ClientConnection) -> Cause:
    if core.failure is None:
        return Cause(
            "other",
            False,
            "the server ended the connection as soon as it was ready (GOAWAY); it "
            "may be shutting down, or a proxy may have no server behind it "
            f"({core.goaway})",
        )
    if core.settings_received:
        return Cause("other", False, f"{core.failure}")
    return Cause(
        "other",
        True,
        "a server that does not speak gRPC (HTTP/2) answered; is this the port of the "
        f"authorizer, and does it use TLS? ({core.failure})",
    )
