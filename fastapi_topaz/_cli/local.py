"""Whether a url leads to this machine only."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING, Final

import anyio

from fastapi_topaz._authorizer.address import complete
from fastapi_topaz._http2.addresses import parse


if TYPE_CHECKING:
    from fastapi_topaz._http2.addresses import Address


__all__ = ["remote_part"]


RESOLVING: Final = 5.0
"""Time limit in seconds to resolve a name."""


async def remote_part(url: str) -> str | None:
    """
    Return what of *url* is not known to be this machine, or None if all of it is.

    Only loopback addresses and Unix sockets are this machine. A name is, if all its
    addresses are.

    Raises:
        ValueError: *url* is malformed.
    """
    endpoint = parse(complete(url))
    try:
        with anyio.fail_after(RESOLVING):
            addresses = await endpoint.resolve()
    except (OSError, TimeoutError):  # a TimeoutError is an OSError too
        return f"{endpoint.host} (it cannot be resolved)"
    remote = [each.text for each in addresses if not _is_local(each)]
    return ", ".join(remote) or None


def _is_local(address: Address) -> bool:
    if address.family == socket.AF_UNIX:
        return True
    ip = ipaddress.ip_address(str(address.sockaddr[0]).partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    return bool((mapped or ip).is_loopback)
