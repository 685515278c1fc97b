"""The checks of TLS: the handshake, the certificate, and what answers inside it."""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING, Final

import anyio
import attrs

from fastapi_topaz._cli.doctor.certificates import (
    CertificateFacts,
    certificates_in,
    date_findings,
    listed,
)
from fastapi_topaz._cli.doctor.findings import Level, found
from fastapi_topaz._cli.doctor.wire import (
    Speaks,
    Wire,
    first_bytes,
    leaf_context,
    lenient_context,
    shake_hands,
)
from fastapi_topaz._http2.tls import ROOTS_VARIABLE


if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Sequence

    from fastapi_topaz._cli.doctor.context import Checkup
    from fastapi_topaz._cli.doctor.findings import Finding
    from fastapi_topaz._cli.doctor.wire import FirstBytes, Handshake
    from fastapi_topaz._http2.addresses import Address
    from fastapi_topaz._rpc.target import Target


__all__ = ["Route", "route_to", "tls_fault"]


@attrs.frozen
class Route:
    """
    How the Authorizer at one address can be asked.

    Args:
        context: The TLS settings, or None for plaintext.
        is_trusted: Whether it is as configured and verified, so that the key may be
            sent.
    """

    context: ssl.SSLContext | None
    is_trusted: bool


_CLOSED: Final = (anyio.EndOfStream, anyio.BrokenResourceError, ConnectionError)

# Parts of `ssl.SSLError.reason`, with the finding. The first match wins.
_REASONS: Final = {
    "CERTIFICATE_REQUIRED": "client-certificate-required",
    "ALERT_BAD_CERTIFICATE": "client-certificate-refused",
    "ALERT_UNKNOWN_CA": "client-certificate-refused",
    "ALERT_UNSUPPORTED_CERTIFICATE": "client-certificate-refused",
    "ALERT_CERTIFICATE_": "client-certificate-refused",
    "ALERT_DECRYPT_ERROR": "client-certificate-refused",
    "ALERT_ACCESS_DENIED": "client-certificate-refused",
    "NO_APPLICATION_PROTOCOL": "alpn-missing",
    "PROTOCOL_VERSION": "tls-version",
    "UNSUPPORTED_PROTOCOL": "tls-version",
    "UNRECOGNIZED_NAME": "tls-name-unknown",
    "WRONG_VERSION_NUMBER": "tls-not-spoken",
    "PACKET_LENGTH_TOO_LONG": "tls-not-spoken",
    "HTTP_REQUEST": "tls-not-spoken",
    "RECORD_LAYER_FAILURE": "tls-not-spoken",
}

# Codes of X509_verify_cert of OpenSSL.
_VERIFY: Final = {
    **dict.fromkeys((2, 7, 18, 19, 20, 21), "certificate-unknown-ca"),
    9: "certificate-not-yet-valid",
    10: "certificate-expired",
    62: "certificate-wrong-name",
    64: "certificate-wrong-name",
}
_NAMES: Final = {62, 64}


def tls_fault(
    error: ssl.SSLError,
    target: Target,
    address: str,
    now: dt.datetime,
    facts: CertificateFacts | None = None,
) -> Finding:
    """
    Return the finding for an error of TLS at the time *now*.

    *facts* are those of the server's certificate, or None if it is not known.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        kind = _VERIFY.get(error.verify_code, "certificate-not-acceptable")
        said = f"the certificate is not accepted: {error.verify_message}"
        return found(kind, said, address, facts=_roots(kind, target, now, facts))
    # Python 3.11 has no name for some alerts, such as number 120.
    reason = error.reason or str(error).upper().replace(" ", "_")
    kind = next((each for part, each in _REASONS.items() if part in reason), "")
    has_certificate = target.client_cert_path is not None
    if kind == "client-certificate-refused" and not has_certificate:
        kind = "client-certificate-required"
    if kind == "client-certificate-required" and has_certificate:
        kind = "client-certificate-refused"
    said = f"the TLS handshake failed (TLS: {reason})"
    own = ""
    if kind == "client-certificate-refused":
        own = _held("client_cert_path", "--client-cert", target.client_cert_path, now)
    return found(kind or "tls-failed", said, address, facts=own)


def _roots(
    kind: str, target: Target, now: dt.datetime, facts: CertificateFacts | None
) -> str:
    """Return the names of the certificates that do not match, in sentences."""
    if kind == "certificate-wrong-name":
        names = ", ".join(facts.names[:_MOST_NAMES]) if facts is not None else ""
        return f"The certificate is for {names}." if names else ""
    if kind not in _ABOVE:
        return ""
    trusted = "Without --cert, only CAs that this system trusts are accepted."
    held: Sequence[CertificateFacts] = ()
    if (own := target.cert_file_path) is not None:
        held = certificates_in(own)
        trusted = _held("cert_file_path", "--cert", own, now)
    elif path := os.environ.get(ROOTS_VARIABLE):
        trusted = (
            f"Without --cert, only CAs in the file {path!r} are accepted, because the "
            f"environment variable {ROOTS_VARIABLE} names it."
        )
    if facts is None:
        return trusted
    issuer = "itself" if facts.issuer == facts.subject else facts.issuer
    said = f"{trusted} The server's certificate is signed by {issuer}."
    if kind == "certificate-unknown-ca" and facts.issuer in {
        each.subject for each in held
    }:
        said += " The CA in the file has that name, but another key."
    return said.strip()


_ABOVE: Final = {
    "certificate-unknown-ca",
    "certificate-expired",
    "certificate-not-yet-valid",
}
"""The findings that may be about the CA, and not about the server's certificate."""

_MOST_NAMES: Final = 8


def _held(parameter: str, option: str, path: str | None, now: dt.datetime) -> str:
    """Return which certificates the file of an option holds, as a sentence."""
    if path is None or not (held := certificates_in(path)):
        return ""
    return f"The file {path!r} of {option} ({parameter}) holds: {listed(held, now)}."


async def route_to(checkup: Checkup, address: Address) -> Route | None:
    """
    Find out what answers at *address*, and add what is found.

    Returns:
        How to ask the Authorizer there. None if it cannot be asked.
    """
    target = checkup.target
    assert target is not None  # noqa: S101
    assert checkup.endpoint is not None  # noqa: S101
    name = target.server_name or checkup.endpoint.certificate_host
    wire = Wire(address, None, name, checkup.settings.timeout)
    if target.insecure:
        return await _plain_route(checkup, target, wire)
    return await _tls_route(checkup, target, wire)


async def _plain_route(checkup: Checkup, target: Target, wire: Wire) -> Route | None:
    said = await first_bytes(wire)
    if said.speaks in {Speaks.CLOSED, Speaks.TLS, Speaks.OTHER}:
        # Some servers close the connection without an alert.
        context = lenient_context(target)
        shook = await _try_handshake(attrs.evolve(wire, context=context))
        if not isinstance(shook, Exception):
            text = "the server speaks TLS, but the options say plaintext"
            checkup.add(found("tls-expected", text, wire.address.text))
            return Route(context, is_trusted=False)
    checkup.add(_spoken(said, wire))
    return Route(None, is_trusted=True) if said.speaks is Speaks.HTTP2 else None


async def _tls_route(checkup: Checkup, target: Target, wire: Wire) -> Route | None:
    where = wire.address.text
    lenient = attrs.evolve(wire, context=lenient_context(target))
    shook = await _try_handshake(lenient)
    if isinstance(shook, TimeoutError):
        said = f"no answer to the TLS handshake within {wire.timeout:g} s"
        checkup.add(found("tls-timeout", said, where))
        return None
    if isinstance(shook, Exception):
        return await _without_tls(checkup, target, wire, shook)
    said = f"{shook.version}, ALPN {shook.protocol or 'none'}"
    checkup.add(found("tls", said, where))
    faults = await _certificate_faults(checkup, target, lenient, shook)
    checkup.add(*faults)
    if shook.protocol != "h2":
        said = "the server does not choose HTTP/2 (ALPN h2) in the TLS handshake"
        checkup.add(found("alpn-missing", said, where))
    is_trusted = checkup.context is not None and all(
        each.level is not Level.PROBLEM for each in faults
    )
    context = checkup.context if is_trusted else lenient.context
    try:
        inside = attrs.evolve(wire, context=context)
        answer = await first_bytes(inside)
        if answer.speaks is Speaks.CLOSED:
            # With TLS 1.3 the server says only after the handshake that it wants a
            # client certificate. The reset for an unread greeting can overtake that.
            await first_bytes(inside, greets=False)
    except ssl.SSLError as error:
        checkup.add(tls_fault(error, target, where, checkup.settings.now()))
        return None
    checkup.add(_spoken(answer, wire))
    # The pool refuses a server without ALPN, so it is not asked.
    if answer.speaks is not Speaks.HTTP2 or shook.protocol != "h2":
        return None
    return Route(context, is_trusted)


async def _without_tls(
    checkup: Checkup, target: Target, wire: Wire, failure: Exception
) -> Route | None:
    """Add why the TLS handshake failed. Perhaps the server speaks plaintext."""
    where = wire.address.text
    fault = None
    if isinstance(failure, ssl.SSLError):
        fault = tls_fault(failure, target, where, checkup.settings.now())
        if fault.id != "tls-not-spoken":
            checkup.add(fault)
            return None
    said = await first_bytes(wire)
    match said.speaks:
        case Speaks.HTTP2:
            text = "the server speaks HTTP/2 without TLS, but the options say TLS"
            checkup.add(found("tls-unexpected-plaintext", text, where))
            return Route(None, is_trusted=False)
        case Speaks.HTTP1:
            checkup.add(_spoken(said, wire))
        case _:
            text = "the server closes the connection during the TLS handshake"
            checkup.add(fault or found("closed-at-once", text, where))
    return None


async def _try_handshake(wire: Wire) -> Handshake | Exception:
    try:
        return await shake_hands(wire)
    except (TimeoutError, ssl.SSLError, OSError, *_CLOSED) as error:
        return error


async def _certificate_faults(
    checkup: Checkup, target: Target, lenient: Wire, shook: Handshake
) -> list[Finding]:
    """Add the facts of the certificate. Return what is wrong with it."""
    where = lenient.address.text
    faults: list[Finding] = []
    now, facts = checkup.settings.now(), None
    if shook.certificate is not None:
        try:
            facts = CertificateFacts.read(shook.certificate)
        except ValueError:
            said = "the certificate cannot be read"
            faults.append(found("certificate-not-acceptable", said, where))
        else:
            checkup.add(found("certificate", f"{facts}", where))
            faults += date_findings(facts, now, where)
    if checkup.context is None:
        return [*faults, *await _name_fault(target, lenient, shook, now, facts)]
    verified = await _try_handshake(attrs.evolve(lenient, context=checkup.context))
    if not isinstance(verified, ssl.SSLCertVerificationError):
        return faults
    faults.append(tls_fault(verified, target, where, now, facts))
    if verified.verify_code not in _NAMES:
        # OpenSSL stops at the first error, and checks the name late.
        faults += await _name_fault(target, lenient, shook, now, facts)
    return list({each.id: each for each in reversed(faults)}.values())[::-1]


async def _name_fault(
    target: Target,
    wire: Wire,
    shook: Handshake,
    now: dt.datetime,
    facts: CertificateFacts | None,
) -> list[Finding]:
    """Return a finding if the certificate is for another name, whatever its CA."""
    if shook.certificate is None:
        return []
    context = leaf_context(target, shook.certificate)
    checked = await _try_handshake(attrs.evolve(wire, context=context))
    if isinstance(checked, ssl.SSLCertVerificationError):
        fault = tls_fault(checked, target, wire.address.text, now, facts)
        if fault.id == "certificate-wrong-name":
            return [fault]
    return []


def _spoken(said: FirstBytes, wire: Wire) -> Finding:
    """Return the finding for what the server speaks."""
    kind, text = {
        Speaks.HTTP2: ("http2", "the server speaks HTTP/2"),
        Speaks.GOAWAY: ("server-goaway", "the server ends the connection (GOAWAY)"),
        Speaks.HTTP1: ("http1-server", f"the server answers HTTP/1 {said.status}"),
        Speaks.TLS: ("tls-expected", "the server answers with a TLS alert"),
        Speaks.OTHER: ("not-http2", "the server answers something else than HTTP/2"),
        Speaks.CLOSED: ("closed-at-once", "the server closes the connection at once"),
        Speaks.SILENT: (
            "server-silent",
            f"the server sends nothing within {wire.timeout:g} s",
        ),
    }[said.speaks]
    return found(kind, text, wire.address.text)
