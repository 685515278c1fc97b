"""
What the frames of the server do to a connection: RFC 9113, sections 3.4, 4, 5 and 6.

A violation raises `PeerViolation`, which ends the connection, or `StreamViolation`,
which is caught here and ends the stream.

This side never waits for the peer to notice that a stream ended. So frames for a closed
stream are always ignored, and not only "for a short time" (section 5.1). They count as
overhead, which is bounded.
"""

from __future__ import annotations

import abc
import math
from typing import TYPE_CHECKING, ClassVar, Final

import attrs
import grpc

from fastapi_topaz._http2 import frames
from fastapi_topaz._http2.errors import (
    ErrorCode,
    PeerViolation,
    StreamViolation,
    code_name,
)
from fastapi_topaz._http2.hpack import decode_block
from fastapi_topaz._http2.limits import (
    CONNECTION_WINDOW,
    LATE_FRAMES,
    MAX_CONTINUATIONS,
    MAX_FRAME_SIZE,
    MAX_HEADER_BLOCK,
    MAX_HEADER_LIST_SIZE,
    MAX_LATE_FRAMES,
    MAX_OVERHEAD_FRAMES,
    MAX_QUEUED_CONTROL,
    OVERHEAD_PERIOD,
    STREAM_WINDOW,
)
from fastapi_topaz._http2.responses import reset_error
from fastapi_topaz._rpc.statuses import EndedCall, Ending


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._http2.stream import Stream


__all__ = ["Receiver"]


_INITIAL_WINDOW: Final = 65_535

_HELLO: Final = (
    frames.PREFACE
    + frames.settings(
        (
            (frames.HEADER_TABLE_SIZE, 0),
            (frames.ENABLE_PUSH, 0),
            (frames.INITIAL_WINDOW_SIZE, STREAM_WINDOW),
            (frames.MAX_HEADER_LIST_SIZE, MAX_HEADER_LIST_SIZE),
        )
    )
    + frames.window_update(0, CONNECTION_WINDOW - _INITIAL_WINDOW)
)
"""The connection preface (section 3.4)."""

_EARLY: Final = 0.01
"""
Seconds by which a deadline may come early at the server.

grpc-go resets the stream with CANCEL at the deadline of the call. One time in ten that
comes before the timer here.
"""

_PADDING_STEP: Final = 16_384


@attrs.define
class PeerSettings:
    """The settings of the server (section 6.5.2). A client may not send beyond them."""

    max_concurrent_streams: float = math.inf
    initial_window_size: int = _INITIAL_WINDOW
    max_frame_size: int = 16_384
    max_header_list_size: float = math.inf


class Receiver(abc.ABC):
    """The half of a connection that takes frames."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.streams: dict[int, Stream] = {}
        """The open streams, by their ids."""
        self.takes_calls = True
        """Whether new calls can be sent: False after GOAWAY and at the end."""
        self.failure: str | None = None
        """Why the connection ended; None if it did not."""
        self.settings_received = self.settings_acknowledged = False
        self._peer = PeerSettings()
        self._waiting: dict[Stream, None] = {}
        self._blocked: dict[int, Stream] = {}
        self._next_id = 1
        self._last_stream_id = frames.MAX_WINDOW
        # What is to be sent, its bytes, and how many of its frames the peer asked for.
        self._out: list[bytes] = [_HELLO]
        self._queued = len(_HELLO)
        self._queued_control = 0
        self._send_window = _INITIAL_WINDOW
        self._received = 0  # since the last WINDOW_UPDATE of the connection
        self._rest = b""
        # A header block of which CONTINUATION frames are due: stream, flags, parts.
        self._open_block: tuple[int, int, list[bytes]] | None = None
        self._overhead = 0
        self._overhead_since = 0.0
        self._now = -math.inf
        self._heard = False
        self._pings = 0

    @property
    def is_ready(self) -> bool:
        """
        Whether calls may begin: both sides know the settings of the other.

        The peer's header blocks refer to no table once it has acknowledged ours.
        """
        return self.settings_received and self.settings_acknowledged

    @property
    def max_concurrent_streams(self) -> float:
        """How many calls the peer takes at once, perhaps infinite."""
        return self._peer.max_concurrent_streams

    @abc.abstractmethod
    def _room_made(self) -> None:
        """Go on with calls that wait for a window or for a stream."""

    # -- sending and ending -------------------------------------------------------

    def _queue(self, frame: bytes) -> None:
        self._out.append(frame)
        self._queued += len(frame)

    def _queue_control(self, frame: bytes) -> None:
        """Queue what the peer made us send."""
        self._queued_control += 1
        if self._queued_control > MAX_QUEUED_CONTROL:
            raise _flood("it asks for answers and reads none")
        self._queue(frame)

    def _end(self, stream: Stream, outcome: bytes | Exception) -> None:
        """Give *stream*, which was taken out, its *outcome*."""
        stream.outcome = outcome
        # What the error of a caller keeps alive should not keep more than that.
        stream.unsent = None
        stream.wake()

    def _end_all(self, failure: str, error: Callable[[], Exception]) -> None:
        if self.failure is not None:
            return
        self.failure = failure
        self.takes_calls = False
        streams = [*self.streams.values(), *self._waiting]
        self.streams.clear()
        self._waiting.clear()
        self._blocked.clear()
        self._rest = b""
        self._open_block = None
        for stream in streams:
            self._end(stream, error())

    def _finish(
        self,
        stream: Stream,
        outcome: bytes | Exception,
        reset: ErrorCode | None,
    ) -> None:
        """End *stream*; *reset* is the code to reset it with, None if it is closed."""
        del self.streams[stream.id]
        if stream.unsent is not None:
            # Section 8.1: the answer is whole before the request is.
            del self._blocked[stream.id]
            reset = ErrorCode.NO_ERROR if reset is None else reset
        if reset is not None:
            self._queue_control(frames.rst_stream(stream.id, reset))
            self._expect_late_frames()
        self._overhead = min(self._overhead, 0)
        self._end(stream, outcome)
        if self._waiting:
            self._room_made()

    # -- frames -----------------------------------------------------------------

    def _receive(self, data: bytes, now: float) -> None:
        """Take *data*, and act on the frames that are complete (section 4.1)."""
        self._now = now
        self._heard = True
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if not self.settings_received and data[:5] == b"HTTP/":
            raise PeerViolation(
                ErrorCode.HTTP_1_1_REQUIRED, "it answers in HTTP/1 and not in HTTP/2"
            )
        at, size = 0, len(data)
        unpack = frames.FRAME_HEADER.unpack_from
        while size - at >= frames.HEADER_SIZE:
            upper, lower, kind, flags, stream_id = unpack(data, at)
            end = at + frames.HEADER_SIZE + (upper << 8 | lower)
            if end - at > frames.HEADER_SIZE + MAX_FRAME_SIZE:
                # Section 4.2. A stream error would do for some, but none is sent.
                raise PeerViolation(
                    ErrorCode.FRAME_SIZE_ERROR, "a frame is larger than 16,384 bytes"
                )
            if end > size:
                break
            payload = data[at + frames.HEADER_SIZE : end]
            self._take_frame(kind, flags, stream_id & frames.MAX_WINDOW, payload)
            at = end
        # An I/O layer reads more than a frame at once, so this copies little.
        self._rest = data[at:]

    def _take_frame(
        self, kind: int, flags: int, stream_id: int, payload: bytes
    ) -> None:
        if not self.settings_received and kind != frames.SETTINGS:
            raise _protocol_error("its first frame is not SETTINGS")  # section 3.4
        if self._open_block is not None and (
            kind != frames.CONTINUATION or stream_id != self._open_block[0]
        ):
            # Section 4.3: a header block is one unit.
            raise _protocol_error("another frame cuts a header block")
        handler = self._HANDLERS.get(kind)
        if handler is None:  # section 5.5: unknown types are ignored
            self._count_overhead()
            return
        if kind in _OF_STREAMS:
            if stream_id not in self.streams:  # nearly each frame is on an open one
                self._check_stream_id(kind, stream_id)
        elif stream_id and kind in _OF_CONNECTIONS:
            raise _protocol_error(f"a frame of type {kind} is on a stream")
        try:
            handler(self, flags, stream_id, payload)
        except StreamViolation as violation:
            self._break_stream(stream_id, violation)

    def _expect_late_frames(self) -> None:
        """Allow for frames of a stream that was reset a moment ago."""
        self._overhead = max(min(self._overhead, 0) - LATE_FRAMES, -MAX_LATE_FRAMES)

    def _check_stream_id(self, kind: int, stream_id: int) -> None:
        if stream_id == 0:
            raise _protocol_error(f"a frame of type {kind} is on stream 0")
        if stream_id >= self._next_id or not stream_id & 1:
            # Section 5.1: it is idle, and a server can open none (section 8.4).
            raise _protocol_error(f"a frame of type {kind} is on an idle stream")

    def _break_stream(self, stream_id: int, violation: StreamViolation) -> None:
        """End a stream with a stream error (section 5.4.2)."""
        stream = self.streams.get(stream_id)
        if stream is None:
            self._count_overhead()
            return
        error = EndedCall(
            Ending.NO_STATUS,
            grpc.StatusCode.INTERNAL,
            f"the answer breaks HTTP/2 ({violation.code.name}): {violation.reason}",
        )
        self._finish(stream, error, violation.code)

    def _count_overhead(self, count: int = 1) -> None:
        """Count a frame that is no progress of a call (section 10.5)."""
        if self._overhead <= 0:
            self._overhead_since = self._now
        self._overhead += count
        if self._overhead > MAX_OVERHEAD_FRAMES:
            if self._now - self._overhead_since < OVERHEAD_PERIOD:
                raise _flood("it sends too many frames that are of no use")
            self._overhead = 0

    # -- frames of streams --------------------------------------------------------

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        # Section 6.9: the whole payload counts, also that of closed streams. No frame
        # can exceed a window here: of the connection's, half is always left, and a
        # stream ends when its message is larger than what is allowed.
        self._received += size
        if self._received > CONNECTION_WINDOW // 2:
            self._queue_control(frames.window_update(0, self._received))
            self._received = 0
        body = frames.unpadded(payload, flags) if flags & frames.PADDED else payload
        stream = self.streams.get(stream_id)
        if stream is None:
            self._count_overhead()
            return
        self._pings = 0
        if body:
            stream.response.data(body)
        elif not flags & frames.END_STREAM:
            self._count_overhead()
        ended = flags & frames.END_STREAM
        if ended and stream.response.outcome is None:
            stream.response.end_of_data()
        if stream.response.outcome is not None:
            self._finish(
                stream, stream.response.outcome, None if ended else ErrorCode.CANCEL
            )
        elif len(body) < size:
            self._give_back_padding(stream, size - len(body))

    def _give_back_padding(self, stream: Stream, size: int) -> None:
        # The window is that of the largest message, and padding is not in it.
        stream.padding += size
        if stream.padding >= _PADDING_STEP:
            self._queue_control(frames.window_update(stream.id, stream.padding))
            stream.padding = 0

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & frames.PADDED:
            payload = frames.unpadded(payload, flags)
        payload = frames.without_priority(payload, flags)
        if flags & frames.END_HEADERS:
            self._take_block(flags, stream_id, payload)
        else:
            self._open_block = stream_id, flags, [payload]

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._open_block is None:
            raise _protocol_error("CONTINUATION follows no HEADERS")  # section 6.10
        _, first_flags, parts = self._open_block
        parts.append(payload)
        if len(parts) > MAX_CONTINUATIONS or sum(map(len, parts)) > MAX_HEADER_BLOCK:
            raise _flood("a header block does not end")
        if flags & frames.END_HEADERS:
            self._open_block = None
            self._take_block(first_flags, stream_id, b"".join(parts))

    def _take_block(self, flags: int, stream_id: int, block: bytes) -> None:
        """Take a complete header block (section 4.3)."""
        stream = self.streams.get(stream_id)
        if stream is None:
            # Without a dynamic table, a block that nobody reads changes nothing.
            self._count_overhead()
            return
        self._pings = 0
        ended = bool(flags & frames.END_STREAM)
        response = stream.response
        response.headers(decode_block(block), end_stream=ended)
        if response.outcome is not None:
            self._finish(stream, response.outcome, None if ended else ErrorCode.CANCEL)

    def _on_priority(self, _flags: int, _stream_id: int, payload: bytes) -> None:
        if len(payload) != 5:
            raise StreamViolation(
                ErrorCode.FRAME_SIZE_ERROR, f"a PRIORITY has {len(payload)} bytes"
            )
        self._count_overhead()  # section 5.3.2: it is deprecated

    def _on_rst_stream(self, _flags: int, stream_id: int, payload: bytes) -> None:
        code = frames.parse_rst_stream(payload)
        stream = self.streams.get(stream_id)
        if stream is None:
            self._count_overhead()
            return
        error = reset_error(code)
        if code == ErrorCode.CANCEL and self._now >= stream.deadline - _EARLY:
            error = EndedCall(
                Ending.TIMED_OUT, grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"
            )
        self._blocked.pop(stream_id, None)
        stream.unsent = None
        self._finish(stream, error, None)

    def _on_push_promise(self, _flags: int, _stream_id: int, _payload: bytes) -> None:
        raise _protocol_error("it pushes, which was forbidden")  # section 8.4

    # -- frames of the connection ---------------------------------------------------

    def _on_settings(self, flags: int, _stream_id: int, payload: bytes) -> None:
        if flags & frames.ACK:
            if payload:
                raise PeerViolation(
                    ErrorCode.FRAME_SIZE_ERROR, "an acknowledgement has a payload"
                )
            if not self.settings_received:
                raise _protocol_error("it acknowledges before its SETTINGS")
            if self.settings_acknowledged:
                self._count_overhead()  # SETTINGS are sent once here
            self.settings_acknowledged = True
            return
        pairs = frames.parse_settings(payload)
        # One frame has room for 2,700 settings, and each may change all streams.
        self._count_overhead(1 + len(pairs))
        for key, value in pairs:
            self._apply(key, value)
        self.settings_received = True
        self._queue_control(frames.SETTINGS_ACK)
        if self._waiting or self._blocked:
            self._room_made()

    def _apply(self, key: int, value: int) -> None:
        """Apply one setting of the peer (section 6.5.2); unknown ones are ignored."""
        if key == frames.MAX_CONCURRENT_STREAMS:
            self._peer.max_concurrent_streams = value
        elif key == frames.MAX_FRAME_SIZE:
            self._peer.max_frame_size = value
        elif key == frames.MAX_HEADER_LIST_SIZE:
            self._peer.max_header_list_size = value
        elif key == frames.INITIAL_WINDOW_SIZE:
            # Section 6.9.2: it changes open streams, and may make a window negative.
            change = value - self._peer.initial_window_size
            self._peer.initial_window_size = value
            for stream in self.streams.values():
                stream.send_window += change
                if stream.send_window > frames.MAX_WINDOW:
                    raise PeerViolation(
                        ErrorCode.FLOW_CONTROL_ERROR, "SETTINGS overflow a window"
                    )

    def _on_ping(self, flags: int, _stream_id: int, payload: bytes) -> None:
        frames.parse_ping(payload)
        self._count_overhead()
        if not flags & frames.ACK:
            self._queue_control(frames.ping(payload, ack=True))

    def _on_goaway(self, _flags: int, _stream_id: int, payload: bytes) -> None:
        last, code, debug = frames.parse_goaway(payload)
        if last > self._last_stream_id:  # section 6.8
            raise _protocol_error("the last stream of GOAWAY goes up")
        self._count_overhead()
        self._last_stream_id = last
        self.takes_calls = False
        said = debug[:200].decode("ascii", "backslashreplace")
        text = f"GOAWAY received; {code_name(code)}" + (f": {said}" if said else "")
        streams = [stream for number, stream in self.streams.items() if number > last]
        for stream in streams:
            del self.streams[stream.id]
            self._blocked.pop(stream.id, None)
        streams += self._waiting
        self._waiting.clear()
        for stream in streams:
            # The server did not and will not process it.
            self._end(
                stream, EndedCall(Ending.GOAWAY, grpc.StatusCode.UNAVAILABLE, text)
            )

    def _on_window_update(self, _flags: int, stream_id: int, payload: bytes) -> None:
        increment = frames.parse_window_update(payload)
        if stream_id >= self._next_id or (stream_id and not stream_id & 1):
            raise _protocol_error("WINDOW_UPDATE is on an idle stream")
        if not self._blocked:
            self._count_overhead()
        if stream_id == 0:
            if increment == 0:
                raise _protocol_error("WINDOW_UPDATE adds nothing")
            self._send_window += increment
            if self._send_window > frames.MAX_WINDOW:
                raise PeerViolation(
                    ErrorCode.FLOW_CONTROL_ERROR, "the connection's window overflows"
                )
        else:
            stream = self.streams.get(stream_id)
            if stream is None:
                return
            if increment == 0:
                raise StreamViolation(
                    ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE adds nothing"
                )
            stream.send_window += increment
            if stream.send_window > frames.MAX_WINDOW:
                raise StreamViolation(
                    ErrorCode.FLOW_CONTROL_ERROR, "the stream's window overflows"
                )
        if self._blocked:
            self._room_made()

    # Plain functions: bound ones would make a circle of references.
    _HANDLERS: ClassVar[dict[int, Callable[[Receiver, int, int, bytes], None]]] = {
        frames.DATA: _on_data,
        frames.HEADERS: _on_headers,
        frames.PRIORITY: _on_priority,
        frames.RST_STREAM: _on_rst_stream,
        frames.SETTINGS: _on_settings,
        frames.PUSH_PROMISE: _on_push_promise,
        frames.PING: _on_ping,
        frames.GOAWAY: _on_goaway,
        frames.WINDOW_UPDATE: _on_window_update,
        frames.CONTINUATION: _on_continuation,
    }


_OF_STREAMS: Final = frozenset(
    {frames.DATA, frames.HEADERS, frames.RST_STREAM, frames.CONTINUATION}
)
_OF_CONNECTIONS: Final = frozenset({frames.SETTINGS, frames.PING, frames.GOAWAY})


def _protocol_error(reason: str) -> PeerViolation:
    return PeerViolation(ErrorCode.PROTOCOL_ERROR, reason)


def _flood(reason: str) -> PeerViolation:
    return PeerViolation(ErrorCode.ENHANCE_YOUR_CALM, reason)
