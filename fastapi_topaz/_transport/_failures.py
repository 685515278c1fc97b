"""
Why a connection or a call failed, as far as only the text of the failure tells.

gRPC gives the reason in no other way, so the texts are read here, in one place, and
connections that failed get words that say what to do. An unknown text is passed on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from fastapi_topaz.exceptions import ConnectFailed


if TYPE_CHECKING:
    from fastapi_topaz._options import AuthorizerOptions
    from fastapi_topaz.exceptions import FailureReason


__all__ = [
    "connect_failed",
    "connect_timed_out",
    "in_time",
    "is_cut_off",
    "is_refused_stream",
]


# (parts of gRPC's text, reason, permanent, what to tell); the first match wins.
_KNOWN: tuple[tuple[tuple[str, ...], FailureReason, bool, str], ...] = (
    (
        ("CERTIFICATE_VERIFY_FAILED",),
        "tls",
        True,
        "the server's certificate is not signed by a CA that {roots}",
    ),
    (
        ("Hostname Verification", "Custom verification check", "Peer name"),
        "tls",
        True,
        "the server's certificate is not valid for the name in url",
    ),
    (
        ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"),
        "tls",
        True,
        (
            "the server does not speak TLS on this port; if it is meant to be "
            "plaintext, pass insecure=True"
        ),
    ),
    (
        ("http1.x server", "Failed parsing HTTP/2"),
        "other",
        True,
        (
            "a server that does not speak gRPC (HTTP/2) answered; is this the port "
            "of the authorizer, and does it use TLS?"
        ),
    ),
    (
        ("Failed to create security handshaker",),
        "tls",
        True,
        "gRPC cannot use the certificates that {roots}",
    ),
    (
        ("target uri is not valid", "Failed to create channel"),
        "resolve",
        True,
        "url is no target that gRPC can read; it is host:port",
    ),
    (
        ("Too many open files",),
        "other",
        False,
        (
            "this process has no file descriptor left; raise its limit (ulimit -n), or "
            "look for what leaks them"
        ),
    ),
    (
        ("errors resolving", "Domain name not found", "DNS", "name resolution"),
        "resolve",
        False,
        "the host name cannot be resolved",
    ),
    (
        ("Connection refused",),
        "refused",
        False,
        "nothing listens there (connection refused)",
    ),
    (
        (
            "timed out",
            "tcp handshaker shutdown",
            # gRPC's own limit ended a TLS handshake that got no answer.
            "Endpoint closing",
        ),
        "timeout",
        False,
        (
            "the server did not complete the connection in time; a port that "
            "accepts and stays silent may be the wrong one, or behind a firewall"
        ),
    ),
    (
        ("Tls handshake failed", "SSL_ERROR", "Handshake", "handshake"),
        "tls",
        False,
        (
            "the TLS handshake failed; if the server is meant to be plaintext, "
            "pass insecure=True"
        ),
    ),
    (
        ("Socket closed", "Connection reset", "Broken pipe", "End of TCP stream"),
        "other",
        False,
        "the server closed the connection before it was ready; {closed}",
    ),
)


def connect_failed(details: str, options: AuthorizerOptions) -> ConnectFailed:
    """Return the error for gRPC's *details* of a failed attempt."""
    for needles, reason, permanent, hint in _KNOWN:
        if any(needle in details for needle in needles):
            text = hint.format(
                roots=(
                    f"cert_file_path={options.cert_file_path!r} holds"
                    if options.cert_file_path
                    else "gRPC ships; pass the right one as cert_file_path"
                ),
                closed=(
                    "is it using TLS? insecure=True was given"
                    if options.insecure
                    else "is it a gRPC server with TLS?"
                ),
            )
            return ConnectFailed(
                f"cannot connect to {options.url}: {text} (gRPC: {details})",
                reason=reason,
                permanent=permanent,
            )
    return ConnectFailed(f"cannot connect to {options.url}: {details}")


def connect_timed_out(options: AuthorizerOptions, timeout: float) -> ConnectFailed:
    """Return the error for an attempt that gave no reason in *timeout* seconds."""
    return ConnectFailed(
        f"cannot connect to {options.url}: not ready within connection_timeout="
        f"{timeout:g} s; the server may be overloaded, or accept and stay silent",
        reason="timeout",
    )


# What gRPC, and no server, says of a call whose socket was closed.
_CUT_OFF = ("Stream removed", "Socket closed", "Connection reset", "Broken pipe")


def is_refused_stream(error: grpc.aio.AioRpcError) -> bool:
    """
    Say whether the server ended this one stream, as it does when it has too many.

    RFC 9113, section 5.4.2: it is an error of the stream, and the connection is well.
    """
    return "RST_STREAM" in (error.details() or "")


def is_cut_off(error: grpc.aio.AioRpcError) -> bool:
    """Say whether the socket was closed under the call; the channel may not know."""
    details = error.details() or ""
    return any(text in details for text in _CUT_OFF)


_EARLY = 0.01
"""Seconds. By so much a deadline may come before its time where the server is."""


def in_time(error: Exception, deadline: float | None) -> Exception:
    """
    Return what a call ended with, DEADLINE_EXCEEDED if that was its *deadline*.

    It travels with the call, and a server on grpc-go, as Topaz is, resets the stream
    when it has passed: up to one time in ten that is here, as CANCELLED, before gRPC's
    own timer goes off. It is the silence that the others are.
    """
    if (
        deadline is None
        or time.time() < deadline - _EARLY
        or not isinstance(error, grpc.aio.AioRpcError)
        or error.code() is not grpc.StatusCode.CANCELLED
        or not is_refused_stream(error)
    ):
        return error
    late: Exception = grpc.aio.AioRpcError(
        grpc.StatusCode.DEADLINE_EXCEEDED,
        error.initial_metadata(),
        error.trailing_metadata(),
        details="Deadline Exceeded",
        debug_error_string=error.debug_error_string(),
    )
    return late
