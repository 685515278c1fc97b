"""
TLS servers that are wrong in one way each, and certificates for them.

A server records the bytes that it got: `clear` before or instead of TLS, `decrypted`
inside TLS. So a test can check which secrets reached it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import pathlib
import socket
import ssl
import tempfile
import threading
import warnings
from typing import TYPE_CHECKING, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


if TYPE_CHECKING:
    from collections.abc import Iterable


__all__ = ["CLIENT_AUTH", "Certificate", "TlsServer", "alert", "key_usage", "tls"]


CLIENT_AUTH = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
DAY = dt.timedelta(days=1)
PATIENCE = 10.0

SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""The first frame of an HTTP/2 server."""


def alert(number: int) -> bytes:
    """Return a fatal TLS alert with the description *number*."""
    return b"\x15\x03\x03\x00\x02\x02" + bytes([number])


def key_usage(*allowed: str) -> x509.KeyUsage:
    """Return the extension that allows the named uses and no other."""
    names = (
        *("digital_signature", "content_commitment", "key_encipherment"),
        *("data_encipherment", "key_agreement", "key_cert_sign", "crl_sign"),
        *("encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{name: name in allowed for name in names})


class Certificate:
    """
    A certificate with its key.

    Args:
        name: Its subject.
        issuer: The certificate that signs it; None signs it with its own key.
        names: Host names and addresses that it is valid for.
        days: When it begins and ends to be valid, in days from now.
        ca: Whether it may sign others.
        extensions: More extensions, none of them critical.
        ed25519_key: Whether it has a key of a kind that gRPC does not support.
    """

    def __init__(
        self,
        name: str = "topaz",
        *,
        issuer: Certificate | None = None,
        names: Iterable[str] = ("localhost", "127.0.0.1"),
        days: tuple[float, float] = (-1, 1),
        ca: bool = False,
        extensions: Iterable[x509.ExtensionType] = (),
        ed25519_key: bool = False,
    ) -> None:
        self.key = (
            ed25519.Ed25519PrivateKey.generate()
            if ed25519_key
            else ec.generate_private_key(ec.SECP256R1())
        )
        now = dt.datetime.now(dt.UTC)
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.subject)
            .issuer_name((issuer or self).subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + days[0] * DAY)
            .not_valid_after(now + days[1] * DAY)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), True)
        )
        if not ca:
            alternatives = x509.SubjectAlternativeName(map(_general_name, names))
            builder = builder.add_extension(alternatives, critical=False)
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        self._signed = builder.sign((issuer or self).key, hashes.SHA256())

    @property
    def pem(self) -> bytes:
        """The certificate in PEM format."""
        return self._signed.public_bytes(serialization.Encoding.PEM)

    @property
    def der(self) -> bytes:
        """The certificate in DER format."""
        return self._signed.public_bytes(serialization.Encoding.DER)

    @property
    def private_pem(self) -> bytes:
        """The key in PEM format."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def tls(
    certificate: Certificate,
    *above: Certificate,
    alpn: Iterable[str] = ("h2",),
    newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ciphers: str | None = None,
    clients: Certificate | None = None,
) -> ssl.SSLContext:
    """
    Return the TLS settings of a server.

    Args:
        certificate: The server's certificate.
        above: CA certificates that the server sends too.
        alpn: The protocols that it offers; none turns the negotiation off.
        newest: The newest version that it supports; it supports all older ones.
        ciphers: The ciphers that it supports for TLS 1.2 and older.
        clients: The CA of client certificates, which are then required.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if ciphers is not None:
        context.set_ciphers(ciphers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about old versions
        context.minimum_version = min(ssl.TLSVersion.TLSv1_2, newest)
        context.maximum_version = newest
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "chain.pem")
        chain = b"".join(each.pem for each in (certificate, *above))
        path.write_bytes(chain + certificate.private_pem)
        context.load_cert_chain(path)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=clients.pem.decode())
    return context


class TlsServer:
    """
    A server that uses TLS with *context*, or answers the first bytes with *reply*.

    After the handshake it sends the first frame of HTTP/2, and reads until the client
    closes. Use it in a `with`.
    """

    def __init__(
        self,
        context: ssl.SSLContext | None = None,
        reply: bytes = b"",
        *,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._context = context
        self._reply = reply
        self._address = (host, port)
        self.clear = b""
        self.decrypted = b""
        self.handshakes = 0

    def __enter__(self) -> Self:
        self._socket = socket.create_server(self._address)
        self.port: int = self._socket.getsockname()[1]
        self._closing = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            socket.create_connection(self._socket.getsockname()[:2]).close()
        self._thread.join(PATIENCE)
        self._socket.close()
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        while True:
            client, _ = self._socket.accept()
            with client:
                if self._closing:
                    return
                client.settimeout(PATIENCE)
                with contextlib.suppress(OSError):
                    self._speak(client)

    def _speak(self, client: socket.socket) -> None:
        if self._context is None:
            self.clear += client.recv(65536)
            client.sendall(self._reply)
            return
        if client.recv(1, socket.MSG_PEEK) != b"\x16":  # not a TLS handshake
            self.clear += client.recv(65536, socket.MSG_PEEK)
        with self._context.wrap_socket(client, server_side=True) as secured:
            self.handshakes += 1
            secured.sendall(SETTINGS)
            while data := secured.recv(65536):
                self.decrypted += data
