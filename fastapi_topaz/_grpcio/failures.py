"""
Why a connection or a call failed, by the texts of gRPC's core.

gRPC gives the reason only as a text. All texts are matched here. The error of a failed
connection says what to do. An unknown text is passed on.

gRPC reports a status that it made itself in the same way as one that the server sent:
one code and one text. The text of a call is matched from its beginning, because a proxy
may quote the same words: "upstream reset: Connection reset by peer" is an answer. gRPC
1.81 and newer put their own words into "Stream removed (...)".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import grpc
import grpc.aio

from fastapi_topaz._rpc.certificates import client_fault, name_of
from fastapi_topaz._rpc.clock import monotonic
from fastapi_topaz._rpc.statuses import EndedCall, Ending
from fastapi_topaz.exceptions import ConnectFailed


if TYPE_CHECKING:
    from fastapi_topaz._rpc.target import Target
    from fastapi_topaz.exceptions import FailureReason


__all__ = [
    "connect_failed",
    "connect_timed_out",
    "ended",
    "hung_up",
    "out_of_time",
    "unserved",
]


# The texts are those of gRPC 1.80 to 1.85 and of its BoringSSL, collected from servers
# that fail in each of these ways. After the reason of a failed handshake, BoringSSL
# adds its verdict on the server's certificate: "OK", or "Invalid certificate
# verification context" if it has not got one yet.
#
# Each row: parts of gRPC's text, reason, permanent, message. The first match wins.
_KNOWN: tuple[tuple[tuple[str, ...], FailureReason, bool, str], ...] = (
    (
        ("certificate has expired",),
        "tls",
        True,
        (
            "the server's certificate, or that of a CA above it, has expired by the "
            "clock of this machine"
        ),
    ),
    (
        ("certificate is not yet valid",),
        "tls",
        True,
        (
            "the server's certificate, or that of a CA above it, is not yet valid by "
            "the clock of this machine"
        ),
    ),
    (
        ("unsupported certificate purpose", "KEY_USAGE_BIT_INCORRECT"),
        "tls",
        True,
        (
            "the server's certificate has the wrong purpose: its key usage does not "
            "allow server authentication"
        ),
    ),
    (
        ("certificate signature failure", "BAD_SIGNATURE"),
        "tls",
        True,
        (
            "the server's certificate is not signed by the CA of that name that "
            "{roots}; was the CA created again with another key?"
        ),
    ),
    (
        ("issuer certificate", "self signed", "self-signed", "the first certificate"),
        "tls",
        True,
        "the server's certificate is not signed by a CA that {roots}",
    ),
    (
        ("CERTIFICATE_VERIFY_FAILED",),
        "tls",
        True,
        "gRPC refuses the server's certificate; its reason is at the end",
    ),
    (
        ("Hostname Verification", "Custom verification check", "Peer name"),
        "tls",
        True,
        "the server's certificate is not valid for {name}",
    ),
    (
        ("missing selected ALPN property", "NO_APPLICATION_PROTOCOL"),
        "tls",
        True,
        (
            "the server speaks TLS but does not offer HTTP/2 in it (ALPN h2), which "
            "gRPC needs; it may be a proxy for HTTP/1.1 only"
        ),
    ),
    (
        ("ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL"),
        "tls",
        True,
        "the server only speaks old versions of TLS; gRPC needs TLS 1.2 or newer",
    ),
    (
        (
            # With TLS 1.3 the alert comes after the handshake. gRPC does not read it.
            "Unwrap failed",
            # The server's certificate was accepted, so the client's is missing.
            "ALERT_HANDSHAKE_FAILURE: OK",
            "ALERT_CERTIFICATE_",
            "ALERT_BAD_CERTIFICATE",
            "ALERT_UNSUPPORTED_CERTIFICATE",
            "ALERT_UNKNOWN_CA",
            "ALERT_ACCESS_DENIED",
        ),
        "tls",
        True,
        "{client}",
    ),
    (
        ("ALERT_HANDSHAKE_FAILURE", "ALERT_INSUFFICIENT_SECURITY"),
        "tls",
        True,
        (
            "the server refused the TLS handshake: gRPC supports none of its ciphers, "
            "or not the kind of key in its certificate"
        ),
    ),
    (
        ("ALERT_UNRECOGNIZED_NAME",),
        "tls",
        True,
        "the server has no certificate for {name}",
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
        "gRPC cannot use the certificates that {roots}, or those of the client",
    ),
    (
        ("target uri is not valid", "Failed to create channel"),
        "resolve",
        True,
        "gRPC cannot read url as a target; write host:port",
    ),
    (
        ("Too many open files",),
        "other",
        False,
        (
            "this process has no file descriptor left; raise its limit (ulimit -n), or "
            "look for the code that leaks them"
        ),
    ),
    (
        ("errors resolving", "Domain name not found", "DNS", "name resolution"),
        "resolve",
        False,
        "the host name cannot be resolved",
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
            "the server did not complete the connection in time; if the port accepts "
            "connections and sends nothing, it may be the wrong port, or a firewall "
            "is in between"
        ),
    ),
    (
        ("Socket closed", "Connection reset", "Broken pipe", "End of TCP stream"),
        "other",
        False,
        "the server closed the connection before it was ready; {closed}",
    ),
    (
        ("Tls handshake failed", "SSL_ERROR", "Handshake", "handshake"),
        "tls",
        False,
        "the TLS handshake failed",
    ),
    (
        ("Connection refused",),
        "refused",
        False,
        "nothing listens there (connection refused)",
    ),
)


def connect_failed(details: str, target: Target) -> ConnectFailed:
    """Return the error for gRPC's *details* of a failed attempt."""
    reason: FailureReason = "other"
    permanent, message = False, details
    for needles, row_reason, row_permanent, hint in _KNOWN:
        if any(needle in details for needle in needles):
            reason, permanent = row_reason, row_permanent
            message = f"{_filled(hint, target)} (gRPC: {details})"
            break
    return ConnectFailed(
        f"cannot connect to {target.url}: {message}", reason=reason, permanent=permanent
    )


def _filled(hint: str, target: Target) -> str:
    """Return *hint* with the words for *target*."""
    return hint.format(
        roots=(
            f"cert_file_path={target.cert_file_path!r} holds"
            if target.cert_file_path
            else "gRPC ships; pass the PEM file of its CA as cert_file_path"
        ),
        closed=(
            "is it using TLS? insecure=True was given"
            if target.insecure
            else "is it a gRPC server with TLS? perhaps " + client_fault(target)
        ),
        client=client_fault(target),
        name=name_of(target),
    )


def hung_up(target: Target) -> ConnectFailed:
    """Return the error for a connection that ended as soon as it was made."""
    return ConnectFailed(
        f"cannot connect to {target.url}: the server ended the connection as soon as "
        "it was ready (GOAWAY, or the socket was closed); it may be shutting down, or "
        "a proxy may have no server behind it"
    )


def connect_timed_out(target: Target, timeout: float) -> ConnectFailed:
    """Return the error for an attempt that gave no reason in *timeout* seconds."""
    return ConnectFailed(
        f"cannot connect to {target.url}: not ready within connection_timeout="
        f"{timeout:g} s; the server may be overloaded, or send nothing",
        reason="timeout",
    )


def unserved(target: Target) -> ConnectFailed:
    """Return the error for a server that does not know the service of the probe."""
    return ConnectFailed(
        f"cannot connect to {target.url}: the gRPC server there {target.unserved}",
        permanent=True,
    )


def out_of_time() -> EndedCall:
    """Return the error of a call whose deadline passed before it was sent."""
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    return EndedCall(Ending.TIMED_OUT, code, "Deadline Exceeded")


# The first match wins. The text of an RST_STREAM or GOAWAY may be followed by more.
_ENDINGS: Final = tuple(
    (re.compile(text), how)
    for text, how in (
        (
            r"(RST_STREAM \()?Received RST_STREAM with error code 7\b",
            Ending.REFUSED_STREAM,
        ),
        (r"(RST_STREAM \()?Received RST_STREAM", Ending.RESET),
        (r"GOAWAY received", Ending.GOAWAY),
        (r"Received http2 header with status: |No status received", Ending.NO_STATUS),
        (r"Data frame with END_STREAM", Ending.NO_STATUS),
        (
            r"Socket closed|(recvmsg|sendmsg|writev?):|Connection reset|Broken pipe",
            Ending.CUT_OFF,
        ),
    )
)
_WRAPPED: Final = re.compile(r"Stream removed( \(|$)")

_EARLY = 0.01
"""Seconds by which a deadline may pass earlier at the server than here."""


def ended(error: grpc.aio.AioRpcError, deadline: float | None) -> EndedCall:
    """
    Return *error* of grpc.aio with how its call ended.

    *deadline* is a time of `monotonic`. It travels with the call. A server on grpc-go,
    such as Topaz, resets the stream when it has passed. Up to one time in ten, that
    arrives here as CANCELLED before gRPC's own timer fires. So it is DEADLINE_EXCEEDED.
    """
    if isinstance(error, EndedCall):
        return error
    how, code, details = _how(error), error.code(), error.details() or ""
    if (
        how is Ending.RESET
        and code is grpc.StatusCode.CANCELLED
        and deadline is not None
        and monotonic() >= deadline - _EARLY
    ):
        late = out_of_time()
        how, code, details = late.how, late.code(), late.details() or ""
    return EndedCall(
        how,
        code,
        details,
        tuple(error.initial_metadata()),
        tuple(error.trailing_metadata()),
        error.debug_error_string(),
    )


def _how(error: grpc.aio.AioRpcError) -> Ending:
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Ending.TIMED_OUT
    details = error.details() or ""
    wrapped = _WRAPPED.match(details)
    start = wrapped.end() if wrapped else 0
    for text, how in _ENDINGS:
        if text.match(details, start):
            return how
    # With other codes gRPC refuses the answer itself, such as one that is too large.
    unknown = error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN}
    return Ending.CUT_OFF if wrapped and unknown else Ending.STATUS
