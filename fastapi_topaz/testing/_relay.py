"""
A TCP relay in front of the gRPC server. It counts sockets and can break them.

gRPC for Python cannot count the sockets of a server, and cannot freeze or reset one. So
clients connect to this relay, which forwards their bytes to the gRPC server.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import cast


__all__ = ["Relay"]


# Bytes that a frozen relay keeps per direction. It must continue to read, or it would
# not notice that a client closed its socket.
_MAX_HELD = 1024 * 1024
_RESET = struct.pack("ii", 1, 0)


class _Side(asyncio.Protocol):
    """One socket of a pair. The other socket writes the bytes that this one reads."""

    def __init__(self, pair: _Pair) -> None:
        self.pair = pair
        self.transport: asyncio.Transport | None = None
        # The transport that gets the bytes read here. None means: hold them.
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
        # Before write(), because a full sink calls pause_writing() during the write.
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
    """The socket that a client connected to."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.pair.relay.is_listening:
            self.pair.accepted()
        else:
            # The socket was accepted just before the relay stopped listening.
            self.abort()


class _Pair:
    """The socket of a client, and the socket that connects on to the server."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.client = _Client(self)
        self.server = _Side(self)
        # A strong reference, because the loop keeps only weak references to tasks.
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
        """Forward or hold bytes, according to the state of the relay."""
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
            # Forward the last bytes that the server sent before it closed its socket.
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
    Accepts clients on a loopback port and forwards their bytes to a server.

    Strictly private. Other threads may only read the numbers. All methods must run in
    the thread of the event loop that opened the relay.
    """

    def __init__(self) -> None:
        self.accepted = 0
        self.frozen = False
        self.draining = False
        # A dict, because it keeps the order in which clients connected.
        self.pairs: dict[_Pair, None] = {}
        self._listener: socket.socket | None = None
        # Strong references, because the loop keeps only weak references to tasks.
        self._welcoming: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._target = ("", 0)

    @property
    def is_listening(self) -> bool:
        """Whether the relay accepts new clients."""
        return self._listener is not None

    def open(self, port: int) -> int:
        """Listen on *port* and return it. 0 means any free port."""
        self.draining = False
        # A new event for each loop: an event belongs to the first loop that waits.
        self._empty = asyncio.Event()
        self._empty.set()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self._listener.setblocking(False)
        # Accepted sockets inherit this option, and asyncio does not set it for them.
        # Without it, some answers wait 40 ms for an acknowledgement.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return int(self._listener.getsockname()[1])

    def serve(self, target_port: int) -> None:
        """Connect each client to *target_port*, including clients that already wait."""
        self._target = ("127.0.0.1", target_port)
        asyncio.get_running_loop().add_reader(self._socket, self._accept)

    @property
    def _socket(self) -> socket.socket:
        assert self._listener is not None  # noqa: S101
        return self._listener

    def _accept(self) -> None:
        # Not an asyncio.Server: if it is closed during accept, it loses the socket.
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
        """Add *pair* to the open pairs, and count it as accepted."""
        self.pairs[pair] = None
        self.accepted += 1
        self._empty.clear()

    def forget(self, pair: _Pair) -> None:
        """Remove *pair* from the open pairs, because its client is gone."""
        self.pairs.pop(pair, None)
        if not self.pairs:
            self._empty.set()

    async def empty(self) -> None:
        """Wait until no client is connected."""
        await self._empty.wait()

    def close_door(self) -> None:
        """Stop listening. Open sockets stay open."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def drain(self) -> None:
        """Refuse new clients and hold requests. Answers still pass."""
        self.close_door()
        self.draining = True
        self._update()

    def abort(self) -> None:
        """Close all sockets at once, even if bytes are not sent yet."""
        self.close_door()
        for pair in list(self.pairs):
            pair.abort()

    def set_frozen(self, frozen: bool) -> None:
        """Hold all bytes in both directions, or forward them again."""
        self.frozen = frozen
        self._update()

    def _update(self) -> None:
        for pair in list(self.pairs):
            pair.update()

    def drop(self, count: int | None) -> int:
        """Reset the oldest *count* clients, or all if None. Return the number reset."""
        oldest = list(self.pairs)[:count]
        for pair in oldest:
            # Removed now, so that a second drop() cannot count the same socket again.
            self.pairs.pop(pair, None)
            pair.client.abort(reset=True)
        return len(oldest)
