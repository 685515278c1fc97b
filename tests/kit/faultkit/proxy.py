"""
A TCP proxy that simulates a load balancer and a broken network.

    clients --TCP--> Proxy --TCP--> backend, backend, ...

It uses bare sockets on an event loop in a thread. Streams do not work here: they close
one loop iteration later than asked, and decide themselves when to write.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import struct
import sys
import threading
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Self


# Seconds for operations that take milliseconds on a working machine.
_PATIENCE = 30.0
_CHUNK = 16 * 1024
# If more chunks than this wait in one direction, the proxy stops reading, and TCP slows
# the sender down. Below this it keeps reading, because otherwise it would not notice a
# close.
_MAX_HELD = 1024
# Stands after the chunks of a sender that closed. A FIN counts as a close too, because
# gRPC never closes only one direction.
_END = b""
_RESET = struct.pack("ii", 1, 0)
_NO_LIMIT = sys.maxsize


@dataclass
class _Faults:
    """The current faults. Healing creates a new object."""

    hanging: bool = False
    # Ports of backends; None means all of them.
    frozen: set[int | None] = field(default_factory=set)
    swallowed: set[int | None] = field(default_factory=set)
    delay: float = 0.0
    handshake: float = 0.0
    # Bytes that each client still gets, and whether a RST or a FIN follows.
    after: int = _NO_LIMIT
    reset: bool = True


class _Side:
    """One socket of a link: the other socket sends the bytes that this one receives."""

    def __init__(self, link: _Link) -> None:
        self.link = link
        self.loop = link.proxy.loop
        self.sock: socket.socket | None = None
        # Closed for good, and how. It is unset before the socket was opened.
        self.over = self.was_reset = False
        self.blocked = False  # the kernel accepts no more bytes now
        self.budget = _NO_LIMIT  # bytes that this socket may still send
        # When each chunk may pass, and the chunk.
        self.held: deque[tuple[float, bytes]] = deque()

    def open(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.forward()
        self.other.forward()

    def close(self, *, reset: bool = False) -> None:
        self.over = True
        if reset:
            # Nothing is forwarded any more either.
            self.held.clear()
        if self.sock is not None:
            self.loop.remove_reader(self.sock)
            self.loop.remove_writer(self.sock)
            if reset:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.sock.close()
            self.sock = None
        self.link.forget_if_over()

    def forward(self) -> None:
        """Let the other side send the bytes that are due and may pass."""
        link, sink, faults = self.link, self.other, self.link.proxy.faults
        hit_by = {None, link.backend}
        if faults.swallowed & hit_by:
            link.spoilt = link.spoilt or bool(self.held)
            self.held.clear()
        elif sink.sock is not None and not faults.frozen & hit_by:
            now = self.loop.time() + 0.001  # a timer may fire a little early
            while self.held and self.held[0][0] <= now and not sink.blocked:
                due, chunk = self.held.popleft()
                if left := sink.send(chunk):
                    self.held.appendleft((due, left))
        if sink.over:
            self.held.clear()
        if self.sock is not None and len(self.held) < _MAX_HELD:
            self.loop.add_reader(self.sock, self._readable)
        elif self.sock is not None:
            self.loop.remove_reader(self.sock)

    def send(self, chunk: bytes) -> bytes:
        """Send the bytes that may be sent and fit in the kernel; return the rest."""
        if chunk == _END:
            self.close(reset=self.other.was_reset)
            return b""
        try:
            sent = self.sock.send(chunk[: self.budget])
        except BlockingIOError:
            sent = 0
        except OSError:
            # The peer has closed. Its earlier bytes can still be read, and then the
            # end.
            return b""
        self.budget -= sent
        if self.budget == 0:
            self.link.break_off()
            return b""
        if sent < len(chunk):
            self.blocked = True
            self.loop.add_writer(self.sock, self._writable)
        return chunk[sent:]

    def receive(self, chunk: bytes) -> None:
        if chunk == _END:
            self.close()
        now = self.loop.time()
        due = max(now + self.link.proxy.faults.delay, self.link.passes_at)
        self.held.append((due, chunk))
        if due > now:
            self.loop.call_at(due, self.forward)
        self.forward()

    def _readable(self) -> None:
        try:
            chunk = self.sock.recv(_CHUNK)
        except OSError:
            chunk, self.was_reset = _END, True
        self.receive(chunk)

    def _writable(self) -> None:
        self.loop.remove_writer(self.sock)
        self.blocked = False
        self.other.forward()


class _Link:
    """A client's socket, and the socket to a backend."""

    def __init__(self, proxy: Proxy, sock: socket.socket) -> None:
        self.proxy = proxy
        self.backend: int | None = None
        # Bytes are missing, so the bytes that follow can make no sense.
        self.spoilt = False
        self.passes_at = proxy.loop.time() + proxy.faults.handshake
        self.client, self.server = _Side(self), _Side(self)
        self.client.other, self.server.other = self.server, self.client
        self.client.budget = proxy.faults.after
        # Kept here, because the loop has only weak references to tasks.
        self._dialling: asyncio.Task[None] | None = None
        self.client.open(sock)
        if not proxy.faults.hanging:
            self._dialling = proxy.loop.create_task(self._connect())

    async def _connect(self) -> None:
        for port in self.proxy.route():
            self.backend = port
            sock = socket.socket()
            sock.setblocking(False)
            try:
                await self.proxy.loop.sock_connect(sock, ("127.0.0.1", port))
            except BaseException as error:
                sock.close()
                if not isinstance(error, OSError):
                    raise
            else:
                self.server.open(sock)
                return
        self.server.was_reset = True
        self.server.receive(_END)

    def heal(self) -> None:
        if self.spoilt:
            self.reset()
            return
        self.client.budget = _NO_LIMIT
        self.passes_at = 0.0
        for side in (self.client, self.server):
            side.held = deque((0.0, chunk) for _, chunk in side.held)
            side.forward()
        if self._dialling is None:
            self._dialling = self.proxy.loop.create_task(self._connect())

    def reset(self) -> None:
        if self._dialling is not None:
            self._dialling.cancel()
        self.client.close(reset=True)
        self.server.close(reset=True)

    def break_off(self) -> None:
        """End the connection: the client has received all bytes that it may receive."""
        if self.proxy.faults.reset:
            self.reset()
            return
        # Not closed, because the kernel would answer later bytes of the client with a
        # RST.
        with contextlib.suppress(OSError):  # the client has closed at this very moment
            self.client.sock.shutdown(socket.SHUT_WR)
        self.server.close(reset=True)

    def forget_if_over(self) -> None:
        if self.client.over and (self.server.over or self._dialling is None):
            self.proxy.links.pop(self, None)


def _in_thread(method):
    """
    Run *method* in the proxy's thread, where everything else runs, and wait for it.
    """

    @functools.wraps(method)
    def call(self: Proxy, *args, **kwargs):
        async def act():
            # Clients in the kernel's queue connected before this call.
            self.accept()
            return method(self, *args, **kwargs)

        return asyncio.run_coroutine_threadsafe(act(), self.loop).result(_PATIENCE)

    return call


class Proxy:
    """
    Forwards connections to *backends*, ports on 127.0.0.1, in turn.

    All methods can be called from any thread, and return when the change has taken
    effect. A client that connected before is then an existing connection. Faults add up
    until `heal`. The counts show what was seen so far, so tests wait for them.
    """

    def __init__(self, backends: list[int], *, host: str = "127.0.0.1") -> None:
        self.backends = backends
        self.host = host
        self.port = 0
        self.accepted = 0
        # time.monotonic() of each accept.
        self.accepted_at: list[float] = []
        # The attributes below are only for the thread. A dict keeps the order of
        # arrival.
        self.links: dict[_Link, None] = {}
        self.faults = _Faults()
        self._turn = -1
        self._stopping = asyncio.Event()

    def __enter__(self) -> Self:
        self._door = self._bound()
        self.port = self._door.getsockname()[1]
        # Independent of the loops that the test uses: this loop is known to work.
        runner = asyncio.Runner(loop_factory=asyncio.SelectorEventLoop)
        self.loop = runner.get_loop()
        self._thread = threading.Thread(
            target=self._run, args=(runner,), name="faultkit-proxy", daemon=True
        )
        self._thread.start()
        self.listen()
        return self

    def stop(self, *_: object) -> None:
        """Reset all connections and end the thread."""
        if self._thread.is_alive():
            self._end()
            self._thread.join(_PATIENCE)

    __exit__ = stop

    @_in_thread
    def _end(self) -> None:
        self.loop.remove_reader(self._door)
        self._door.close()
        for link in list(self.links):
            link.reset()
        self._stopping.set()

    def _run(self, runner: asyncio.Runner) -> None:
        with runner:
            runner.run(self._stopping.wait())

    # -- state and basic operations

    @property
    def url(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def open(self) -> int:
        """Sockets of clients that are open now."""
        return sum(link.client.sock is not None for link in list(self.links))

    def open_by_backend(self) -> Counter[int]:
        """Connections that are open now on both sides, by the port of the backend."""
        pairs = [link for link in list(self.links) if link.server.sock is not None]
        return Counter(link.backend for link in pairs if link.client.sock is not None)

    @_in_thread
    def refuse(self) -> None:
        """Close the listening socket: connection refused."""
        self.loop.remove_reader(self._door)
        self._door.close()
        # Bound, but not listening: it refuses clients, and keeps the port reserved.
        self._door = self._bound()

    @_in_thread
    def listen(self) -> None:
        """Listen again, on the same port."""
        self._door.listen(1024)
        self.loop.add_reader(self._door, self.accept)

    def _bound(self) -> socket.socket:
        door = socket.socket()
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.setblocking(False)
        door.bind((self.host, self.port))
        return door

    def accept(self) -> None:
        # An error means that no client is waiting, or that the proxy does not listen.
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._door.accept()
                sock.setblocking(False)
                self.accepted_at.append(self.loop.time())
                self.accepted += 1
                self.links[_Link(self, sock)] = None

    def route(self) -> list[int]:
        """Return the backends, beginning with the next one in turn."""
        ports = list(self.backends)
        self._turn += 1
        first = self._turn % len(ports) if ports else 0
        return ports[first:] + ports[:first]

    # -- faults

    @_in_thread
    def hang(self) -> None:
        """Accept, but connect to no backend: new connections stay silent."""
        self.faults.hanging = True

    @_in_thread
    def half_open(self, backend: int | None = None) -> None:
        """
        Lose all bytes and closes, as a dead network does; only for *backend*, if given.
        """
        self.faults.swallowed.add(backend)

    @_in_thread
    def freeze(self, backend: int | None = None) -> None:
        """Hold all bytes and closes until `heal`; only for *backend*, if given."""
        self.faults.frozen.add(backend)

    @_in_thread
    def delay(self, seconds: float) -> None:
        """Forward bytes that arrive from now on later by this time, in order."""
        self.faults.delay = seconds

    @_in_thread
    def slow_handshake(self, seconds: float) -> None:
        """Hold the bytes of new connections until this time after the accept."""
        self.faults.handshake = seconds

    @_in_thread
    def reset_mid_response(self, after: int) -> None:
        """
        Reset after a client got this many more bytes; 0 resets instead of the next
        byte.
        """
        self._break_off(after, reset=True)

    @_in_thread
    def truncate_mid_response(self, after: int) -> None:
        """Like `reset_mid_response`, but with a normal end (FIN)."""
        self._break_off(after, reset=False)

    def _break_off(self, after: int, *, reset: bool) -> None:
        self.faults.after, self.faults.reset = after, reset
        for link in self.links:
            link.client.budget = after

    @_in_thread
    def cut(self, count: int | None = None, *, backend: int | None = None) -> int:
        """
        Reset the oldest *count* connections (of *backend*, if given); return how many.
        """
        links = [
            k for k in self.links if k.client.sock and backend in {None, k.backend}
        ]
        for link in links[:count]:
            link.reset()
        return len(links[:count])

    @_in_thread
    def heal(self) -> None:
        """End all faults except `refuse`; reset connections that lost bytes."""
        self.faults = _Faults()
        for link in list(self.links):
            link.heal()
