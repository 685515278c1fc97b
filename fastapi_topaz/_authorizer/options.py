"""
The options of the authorizer, and the identity of a check.

Nothing here uses the network, a file or an event loop. So a module may create options
at import time, before a worker process forks.
"""

from __future__ import annotations

import enum
import os
from typing import Any, ClassVar, Final, Protocol

import attrs

from fastapi_topaz._authorizer.address import complete
from fastapi_topaz._checks import check_text
from fastapi_topaz._redaction import boundary, guarded
from fastapi_topaz._rpc.metadata import Credentials, Metadata, frozen_metadata
from fastapi_topaz._rpc.target import MAX_MESSAGE_BYTES, PATHS, Target


__all__ = [
    "PROBE",
    "AuthorizerOptions",
    "AuthorizerOptionsLike",
    "Identity",
    "IdentityLike",
    "IdentityType",
]


class IdentityLike(Protocol):
    """An `Identity`, or one of `aserto.client`."""

    @property
    def type(self) -> int:
        """The type of the value."""
        ...

    @property
    def value(self) -> str | None:
        """The subject, token or text."""
        ...


class AuthorizerOptionsLike(Protocol):
    """An `AuthorizerOptions`, or one of `aserto.client`."""

    @property
    def url(self) -> str:
        """The address of the authorizer."""
        ...

    @property
    def tenant_id(self) -> str | None:
        """The id of the tenant."""
        ...

    @property
    def api_key(self) -> str | None:
        """The API key."""
        ...


class IdentityType(enum.IntEnum):
    """
    The type of the value of an [Identity][fastapi_topaz.Identity].

    The numbers are the same as in `aserto.authorizer.v2.api.IdentityType`. Its long
    names work too.
    """

    IDENTITY_TYPE_UNKNOWN = 0
    IDENTITY_TYPE_NONE = 1
    IDENTITY_TYPE_SUB = 2
    IDENTITY_TYPE_JWT = 3
    IDENTITY_TYPE_MANUAL = 4

    NONE = 1
    """An anonymous caller, without a value."""
    SUB = 2
    """The subject of a token, such as a user id or an e-mail address."""
    JWT = 3
    """A complete JSON Web Token. Topaz verifies it."""
    MANUAL = 4
    """Passed to the policy unchanged, without a lookup in the directory."""


@guarded
@attrs.frozen(slots=False)
class Identity:
    """
    The user or other caller that a decision is about.

    Args:
        type: The type of *value*.
        value: The subject, token or text. None, the default, for an anonymous caller.

    Raises:
        TypeError: *type* is not an identity type, or *value* is not a str.
        ValueError: *type* is unknown, or *value* is missing.
    """

    type: IdentityType
    # Not in the repr: it may be a token, and reprs end up in logs.
    value: str | None = attrs.field(default=None, repr=False)
    # Not a field, so it is not compared.
    encoded: ClassVar[bytes | None] = None
    """The encoded identity. The package sets it on first use."""

    def __attrs_post_init__(self) -> None:
        if isinstance(self.type, bool) or not isinstance(self.type, int):
            # Show only its type. If the caller swapped the arguments, it may be a
            # token.
            given = type(self.type).__name__
            raise TypeError(f"type must be an IdentityType, got a {given}")
        try:
            kind = IdentityType(self.type)
        except ValueError:
            raise ValueError(
                f"type must be an IdentityType, got {self.type!r}"
            ) from None
        if self.value is not None and not isinstance(self.value, str):
            raise TypeError(
                f"value must be a str or None, got {type(self.value).__name__}"
            )
        if kind is IdentityType.IDENTITY_TYPE_UNKNOWN:
            raise ValueError("type must not be IDENTITY_TYPE_UNKNOWN: Topaz refuses it")
        if kind is not IdentityType.NONE and not self.value:
            raise ValueError(
                f"value must not be empty for an identity of type {kind.name}"
            )
        object.__setattr__(self, "type", kind)

    def __getstate__(self) -> dict[str, Any]:
        return {"type": self.type, "value": self.value}

    @classmethod
    @boundary
    def coerce(cls, identity: object) -> Identity:
        """
        Return *identity* as an `Identity`. None means the anonymous caller.

        An `aserto.client.Identity` has the same attributes and is accepted too. The
        error never shows the value.
        """
        if isinstance(identity, cls):
            return identity
        if identity is None:
            return ANONYMOUS
        try:
            return cls(identity.type, identity.value)  # type: ignore[attr-defined]
        except AttributeError:
            raise TypeError(
                f"identity must be an Identity, got {type(identity).__name__}"
            ) from None


# Every Topaz answers this call. In its default configuration, it even does so without
# credentials. Topaz serves grpc.health.v1 on another port.
PROBE = "/aserto.authorizer.v2.Authorizer/Info"

API_KEY: Final = "authorization"
TENANT_ID: Final = "aserto-tenant-id"
"""The keys of the metadata for these options."""

UNSERVED = (
    "is not an authorizer: it does not serve aserto.authorizer.v2.Authorizer; the url "
    "must lead to the port of Topaz's authorizer, which is 8282 by default"
)

ANONYMOUS = Identity(IdentityType.NONE)


_OPTIONAL = ("tenant_id", "api_key", *PATHS, "authority", "server_name")
"""The options whose empty text counts as None."""

_OF_TARGET = (
    *("url", "credentials", *PATHS, "authority", "server_name", "insecure"),
    "max_message_bytes",
)
"""The options that mean the same for a `Target`."""


@guarded
@attrs.frozen(kw_only=True)
class AuthorizerOptions:
    """
    The address of the authorizer, and the credentials for it.

    An empty text counts as None, except for *url*, because settings classes use an
    empty text for an unset variable.

    Args:
        url: `host`, `host:port` or `[IPv6]:port`. The default is `localhost:8282`. If
            the port is missing, it is 8282, and the attribute `url` includes it.
            These gRPC targets are accepted too: `dns:///host:port`,
            `dns://nameserver/host:port` (with the transport `grpcio` only),
            `ipv4:1.2.3.4:8282,5.6.7.8:8282`, `ipv6:[2001:db8::1]:8282`, `unix:/path`
            and `unix-abstract:name`. The schemes `xds` and `vsock` are not accepted.
            Write an internationalised host name in its ASCII form (`xn--...`).
        tenant_id: Sent as the metadata `aserto-tenant-id`. Default None.
        api_key: Sent as the metadata `authorization: basic KEY`. Default None.
        cert_file_path: A PEM file with the CA that signed the server's certificate.
            None, the default, means the root certificates of the system, or of gRPC
            with the transport `grpcio`. The file is read at every connect, so new
            connections use a rotated file.
        insecure: True means plaintext, without TLS. Default False: if the server does
            not support TLS, connecting fails. There is no fallback to plaintext. With
            an *api_key*, *extra_metadata* or *credentials*, and a *url* that is not
            loopback, the pool logs a WARNING when it opens.
        client_cert_path: A PEM file with the certificate of this client (mutual TLS).
            Default None. It is read at every connect. See `Target`.
        client_key_path: A PEM file with the private key of that certificate. Given if
            and only if *client_cert_path* is.
        authority: The `:authority` of requests. None, the default, means *server_name*
            if that is given, otherwise host and port of *url*.
        server_name: The name that the server's certificate must be for. None, the
            default, means the host of *url*.
        extra_metadata: Pairs that are sent with every call and every probe, in addition
            to those of *tenant_id* and *api_key*. Default none. No repr shows them.
        credentials: A function or coroutine function without arguments, which returns
            the metadata of one call. See `Target`. Default None.
        max_message_bytes: The most bytes of one request or response. Default 4 MiB. A
            call with a larger message ends with RESOURCE_EXHAUSTED.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: *url* has none of these forms, a header value cannot be sent,
            *extra_metadata* has a key of *tenant_id* or *api_key*, or see `Target`.
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
    # A repr may show a key, as that of a partial() does. It may not be hashable.
    credentials: Credentials | None = attrs.field(default=None, repr=False, hash=False)
    max_message_bytes: int = MAX_MESSAGE_BYTES

    def __attrs_post_init__(self) -> None:
        check_text("url", self.url, optional=False)
        object.__setattr__(self, "url", complete(self.url))
        for name in PATHS:
            if isinstance(path := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(path))
        for name in _OPTIONAL:
            if getattr(self, name) == "":
                object.__setattr__(self, name, None)
        check_text("tenant_id", self.tenant_id)
        if self.api_key is not None and not isinstance(self.api_key, str):
            raise TypeError(f"api_key must be a str, got {type(self.api_key).__name__}")
        check_text("api_key", self.api_key)
        for name in ("tenant_id", "api_key"):
            value = getattr(self, name)
            if value is not None and not (value.isascii() and value.isprintable()):
                # RFC 9113, section 8.2.1. The value may be a secret, so it is not
                # shown.
                raise ValueError(
                    f"{name} must be printable ASCII to be sent as a header"
                )
        extra = frozen_metadata(self.extra_metadata, "extra_metadata")
        object.__setattr__(self, "extra_metadata", extra)
        for option, key in (("api_key", API_KEY), ("tenant_id", TENANT_ID)):
            if getattr(self, option) is not None and key in dict(extra):
                raise ValueError(
                    f"extra_metadata must not have the key {key!r} if {option} is "
                    "given, because the server would get two values"
                )
        _ = self.target  # it checks the other options

    @property
    def metadata(self) -> Metadata:
        """The headers that are sent with every call, without those of `credentials`."""
        headers: list[tuple[str, str | bytes]] = []
        if self.api_key is not None:
            headers.append((API_KEY, f"basic {self.api_key}"))
        if self.tenant_id is not None:
            headers.append((TENANT_ID, self.tenant_id))
        return (*headers, *self.extra_metadata)

    @property
    def target(self) -> Target:
        """These options as a `Target` for `GrpcConnector`, with a probe for Topaz."""
        return Target(
            metadata=self.metadata,
            probe=PROBE,
            unserved=UNSERVED,
            **{name: getattr(self, name) for name in _OF_TARGET},
        )

    @classmethod
    @boundary
    def coerce(cls, options: Any) -> AuthorizerOptions:
        """
        Return *options* as `AuthorizerOptions`.

        An `aserto.client.AuthorizerOptions` is accepted too. It keeps the path of the
        certificate in a private attribute.

        Raises:
            TypeError: *options* has no `url`.
        """
        if isinstance(options, cls):
            return options
        if not hasattr(options, "url"):
            raise TypeError(
                "authorizer_options must be an AuthorizerOptions, got "
                f"{type(options).__name__}"
            )
        given = {
            field.name: getattr(options, field.name)
            for field in attrs.fields(cls)
            if hasattr(options, field.name)
        }
        if "cert_file_path" not in given:
            given["cert_file_path"] = getattr(options, "_cert_file_path", None)
        return cls(**given)
