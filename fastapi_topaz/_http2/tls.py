"""
TLS without I/O: an `ssl.SSLObject` between two buffers.

CPU of a call relative to a bare grpc.aio stub: 0.44 with the TLS of asyncio, 0.85 with
that of trio, 0.39 with this module. Memory of a connection: 285 KiB with the TLS of
asyncio, 23 KiB with this module.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import ssl
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from fastapi_topaz._rpc.certificates import client_pair, load_pair, root_certificates
from fastapi_topaz.exceptions import ConnectFailed


if TYPE_CHECKING:
    from fastapi_topaz._rpc.target import Target


__all__ = ["ROOTS_VARIABLE", "TlsSession", "tls_context"]


ROOTS_VARIABLE: Final = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"
"""The environment variable of gRPC with the path of the default root certificates."""

_READ: Final = 65_536


class TlsSession:
    """
    The client side of one TLS connection.

    Pass the bytes that the socket receives to `received`. Send those of `to_send`.

    Args:
        context: See `tls_context`.
        host: The name or address for which the server's certificate must be valid.
    """

    __slots__ = ("_end", "_incoming", "_object", "_outgoing", "is_established")

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_hostname=host
        )
        self.is_established = False
        # What ended the session, after the bytes that were returned.
        self._end: OSError | None = None

    def handshake(self) -> None:
        """
        Continue the handshake. Afterwards, `is_established` is True if it is complete.

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
        Return the plaintext of *data*, which the socket received.

        They may have ended the session: see `raise_end`.
        """
        self._incoming.write(data)
        return self._read() if self.is_established else b""

    def _read(self) -> bytes:
        parts = []
        try:
            while part := self._object.read(_READ):
                parts.append(part)
            self._end = ConnectionResetError("the server closed the connection")
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            # Plaintext before an alert is valid.
            self._end = error.with_traceback(None)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def raise_end(self) -> None:
        """
        Raise what ended the session, if it has ended.

        Raises:
            ConnectionResetError: The server said close_notify.
            ssl.SSLError: The server broke TLS, or sent an alert.
        """
        end, self._end = self._end, None
        try:
            if end is not None:
                raise end
        finally:
            del end

    def received_early(self) -> bytes:
        """Return plaintext that arrived together with the end of the handshake."""
        return self._read()

    def encrypt(self, data: bytes) -> None:
        """Encrypt *data* for `to_send`. A peer cannot make it raise an error."""
        # The buffer grows as needed, so this never raises SSLWantWriteError.
        self._object.write(data)

    def say_close(self) -> None:
        """Queue close_notify. The close_notify of the server is not awaited."""
        with contextlib.suppress(ssl.SSLError):
            self._object.unwrap()

    def to_send(self) -> bytes:
        """Return the bytes to send."""
        return self._outgoing.read()


def tls_context(target: Target) -> ssl.SSLContext:
    """
    Return the TLS context for *target*, with the root certificates to trust.

    They come from `cert_file_path`, or from the file in
    `GRPC_DEFAULT_SSL_ROOTS_FILE_PATH`, or from the operating system: the first that is
    set. The context also has the certificate of the client, if *target* has one.

    Raises:
        ConnectFailed: There are no trusted root certificates.
        ValueError: A file with certificates, or with the key, cannot be used.
    """
    roots = root_certificates(target)
    if roots is None and (path := os.environ.get(ROOTS_VARIABLE)):
        try:
            roots = pathlib.Path(path).read_bytes()
            _context(roots)
        except (OSError, ValueError) as error:
            raise ConnectFailed(
                f"cannot connect to {target.url}: the file {path!r} in "
                f"{ROOTS_VARIABLE} cannot be used: {error}",
                reason="tls",
                permanent=True,
            ) from error
    context = _system_context() if roots is None else _context(roots)
    if context is None:
        raise ConnectFailed(
            f"cannot connect to {target.url}: this system has no trusted root "
            "certificates; pass cert_file_path, or install them (such as the package "
            f"ca-certificates), or set {ROOTS_VARIABLE}",
            reason="tls",
            permanent=True,
        )
    pair = client_pair(target)
    if pair is None:
        return context
    digest = hashlib.sha256(b"".join(pair)).digest()
    return _client_context(
        roots, str(target.client_cert_path), str(target.client_key_path), digest
    )


# Of the key, only a digest is kept here.
@lru_cache(maxsize=4)
def _client_context(
    roots: bytes | None, cert_path: str, key_path: str, _digest: bytes
) -> ssl.SSLContext:
    # A context of its own: the others are shared with targets without a certificate.
    if roots is not None:
        context = _context.__wrapped__(roots)
    else:
        context = _loaded_system_context.__wrapped__()
    load_pair(context, cert_path, key_path)
    return context


# The bundle of a system takes 20 ms to parse. A file is cached by its content, so a
# rotated file is used. The store of the system is read once.
@lru_cache(maxsize=4)
def _context(pem: bytes) -> ssl.SSLContext:
    context = _bare_context()
    # Comments between certificates may be in any encoding.
    text = pem.decode("latin-1").encode("ascii", "replace").decode()
    context.load_verify_locations(cadata=text)
    return context


@lru_cache(maxsize=1)
def _loaded_system_context() -> ssl.SSLContext:
    context = _bare_context()
    context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


def _system_context() -> ssl.SSLContext | None:
    """Return the context with the roots of the system, or None if it has none."""
    context = _loaded_system_context()
    if context.cert_store_stats()["x509_ca"]:
        return context
    # OpenSSL loads certificates in a directory only when it needs them.
    directory = ssl.get_default_verify_paths().capath
    with contextlib.suppress(OSError):
        if directory is not None and any(pathlib.Path(directory).iterdir()):
            return context
    # They may be installed while this process runs.
    _loaded_system_context.cache_clear()
    return None


def _forget_contexts() -> None:
    for cached in (_context, _client_context, _loaded_system_context):
        cached.cache_clear()


if hasattr(os, "register_at_fork"):  # pragma: no branch  (not on Windows)
    # Another thread may be in a handshake, in which OpenSSL locks the context. In the
    # child no thread would ever unlock it.
    os.register_at_fork(after_in_child=_forget_contexts)


def _bare_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 9113, section 9.2
    context.set_alpn_protocols(["h2"])
    # Not strict: the CA that Topaz generates has no Authority Key Identifier. As in
    # gRPC, an intermediate CA in the file is trusted without its root.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.verify_flags |= (
        ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_TRUSTED_FIRST
    )
    # RFC 9113, section 9.2.1: neither compression nor renegotiation.
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    return context
