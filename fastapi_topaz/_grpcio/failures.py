"""
Why a connection or a call failed, as far as only the text of the failure tells.

gRPC gives the reason in no other way, so the texts are read here, in one place, and
connections that failed get words that say what to do. An unknown text is passed on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import grpc.aio

from fastapi_topaz._rpc.certificates import client_fault, name_of
from fastapi_topaz._rpc.clock import monotonic
from fastapi_topaz._rpc.statuses import Ending, ending
from fastapi_topaz.exceptions import ConnectFailed


if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastapi_topaz._rpc.target import Target
    from fastapi_topaz.exceptions import FailureReason


__all__ = [
    "connect_failed",
    "connect_timed_out",
    "each_failed",
    "hung_up",
    "in_time",
    "out_of_time",
    "unserved",
]


# The texts are those of gRPC 1.80 to 1.85 and of its BoringSSL, collected from servers
# that fail in each of these ways. After the reason of a failed handshake BoringSSL says
# what it thinks of the server's certificate: "OK", or "Invalid certificate verification
# context" if it has not seen one yet.
#
# Each row: parts of gRPC's text, reason, permanent, message. The first match wins; of
# several addresses, the one whose row comes first.
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
            # With TLS 1.3 the server says so after the handshake, where gRPC does not
            # read the alert.
            "Unwrap failed",
            # The server's certificate was accepted, so ours is what is missing.
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

_MOST = 16
"""Addresses that a message lists."""


def connect_failed(details: str, target: Target) -> ConnectFailed:
    """Return the error for gRPC's *details* of a failed attempt."""
    _, reason, permanent, said = _cause(details, target)
    return ConnectFailed(
        f"cannot connect to {target.url}: {said}"
        + (f" (gRPC: {details})" if said != details else ""),
        reason=reason,
        permanent=permanent,
    )


def each_failed(
    failed: ConnectFailed,
    target: Target,
    tried: Sequence[tuple[str, str | None]],
) -> ConnectFailed:
    """
    Return the error for an attempt at several addresses, *tried* with gRPC's texts.

    It is *failed*, which is about one of them, if gRPC does not say why each failed.
    """
    causes = []
    for address, text in tried:
        if text is None:
            return failed
        causes.append((_cause(text, target), address, text))
    causes.sort()
    by_hint: dict[str, list[str]] = {}
    for (_, _, _, hint), address, _ in causes:
        by_hint.setdefault(hint, []).append(address)
    said = "; ".join(
        f"{_listed(addresses)}: {hint}" for hint, addresses in by_hint.items()
    )
    (_, reason, _, _), _, details = causes[0]
    return ConnectFailed(
        f"cannot connect to {target.url}: {said} (gRPC: {details})",
        reason=reason,
        # An address whose fault is not permanent may come back.
        permanent=all(permanent for (_, _, permanent, _), _, _ in causes),
    )


def _listed(addresses: Sequence[str]) -> str:
    more = f" and {len(addresses) - _MOST} more" if len(addresses) > _MOST else ""
    return f"{', '.join(addresses[:_MOST])}{more}"


def _cause(details: str, target: Target) -> tuple[int, FailureReason, bool, str]:
    """Return the row of `_KNOWN` that *details* match, by its number."""
    for number, (needles, reason, permanent, hint) in enumerate(_KNOWN):
        if any(needle in details for needle in needles):
            said = hint.format(
                roots=(
                    f"cert_file_path={target.cert_file_path!r} holds"
                    if target.cert_file_path
                    else "gRPC ships; pass the right one as cert_file_path"
                ),
                closed=(
                    "is it using TLS? insecure=True was given"
                    if target.insecure
                    else "is it a gRPC server with TLS? perhaps " + client_fault(target)
                ),
                client=client_fault(target),
                name=name_of(target),
            )
            return number, reason, permanent, said
    return len(_KNOWN), "other", False, details


def hung_up(target: Target) -> ConnectFailed:
    """Return the error for a connection that ended as soon as it was made."""
    return ConnectFailed(
        f"cannot connect to {target.url}: the server ended the connection as soon as "
        "it was ready (GOAWAY, or the socket was closed); it may be shutting down, or "
        "a proxy may have no server behind it"
    )


def connect_timed_out(
    target: Target,
    timeout: float,
    tried: Sequence[tuple[str, str | None]] = (),
) -> ConnectFailed:
    """Return the error for an attempt that gave no reason in *timeout* seconds."""
    each = "; ".join(
        f"{address}: {text or 'no answer'}" for address, text in tried[:_MOST]
    )
    return ConnectFailed(
        f"cannot connect to {target.url}: not ready within connection_timeout="
        f"{timeout:g} s; the server may be overloaded, or send nothing"
        + (f" (tried {each})" if each else ""),
        reason="timeout",
    )


def unserved(target: Target) -> ConnectFailed:
    """Return the error for a server that does not know the service of the probe."""
    return ConnectFailed(
        f"cannot connect to {target.url}: the gRPC server there {target.unserved}",
        permanent=True,
    )


def out_of_time() -> Exception:
    """Return the error of a call whose deadline came before it was sent."""
    none = grpc.aio.Metadata()
    error: Exception = grpc.aio.AioRpcError(
        grpc.StatusCode.DEADLINE_EXCEEDED, none, none, details="Deadline Exceeded"
    )
    return error


_EARLY = 0.01
"""Seconds. By so much a deadline may come before its time where the server is."""


def in_time(error: Exception, deadline: float | None) -> Exception:
    """
    Return what a call ended with, DEADLINE_EXCEEDED if that was its *deadline*.

    *deadline* is a time of `monotonic`.

    It travels with the call, and a server on grpc-go, as Topaz is, resets the stream
    when it has passed: up to one time in ten that is here, as CANCELLED, before gRPC's
    own timer goes off. It is the silence that the others are.
    """
    if (
        deadline is None
        or monotonic() < deadline - _EARLY
        or not isinstance(error, grpc.aio.AioRpcError)
        or error.code() is not grpc.StatusCode.CANCELLED
        or ending(error) is not Ending.RESET
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
