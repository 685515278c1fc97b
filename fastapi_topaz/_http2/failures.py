"""Explanations of failed connects: from exceptions of sockets and TLS to messages."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from typing import TYPE_CHECKING, Final

import attrs
import grpc

from fastapi_topaz._http2.tls import ROOTS_VARIABLE
from fastapi_topaz._rpc.certificates import client_fault, name_of
from fastapi_topaz._rpc.statuses import EndedCall, Ending
from fastapi_topaz.exceptions import ConnectFailed, ConnectionLost


if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastapi_topaz._http2.addresses import Address
    from fastapi_topaz._rpc.target import Target
    from fastapi_topaz.exceptions import FailureReason


__all__ = [
    "NO_HTTP2_IN_TLS",
    "Cause",
    "HandshakeFailed",
    "cause_of",
    "closed_under",
    "each_failed",
    "not_sent",
    "timed_out",
    "unresolved",
]


@attrs.frozen
class Cause:
    """Why one attempt failed."""

    reason: FailureReason
    permanent: bool
    text: str


class HandshakeFailed(Exception):  # noqa: N818  (never leaves this folder)
    """The server was reached, but does not speak HTTP/2 as required."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.text)
        self.cause = cause


_CLIENT_CERTIFICATE: Final = "{client}"
"""Stands for what is wrong with the client's certificate: see `client_fault`."""

_NO_TLS: Final = (
    "the server does not speak TLS on this port; if it is meant to be plaintext, pass "
    "insecure=True"
)
NO_HTTP2_IN_TLS: Final = (
    "the server speaks TLS but does not offer HTTP/2 in it (ALPN h2), which gRPC "
    "needs; it may be a proxy that is set up for HTTP/1.1 only"
)

# Parts of `ssl.SSLError.reason`, with their explanations. The first match wins.
_TLS: Final = {
    "CERTIFICATE_REQUIRED": _CLIENT_CERTIFICATE,
    "ALERT_BAD_CERTIFICATE": _CLIENT_CERTIFICATE,
    "ALERT_UNKNOWN_CA": _CLIENT_CERTIFICATE,
    "ALERT_UNSUPPORTED_CERTIFICATE": _CLIENT_CERTIFICATE,
    "ALERT_CERTIFICATE_": _CLIENT_CERTIFICATE,
    "ALERT_DECRYPT_ERROR": _CLIENT_CERTIFICATE,
    "ALERT_ACCESS_DENIED": _CLIENT_CERTIFICATE,
    "NO_APPLICATION_PROTOCOL": NO_HTTP2_IN_TLS,
    "PROTOCOL_VERSION": (
        "the server only speaks old versions of TLS; TLS 1.2 or newer is needed"
    ),
    "UNSUPPORTED_PROTOCOL": (
        "the server only speaks old versions of TLS; TLS 1.2 or newer is needed"
    ),
    "UNRECOGNIZED_NAME": "the server has no certificate for {name}",
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "PACKET_LENGTH_TOO_LONG": _NO_TLS,
    "HTTP_REQUEST": _NO_TLS,
    "RECORD_LAYER_FAILURE": _NO_TLS,
    "HANDSHAKE_FAILURE": (
        "the server refused the TLS handshake: {client}, or none of its ciphers or "
        "keys is supported here"
    ),
}

_NO_DESCRIPTORS: Final = {errno.EMFILE, errno.ENFILE}

_MOST: Final = 16
"""The most addresses that a message lists."""


def cause_of(error: Exception, target: Target) -> Cause:
    """Return why an attempt ended with *error*."""
    if isinstance(error, HandshakeFailed):
        return error.cause
    if isinstance(error, ssl.SSLCertVerificationError):
        return Cause("tls", True, _certificate_fault(error, target))
    if isinstance(error, ssl.SSLError):
        return _tls_fault(error, target)
    if isinstance(error, socket.gaierror):
        return Cause("resolve", False, f"the host name cannot be resolved ({error})")
    if isinstance(error, OSError):
        return _socket_fault(error, target)
    return Cause("other", False, f"{type(error).__name__}: {error}")


def _socket_fault(error: OSError, target: Target) -> Cause:
    if isinstance(error, ConnectionRefusedError):
        return Cause("refused", False, "nothing listens there (connection refused)")
    if isinstance(error, FileNotFoundError):
        return Cause("refused", False, "the socket does not exist")
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return Cause("other", False, ended_early(target))
    if isinstance(error, TimeoutError):  # ETIMEDOUT
        return Cause("timeout", False, "nothing answered (timed out)")
    if error.errno in _NO_DESCRIPTORS:
        return Cause(
            "other",
            False,
            "this process has no file descriptor left; raise its limit (ulimit -n), "
            "or find the code that leaks them",
        )
    return Cause("other", False, error.strerror or str(error))


def ended_early(target: Target) -> str:
    """Return the message for a server that closed a new connection."""
    hint = (
        "is it using TLS? insecure=True was given"
        if target.insecure
        else f"is it a gRPC server with TLS? perhaps {client_fault(target)}"
    )
    return f"the server closed the connection before it was ready; {hint}"


def _roots(target: Target) -> str:
    """Return which CAs are trusted, for the end of a sentence."""
    if target.cert_file_path:
        return f"cert_file_path={target.cert_file_path!r} holds"
    # The same order as in tls_context().
    path = os.environ.get(ROOTS_VARIABLE)
    trusted = f"{ROOTS_VARIABLE}={path!r} holds" if path else "this system trusts"
    return f"{trusted}; pass the PEM file of its CA as cert_file_path"


def _certificate_fault(error: ssl.SSLCertVerificationError, target: Target) -> str:
    # By the error of X509_verify_cert(3).
    roots = _roots(target)
    whose = "the server's certificate, or that of a CA above it,"
    not_signed = f"the server's certificate is not signed by a CA that {roots}"
    texts = {
        2: not_signed,
        7: (
            "the server's certificate is not signed by the CA of that name that "
            f"{roots}; was the CA created again with another key?"
        ),
        9: f"{whose} is not yet valid by the clock of this machine",
        10: f"{whose} has expired by the clock of this machine",
        18: not_signed,
        19: not_signed,
        20: not_signed,
        21: not_signed,
        26: (
            "the server's certificate has the wrong purpose: its key usage does not "
            "allow server authentication"
        ),
        62: f"the server's certificate is not valid for {name_of(target)}",
        64: f"the server's certificate is not valid for {name_of(target)}",
    }
    other = f"the server's certificate is not acceptable: {error.verify_message}"
    return texts.get(error.verify_code, other)


def _tls_fault(error: ssl.SSLError, target: Target) -> Cause:
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return Cause("other", False, ended_early(target))
    # Python 3.11 has no name for some alerts, such as number 120.
    found = error.reason or str(error).upper().replace(" ", "_")
    for part, text in _TLS.items():
        if part in found:
            said = text.format(client=client_fault(target), name=name_of(target))
            return Cause("tls", True, f"{said} (TLS: {found})")
    return Cause("tls", False, f"the TLS handshake failed (TLS: {found})")


def each_failed(
    target: Target, failures: Sequence[tuple[Address | None, Exception]]
) -> ConnectFailed:
    """
    Return the error for *failures*: pairs of an address and its exception.

    The address is None if the name was not resolved. The error is permanent only if all
    failures are.
    """
    causes = [(address, cause_of(error, target)) for address, error in failures]
    by_text: dict[str, list[str]] = {}
    for address, cause in causes:
        by_text.setdefault(cause.text, []).append(address.text if address else "")
    said = "; ".join(
        text if len(causes) == 1 else f"{_listed(addresses)}: {text}"
        for text, addresses in by_text.items()
    )
    # The reason is that of a permanent failure, if there is one.
    first = min(causes, key=lambda each: not each[1].permanent)[1]
    failed = ConnectFailed(
        f"cannot connect to {target.url}: {said}",
        reason=first.reason,
        permanent=all(cause.permanent for _, cause in causes),
    )
    failed.__cause__ = failures[-1][1].with_traceback(None)
    return failed


def _listed(addresses: Sequence[str]) -> str:
    more = f" and {len(addresses) - _MOST} more" if len(addresses) > _MOST else ""
    return f"{', '.join(addresses[:_MOST])}{more}"


def closed_under(method: str, url: str) -> ConnectionLost:
    """Return the error of a call whose connection was closed on this side."""
    return ConnectionLost(
        f"the call {method} to {url} ended without a response: the connection was "
        "closed during the call"
    )


def not_sent(method: str, url: str, why: str) -> EndedCall:
    """Return the error of a call that began after its connection had ended."""
    return EndedCall(
        Ending.NOT_SENT,
        grpc.StatusCode.UNAVAILABLE,
        f"the call {method} was not sent: the connection to {url} has ended: {why}",
    )


def timed_out(
    target: Target,
    timeout: float,
    failures: Sequence[tuple[Address | None, Exception]],
    pending: Sequence[Address],
) -> ConnectFailed:
    """Return the error of a connect that took longer than *timeout* seconds."""
    each = [f"{address.text}: no answer" for address in pending]
    each += [
        f"{address.text if address else 'resolving'}: {cause_of(error, target).text}"
        for address, error in failures
    ]
    return ConnectFailed(
        f"cannot connect to {target.url}: not ready within connection_timeout="
        f"{timeout:g} s; the server may be overloaded, or accept and stay silent"
        + (f" (tried {'; '.join(each[:_MOST])})" if each else ""),
        reason="timeout",
    )


def unresolved(target: Target, timeout: float) -> ConnectFailed:
    """Return the error for a name that was not resolved within *timeout* seconds."""
    return ConnectFailed(
        f"cannot connect to {target.url}: its host name was not resolved within "
        f"connection_timeout={timeout:g} s; the name server may be overloaded or "
        "unreachable",
        reason="timeout",
    )
