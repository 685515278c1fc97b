"""
What the user configures, and every check of it.

Nothing here touches the network, a file or an event loop: options are built at
import time, before a worker process forks.
"""

from __future__ import annotations

import enum
import functools
import math
import os
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, Protocol

import attrs

from fastapi_topaz._authorizer.address import complete
from fastapi_topaz._redaction import boundary, guarded


if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = [
    "AuthorizerOptions",
    "Identity",
    "IdentityType",
    "PoolOptions",
    "fit_minimum",
    "seconds",
    "shown",
    "text",
]


def shown(value: object) -> str:
    """Return the text of *value* for a message, whatever it is."""
    try:
        return repr(value)
    except Exception:  # noqa: BLE001  (Python itself refuses numbers of 4,300 digits)
        return f"a {type(value).__name__} that cannot be shown"


def _count(name: str, value: object, minimum: int) -> None:
    # bool is an int to isinstance, but `max_connections=True` is a mistake.
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be an int, got {shown(value)} ({type(value).__name__})"
        )
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {shown(value)}")


def seconds(
    name: str, value: object, *, zero: bool = True, infinite: bool = True
) -> float:
    """Return *value* as a float of seconds, or say what is wrong with it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"{name} must be a number of seconds, got {shown(value)} "
            f"({type(value).__name__})"
        )
    given = value
    try:
        value = float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a number of seconds") from None
    if math.isnan(value) or value < 0 or (value == 0 and not zero):
        least = "at least 0" if zero else "more than 0"
        raise ValueError(f"{name} must be {least} seconds, got {given!r}")
    if math.isinf(value) and not infinite:
        raise ValueError(f"{name} must be a finite number of seconds, got {given!r}")
    return value


def text(name: str, value: object, *, optional: bool = True) -> None:
    """Return if *value* is a str with something in it, or say what is wrong with it."""
    if value is None and optional:
        return
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be a str, got {shown(value)} ({type(value).__name__})"
        )
    if not value.strip():
        raise ValueError(f"{name} must not be empty, got {value!r}")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(
            f"{name} must be True or False, got {shown(value)} ({type(value).__name__})"
        )


# Less would keep the event loop, or the server, busy with nothing else.
_LEAST = {
    "idle_check_interval": 0.001,
    "health_check_interval": 0.001,
    "max_lifetime": 1.0,
}


class IdentityLike(Protocol):
    """An `Identity`, or one of `aserto.client`."""

    @property
    def type(self) -> int:
        """What the value is."""
        ...

    @property
    def value(self) -> str | None:
        """The subject, token or text."""
        ...


class AuthorizerOptionsLike(Protocol):
    """An `AuthorizerOptions`, or one of `aserto.client`."""

    @property
    def url(self) -> str:
        """Where the authorizer is."""
        ...

    @property
    def tenant_id(self) -> str | None:
        """The tenant."""
        ...

    @property
    def api_key(self) -> str | None:
        """The key."""
        ...


P = ParamSpec("P")


def fit_minimum(init: Callable[P, None]) -> Callable[P, None]:
    """
    Let an omitted `min_connections` be 1 if `max_connections` is 1.

    Its default stays 2 in the signature of *init*, as it is documented. An explicit 2
    is a contradiction then, which *init* refuses: only the caller's arguments tell the
    two apart.
    """

    @functools.wraps(init)
    def fitting(*args: P.args, **kwargs: P.kwargs) -> None:
        if kwargs.get("max_connections") == 1:
            kwargs.setdefault("min_connections", 1)
        init(*args, **kwargs)

    return fitting


@attrs.frozen(kw_only=True)
class PoolOptions:
    """
    The parameters of a pool; `ConnectionPool` documents each, and has the defaults.

    Strictly private.
    """

    min_connections: int
    max_connections: int
    acquire_timeout: float
    connection_timeout: float
    max_idle_time: float
    idle_check_interval: float
    health_check_interval: float
    health_check_timeout: float
    eager_init: bool
    retry_on_failure: bool
    max_retries: int
    streams_per_connection: int
    max_waiting: int | None
    max_lifetime: float
    leak_threshold: float
    name: str | None

    def __attrs_post_init__(self) -> None:
        _count("min_connections", self.min_connections, 0)
        _count("max_connections", self.max_connections, 1)
        if self.min_connections > self.max_connections:
            raise ValueError(
                f"min_connections must not exceed max_connections, got "
                f"min_connections={shown(self.min_connections)} and "
                f"max_connections={shown(self.max_connections)}"
            )
        _count("max_retries", self.max_retries, 0)
        _count("streams_per_connection", self.streams_per_connection, 1)
        if self.max_waiting is not None:
            _count("max_waiting", self.max_waiting, 0)
        for name in (
            "acquire_timeout",
            "max_idle_time",
            "idle_check_interval",
            "health_check_interval",
            "max_lifetime",
            "leak_threshold",
        ):
            seconds(name, getattr(self, name))
        for name, least in _LEAST.items():
            if 0 < getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be 0, which is never, or at least {least:g} seconds, "
                    f"got {getattr(self, name)!r}"
                )
        for name in ("connection_timeout", "health_check_timeout"):
            seconds(name, getattr(self, name), zero=False, infinite=False)
        _flag("eager_init", self.eager_init)
        _flag("retry_on_failure", self.retry_on_failure)
        text("name", self.name)

    @property
    def capacity(self) -> int:
        """Leases the pool can give out at once."""
        return self.max_connections * self.streams_per_connection

    @property
    def attempts(self) -> int:
        """Rounds of connecting that one demand is worth."""
        return 1 + (self.max_retries if self.retry_on_failure else 0)


class IdentityType(enum.IntEnum):
    """
    What the value of an [Identity][fastapi_topaz.Identity] is.

    The numbers are those of `aserto.authorizer.v2.api.IdentityType`, and its long
    names work as well as the short ones.
    """

    IDENTITY_TYPE_UNKNOWN = 0
    IDENTITY_TYPE_NONE = 1
    IDENTITY_TYPE_SUB = 2
    IDENTITY_TYPE_JWT = 3
    IDENTITY_TYPE_MANUAL = 4

    NONE = 1
    """Nobody: an anonymous caller."""
    SUB = 2
    """The subject of a token, such as a user id or an e-mail address."""
    JWT = 3
    """A whole JSON Web Token; Topaz verifies it."""
    MANUAL = 4
    """Handed to the policy as it is, without looking anybody up."""


@guarded
@attrs.frozen(slots=False)
class Identity:
    """
    On whose behalf a decision is asked for.

    Args:
        type: What *value* is.
        value: The subject, token or text; None for an anonymous caller.

    Raises:
        TypeError: *type* is no identity type, or *value* no str.
        ValueError: *type* is unknown, or *value* is missing.
    """

    type: IdentityType
    # Not in the repr: it may be a token, and reprs end up in logs.
    value: str | None = attrs.field(default=None, repr=False)
    # What goes over the wire, once somebody needed it; no part of what it is.
    encoded: ClassVar[bytes | None] = None

    def __attrs_post_init__(self) -> None:
        if isinstance(self.type, bool) or not isinstance(self.type, int):
            # By its type: the arguments may be swapped, and the value a token.
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
        Return *identity* as an `Identity`; None is the anonymous caller.

        Objects of `aserto.client.Identity` have the same attributes and are
        welcome. The value never appears in the error.
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


ANONYMOUS = Identity(IdentityType.NONE)


@guarded
@attrs.frozen(kw_only=True)
class AuthorizerOptions:
    """
    Where the authorizer is, and how to talk to it.

    An empty `tenant_id`, `api_key` or `cert_file_path` counts as None, because that is
    what settings classes hold for an unset variable.

    Args:
        url: `host`, `host:port` or `[IPv6]:port`. The port is 8282 if it is missing,
            and the attribute `url` includes it. These targets of gRPC are accepted
            too: `dns:///host:port`, `dns://nameserver/host:port`,
            `ipv4:1.2.3.4:8282,5.6.7.8:8282`, `ipv6:[2001:db8::1]:8282`,
            `unix:/path` and `unix-abstract:name`. The schemes `xds` and `vsock` are
            not. Write an internationalised host name in its ASCII form (`xn--...`).
        tenant_id: Sent as the metadata `aserto-tenant-id`.
        api_key: Sent as the metadata `authorization: basic KEY`.
        cert_file_path: A PEM file with the CA that signed the server's certificate;
            None means the roots that gRPC ships. Read at every connect, so a
            rotated file is used by new connections.
        insecure: True for plaintext, without TLS. Never a fallback: a server that
            does not speak TLS is an error otherwise. With an *api_key* and a *url*
            that is no loopback, the pool logs a WARNING when it opens.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: *url* has none of these forms, or a header value cannot be sent.
    """

    url: str = "localhost:8282"
    tenant_id: str | None = None
    api_key: str | None = attrs.field(default=None, repr=False)
    cert_file_path: str | None = None
    insecure: bool = False

    def __attrs_post_init__(self) -> None:
        text("url", self.url, optional=False)
        object.__setattr__(self, "url", complete(self.url))
        if isinstance(self.cert_file_path, os.PathLike):
            object.__setattr__(self, "cert_file_path", os.fspath(self.cert_file_path))
        for name in ("tenant_id", "api_key", "cert_file_path"):
            if getattr(self, name) == "":
                object.__setattr__(self, name, None)
        for name in ("tenant_id", "cert_file_path"):
            text(name, getattr(self, name))
        if self.api_key is not None and not isinstance(self.api_key, str):
            raise TypeError(f"api_key must be a str, got {type(self.api_key).__name__}")
        text("api_key", self.api_key)
        for name in ("tenant_id", "api_key"):
            value = getattr(self, name)
            if value is not None and not (value.isascii() and value.isprintable()):
                # RFC 9113, section 8.2.1. The value may be a secret: not shown.
                raise ValueError(
                    f"{name} must be printable ASCII to be sent as a header"
                )
        _flag("insecure", self.insecure)
        if self.insecure and self.cert_file_path is not None:
            raise ValueError(
                "cert_file_path and insecure=True exclude each other, got "
                f"cert_file_path={self.cert_file_path!r}"
            )

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The headers that go with every call."""
        headers = []
        if self.api_key is not None:
            headers.append(("authorization", f"basic {self.api_key}"))
        if self.tenant_id is not None:
            headers.append(("aserto-tenant-id", self.tenant_id))
        return tuple(headers)

    @classmethod
    @boundary
    def coerce(cls, options: Any) -> AuthorizerOptions:
        """
        Return *options* as `AuthorizerOptions`.

        Objects of `aserto.client.AuthorizerOptions` are welcome; they keep the path
        of the certificate in a private attribute.

        Raises:
            TypeError: *options* has no `url`.
        """
        if isinstance(options, cls):
            return options
        try:
            url = options.url
        except AttributeError:
            raise TypeError(
                "authorizer_options must be an AuthorizerOptions, got "
                f"{type(options).__name__}"
            ) from None
        return cls(
            url=url,
            tenant_id=getattr(options, "tenant_id", None),
            api_key=getattr(options, "api_key", None),
            cert_file_path=getattr(
                options, "cert_file_path", getattr(options, "_cert_file_path", None)
            ),
            insecure=getattr(options, "insecure", False),
        )
