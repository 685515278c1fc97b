"""
TLS without I/O: an `ssl.SSLObject` between two buffers.

The sslproto of asyncio costs 0.44 of a bare stub and 285 KiB a connection, and the
SSLStream of trio 0.85. This costs 0.39 and 23 KiB on both.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import ssl
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from fastapi_topaz._rpc.certificates import root_certificates
from fastapi_topaz.exceptions import ConnectFailed


if TYPE_CHECKING:
    from fastapi_topaz._rpc.target import Target


__all__ = ["ROOTS_VARIABLE", "TlsSession", "tls_context"]


ROOTS_VARIABLE: Final = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"
"""The environment variable of gRPC that names a file with the default roots."""

_READ: Final = 65_536


class TlsSession:
    """
    One TLS connection of a client.

    Bytes of the socket go to `received`, and those for it come from `to_send`.

    Args:
        context: See `tls_context`.
        host: The name or address that the server's certificate has to be for.
    """

    __slots__ = ("_incoming", "_object", "_outgoing", "is_ended", "is_established")

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_hostname=host
        )
        self.is_established = False
        self.is_ended = False
        """Whether the server said close_notify."""

    def handshake(self) -> None:
        """
        Go on with the handshake; `is_established` says whether it is complete.

        Raises:
            ssl.SSLError: It failed.
        """
        with contextlib.suppress(ssl.SSLWantReadError):
            self._object.do_handshake()
            self.is_established = True

    @property
    def protocol(self) -> str | None:
        """The protocol that the server selected by ALPN (RFC 7301)."""
        return self._object.selected_alpn_protocol()

    def received(self, data: bytes) -> bytes:
        """
        Return what *data*, received from the socket, say in plaintext.

        Raises:
            ssl.SSLError: The server broke TLS, or sent an alert.
        """
        self._incoming.write(data)
        return self._read() if self.is_established else b""

    def _read(self) -> bytes:
        parts = []
        try:
            while part := self._object.read(_READ):
                parts.append(part)
            self.is_ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            # What came before an alert counts. The alert is found again.
            if not parts:
                raise
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def received_early(self) -> bytes:
        """Return the plaintext that came together with the end of the handshake."""
        return self._read()

    def encrypt(self, data: bytes) -> None:
        """Encrypt *data*, to be sent; it raises nothing that a peer can cause."""
        # The buffer grows as needed, so this never asks for more room.
        self._object.write(data)

    def say_close(self) -> None:
        """Add close_notify to what is to be sent. Nothing waits for the answer."""
        with contextlib.suppress(ssl.SSLError):
            self._object.unwrap()

    def to_send(self) -> bytes:
        """Return the bytes for the socket."""
        return self._outgoing.read()


def tls_context(target: Target) -> ssl.SSLContext:
    """
    Return the context for *target*, which decides what is trusted.

    The roots are those of `cert_file_path`, else those of the file that
    `GRPC_DEFAULT_SSL_ROOTS_FILE_PATH` names, else those of the system.

    Raises:
        ConnectFailed: There are no roots to trust.
        ValueError: `cert_file_path` cannot be used.
    """
    pem = root_certificates(target)
    if pem is not None:
        return _context(pem)
    if path := os.environ.get(ROOTS_VARIABLE):
        try:
            return _context(pathlib.Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise ConnectFailed(
                f"cannot connect to {target.url}: the file that {ROOTS_VARIABLE} "
                f"names cannot be used: {path!r}: {error}",
                reason="tls",
                permanent=True,
            ) from error
    context = _system_context()
    if context is None:
        raise ConnectFailed(
            f"cannot connect to {target.url}: this system has no trusted root "
            "certificates; pass cert_file_path, or install them (such as the package "
            f"ca-certificates), or set {ROOTS_VARIABLE}",
            reason="tls",
            permanent=True,
        )
    return context


# To parse the bundle of a system takes 20 ms. A file is cached by its content, so that
# a rotated one is used; the store of the system is read once.
@lru_cache(maxsize=4)
def _context(pem: bytes) -> ssl.SSLContext:
    context = _bare_context()
    # Comments between certificates may be in any encoding.
    text = pem.decode("latin-1").encode("ascii", "replace").decode()
    context.load_verify_locations(cadata=text)
    return context


@lru_cache(maxsize=1)
def _system_context() -> ssl.SSLContext | None:
    context = _bare_context()
    context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    # Those in a directory are loaded when a certificate needs one.
    directory = ssl.get_default_verify_paths().capath
    has_directory = directory is not None and any(pathlib.Path(directory).iterdir())
    return context if context.cert_store_stats()["x509_ca"] or has_directory else None


def _bare_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 9113, section 9.2
    context.set_alpn_protocols(["h2"])
    # Not strict: the CA that Topaz makes has no Authority Key Identifier. As gRPC does,
    # an intermediate CA in the file is trusted without its root.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.verify_flags |= (
        ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_TRUSTED_FIRST
    )
    # RFC 9113, section 9.2.1: neither compression nor renegotiation.
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    return context
