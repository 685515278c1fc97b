"""Whether a gRPC target leads to this machine, where plaintext crosses no network."""

from __future__ import annotations

import ipaddress
import re

from fastapi_topaz._rpc.names import host_in


__all__ = ["is_loopback"]


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
            return all(map(_is_loopback_address, map(host_in, rest.split(","))))
        case "dns":
            # dns://SERVER/NAME asks that server, whose answer may be any address.
            host = host_in(re.sub(r"\A/(//)?", "", rest))
        case _:
            host = host_in(target)
    # Names are case-insensitive, and one dot at the end makes them absolute.
    return host.lower().removesuffix(".") == "localhost" or _is_loopback_address(host)


def _is_loopback_address(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
