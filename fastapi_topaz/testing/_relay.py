"""
The front door: a TCP relay that counts sockets and breaks them on request.

gRPC for Python tells nobody how many sockets a server has, and offers no way to
silence or reset one. So clients connect here, and their bytes go on to the gRPC
server behind.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import cast


__all__ = ["Relay"]


# A frozen relay reads on, or it would not notice that a client hung up; this
# bounds what it keeps in bytes per direction.
_MAX_HELD = 1024 * 1024
_RESET = struct.pack("ii", 1, 0)


class _Side(asyncio.Protocol):
    """One socket of a pair: what it reads, the other one writes."""

    def __init__(self, pair: _Pair) -> None:
        self.pair = pair
        self.transport: asyncio.Transport | None = None
        # Where reads go; None while nothing may pass.
        self.sink: asyncio.Transport | None = None
        self.held = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.sink is not None:
            self.sink.write(data)
            return
        self.held += data
        if len(self.held) >= _MAX_HELD:
            self.read(False)

    def pause_writing(self) -> None:
        self.pair.opposite(self).read(False)

    def resume_writing(self) -> None:
        self.pair.opposite(self).read(True)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.transport = None
        self.pair.lost(self)

    def read(self, on: bool) -> None:
        if self.transport is None:
            return
        if on:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    def flow(self, sink: asyncio.Transport) -> None:
        self.sink = sink
        # Before the write: a full sink pauses reading again from inside it.
        self.read(True)
        if self.held:
            sink.write(bytes(self.held))
            self.held.clear()

    def abort(self, *, reset: bool = False) -> None:
        if self.transport is None:
            return
        if reset:
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()


class _Client(_Side):
    """The side that a client connected to."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.pair.relay.is_listening:
            self.pair.accepted()
        else:
            # Accepted just before the door was closed.
            self.abort()


class _Pair:
    """A client's socket and the one that leads on to the server."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.client = _Client(self)
        self.server = _Side(self)
        # Held, because the loop keeps only weak references to tasks.
        self._connecting: asyncio.Task[None] | None = None
        self._server_gone = False

    def opposite(self, side: _Side) -> _Side:
        return self.server if side is self.client else self.client

    def accepted(self) -> None:
        self.relay.add(self)
        self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        try:
            await self.relay.connect(self.server)
        except OSError:
            self._server_gone = True
        if self.client.transport is None:
            self.server.abort()
        else:
            self.update()

    def update(self) -> None:
        """Let bytes pass, or hold them, as the relay now says."""
        client, server = self.client.transport, self.server.transport
        if self.relay.frozen:
            self.client.sink = self.server.sink = None
        elif client is not None and server is not None:
            self.server.flow(client)
            if self.relay.draining:
                self.client.sink = None
            else:
                self.client.flow(server)
        elif client is not None and self._server_gone:
            # What the server said before it left.
            self.server.flow(client)
            client.close()

    def lost(self, side: _Side) -> None:
        if side is self.client:
            self.relay.forget(self)
            if self.server.transport is not None:
                self.server.transport.close()
        else:
            self._server_gone = True
            self.client.sink = None
            self.update()

    def abort(self) -> None:
        self.client.abort()
        self.server.abort()


class Relay:
    """
    Accepts clients on a loopback port and forwards to a server.

    Strictly private. Everything but reading the numbers belongs to the thread of
    the event loop it was opened in.
    """

    def __init__(self) -> None:
        self.accepted = 0
        self.frozen = False
        self.draining = False
        # A dict, because it remembers who came first.
        self.pairs: dict[_Pair, None] = {}
        self._listener: socket.socket | None = None
        # The loop itself keeps only weak references to tasks.
        self._welcoming: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._target = ("", 0)

    @property
    def is_listening(self) -> bool:
        """Whether new clients are welcome."""
        return self._listener is not None

    def open(self, port: int) -> int:
        """Listen on *port*, 0 for any free one, and return it."""
        self.draining = False
        # An event belongs to the first loop that waits for it.
        self._empty = asyncio.Event()
        self._empty.set()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self._listener.setblocking(False)
        # Accepted sockets inherit it; asyncio would not set it for these, and then one
        # answer in a few waits 40 ms for an acknowledgement.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return int(self._listener.getsockname()[1])

    def serve(self, target_port: int) -> None:
        """Connect each client, also those that wait already, to *target_port*."""
        self._target = ("127.0.0.1", target_port)
        asyncio.get_running_loop().add_reader(self._socket, self._accept)

    @property
    def _socket(self) -> socket.socket:
        assert self._listener is not None  # noqa: S101
        return self._listener

    def _accept(self) -> None:
        # Not an asyncio.Server: closed at this very moment, it forgets the socket.
        client, _ = self._socket.accept()
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._welcome(client))
        self._welcoming.add(task)
        task.add_done_callback(self._welcoming.discard)

    async def _welcome(self, client: socket.socket) -> None:
        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: _Pair(self).client, client
        )

    async def connect(self, side: _Side) -> None:
        """Connect *side* to the server."""
        await asyncio.get_running_loop().create_connection(lambda: side, *self._target)

    def add(self, pair: _Pair) -> None:
        """Count *pair* in."""
        self.pairs[pair] = None
        self.accepted += 1
        self._empty.clear()

    def forget(self, pair: _Pair) -> None:
        """Count *pair* out: its client is gone."""
        self.pairs.pop(pair, None)
        if not self.pairs:
            self._empty.set()

    async def empty(self) -> None:
        """Wait until no client is left."""
        await self._empty.wait()

    def close_door(self) -> None:
        """Refuse new clients from now on; open sockets stay."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def drain(self) -> None:
        """Refuse new clients and new requests; answers go on."""
        self.close_door()
        self.draining = True
        self._update()

    def abort(self) -> None:
        """Close all sockets, without waiting for anything still to be sent."""
        self.close_door()
        for pair in list(self.pairs):
            pair.abort()

    def set_frozen(self, frozen: bool) -> None:
        """Hold all bytes in both directions, or let them go on."""
        self.frozen = frozen
        self._update()

    def _update(self) -> None:
        for pair in list(self.pairs):
            pair.update()

    def drop(self, count: int | None) -> int:
        """Reset the oldest *count* clients, None for all; return how many."""
        oldest = list(self.pairs)[:count]
        for pair in oldest:
            # At once, so that dropping twice cannot count one socket twice.
            self.pairs.pop(pair, None)
            pair.client.abort(reset=True)
        return len(oldest)
