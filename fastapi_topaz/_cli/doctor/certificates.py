"""The facts in a certificate, also in one that is not trusted."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Final

import attrs
from cryptography import x509
from cryptography.x509.oid import NameOID

from fastapi_topaz._cli.doctor.findings import found


if TYPE_CHECKING:
    from fastapi_topaz._cli.doctor.findings import Finding


__all__ = ["CertificateFacts", "date_findings"]


SOON: Final = dt.timedelta(days=14)


@attrs.frozen
class CertificateFacts:
    """The dates and names of one certificate."""

    begins: dt.datetime
    ends: dt.datetime
    names: tuple[str, ...]
    issuer: str

    @classmethod
    def read(cls, der: bytes) -> CertificateFacts:
        """
        Read a certificate in DER format.

        Raises:
            ValueError: It cannot be read.
        """
        certificate = x509.load_der_x509_certificate(der)
        return cls(
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
            _names(certificate),
            _common_name(certificate.issuer),
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
