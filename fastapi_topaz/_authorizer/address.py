"""
Checks the url of an authorizer, and adds the port if it is missing.

gRPC itself accepts nearly any text as a target. For example, it uses
`grpc://topaz:8282` as a host name, and connects to port 17284 for `topaz:82820`. So
this module checks the url first.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["complete"]


_DEFAULT_PORT = 8282

_FORMS = (
    "host, host:port, [IPv6]:port, dns:///host:port, dns://nameserver/host:port, "
    "ipv4:ADDRESS:port,..., ipv6:[ADDRESS]:port,..., unix:/path or unix-abstract:name"
)

# Host names may not have underscores, but names of containers often do.
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")

_SOCKET_PATH_LIMIT = 107
"""Maximum length of a socket path on Linux, in bytes."""


def complete(url: str) -> str:
    """
    Return *url*, with port 8282 for each address without a port.

    Raises:
        ValueError: *url* has none of the accepted forms.
    """
    try:
        return _complete(url)
    except ValueError as error:
        without = " without a scheme" if "://" in url else ""
        raise ValueError(
            f"url must be host:port{without}, got {_shown(url)!r}: {error}; "
            f"accepted are {_FORMS}"
        ) from None


def _shown(url: str) -> str:
    """Return *url* with the password of its user replaced by `***`."""
    user, at, host = url.rpartition("@")
    name = re.match(r"([A-Za-z0-9+.-]*://)?[^:]*", user)
    assert name is not None  # noqa: S101  (it matches any text)
    return f"{name.group()}{':***' if name.group() != user else ''}{at}{host}"


def _complete(url: str) -> str:
    if not url.isprintable() or " " in url:
        raise ValueError("it has spaces or control characters")
    if not url.isascii():
        raise ValueError(
            "it has characters beyond ASCII; write a host name as xn--... "
            "(IDNA), and percent-encode a path"
        )
    scheme, colon, rest = url.partition(":")
    name = scheme.lower()
    if name in {"http", "https"} and rest.startswith("//"):
        raise ValueError(
            f"remove {name}://, because TLS is the default, and insecure=True means "
            "plaintext"
        )
    if colon and name in _SCHEMES:
        return f"{scheme}:{_SCHEMES[name](rest)}"
    if (colon and name in _UNSUPPORTED) or rest.startswith("//"):
        raise ValueError(f"the scheme {scheme}: is not supported")
    return _host_and_port(url)


def _dns(rest: str) -> str:
    if not rest.startswith("//"):
        return _host_and_port(rest)
    server, slash, target = rest[2:].partition("/")
    if not slash:
        raise ValueError("write dns:///host:port; a name server follows dns://")
    if server:
        _host_and_port(server)
    return f"//{server}/{_host_and_port(target)}"


def _ipv4(rest: str) -> str:
    addresses = [_split(each) for each in rest.split(",")]
    for host, _ in addresses:
        _check_ipv4(host)
    return ",".join(f"{host}:{port}" for host, port in addresses)


def _ipv6(rest: str) -> str:
    addresses = [_split(each) for each in rest.split(",")]
    for host, _ in addresses:
        if not host.startswith("["):
            raise ValueError(f"{host!r} is not an IPv6 address")
    return ",".join(f"{host}:{port}" for host, port in addresses)


def _unix(rest: str) -> str:
    path = rest.removeprefix("//")
    if path != rest and not path.startswith("/"):
        raise ValueError("write unix:path, or unix:///path if it begins with a slash")
    _check_socket(path)
    return rest


def _unix_abstract(rest: str) -> str:
    _check_socket(rest)
    return rest


_SCHEMES: dict[str, Callable[[str], str]] = {
    "dns": _dns,
    "ipv4": _ipv4,
    "ipv6": _ipv6,
    "unix": _unix,
    "unix-abstract": _unix_abstract,
}

# Schemes of gRPC that are not supported here. They are not host names.
_UNSUPPORTED = {"xds", "vsock", "google-c2p"}


def _check_socket(path: str) -> None:
    if not path:
        raise ValueError("it names no socket")
    if "?" in path or "#" in path:
        raise ValueError("percent-encode ? and # in the path of a socket")
    if len(path) > _SOCKET_PATH_LIMIT:
        raise ValueError(
            f"the path of a socket has at most {_SOCKET_PATH_LIMIT} characters"
        )


def _host_and_port(text: str) -> str:
    host, port = _split(text)
    if not host.startswith("["):
        _check_name(host)
    return f"{host}:{port}"


def _split(text: str) -> tuple[str, int]:
    """Return the host and the port. An IPv6 address is in brackets."""
    if "@" in text:
        raise ValueError("it must not have a user name; the key is passed as api_key")
    if any(each in text for each in "/?#"):
        raise ValueError("it must not have a path, or a slash at its end")
    if text.startswith("["):
        address, closed, rest = text[1:].partition("]")
        if not closed or not (rest == "" or rest.startswith(":")):
            raise ValueError("[IPv6] is followed by :port, or by nothing")
        if not _is_ipv6(address):
            raise ValueError(f"{address!r} is not an IPv6 address")
        return f"[{address}]", _port(rest[1:]) if rest else _DEFAULT_PORT
    host, colon, last = text.rpartition(":")
    if ":" not in host:  # a name or an IPv4 address
        return (host, _port(last)) if colon else (text, _DEFAULT_PORT)
    if not _is_ipv6(text):
        raise ValueError(
            f"{text!r} is not an IPv6 address; with a port, write [IPv6]:port"
        )
    if last.isdigit() and _is_ipv6(host):
        raise ValueError(f"write [{host}]:{last} if {last} is the port, else [{text}]")
    return f"[{text}]", _DEFAULT_PORT


def _port(port: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError(f"a port is a number from 1 to 65535, and not {port!r}")
    return int(port)


def _check_name(host: str) -> None:
    if not host:
        raise ValueError("it has no host")
    if host.isdigit():
        raise ValueError("a number alone is not a host; write localhost:port")
    labels = host.removesuffix(".").split(".")
    if labels[-1].isdigit():
        _check_ipv4(host)
    elif len(host) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError(f"{host!r} is no host name")


def _check_ipv4(host: str) -> None:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        raise ValueError(f"{host!r} is not an IPv4 address") from None


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
