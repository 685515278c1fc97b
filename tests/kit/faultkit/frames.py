"""
A server that sends the HTTP/2 frames that a test wrote, right or wrong.

`Http2Server` keeps to the protocol between its faults. This server checks nothing. It
answers each request with the bytes that the test's script writes, so an answer may
break any rule of HTTP/2 or gRPC.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import Counter
from typing import TYPE_CHECKING, Self

from aserto.authorizer.v2 import Decision, IsResponse
from hpack import Decoder

from fastapi_topaz import AuthorizerOptions


if TYPE_CHECKING:
    from collections.abc import Callable

    Script = Callable[["Wire", int, str], object]


DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_PATIENCE = 30.0


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return one HTTP/2 frame (RFC 9113, section 4.1)."""
    head = struct.pack("!I", len(payload))[1:] + struct.pack(
        "!BBI", kind, flags, stream
    )
    return head + payload


def block(headers: list[tuple[str | bytes, str | bytes]]) -> bytes:
    """Return *headers* in HPACK as literals, which need no state and no rules."""
    return b"".join(b"\x10" + _text(name) + _text(value) for name, value in headers)


def _text(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    if len(data) < 127:
        return bytes([len(data)]) + data
    rest, length = len(data) - 127, bytearray([127])
    while rest > 127:
        length.append(rest & 127 | 128)
        rest >>= 7
    length.append(rest)
    return bytes(length) + data


def message(data: bytes, *, flag: int = 0, length: int | None = None) -> bytes:
    """Return *data* as a gRPC message, with a wrong *length* if one is given."""
    return struct.pack("!BI", flag, len(data) if length is None else length) + data


ALLOW = IsResponse(decisions=[Decision(decision="allowed", **{"is": True})])
HEAD = [(":status", "200"), ("content-type", "application/grpc")]
TAIL = [("grpc-status", "0")]


def answer(head=HEAD, body: bytes | None = None, tail=TAIL) -> Script:
    """Return a script that sends headers, a body and trailers; by default an allow."""

    def script(wire: Wire, stream: int, method: str) -> None:
        allow = ALLOW.SerializeToString() if method == "Is" else b""
        wire.headers(stream, head)
        wire.data(stream, message(allow) if body is None else body)
        wire.headers(stream, tail, end=True)

    return script


class Wire:
    """One connection that a script writes to."""

    def __init__(self, server: FrameServer, sock: socket.socket) -> None:
        self._server = server
        self._socket = sock
        # By stream: the message of a request that was read.
        self.asked: dict[int, bytes] = {}
        # An acknowledgement of SETTINGS may not come before those of the server.
        self._is_silent = True
        self._ack_is_due = False

    def send(self, *parts: bytes) -> None:
        """Send bytes at once; do nothing if the client is gone."""
        self._is_silent = False
        with contextlib.suppress(OSError):
            self._socket.sendall(b"".join(parts))

    def headers(self, stream: int, headers: list, *, end: bool = False) -> None:
        """Send a block of headers, or of trailers if *end* is true."""
        flags = END_HEADERS | (END_STREAM if end else 0)
        self.send(frame(HEADERS, flags, stream, block(headers)))

    def data(self, stream: int, data: bytes, *, end: bool = False) -> None:
        self.send(frame(DATA, END_STREAM if end else 0, stream, data))

    def reset(self, stream: int, code: int) -> None:
        self.send(frame(RST_STREAM, 0, stream, struct.pack("!I", code)))

    def goaway(self, code: int = 0, *, last: int = 0, debug: bytes = b"") -> None:
        self.send(frame(GOAWAY, 0, 0, struct.pack("!II", last, code) + debug))

    def settings(self, values: dict[int, int]) -> None:
        pairs = (struct.pack("!HI", *pair) for pair in values.items())
        self.send(frame(SETTINGS, 0, 0, b"".join(pairs)))
        if self._ack_is_due:
            self._ack_is_due = False
            self.send(frame(SETTINGS, ACK, 0))

    def close(self) -> None:
        """Close the socket; the client can still read what was sent before."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def serve(self) -> None:
        """Read requests until the client closes, and answer each by the script."""
        reader = self._socket.makefile("rb")
        decoder = Decoder()
        paths: dict[int, str] = {}
        bodies: dict[int, bytes] = {}
        with contextlib.suppress(OSError), reader:
            if reader.read(len(_PREFACE)) != _PREFACE:
                return
            self._server.on_connect(self)
            while len(head := reader.read(9)) == 9:
                size = int.from_bytes(head[:3])
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:])
                payload = reader.read(size)
                if kind == SETTINGS and not flags & ACK:
                    if self._is_silent:
                        self._ack_is_due = True
                    else:
                        self.send(frame(SETTINGS, ACK, 0))
                elif kind == PING and not flags & ACK:
                    self.send(frame(PING, ACK, 0, payload))
                elif kind == HEADERS:
                    # gRPC does not split header blocks as small as these.
                    fields = dict(decoder.decode(payload, raw=True))
                    paths[stream] = fields[b":path"].decode()
                elif kind == DATA:
                    bodies[stream] = bodies.get(stream, b"") + payload
                if kind in {HEADERS, DATA} and flags & END_STREAM:
                    self.asked[stream] = bodies.pop(stream, b"")[len(message(b"")) :]
                    self._server.on_request(self, stream, paths.pop(stream))


class FrameServer:
    """
    Runs a script for each connection and each request; use it in a `with`.

    *script* is called with the `Wire`, the number of the stream and the name of the
    method. *greeting* is called with the `Wire` of each new connection, in place of the
    SETTINGS frame that a server begins with.
    """

    def __init__(
        self,
        script: Script,
        greeting: Callable[[Wire], object] = lambda wire: wire.settings({}),
    ) -> None:
        self.script = script
        self.greeting = greeting
        self.accepted = 0
        self.calls: Counter[str] = Counter()
        self.errors: list[BaseException] = []
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self._listener.getsockname()[1]
        self.url = f"127.0.0.1:{self.port}"
        self.options = AuthorizerOptions(url=self.url, insecure=True)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        with self._lock:
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(_PATIENCE)
        self._listener.close()
        with self._lock:
            rest = list(self._open.items())
        for sock, _thread in rest:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for _sock, thread in rest:
            thread.join(_PATIENCE)
        # An error in a script must not be silent, and must not hide why the test
        # failed.
        if self.errors and exc_type is None:
            raise self.errors[0]

    @property
    def open(self) -> int:
        """The number of open client sockets."""
        return len(self._open)

    def on_connect(self, wire: Wire) -> None:
        self.greeting(wire)

    def on_request(self, wire: Wire, stream: int, path: str) -> None:
        method = path.rpartition("/")[2]
        with self._lock:
            self.calls[method] += 1
        self.script(wire, stream, method)

    def _accept(self) -> None:
        while True:
            try:
                sock, _address = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            with self._lock:
                self.accepted += 1
                self._open[sock] = thread
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock:
                Wire(self, sock).serve()
        except BaseException as error:  # noqa: BLE001  (shown when the server ends)
            self.errors.append(error)
        finally:
            with self._lock:
                del self._open[sock]
