"""A server for the HTTP/2 client: the library `h2`, in memory and on a socket."""

from __future__ import annotations

import contextlib
import math
import pathlib
import socket
import struct
import threading

import anyio
import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import pytest

from fastapi_topaz._http2.addresses import Address
from fastapi_topaz._http2.connection import ClientConnection
from fastapi_topaz._http2.opening import NativeOpener
from fastapi_topaz._http2.requests import RequestBlocks
from fastapi_topaz._http2.stream import Stream
from fastapi_topaz._rpc.target import Target
from fastapi_topaz.exceptions import ConnectFailed


METHOD = "/test.Service/Call"
HEAD = [(":status", "200"), ("content-type", "application/grpc")]
TAIL = [("grpc-status", "0")]
BLOCKS = RequestBlocks("test:1", (), is_tls=False)


def message(data, flag=0):
    return struct.pack(">BL", flag, len(data)) + data


class Call:
    """A call on a `ClientConnection`, whose end is counted."""

    def __init__(
        self, connection, request=b"", deadline=None, blocks=BLOCKS, began=0.0
    ):
        self.ends = 0
        block, size = blocks.block(METHOD, None, ())
        self.stream = Stream(block, size, request, deadline, self._wake)
        connection.begin(self.stream, METHOD, began)

    def _wake(self):
        self.ends += 1

    @property
    def outcome(self):
        assert self.ends == (self.stream.outcome is not None)
        return self.stream.outcome


def client(**options):
    return ClientConnection("test:1", **options)


class H2Server:
    """The library `h2` as the server of one connection."""

    def __init__(self, settings=None):
        config = h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        if settings:
            self.h2.local_settings = h2.settings.Settings(
                client=False, initial_values=settings
            )
            self.h2.max_inbound_frame_size = self.h2.local_settings.max_frame_size
        self.h2.initiate_connection()
        self.requests = {}
        self.complete = []
        self.headers = {}
        self.events = []
        self.left = False  # whether it said GOAWAY
        self._unsent = {}

    def receive(self, data):
        for event in self.h2.receive_data(data):
            self.events.append(event)
            match event:
                case h2.events.RequestReceived():
                    self.requests[event.stream_id] = b""
                    self.headers[event.stream_id] = event.headers
                case h2.events.DataReceived():
                    self.requests[event.stream_id] += event.data
                    if event.flow_controlled_length:
                        self.h2.acknowledge_received_data(
                            event.flow_controlled_length, event.stream_id
                        )
                case h2.events.StreamEnded():
                    self.complete.append(event.stream_id)
        self.pump()

    def answer(self, stream_id, data, *, padding=None, frame=16_384, tail=TAIL):
        """Send a whole answer, as fast as the windows allow."""
        self.h2.send_headers(stream_id, HEAD)
        self._unsent[stream_id] = message(data), padding, frame, tail
        self.pump()

    def pump(self):
        for stream_id, (whole, padding, frame, tail) in list(self._unsent.items()):
            rest = whole
            pad = 0 if padding is None else padding + 1
            while rest:
                window = self.h2.local_flow_control_window(stream_id)
                size = min(len(rest), window - pad, frame - pad)
                if size <= 0:
                    break
                self.h2.send_data(stream_id, rest[:size], pad_length=padding)
                rest = rest[size:]
            if rest:
                self._unsent[stream_id] = rest, padding, frame, tail
            else:
                del self._unsent[stream_id]
                self.h2.send_headers(stream_id, tail, end_stream=True)

    def output(self):
        return self.h2.data_to_send()


def exchange(connection, server, now=0.0, split=None):
    """Carry bytes both ways until both are quiet; *split* cuts them in parts."""
    while True:
        there = connection.take_output()
        for part in split(there) if split else [there]:
            if part:
                server.receive(part)
        back = server.output()
        for part in split(back) if split else [back]:
            if part:
                connection.receive(part, now)
        if not there and not back:
            return


def connected(settings=None, **options):
    """Return a client and a server that know each other's settings."""
    connection, server = client(**options), H2Server(settings)
    exchange(connection, server)
    assert connection.is_ready
    assert connection.next_deadline == math.inf
    return connection, server


# -- addresses ----------------------------------------------------------


def v4(host, port=1):
    return Address(socket.AF_INET, (host, port), f"ipv4:{host}:{port}")


def v6(host, port=1):
    return Address(socket.AF_INET6, (host, port, 0, 0), f"ipv6:[{host}]:{port}")


# -- the same on a socket -------------------------------------------------


class SocketServer:
    """
    Serves each connection by an `H2Server` in a thread of its own.

    *script* is called with the server, a stream id and the request, for each call; the
    default echoes. What it does to `server` is sent when it returns.
    """

    def __init__(self, script=None, *, tls=None, settings=None, listener=None):
        self.script = script or (
            lambda server, number, data: server.answer(number, data)
        )
        self.tls = tls
        self.settings = settings
        self.accepted = 0
        self.servers = []
        self._sockets = []
        self._threads = []
        self.listener = listener or socket.create_server(("127.0.0.1", 0))

    @property
    def port(self):
        return self.listener.getsockname()[1]

    @property
    def url(self):
        return f"127.0.0.1:{self.port}"

    def __enter__(self):
        self._start(self._accept)
        return self

    def __exit__(self, *_):
        for each in (self.listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        for each in (self.listener, *self._sockets):
            each.close()

    def _start(self, run, *args):
        thread = threading.Thread(target=run, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                self.accepted += 1
                self._sockets.append(sock)
                self._start(self._serve, sock)

    def _serve(self, sock):
        with contextlib.suppress(OSError, h2.exceptions.ProtocolError):
            if self.tls is not None:
                raw, sock = sock, self.tls.wrap_socket(sock, server_side=True)
                self._sockets[self._sockets.index(raw)] = sock
            self._run(sock)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def _run(self, sock):
        server = H2Server(self.settings)
        server.sock = sock
        self.servers.append(server)
        sock.sendall(server.output())
        answered = 0
        while data := sock.recv(65_536):
            server.receive(data)
            while answered < len(server.complete):
                number = server.complete[answered]
                answered += 1
                self.script(server, number, server.requests[number][5:])
            sock.sendall(server.output())


def descriptors():
    """Return how many file descriptors this process has open."""
    return len([*pathlib.Path("/proc/self/fd").iterdir()])


@contextlib.asynccontextmanager
async def opened(target, timeout=5.0):
    """Yield a connection as the pool would have it, with its task."""
    if isinstance(target, SocketServer):
        target = Target(url=target.url, insecure=True)
    connection = await NativeOpener(target).open(timeout)
    # A server in Python may need seconds for a large answer, and answers no PING then.
    connection._core._silence = math.inf
    async with anyio.create_task_group() as tasks:
        if hasattr(connection, "run"):
            tasks.start_soon(connection.run)
        try:
            yield connection
        finally:
            await connection.close(0.0)


async def call(connection, request=b"", timeout=5.0, metadata=()):
    return await connection.call(METHOD, request, timeout=timeout, metadata=metadata)


async def failure_of(target, timeout=5.0):
    """Return why a connect failed."""
    with pytest.raises(ConnectFailed) as caught:
        await NativeOpener(target).open(timeout)
    return caught.value
