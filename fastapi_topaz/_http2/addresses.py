"""
The addresses of a target: those in its url, or those that its name resolves to.

Urls have the forms of gRPC: https://grpc.github.io/grpc/core/md_doc_naming.html. A name
is resolved in a thread, because `getaddrinfo` blocks. Addresses need no thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
import urllib.parse
from typing import Any, Final

import anyio
import attrs
from anyio.lowlevel import current_token


__all__ = ["Address", "Endpoint", "parse"]


_DEFAULT_PORT: Final = "443"
"""The port of a url without one, as in gRPC."""

_LAST_PORT: Final = 65_535


@attrs.frozen
class Address:
    """One address to connect to. *text* is its form in gRPC, for messages."""

    family: int
    sockaddr: tuple[Any, ...] | str
    text: str


@attrs.frozen
class Endpoint:
    """
    The parsed url of a target.

    Attributes:
        authority: The `:authority` of requests.
        host: A DNS name or an IP address.
        port: The port of *host*, if *host* must be resolved.
        addresses: The addresses, if the url contains them.
    """

    authority: str
    host: str
    port: str = ""
    addresses: tuple[Address, ...] = ()

    @property
    def certificate_host(self) -> str:
        """The name or address that the certificate of the server must be for."""
        # gRPC removes the same: the dot of a complete name, and the scope of an IPv6
        # address. A certificate has neither.
        return self.host.partition("%")[0].removesuffix(".")

    async def resolve(self) -> tuple[Address, ...]:
        """
        Return all addresses, in the order of `getaddrinfo`.

        Raises:
            OSError: The name cannot be resolved. Most errors are a `socket.gaierror`.
        """
        if self.addresses:
            return self.addresses
        found = await _resolved(self.host, self.port)
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "it has no IPv4 or IPv6 address")
        # A hosts file may have the same address in several lines for one name.
        return tuple(dict.fromkeys(found))


async def _resolved(host: str, port: str) -> list[Address]:
    """
    Return the addresses of *host*, found in a daemon thread.

    The threads of `anyio.to_thread` would keep the process alive at its end: until the
    resolver answers, and without end if their event loop was closed.
    """
    loop: Any = current_token().native_token
    is_asyncio = isinstance(loop, asyncio.AbstractEventLoop)
    call_soon = loop.call_soon_threadsafe if is_asyncio else loop.run_sync_soon
    done = anyio.Event()
    outcome: list[list[Address] | OSError] = []

    def resolve() -> None:
        try:
            outcome.append(_getaddrinfo(host, port))
        except OSError as error:
            outcome.append(error)
        except UnicodeError as error:  # it is no name: a part is empty or too long
            outcome.append(socket.gaierror(socket.EAI_NONAME, str(error)))
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            call_soon(done.set)

    threading.Thread(target=resolve, name="fastapi_topaz: names", daemon=True).start()
    await done.wait()
    found = outcome.pop()
    if isinstance(found, OSError):
        try:
            raise found
        finally:
            del found
    return found


def _getaddrinfo(host: str, port: str) -> list[Address]:
    return [
        # An IPv6 `sockaddr` has a scope, which link-local addresses need.
        _address(family, sockaddr)
        for family, _, _, _, sockaddr in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )
        if family in {socket.AF_INET, socket.AF_INET6}
    ]


def _address(family: int, sockaddr: tuple[Any, ...]) -> Address:
    host, port = sockaddr[:2]
    if family == socket.AF_INET6:
        return Address(family, sockaddr, f"ipv6:[{host}]:{port}")
    return Address(family, sockaddr, f"ipv4:{host}:{port}")


def parse(url: str) -> Endpoint:
    """
    Parse *url*.

    Raises:
        ValueError: *url* is malformed, or only gRPC's core can resolve it.
    """
    scheme, colon, rest = url.partition(":")
    match scheme.lower() if colon else "":
        case "unix":
            path = urllib.parse.unquote(rest.removeprefix("//"))
            return _unix(path, f"unix:{path}")
        case "unix-abstract":
            name = urllib.parse.unquote(rest)
            return _unix(f"\0{name}", f"unix-abstract:{name}")
        case "ipv4" | "ipv6":
            return _static(rest.removeprefix("//").split(","))
        case "dns":
            if rest.startswith("//"):
                server, _, rest = rest[2:].partition("/")
                if server:
                    raise ValueError(
                        f"the name server {server} in it needs transport='grpcio'"
                    )
            return _named(rest)
        case _:
            return _named(url)


def _unix(path: str, text: str) -> Endpoint:
    address = Address(socket.AF_UNIX, path, text)
    return Endpoint("localhost", "localhost", addresses=(address,))


def _static(texts: list[str]) -> Endpoint:
    endpoints = [_named(text) for text in texts]
    addresses = [address for each in endpoints for address in each.addresses]
    if len(addresses) < len(texts):
        raise ValueError("it has a name, but this scheme only allows addresses")
    return Endpoint(
        endpoints[0].authority, endpoints[0].host, addresses=tuple(addresses)
    )


def _named(text: str) -> Endpoint:
    """Return the endpoint of `host:port`, `[IPv6]:port`, or these without a port."""
    if text.startswith("["):
        host, bracket, after = text[1:].partition("]")
        port = after.removeprefix(":")
        if not bracket or port == after != "":
            raise ValueError("it must be like [IPv6]:port")
    elif text.count(":") > 1:
        host, port = text, ""
    else:
        host, _, port = text.partition(":")
    port = port or _DEFAULT_PORT
    if port.isdecimal() and int(port) > _LAST_PORT:
        # getaddrinfo would take it modulo 65,536, which is the port of another server.
        raise ValueError(f"its port is above {_LAST_PORT}")
    try:
        # For an address, the `getaddrinfo` below needs no network. It parses scopes.
        ip = ipaddress.ip_address(host)
    except ValueError:
        if not host:
            raise ValueError("it has no host") from None
        if "/" in text or ":" in host:
            raise ValueError(
                "it is not like host:port, [IPv6]:port, dns:///host:port, "
                "ipv4:address:port, ipv6:[address]:port or unix:/path; other forms "
                "need transport='grpcio'"
            ) from None
        return Endpoint(f"{host}:{port}", host, port)
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror as error:
        raise ValueError(f"its port or scope cannot be used: {error}") from None
    family, _, _, _, sockaddr = found[0]
    authority = f"[{host}]:{port}" if ip.version == 6 else f"{host}:{port}"
    return Endpoint(authority, host, addresses=(_address(family, sockaddr),))
