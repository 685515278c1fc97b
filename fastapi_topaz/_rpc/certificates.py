"""
The files with certificates, and what is wrong with one that cannot be used.

gRPC does not say it: it silently skips a damaged certificate that follows a good one,
and takes an empty file for "use the default roots".
"""

from __future__ import annotations

import codecs
import functools
import pathlib
import ssl
import stat
from typing import TYPE_CHECKING, NamedTuple


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._rpc.target import Target


__all__ = [
    "ClientPair",
    "client_fault",
    "client_pair",
    "load_pair",
    "name_of",
    "root_certificates",
]


_BEGIN = b"-----BEGIN CERTIFICATE-----"

_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def root_certificates(target: Target) -> bytes | None:
    """
    Return the PEM text of `cert_file_path`, or None for the default roots.

    Raises:
        ValueError: The file cannot be read, or is not a PEM file of certificates.
    """
    if target.cert_file_path is None:
        return None
    return _read_pem(
        "cert_file_path", target.cert_file_path, "of CA certificates", _fault
    )


class ClientPair(NamedTuple):
    """The certificate of a client, with the certificates above it, and its key."""

    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return "<ClientPair>"  # without the key


def client_pair(target: Target) -> ClientPair | None:
    """
    Return the PEM texts of `client_cert_path` and `client_key_path`, or None.

    Raises:
        ValueError: A file cannot be read or used, or they do not belong together.
    """
    if target.client_cert_path is None or target.client_key_path is None:
        return None
    certificate = _read_pem(
        "client_cert_path",
        target.client_cert_path,
        "with the certificate of the client",
        _fault,
    )
    key = _read_pem(
        "client_key_path", target.client_key_path, "with a private key", _key_fault
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    load_pair(context, target.client_cert_path, target.client_key_path)
    return ClientPair(certificate, key)


def load_pair(context: ssl.SSLContext, cert_path: str, key_path: str) -> None:
    """
    Load the certificate of the client into *context*.

    Raises:
        ValueError: The files do not belong together, or cannot be used.
    """
    try:
        # Without a password, OpenSSL would ask for one on the terminal.
        context.load_cert_chain(cert_path, key_path, password=b"")
    except OSError as error:  # nearly always an ssl.SSLError
        mismatch = getattr(error, "reason", None) == "KEY_VALUES_MISMATCH"
        raise ValueError(
            f"client_cert_path and client_key_path cannot be used, got {cert_path!r} "
            f"and {key_path!r}: "
            + (
                "the key is not that of the certificate (the first one in its file)"
                if mismatch
                else "the key is damaged, or of a kind that OpenSSL does not accept"
            )
        ) from None


def client_fault(target: Target) -> str:
    """Return what is wrong if the server refuses this client in the TLS handshake."""
    if target.client_cert_path is None:
        return (
            "the server requires a client certificate (mTLS): pass client_cert_path "
            "and client_key_path"
        )
    return (
        "the server refuses the client certificate in client_cert_path="
        f"{target.client_cert_path!r}: it may have expired, lack the purpose client "
        "authentication, or not be signed by a CA that the server trusts"
    )


def name_of(target: Target) -> str:
    """Return how errors call the name that the server's certificate must be for."""
    if target.server_name is None:
        return "the name in url"
    return f"server_name={target.server_name!r}"


def _read_pem(
    option: str, path: str, what: str, fault_of: Callable[[bytes], str | None]
) -> bytes:
    """
    Return the content of the file at *path*.

    Raises:
        ValueError: It cannot be read, or has a fault. The message names the *option*.
    """
    pem = b""
    try:
        pem = _read(pathlib.Path(path))
        fault = fault_of(pem)
    except (OSError, ValueError) as error:  # ValueError: the path holds a NUL
        fault = getattr(error, "strerror", None) or str(error)
    if fault:
        raise ValueError(
            f"{option} must be a readable PEM file {what}, got {path!r}: {fault}"
        )
    return pem


def _read(path: pathlib.Path) -> bytes:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        # Opening a pipe that has no writer would block the event loop.
        raise ValueError("it is not a regular file")
    return path.read_bytes()


# Cached by content: the file is read at each connect, and to parse a bundle of 140
# certificates takes milliseconds.
@functools.lru_cache(maxsize=4)
def _fault(pem: bytes) -> str | None:
    """Return what is wrong with *pem*, or None if every certificate in it is good."""
    if not pem.strip():
        return "it is empty"
    if pem.startswith(_BYTE_ORDER_MARKS):
        # OpenSSL does not find the certificate behind it.
        return "it begins with a byte order mark; save it as UTF-8 without BOM"
    if _BEGIN not in pem:
        return _other_content(pem)
    # Comments may be in any encoding.
    text = pem.decode("latin-1").encode("ascii", "replace").decode()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except ssl.SSLError:
        if all(not line.startswith(_BEGIN) for line in pem.splitlines()):
            return "'-----BEGIN CERTIFICATE-----' must be at the start of a line"
        return "a certificate in it is damaged or cut off"
    return None


def _key_fault(pem: bytes) -> str | None:
    """Return what is certainly wrong with a private key, or None."""
    if not pem.strip():
        return "it is empty"
    if pem.startswith(_BYTE_ORDER_MARKS):
        return "it begins with a byte order mark; save it as UTF-8 without BOM"
    if b"BEGIN ENCRYPTED PRIVATE KEY-----" in pem or b"Proc-Type: 4,ENCRYPTED" in pem:
        return "the key is encrypted; decrypt it with openssl pkey"
    if b"PRIVATE KEY-----" in pem:
        return None
    if _BEGIN in pem:
        return "it holds a certificate and no private key"
    return "it holds no private key in PEM format"


def _other_content(pem: bytes) -> str:
    if b"PRIVATE KEY-----" in pem:
        return "it holds a private key and no certificate"
    if b"-----BEGIN " in pem:
        return "it holds no certificate, but something else in PEM format"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError):
        return "it holds no certificate in PEM format"
    return "it is in DER format; convert it with openssl x509 -inform der"
