"""
Connects to the first of several addresses that is ready (RFC 8305, "Happy Eyeballs").

It runs on asyncio and trio, because it waits with `anyio.wait_writable`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import anyio

from fastapi_topaz._fork import close_in_child
from fastapi_topaz._http2.failures import HandshakeFailed
from fastapi_topaz._pool.interrupts import protected
from fastapi_topaz._rpc.clock import monotonic


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from fastapi_topaz._http2.addresses import Address


__all__ = ["ATTEMPT_DELAY", "FailedAddresses", "Race"]


R = TypeVar("R")

ATTEMPT_DELAY: Final = 0.25
"""
Seconds until the next address is tried in parallel (RFC 8305, section 5).

As in gRPC, an address has this time to become ready for calls, not only to connect.
"""

_UNSENT_LIMIT: Final = 131_072
"""
Bytes in the socket's buffer that are not sent yet. With more, it is not writable.

The system would buffer up to 4 MiB. On a slow link, a PING behind them would be late.
"""

FAILED_FOR: Final = 10.0
"""Seconds for which a failed address is tried last."""

REFUSED_FOR: Final = 1.0
"""
Seconds for which an address that refused the connection comes last.

A refusal costs no time. A replica that restarts refuses until it is ready, and the pool
opens new connections about 2 s after a loss, so that they reach the replica again.
"""


class FailedAddresses:
    """Remembers which addresses of one connector failed recently."""

    def __init__(self) -> None:
        # By address: the time until which it comes last.
        self._failed: dict[Address, float] = {}

    def add(self, address: Address, error: Exception | None = None) -> None:
        """Record that *address* failed just now, with *error* or by silence."""
        refused = isinstance(error, ConnectionRefusedError)
        last_for = REFUSED_FOR if refused else FAILED_FOR
        self._failed[address] = monotonic() + last_for

    def remove(self, address: Address) -> None:
        """Forget a failure of *address*, because a connection to it is ready."""
        self._failed.pop(address, None)

    def order(
        self, addresses: Iterable[Address], in_use: Mapping[str, int] | None = None
    ) -> list[Address]:
        """
        Return *addresses* in random order. Addresses that failed recently come last.

        The random order spreads the connections of all workers over the servers. IPv4
        and IPv6 alternate (RFC 8305, section 4). The first family is also random.

        Args:
            addresses: The addresses of all servers.
            in_use: The connections to each address, by its text. Addresses with fewer
                come first. So the connections of one pool lead to different servers.
        """
        now = monotonic()
        self._failed = {
            address: until for address, until in self._failed.items() if now < until
        }
        mixed = list(addresses)
        random.shuffle(mixed)
        by_family: dict[int, list[Address]] = {}
        for address in mixed:
            by_family.setdefault(address.family, []).append(address)
        turns = _in_turns(*by_family.values())
        used = in_use or {}
        unused = [address for address in turns if not used.get(address.text)]
        proven = [address for address in turns if used.get(address.text)]
        # An unused address may belong to a server that is gone. After each of them
        # comes one that works, so one attempt waits at most for one silent server.
        ordered = _in_turns(unused, sorted(proven, key=lambda a: used[a.text]))
        return sorted(ordered, key=self._failed.__contains__)


def _in_turns(*groups: list[Address]) -> list[Address]:
    """Return the first address of each group, then the second of each, and so on."""
    longest = max(map(len, groups), default=0)
    return [
        group[turn] for turn in range(longest) for group in groups if turn < len(group)
    ]


class Race(Generic[R]):
    """
    One race to several addresses.

    Args:
        addresses: The addresses, in the order in which they are tried.
        greet: Makes a connection of a connected socket. A frozen server accepts TCP
            connections, so this part belongs to the race.

    Attributes:
        failures: The addresses that failed, and why.
        pending: The addresses whose attempts have neither failed nor become ready.
        overtaken: Those of them that began before the winner.
    """

    def __init__(
        self,
        addresses: Iterable[Address],
        greet: Callable[[socket.socket], Awaitable[R]],
    ) -> None:
        self._untried = list(addresses)
        self._greet = greet
        self._winner: tuple[R, socket.socket, Address] | None = None
        self._sockets: set[socket.socket] = set()
        self.pending: list[Address] = []
        self.overtaken: set[Address] = set()
        self.failures: list[tuple[Address, Exception]] = []

    async def run(self) -> tuple[R, Address] | None:
        """
        Return what *greet* made of the first address that is ready, and that address.

        The next attempt starts when one fails, or after `ATTEMPT_DELAY`. It returns
        None if all addresses have failed. The sockets of all others are closed.
        """
        try:
            async with anyio.create_task_group() as attempts:
                while self._untried and self._winner is None:
                    address = self._untried.pop(0)
                    self.pending.append(address)
                    failed = anyio.Event()
                    attempts.start_soon(
                        self._attempt, address, failed, attempts.cancel_scope
                    )
                    if self._untried:
                        with anyio.move_on_after(ATTEMPT_DELAY):
                            await failed.wait()
        except BaseException:
            self._winner = None
            raise
        finally:
            # Also those of attempts that never go on, because the loop was closed.
            won = None if self._winner is None else self._winner[1]
            for sock in self._sockets - {won}:
                sock.close()
        return None if self._winner is None else (self._winner[0], self._winner[2])

    @protected
    async def _attempt(
        self, address: Address, failed: anyio.Event, scope: anyio.CancelScope
    ) -> None:
        sock = None
        try:
            sock = socket.socket(address.family, socket.SOCK_STREAM)
            self._sockets.add(sock)
            close_in_child(sock)
            await connect(sock, address)
            ready = await self._greet(sock)
        except (OSError, HandshakeFailed) as error:
            if sock is not None:
                sock.close()
            self.pending.remove(address)
            self.failures.append((address, error))
            failed.set()
            return
        if self._winner is not None:  # two were ready in the same iteration
            return
        self._winner = ready, sock, address
        self.overtaken = set(self.pending[: self.pending.index(address)])
        self.pending.remove(address)
        scope.cancel()


async def connect(sock: socket.socket, address: Address) -> None:
    """
    Make *sock* non-blocking and connect it to *address*. Close it if that fails.

    Raises:
        OSError: The connect failed.
    """
    try:
        sock.setblocking(False)
        if address.family != socket.AF_UNIX:
            # A request is one segment, and must not wait for the next one (Nagle).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(AttributeError, OSError):  # not on all systems
                sock.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_LIMIT
                )
        try:
            sock.connect(address.sockaddr)
        except BlockingIOError as error:
            if error.errno == errno.EAGAIN:
                raise  # a Unix socket whose backlog is full
            await anyio.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code)) from None
    except BaseException:
        sock.close()
        raise
