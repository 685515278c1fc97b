"""The names of a server: the host of a url, an authority, the name in a certificate."""

from __future__ import annotations

import ipaddress
import re

from fastapi_topaz._checks import check_text


__all__ = [
    "check_authority",
    "check_server_name",
    "host_in",
    "host_of",
    "split_port",
]


_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
# RFC 3986, section 3.2, without user information (RFC 9113, section 8.3.1).
_AUTHORITY = re.compile(
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]+)(?::(?P<port>[0-9]+))?"
)
_PORT = r"[0-9]+|https?"
# With a port, an IPv6 address needs brackets.
_HOST_AND_PORT = re.compile(
    rf"\[(?P<bracketed>[^\[\]]*)\](?::(?:{_PORT}))?|(?P<plain>[^:]*)(?::(?:{_PORT}))?"
)


def check_authority(authority: object) -> None:
    """
    Check that *authority* is `host` or `host:port`, or None.

    Raises:
        TypeError: It is not a str.
        ValueError: It has another form.
    """
    check_text("authority", authority)
    if authority is not None and split_port(str(authority)) is None:
        raise ValueError(f"authority must be host or host:port, got {authority!r}")


def split_port(authority: str) -> tuple[str, str] | None:
    """Return host and port of *authority*, the port perhaps empty, or None."""
    found = _AUTHORITY.fullmatch(authority)
    if found is None or len(authority) > 255 or int(found["port"] or 0) > 65535:
        return None
    return found["host"], found["port"] or ""


def check_server_name(name: object) -> None:
    """
    Check that *name* is a host name or an IP address, or None.

    Raises:
        TypeError: It is not a str.
        ValueError: It has another form, such as one with a port.
    """
    check_text("server_name", name)
    if name is None or (_NAME.fullmatch(str(name)) and len(str(name)) <= 253):
        return
    try:
        ipaddress.ip_address(str(name))
    except ValueError:
        raise ValueError(
            "server_name must be a host name in ASCII, or an IP address, without a "
            f"port, got {name!r}"
        ) from None


def host_of(url: str) -> str:
    """Return the host that the certificate of the gRPC target *url* has to be for."""
    scheme, colon, rest = url.partition(":")
    match scheme.lower() if colon else "":
        case "unix" | "unix-abstract":
            return "localhost"
        case "ipv4" | "ipv6":
            return host_in(rest.partition(",")[0])
        case "dns":
            return host_in(re.sub(r"\A(//[^/]*/|/)?", "", rest))
        case _:
            return host_in(url)


def host_in(address: str) -> str:
    """Return the host of `host:port`, `[IPv6]:port`, or these without a port."""
    if (parts := _HOST_AND_PORT.fullmatch(address)) is not None:
        return parts["bracketed"] or parts["plain"] or ""
    return address  # an IPv6 address without a port, or nothing that can be read
