"""Raw connections to one address: TCP, TLS, and the first bytes of the server."""

from __future__ import annotations

import enum
import re
import ssl
from typing import TYPE_CHECKING, Final

import anyio
import attrs
from anyio.streams.tls import TLSAttribute, TLSStream

from fastapi_topaz._rpc.certificates import load_pair


if TYPE_CHECKING:
    from anyio.abc import ByteStream

    from fastapi_topaz._http2.addresses import Address
    from fastapi_topaz._rpc.target import Target


__all__ = [
    "FirstBytes",
    "Handshake",
    "Speaks",
    "Wire",
    "dial",
    "first_bytes",
    "leaf_context",
    "lenient_context",
    "shake_hands",
    "speaks",
]


_GREETING: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    [0, 0, 0, 4, 0, 0, 0, 0, 0]
)
"""The connection preface of a client, with empty SETTINGS (RFC 9113, section 3.4)."""

_NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL, for which Python has no name."""

_HTTP1 = re.compile(rb"HTTP/1\.[01] (\d{3})")
_SETTINGS, _GOAWAY = 4, 7


async def dial(address: Address) -> ByteStream:
    """
    Connect to *address*.

    Raises:
        OSError: It failed.
    """
    sockaddr = address.sockaddr
    if isinstance(sockaddr, str):
        return await anyio.connect_unix(sockaddr)
    try:
        return await anyio.connect_tcp(str(sockaddr[0]), int(sockaddr[1]))
    except OSError as error:
        # anyio wraps the error of the only attempt.
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise


@attrs.frozen
class Wire:
    """
    How to reach a server.

    Args:
        address: Where it is.
        context: The TLS settings, or None for plaintext.
        name: The name to ask for in TLS.
        timeout: Time limit in seconds for each step.
    """

    address: Address
    context: ssl.SSLContext | None
    name: str
    timeout: float

    async def open(self) -> ByteStream:
        """
        Connect, and make the TLS handshake if there is one.

        Raises:
            TimeoutError: It took too long.
            ssl.SSLError: The TLS handshake failed.
            anyio.EndOfStream, anyio.BrokenResourceError: The server closed it.
            OSError: The connect failed.
        """
        with anyio.fail_after(self.timeout):
            stream = await dial(self.address)
            if self.context is None:
                return stream
            try:
                return await TLSStream.wrap(
                    stream,
                    server_side=False,
                    hostname=self.name,
                    ssl_context=self.context,
                    standard_compatible=False,
                )
            except BaseException:
                await anyio.aclose_forcefully(stream)
                raise


# -- TLS ----------------------------------------------------------------------------


def lenient_context(target: Target) -> ssl.SSLContext:
    """Return TLS settings that accept each certificate, to look at it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    if target.client_cert_path is not None and target.client_key_path is not None:
        load_pair(context, target.client_cert_path, target.client_key_path)
    return context


def leaf_context(target: Target, der: bytes) -> ssl.SSLContext:
    """Return TLS settings that check only the name in the certificate *der*."""
    context = lenient_context(target)
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = True
    flags = context.verify_flags & ~ssl.VERIFY_X509_STRICT
    flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    context.verify_flags = ssl.VerifyFlags(flags)
    context.load_verify_locations(cadata=der)
    return context


@attrs.frozen
class Handshake:
    """What a TLS handshake showed: the certificate (DER), protocol and version."""

    certificate: bytes | None
    protocol: str | None
    version: str


async def shake_hands(wire: Wire) -> Handshake:
    """
    Make one TLS handshake, and close the connection.

    Raises:
        See `Wire.open`.
    """
    stream = await wire.open()
    try:
        attribute = stream.extra
        return Handshake(
            attribute(TLSAttribute.peer_certificate_binary, None),
            attribute(TLSAttribute.alpn_protocol, None),
            attribute(TLSAttribute.tls_version),
        )
    finally:
        await anyio.aclose_forcefully(stream)


# -- the first bytes ----------------------------------------------------------------


class Speaks(enum.Enum):
    """The protocol of a server, by its first bytes."""

    HTTP2 = enum.auto()
    GOAWAY = enum.auto()
    HTTP1 = enum.auto()
    TLS = enum.auto()
    OTHER = enum.auto()
    CLOSED = enum.auto()
    SILENT = enum.auto()


@attrs.frozen
class FirstBytes:
    """The protocol of a server, and the HTTP/1 status if it sent one."""

    speaks: Speaks
    status: int | None = None


def speaks(data: bytes, *, is_all: bool) -> FirstBytes | None:
    """Return what a server speaks that sent *data*, or None if that takes more."""
    if data[:1] in {b"\x15", b"\x16"} and data[1:2] == b"\x03":
        return FirstBytes(Speaks.TLS)
    if (status := _HTTP1.match(data)) is not None:
        return FirstBytes(Speaks.HTTP1, int(status[1]))
    if len(data) >= 9 and data[5:9] == bytes(4) and data[3] in {_SETTINGS, _GOAWAY}:
        return FirstBytes(Speaks.HTTP2 if data[3] == _SETTINGS else Speaks.GOAWAY)
    if not is_all and len(data) < 12:
        return None
    return FirstBytes(Speaks.OTHER if data else Speaks.CLOSED)


async def first_bytes(wire: Wire, *, greets: bool = True) -> FirstBytes:
    """
    Greet the server as an HTTP/2 client does, and return what it speaks.

    No metadata is sent. If *greets* is False, nothing is.

    Raises:
        ssl.SSLError: The TLS handshake failed, or the server ended TLS with an alert.
    """
    data = b""
    try:
        stream = await wire.open()
    except TimeoutError:
        return FirstBytes(Speaks.SILENT)
    except ssl.SSLError:
        raise
    except (OSError, anyio.EndOfStream, anyio.BrokenResourceError):
        return FirstBytes(Speaks.CLOSED)
    try:
        with anyio.fail_after(wire.timeout):
            if greets:
                await stream.send(_GREETING)
            while (said := speaks(data, is_all=False)) is None:
                data += await stream.receive()
            return said
    except TimeoutError:
        if not data:
            return FirstBytes(Speaks.SILENT)
    except (anyio.EndOfStream, anyio.BrokenResourceError) as error:
        if isinstance(error.__cause__, ssl.SSLError):
            raise error.__cause__ from None
    finally:
        await anyio.aclose_forcefully(stream)
    said = speaks(data, is_all=True)
    assert said is not None  # noqa: S101
    return said
