"""
A scripted gRPC server that implements HTTP/2 by hand.

A real gRPC server cannot send GOAWAY at a chosen moment, refuse a stream, stop in the
middle of a message or change its SETTINGS. This server answers every unary call, and
breaks the protocol on request.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import threading
import urllib.parse
from collections import Counter
from typing import Self

import grpc
import h2.events
from aserto.authorizer.v2 import Decision, IsResponse
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame

from fastapi_topaz import AuthorizerOptions


_IS = "/aserto.authorizer.v2.Authorizer/Is"
_ALLOWED = IsResponse(decisions=[Decision(decision="allowed", **{"is": True})])
_HEADERS = [(":status", "200"), ("content-type", "application/grpc")]
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() discards and resets
_SMALLEST = 64  # room for the usual answer and the padding field
_PATIENCE = 30.0  # for a client to handle a frame; normally far less


def _limited_to(streams: int | None) -> dict[SettingCodes, int]:
    limit = 2**32 - 1 if streams is None else streams
    return {SettingCodes.MAX_CONCURRENT_STREAMS: limit}


class _Call:
    """One stream, from its first header to the end of its answer."""

    def __init__(self, connection: _Connection, stream: int, path: str) -> None:
        self.connection = connection
        self.stream = stream
        self.method = path.rpartition("/")[2]
        self.message = _ALLOWED.SerializeToString() if path == _IS else b""
        # The request so far, as a gRPC message.
        self.asked = b""
        self.is_held = False
        # The rest of an answer that flow control does not allow yet.
        self.unsent: memoryview | None = None

    def _frame(self, size: int | None = None) -> bytes:
        message = self.message
        if size is not None:
            # An unknown field (1000, bytes, a length that always takes four bytes).
            # protobuf ignores it, so the message has the same meaning.
            rest = size - len(message) - 6
            length = (rest & 127 | 128, rest >> 7 & 127 | 128, rest >> 14 & 127 | 128)
            message += bytes([0xC2, 0x3E, *length, rest >> 21]) + bytes(rest)
        return struct.pack("!BI", 0, len(message)) + message

    def reply(self, size: int | None = None) -> None:
        """Answer OK, as fast as the client reads."""
        self.connection.h2.send_headers(self.stream, _HEADERS)
        self.unsent = memoryview(self._frame(size))
        self.pump()

    def pump(self) -> None:
        """Send as much of the answer as flow control allows."""
        if self.unsent is None:
            return
        wire = self.connection.h2
        while self.unsent:
            window = wire.local_flow_control_window(self.stream)
            room = min(window, wire.max_outbound_frame_size)
            if room <= 0:
                return
            wire.send_data(self.stream, bytes(self.unsent[:room]))
            self.unsent = self.unsent[room:]
        self._end([("grpc-status", "0")])

    def fail(self, code: int, message: str) -> None:
        """Answer with trailers only."""
        text = urllib.parse.quote(message)
        self._end([*_HEADERS, ("grpc-status", str(code)), ("grpc-message", text)])

    def _end(self, headers: list[tuple[str, str]]) -> None:
        self.connection.h2.send_headers(self.stream, headers, end_stream=True)
        self.connection.forget(self.stream)

    def reset(self, error_code: int) -> None:
        self.connection.h2.reset_stream(self.stream, error_code)
        self.connection.server.resets += 1
        self.connection.forget(self.stream)

    def truncate(self) -> None:
        """Send half of the answer, then reset the connection."""
        frame = self._frame()
        self.connection.h2.send_headers(self.stream, _HEADERS)
        self.connection.h2.send_data(self.stream, frame[: len(frame) // 2])
        # Only after the client has read it, because a reset may overtake data.
        self.connection.barrier().add_done_callback(self.connection.reset)


class _Connection(asyncio.Protocol):
    """The connection of one client."""

    def __init__(self, server: Http2Server) -> None:
        self.server = server
        self.calls: dict[int, _Call] = {}
        self.h2 = H2Connection(H2Configuration(client_side=False))
        self.lost = asyncio.get_running_loop().create_future()
        self._is_greeted = self._is_over = False
        # Streams above it came after a GOAWAY and never get an answer.
        self._last_stream = math.inf
        # Set once the client knows that the server closes after its calls are answered.
        self._warned: asyncio.Future[None] | None = None
        self._barriers: dict[bytes, asyncio.Future[None]] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.h2.local_settings = Settings(False, self.server.settings)
        self.h2.initiate_connection()
        self.flush()
        self.server.accepted += 1
        self.server.connections[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._give_up()
        self.server.connections.pop(self)
        for barrier in self._barriers.values():
            barrier.set_result(None)
        self.lost.set_result(None)

    def _give_up(self) -> None:
        self._is_over = True
        self.calls.clear()

    def data_received(self, data: bytes) -> None:
        try:
            events = self.h2.receive_data(data)
        except ProtocolError as error:
            self.server.errors.append(error)
            self._give_up()
            self.flush()
            events = []
        # h2 already has the state after the last event. An answer to a stream that was
        # reset meanwhile is an error. So all events are recorded before the first
        # answer.
        complete = [call for event in events if (call := self._note(event))]
        if self._is_over:
            self.transport.close()
            return
        for call in complete:
            if call.stream in self.calls:
                self.server.handle(call)
        for call in list(self.calls.values()):
            call.pump()
        self.flush()

    def _note(self, event: h2.events.Event) -> _Call | None:
        """Return the call with the request that *event* completes."""
        stream = getattr(event, "stream_id", None)
        match event:
            case h2.events.RemoteSettingsChanged():
                self._is_greeted = True
            case h2.events.ConnectionTerminated():
                self._give_up()
            case h2.events.PingAckReceived(ping_data=number):
                self._barriers.pop(number).set_result(None)
            case h2.events.RequestReceived() if stream <= self._last_stream:
                path = dict(event.headers)[b":path"].decode()
                self.calls[stream] = _Call(self, stream, path)
                peak = max(self.server.max_concurrent_seen, len(self.calls))
                self.server.max_concurrent_seen = peak
            case h2.events.DataReceived():
                self.h2.acknowledge_received_data(event.flow_controlled_length, stream)
                if stream in self.calls:
                    self.calls[stream].asked += event.data
            case h2.events.StreamReset():
                self.forget(stream)
            case h2.events.StreamEnded() if stream in self.calls:
                self.server.counted[self.calls[stream].method] += 1
                return self.calls[stream]
        return None

    def flush(self) -> None:
        if data := self.h2.data_to_send():
            self.transport.write(data)

    def barrier(self) -> asyncio.Future[None]:
        """Return once the client has handled the sent frames, or is gone."""
        passed = asyncio.get_running_loop().create_future()
        if self._is_over or not self._is_greeted:
            passed.set_result(None)  # the client is gone and would not answer a PING
        else:
            number = id(passed).to_bytes(8, "big")
            self._barriers[number] = passed
            self.h2.ping(number)
            self.flush()
        return passed

    def forget(self, stream: int) -> None:
        """Record that *stream* was answered, or given up by the client."""
        self.calls.pop(stream, None)
        is_warned = self._warned is not None and self._warned.done()
        if is_warned and not self.calls and not self._is_over:
            self.flush()
            self.transport.close()

    def goaway(self, error_code: int, debug: bytes, close: bool) -> asyncio.Future:
        self.flush()
        self._last_stream = min(self._last_stream, self.h2.highest_inbound_stream_id)
        # By hand, because h2 sends nothing more after a GOAWAY, not even answers.
        frame = GoAwayFrame(0, int(self._last_stream), error_code, debug)
        self.transport.write(frame.serialize())
        told = self.barrier()
        if close:
            self._warned = told
            told.add_done_callback(lambda _: self.forget(0))
        return told

    def limit_streams(self) -> asyncio.Future[None]:
        if not self._is_over:
            self.h2.update_settings(self.server.settings)
        return self.barrier()

    def reset(self, _: object) -> None:
        if not self._is_over:
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()


class Http2Server:
    """
    Answers every unary call OK, until a fault is set; use it in a `with`.

    When a method returns, every connected client has handled the change. The last fault
    that was set applies. It is applied when a call is answered, so held calls get the
    fault that is set when they are let go. *times* is a number of calls, None for all.
    A *limit* of None means no limit.
    """

    def __init__(
        self, *, host="127.0.0.1", port=0, max_concurrent_streams: int | None = None
    ) -> None:
        self.host = host
        self.port = port
        self.settings = _limited_to(max_concurrent_streams)
        self.accepted = 0
        self.resets = 0  # streams that got RST_STREAM
        self.max_concurrent_seen = 0
        self.errors: list[ProtocolError] = []  # how clients broke the protocol
        self.connections: dict[_Connection, None] = {}
        self.counted: Counter[str] = Counter()
        self._is_holding = False
        self._fault = (_Call.reply, math.inf)
        self._bugs: list[dict] = []

    def __enter__(self) -> Self:
        listener = socket.create_server((self.host, self.port), backlog=1024)
        # Accepted sockets inherit it; asyncio does not set it on a socket without
        # proto.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = listener.getsockname()[1]
        self.url = f"{self.host}:{self.port}"
        self.options = AuthorizerOptions(url=self.url, insecure=True)
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda _, context: self._bugs.append(context))
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(lambda: self._start(listener))
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        self._run(self._stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        # An error in the kit must not be silent, and must not hide why the test failed.
        if self._bugs and exc_type is None:
            raise RuntimeError(self._bugs) from self._bugs[0].get("exception")

    async def _start(self, listener: socket.socket) -> None:
        server = self._loop.create_server(lambda: _Connection(self), sock=listener)
        self._server = await server

    async def _stop(self) -> None:
        # An asyncio.Server that is closed during an accept loses the socket.
        self._loop.remove_reader(self._server.sockets[0].fileno())
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})
        self._server.close()
        for connection in list(self.connections):
            connection.transport.abort()
            await connection.lost

    def _run(self, work) -> None:
        """Run *work* in the server's thread, and wait for it."""

        async def patiently():
            async with asyncio.timeout(_PATIENCE):
                if (rest := work()) is not None:
                    await rest

        asyncio.run_coroutine_threadsafe(patiently(), self._loop).result()

    def _tell(self, say) -> None:
        self._run(lambda: asyncio.gather(*map(say, list(self.connections))))

    def handle(self, call: _Call) -> None:
        """Handle a call that has arrived, as the script says."""
        call.is_held = self._is_holding
        if call.is_held:
            return
        act, times = self._fault
        self._fault = (act, times - 1) if times > 1 else (_Call.reply, math.inf)
        act(call)

    def _script(self, act, times: int | None) -> None:
        if times is not None and times < 1:
            raise ValueError(f"times must be at least 1, got {times!r}")
        fault = (act, math.inf if times is None else times)
        self._run(lambda: setattr(self, "_fault", fault))

    # -- the interface for tests

    @property
    def open(self) -> int:
        """The number of connected clients."""
        return len(self.connections)

    @property
    def calls(self) -> Counter[str]:
        """Complete requests that arrived, by method, whatever their outcome."""
        return Counter(self.counted)

    @property
    def in_flight(self) -> int:
        """The number of held calls."""
        return len(self._held())

    def _held(self) -> list[_Call]:
        every = [list(client.calls.values()) for client in list(self.connections)]
        return [call for calls in every for call in calls if call.is_held]

    def goaway(self, error_code=0, debug=b"too_many_pings", *, close=True) -> None:
        """
        Let no client open another stream; calls that have arrived are still answered.
        """
        self._tell(lambda client: client.goaway(error_code, debug, close))

    def refuse_streams(self, times: int | None = None) -> None:
        """Reset streams with REFUSED_STREAM: the server has not processed them."""
        self.reset_streams(times, ErrorCodes.REFUSED_STREAM)

    def reset_streams(self, times: int | None, error_code: int) -> None:
        self._script(lambda call: call.reset(error_code), times)

    def truncate(self, times: int | None = None) -> None:
        """Reset the connection in the middle of an answer."""
        self._script(_Call.truncate, times)

    def status(self, code, message: str = "", times: int | None = None) -> None:
        """Answer with a `grpc.StatusCode`, or a number that gRPC need not know."""
        number = code.value[0] if isinstance(code, grpc.StatusCode) else code
        self._script(lambda call: call.fail(number, message), times)

    def answer_size(self, size: int, times: int | None = None) -> None:
        """Pad the messages to *size* bytes."""
        if size < _SMALLEST:
            raise ValueError(f"size must be at least {_SMALLEST}, got {size!r}")
        self._script(lambda call: call.reply(size), times)

    def heal(self) -> None:
        """Answer OK, also held calls; limits stay."""
        self._script(_Call.reply, None)
        self.let_go()

    def hold(self) -> None:
        """Hold calls: leave them unanswered."""
        self._run(lambda: setattr(self, "_is_holding", True))

    def let_go(self) -> None:
        """Answer again, held calls first."""

        def answer():
            self._is_holding = False
            for call in self._held():
                self.handle(call)
                call.connection.flush()

        self._run(answer)

    def set_max_concurrent_streams(self, limit: int | None) -> None:
        """Announce the stream limit to every client; 0 allows no stream."""
        self.settings = _limited_to(limit)
        self._tell(_Connection.limit_streams)
