"""The facts in a certificate, also in one that is not trusted."""

from __future__ import annotations

import datetime as dt
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
from cryptography import x509
from cryptography.x509.oid import NameOID

from fastapi_topaz._cli.doctor.findings import found


if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastapi_topaz._cli.doctor.findings import Finding


__all__ = ["CertificateFacts", "certificates_in", "date_findings", "listed"]


SOON: Final = dt.timedelta(days=14)

_MOST_LISTED: Final = 3
"""The most certificates of one file that are listed."""


@attrs.frozen
class CertificateFacts:
    """The dates and names of one certificate."""

    begins: dt.datetime
    ends: dt.datetime
    names: tuple[str, ...]
    issuer: str
    subject: str
    is_ca: bool

    @classmethod
    def read(cls, der: bytes) -> CertificateFacts:
        """
        Read a certificate in DER format.

        Raises:
            ValueError: It cannot be read.
        """
        return cls.of(x509.load_der_x509_certificate(der))

    @classmethod
    def of(cls, certificate: x509.Certificate) -> CertificateFacts:
        """
        Return the facts in *certificate*.

        Raises:
            ValueError: An extension cannot be read.
        """
        return cls(
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
            _names(certificate),
            _common_name(certificate.issuer),
            _common_name(certificate.subject),
            _is_ca(certificate),
        )

    def __str__(self) -> str:
        names = ", ".join(self.names) or "no name"
        return (
            f"for {names}; valid from {self.begins:%Y-%m-%d} to {self.ends:%Y-%m-%d}; "
            f"issued by {self.issuer or 'an issuer without a name'}"
        )


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        extension = certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
    except x509.ExtensionNotFound:
        return ()
    names = extension.value.get_values_for_type(x509.DNSName)
    addresses = extension.value.get_values_for_type(x509.IPAddress)
    return (*names, *map(str, addresses))


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        extension = certificate.extensions.get_extension_for_class(
            x509.BasicConstraints
        )
    except x509.ExtensionNotFound:
        return certificate.issuer == certificate.subject  # as in old certificates
    return extension.value.ca


def certificates_in(path: str) -> list[CertificateFacts]:
    """Return the certificates in the PEM file at *path*. Empty if it is unreadable."""
    try:
        # A bundle may hold old certificates, about which cryptography warns.
        with warnings.catch_warnings(action="ignore"):
            loaded = x509.load_pem_x509_certificates(Path(path).read_bytes())
            return [CertificateFacts.of(each) for each in loaded]
    except (OSError, ValueError):
        return []


def listed(certificates: Sequence[CertificateFacts], now: dt.datetime) -> str:
    """Return the subjects of the first *certificates*, with what is wrong at *now*."""
    others = len(certificates) - _MOST_LISTED
    more = f" and {others} more" if others > 0 else ""
    first = certificates[:_MOST_LISTED]
    return ", ".join(_titled(each, now) for each in first) + more


def _titled(facts: CertificateFacts, now: dt.datetime) -> str:
    notes = [] if facts.is_ca else [f"not a CA, signed by {facts.issuer}"]
    if now > facts.ends:
        notes.append(f"expired on {facts.ends:%Y-%m-%d}")
    if now < facts.begins:
        notes.append(f"valid only from {facts.begins:%Y-%m-%d}")
    title = facts.subject or "a certificate without a name"
    return f"{title} ({', '.join(notes)})" if notes else title


def _common_name(name: x509.Name) -> str:
    for each in name.get_attributes_for_oid(NameOID.COMMON_NAME):
        return str(each.value)
    return name.rfc4514_string()


def date_findings(
    facts: CertificateFacts, now: dt.datetime, address: str
) -> list[Finding]:
    """Return what is wrong with the dates of a certificate at *now*."""
    if now > facts.ends:
        said = f"the certificate expired on {facts.ends:%Y-%m-%d %H:%M} UTC"
        return [found("certificate-expired", said, address)]
    if now < facts.begins:
        said = f"the certificate is valid only from {facts.begins:%Y-%m-%d %H:%M} UTC"
        return [found("certificate-not-yet-valid", said, address)]
    if facts.ends - now < SOON:
        days = (facts.ends - now).days
        said = f"the certificate expires in {days} days"
        return [found("certificate-expires-soon", said, address)]
    return []
