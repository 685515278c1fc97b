"""
A DNS server with answers that change on request.

gRPC asks it for a target such as `dns://127.0.0.1:5353/topaz.test:8282`, so a name
can move, grow or vanish without touching the machine's resolver. The native transport
asks only the machine's resolver, which `Names.resolver` can replace in a test.
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Self


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


__all__ = ["Names"]


_A = 1
_RESPONSE, _RECURSION_DESIRED, _NXDOMAIN = 0x8000, 0x0100, 3
_HEADER = struct.Struct("!6H")
# A pointer to the question's name, A, IN, TTL 0, four bytes of address.
_RECORD = struct.pack("!HHHIH", 0xC00C, _A, 1, 0, 4)


class Names:
    """
    Answers A queries over UDP from the addresses that it was given; use it in a `with`.

    An unknown name, or a name with the addresses None, does not exist (NXDOMAIN). A
    name with an empty list of addresses exists without any (NOERROR). This is also the
    answer to queries of another type, such as AAAA.
    """

    def __init__(self, names: Mapping[str, Iterable[str] | None]) -> None:
        self._lock = threading.Lock()
        self._names: dict[str, list[str]] = {}
        self._queries: Counter[str] = Counter()
        self._is_silent = False
        for name, addresses in names.items():
            self.set(name, addresses)

    def __enter__(self) -> Self:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wake.send(b"!")
        self._thread.join()
        for sock in (self._socket, self._wake, self._woken):
            sock.close()

    def target(self, name: str, port: int) -> str:
        """Return the gRPC target that makes gRPC look *name* up at this server."""
        return f"dns://127.0.0.1:{self.port}/{name}:{port}"

    def resolver(self, usual: Callable[..., Any]) -> Callable[..., Any]:
        """Return a `getaddrinfo` that answers for these names, and else as *usual*."""
        known = frozenset(self._names)

        def getaddrinfo(host: str, port: str, **options: Any) -> Any:
            if host not in known:
                return usual(host, port, **options)
            with self._lock:
                self._queries[host] += 1
                addresses, silent = self._names.get(host), self._is_silent
            if silent:
                while self._is_silent:
                    time.sleep(0.01)
                raise socket.gaierror(socket.EAI_AGAIN, "no name server answered")
            if not addresses:
                raise socket.gaierror(socket.EAI_NONAME, "it has no address")
            kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
            return [(*kind, (address, int(port))) for address in addresses]

        return getaddrinfo

    def set(self, name: str, addresses: Iterable[str] | None) -> None:
        """Change the addresses of *name* from the next query on."""
        with self._lock:
            if addresses is None:
                self._names.pop(name, None)
            else:
                self._names[name] = list(addresses)

    def silent(self) -> None:
        """Leave queries unanswered, as an unreachable name server does."""
        with self._lock:
            self._is_silent = True

    def heal(self) -> None:
        """Answer again. A query that was left unanswered is not answered later."""
        with self._lock:
            self._is_silent = False

    @property
    def queries(self) -> Counter[str]:
        """
        How often each name was queried, answered or not.

        Only type A counts: a lookup queries A and AAAA, and is still one lookup.
        """
        with self._lock:
            return Counter(self._queries)

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while all(key.fileobj is self._socket for key, _ in selector.select()):
                query, client = self._socket.recvfrom(4096)
                if answer := self._answer(query):
                    self._socket.sendto(answer, client)

    def _answer(self, query: bytes) -> bytes | None:
        number, flags, *_ = _HEADER.unpack_from(query)
        name, kind, end = _question(query)
        with self._lock:
            if kind == _A:
                self._queries[name] += 1
            if self._is_silent:
                return None
            addresses = self._names.get(name)
        records = addresses if addresses and kind == _A else []
        flags = _RESPONSE | flags & _RECURSION_DESIRED
        if addresses is None:
            flags |= _NXDOMAIN
        return b"".join(
            [
                _HEADER.pack(number, flags, 1, len(records), 0, 0),
                query[_HEADER.size : end],
                *(_RECORD + socket.inet_aton(address) for address in records),
            ]
        )


def _question(query: bytes) -> tuple[str, int, int]:
    """Return the name, the type and the end of the only question in *query*."""
    labels = []
    at = _HEADER.size
    while length := query[at]:
        labels.append(query[at + 1 : at + 1 + length].decode().lower())
        at += 1 + length
    (kind,) = struct.unpack_from("!H", query, at + 1)
    return ".".join(labels), kind, at + 5
