"""
The file with the CA certificates, and what is wrong with one that cannot be used.

gRPC tells neither: it silently skips a damaged certificate that follows a good one, and
takes an empty file for "use the default roots".
"""

from __future__ import annotations

import codecs
import functools
import pathlib
import ssl
import stat
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from fastapi_topaz._rpc.target import Target


__all__ = ["root_certificates"]


_BEGIN = b"-----BEGIN CERTIFICATE-----"

_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def root_certificates(target: Target) -> bytes | None:
    """
    Return the PEM text of `cert_file_path`, or None for gRPC's own roots.

    Raises:
        ValueError: The file cannot be read, or is not a PEM file of certificates.
    """
    if target.cert_file_path is None:
        return None
    pem = b""
    try:
        pem = _read(pathlib.Path(target.cert_file_path))
        fault = _fault(pem)
    except (OSError, ValueError) as error:  # ValueError: the path holds a NUL
        fault = getattr(error, "strerror", None) or str(error)
    if fault:
        raise ValueError(
            "cert_file_path must be a readable PEM file of CA certificates, got "
            f"{target.cert_file_path!r}: {fault}"
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
