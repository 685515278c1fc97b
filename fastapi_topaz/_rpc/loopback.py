"""Whether a gRPC target leads to this machine, where plaintext crosses no network."""

from __future__ import annotations

import ipaddress
import re


__all__ = ["is_loopback"]


_PORT = r"[0-9]+|https?"
# With a port, an IPv6 address needs brackets.
_HOST_AND_PORT = re.compile(
    rf"\[(?P<bracketed>[^\[\]]*)\](?::(?:{_PORT}))?|(?P<plain>[^:]*)(?::(?:{_PORT}))?"
)


def is_loopback(target: str) -> bool:
    """
    Return whether every address of the gRPC *target* is a loopback or a Unix socket.

    Nothing is resolved: of all names only `localhost` counts. A target that cannot be
    read is not a loopback.
    """
    scheme, colon, rest = target.partition(":")
    match scheme.lower() if colon else "":
        case "unix" | "unix-abstract":
            return True
        case "ipv4" | "ipv6":
            return all(map(_is_loopback_address, map(_host, rest.split(","))))
        case "dns":
            # dns://SERVER/NAME asks that server, whose answer may be any address.
            host = _host(re.sub(r"\A/(//)?", "", rest))
        case _:
            host = _host(target)
    # Names are case-insensitive, and one dot at the end makes them absolute.
    return host.lower().removesuffix(".") == "localhost" or _is_loopback_address(host)


def _host(address: str) -> str:
    if (parts := _HOST_AND_PORT.fullmatch(address)) is not None:
        return parts["bracketed"] or parts["plain"] or ""
    return address  # an IPv6 address without a port, or nothing that can be read


def _is_loopback_address(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
