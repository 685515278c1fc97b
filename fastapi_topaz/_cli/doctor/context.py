"""What the checks share: the settings, and what earlier checks have learned."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import attrs

from fastapi_topaz._rpc.target import MAX_MESSAGE_BYTES


if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from fastapi_topaz._cli.doctor.findings import Finding
    from fastapi_topaz._http2.addresses import Address, Endpoint
    from fastapi_topaz._rpc.metadata import Credentials, Metadata
    from fastapi_topaz._rpc.target import Target


__all__ = ["Checkup", "Settings"]


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


@attrs.frozen(kw_only=True)
class Settings:
    """
    What to check. The values are checked later, so that a wrong one is a finding.

    Args:
        url: As in `AuthorizerOptions`, and so are the other options of that class.
        policy_root: The package that all policies are below. None: not checked.
        policy_path: A policy that must exist. None: not checked.
        streams: The streams that the application uses on each connection.
        policy_instance_name: As in `TopazConfig`.
        policy_instance_label: As in `TopazConfig`.
        timeout: Time limit in seconds for each step.
        source: Where the settings come from, such as `main:config`. None: only the
            command line.
        now: Returns the time of this machine, with its zone.
    """

    url: str = "localhost:8282"
    tenant_id: str | None = None
    api_key: str | None = attrs.field(default=None, repr=False)
    cert_file_path: str | None = None
    insecure: bool = False
    client_cert_path: str | None = None
    client_key_path: str | None = None
    authority: str | None = None
    server_name: str | None = None
    extra_metadata: Metadata = attrs.field(default=(), repr=False)
    credentials: Credentials | None = attrs.field(default=None, repr=False)
    max_message_bytes: int = MAX_MESSAGE_BYTES
    policy_root: str | None = None
    policy_path: str | None = None
    streams: int = 1
    policy_instance_name: str | None = None
    policy_instance_label: str | None = None
    timeout: float = 3.0
    source: str | None = None
    now: Callable[[], dt.datetime] = _utc_now

    @property
    def has_secrets(self) -> bool:
        """Whether calls carry anything that only a trusted server may get."""
        given = (self.api_key, self.tenant_id, self.extra_metadata, self.credentials)
        return any(given)


@attrs.define
class Checkup:
    """
    One run of all checks.

    Attributes:
        settings: What to check.
        findings: What was found so far.
        target: The target, or None if the settings have none that can be used.
        has_credentials: Whether the target carries the credentials of the settings.
            It does not if an option is wrong.
        endpoint: The parsed url.
        context: The TLS settings of the pool, or None if there are none.
        addresses: The addresses of the host.
        reached: Those that accept TCP connections.
    """

    settings: Settings
    findings: list[Finding] = attrs.Factory(list)
    target: Target | None = None
    has_credentials: bool = False
    endpoint: Endpoint | None = None
    context: ssl.SSLContext | None = None
    addresses: tuple[Address, ...] = ()
    reached: list[Address] = attrs.Factory(list)

    def add(self, *findings: Finding) -> None:
        """Add findings."""
        self.findings.extend(findings)
