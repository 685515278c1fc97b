"""
The frames of the server, and their effects: RFC 9113, sections 3.4, 4, 5 and 6.

A violation of the protocol raises `PeerViolation`, which ends the connection, or
`StreamViolation`. The receiver catches the latter and ends the stream.

Frames for a closed stream are always ignored, not only "for a short period" (section
5.1), because the client does not wait until the server knows that a stream is closed.
They count as overhead, which is limited.
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
    BYTES_PER_UPDATE,
    CONNECTION_WINDOW,
    LATE_FRAMES,
    MAX_CONTINUATIONS,
    MAX_FRAME_SIZE,
    MAX_HEADER_BLOCK,
    MAX_HEADER_LIST_SIZE,
    MAX_LATE_FRAMES,
    MAX_MESSAGE,
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

_DEADLINE_TOLERANCE: Final = 0.01
"""
Seconds before the deadline in which CANCEL means that the deadline is exceeded.

grpc-go resets the stream with CANCEL at the deadline of the call. In one of ten calls,
the reset arrives before the timer of the client.
"""

_PADDING_STEP: Final = 16_384
"""Bytes of padding that one WINDOW_UPDATE of a stream returns."""


def _preface(stream_window: int, connection_window: int) -> bytes:
    """Return the connection preface (section 3.4)."""
    return (
        frames.PREFACE
        + frames.settings(
            (
                (frames.HEADER_TABLE_SIZE, 0),
                (frames.ENABLE_PUSH, 0),
                (frames.INITIAL_WINDOW_SIZE, stream_window),
                (frames.MAX_HEADER_LIST_SIZE, MAX_HEADER_LIST_SIZE),
            )
        )
        + frames.window_update(0, connection_window - _INITIAL_WINDOW)
    )


@attrs.define
class PeerSettings:
    """The settings of the server, which limit what the client sends (section 6.5.2)."""

    max_concurrent_streams: float = math.inf
    initial_window_size: int = _INITIAL_WINDOW
    max_frame_size: int = 16_384
    max_header_list_size: float = math.inf


class Receiver(abc.ABC):
    """The part of a connection that receives frames."""

    __slots__ = (
        "_blocked",
        "_connection_window",
        "_first_unsent_id",
        "_heard",
        "_last_stream_id",
        "_late_frames",
        "_next_id",
        "_now",
        "_open_block",
        "_out",
        "_overhead",
        "_overhead_since",
        "_peer",
        "_pings",
        "_queued",
        "_queued_control",
        "_received",
        "_rest",
        "_send_window",
        "_waiting",
        "failure",
        "goaway",
        "max_message",
        "settings_acknowledged",
        "settings_received",
        "streams",
        "takes_calls",
        "target",
    )

    def __init__(self, target: str, max_message: int = MAX_MESSAGE) -> None:
        self.target = target
        self.max_message = max_message
        more = max(0, max_message - MAX_MESSAGE)
        window = min(CONNECTION_WINDOW + 4 * more, frames.MAX_WINDOW)
        self._connection_window = window
        # Frames that may come late: see `LATE_FRAMES`.
        self._late_frames = LATE_FRAMES + more // MAX_FRAME_SIZE
        self.streams: dict[int, Stream] = {}
        """The open streams, by their ids."""
        self.takes_calls = True
        """Whether new calls can begin: False after GOAWAY and at the end."""
        self.failure: str | None = None
        """Why the connection ended. None if it has not ended."""
        self.settings_received = self.settings_acknowledged = False
        self.goaway = ""
        """What the last GOAWAY said."""
        self._peer = PeerSettings()
        self._waiting: dict[Stream, None] = {}
        self._blocked: dict[int, Stream] = {}
        self._next_id = 1
        # The I/O layer took no byte of the streams from this one on.
        self._first_unsent_id = 1
        self._last_stream_id = frames.MAX_WINDOW
        # The frames to send, their bytes, and how many of them are replies to frames of
        # the peer.
        self._out: list[bytes] = [_preface(STREAM_WINDOW + more, window)]
        self._queued = len(self._out[0])
        self._queued_control = 0
        self._send_window = _INITIAL_WINDOW
        self._received = 0  # since the last WINDOW_UPDATE of the connection
        self._rest = b""
        # A header block that CONTINUATION frames must complete: stream, flags, parts.
        self._open_block: tuple[int, int, list[bytes]] | None = None
        self._overhead = 0
        self._overhead_since = 0.0
        self._now = -math.inf
        self._heard = False
        self._pings = 0

    @property
    def is_ready(self) -> bool:
        """
        Whether calls may begin: both sides know the settings of the other side.

        After the peer has acknowledged the client's settings, its header blocks do not
        refer to a dynamic table.
        """
        return self.settings_received and self.settings_acknowledged

    @property
    def max_concurrent_streams(self) -> float:
        """The most concurrent calls that the peer allows. It may be infinite."""
        return self._peer.max_concurrent_streams

    @abc.abstractmethod
    def _resume_calls(self) -> None:
        """Continue calls that wait for a window, for a stream, or for the socket."""

    # -- sending and ending -------------------------------------------------------

    def _queue(self, frame: bytes) -> None:
        self._out.append(frame)
        self._queued += len(frame)

    def _queue_control(self, frame: bytes) -> None:
        """Queue a reply to a frame of the peer."""
        self._queued_control += 1
        if self._queued_control > MAX_QUEUED_CONTROL:
            raise _flood("the server causes replies and does not read them")
        self._queue(frame)

    def _end(self, stream: Stream, outcome: bytes | Exception) -> None:
        """Set the *outcome* of *stream*, which was removed, and wake its caller."""
        stream.outcome = outcome
        # An error may keep its stream alive. The request needs no memory any more.
        stream.unsent = None
        stream.wake()

    def _end_all(self, failure: str, error: Callable[[Stream], Exception]) -> None:
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
            self._end(stream, error(stream))

    def _finish(
        self,
        stream: Stream,
        outcome: bytes | Exception,
        reset: ErrorCode | None,
    ) -> None:
        """
        Remove *stream* and set its *outcome*.

        *reset* is the code of the RST_STREAM frame to send. None means that the stream
        is already closed.
        """
        del self.streams[stream.id]
        if stream.unsent is not None:
            # Section 8.1: the response is complete before the request is.
            del self._blocked[stream.id]
            reset = ErrorCode.NO_ERROR if reset is None else reset
        if reset is not None:
            # Not `_queue_control`: it may raise, and this call must get its outcome.
            # There is at most one such frame for each call.
            self._queue(frames.rst_stream(stream.id, reset))
            self._expect_late_frames()
        self._overhead = min(self._overhead, 0)
        self._end(stream, outcome)
        if self._waiting:
            self._resume_calls()

    # -- frames -----------------------------------------------------------------

    def _receive(self, data: bytes, now: float) -> None:
        """Process the complete frames in *data*, and keep the rest (section 4.1)."""
        self._now = now
        self._heard = True
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if not self.settings_received and data[:5] == b"HTTP/":
            raise PeerViolation(
                ErrorCode.PROTOCOL_ERROR, "the server speaks HTTP/1 and not HTTP/2"
            )
        at, size = 0, len(data)
        unpack = frames.FRAME_HEADER.unpack_from
        while size - at >= frames.HEADER_SIZE:
            upper, lower, kind, flags, stream_id = unpack(data, at)
            end = at + frames.HEADER_SIZE + (upper << 8 | lower)
            if end - at > frames.HEADER_SIZE + MAX_FRAME_SIZE:
                # Section 4.2. For some frames a stream error is enough. But no server
                # sends such frames, so all of them are connection errors.
                raise PeerViolation(
                    ErrorCode.FRAME_SIZE_ERROR, "a frame is larger than 16,384 bytes"
                )
            if end > size:
                break
            payload = data[at + frames.HEADER_SIZE : end]
            self._process_frame(kind, flags, stream_id & frames.MAX_WINDOW, payload)
            at = end
        # One read usually has more than one frame, so this copies little.
        self._rest = data[at:]

    def _process_frame(
        self, kind: int, flags: int, stream_id: int, payload: bytes
    ) -> None:
        if not self.settings_received and kind != frames.SETTINGS:
            raise _protocol_error("the first frame is not SETTINGS")  # section 3.4
        if self._open_block is not None and (
            kind != frames.CONTINUATION or stream_id != self._open_block[0]
        ):
            # Section 4.3: a header block is one unit.
            raise _protocol_error("a header block is interrupted by another frame")
        handler = self._HANDLERS.get(kind)
        if handler is None:  # section 5.5: unknown types are ignored
            self._count_overhead()
            return
        if kind in _OF_STREAMS:
            if stream_id not in self.streams:  # nearly all frames are on open streams
                self._check_stream_id(kind, stream_id)
        elif stream_id and kind in _OF_CONNECTIONS:
            raise _protocol_error(f"a frame of type {kind} is on a stream")
        try:
            handler(self, flags, stream_id, payload)
        except StreamViolation as violation:
            self._reset_stream(stream_id, violation)

    def _expect_late_frames(self) -> None:
        """Allow more overhead, because frames for a reset stream may still arrive."""
        late = min(self._overhead, 0) - self._late_frames
        self._overhead = max(late, -MAX_LATE_FRAMES)

    def _expect_window_updates(self, size: int) -> None:
        """Allow more overhead: WINDOW_UPDATE frames for *size* bytes of sent DATA."""
        allowed = 2 + size // BYTES_PER_UPDATE
        self._overhead = max(self._overhead - allowed, -MAX_LATE_FRAMES)

    def _check_stream_id(self, kind: int, stream_id: int) -> None:
        if stream_id == 0:
            raise _protocol_error(f"a frame of type {kind} is on stream 0")
        if stream_id >= self._next_id or not stream_id & 1:
            # Section 5.1: the stream is idle. A server opens none (section 8.4).
            raise _protocol_error(f"a frame of type {kind} is on an idle stream")

    def _reset_stream(self, stream_id: int, violation: StreamViolation) -> None:
        """End a stream with a stream error (section 5.4.2)."""
        stream = self.streams.get(stream_id)
        if stream is None:
            self._count_overhead()
            return
        error = EndedCall(
            Ending.NO_STATUS,
            grpc.StatusCode.INTERNAL,
            f"the response violates HTTP/2 ({violation.code.name}): {violation.reason}",
        )
        self._finish(stream, error, violation.code)

    def _count_overhead(self, count: int = 1) -> None:
        """Count *count* overhead frames (section 10.5)."""
        if self._overhead <= 0:
            self._overhead_since = self._now
        self._overhead += count
        if self._overhead > MAX_OVERHEAD_FRAMES:
            if self._now - self._overhead_since < OVERHEAD_PERIOD:
                raise _flood("the server sends too many frames without data")
            self._overhead = 0

    # -- frames of streams --------------------------------------------------------

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        # Section 6.9: the whole payload counts, with its padding and also for closed
        # streams. The windows need no check. A frame fits into the connection's window,
        # because half of it is always left. A stream ends if its message exceeds the
        # limit, which is below its window.
        self._received += size
        if self._received > self._connection_window // 2:
            self._queue_control(frames.window_update(0, self._received))
            self._received = 0
        body = frames.unpadded(payload, flags) if flags & frames.PADDED else payload
        stream = self.streams.get(stream_id)
        if stream is None:
            self._count_overhead()
            return
        self._pings = 0
        stream.response.data(body)
        if not (body or flags & frames.END_STREAM):
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
        # The window of a stream has room for the largest message, but not for padding.
        stream.padding += size
        if stream.padding >= _PADDING_STEP:
            self._queue_control(frames.window_update(stream.id, stream.padding))
            stream.padding = 0

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & frames.PADDED:
            payload = frames.unpadded(payload, flags)
        payload = frames.without_priority(payload, flags)
        if flags & frames.END_HEADERS:
            self._process_block(flags, stream_id, payload)
        else:
            self._open_block = stream_id, flags, [payload]

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._open_block is None:
            # Section 6.10.
            raise _protocol_error("a CONTINUATION frame does not follow HEADERS")
        _, first_flags, parts = self._open_block
        parts.append(payload)
        if len(parts) > MAX_CONTINUATIONS or sum(map(len, parts)) > MAX_HEADER_BLOCK:
            raise _flood("a header block is too long")
        if flags & frames.END_HEADERS:
            self._open_block = None
            self._process_block(first_flags, stream_id, b"".join(parts))

    def _process_block(self, flags: int, stream_id: int, block: bytes) -> None:
        """Process a complete header block (section 4.3)."""
        stream = self.streams.get(stream_id)
        if stream is None:
            # Without a dynamic table, a block that is not decoded changes no state.
            self._count_overhead()
            return
        self._pings = 0
        ended = bool(flags & frames.END_STREAM)
        response = stream.response
        response.headers(decode_block(block), end_stream=ended)
        if response.outcome is not None:
            self._finish(stream, response.outcome, None if ended else ErrorCode.CANCEL)

    def _on_priority(self, _flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id == 0:  # section 6.3
            raise _protocol_error("PRIORITY is on stream 0")
        if len(payload) != 5:
            raise StreamViolation(
                ErrorCode.FRAME_SIZE_ERROR, f"a PRIORITY frame has {len(payload)} bytes"
            )
        self._count_overhead()  # section 5.3.2: it is deprecated

    def _on_rst_stream(self, _flags: int, stream_id: int, payload: bytes) -> None:
        code = frames.parse_rst_stream(payload)
        stream = self.streams.get(stream_id)
        if stream is None:
            self._count_overhead()
            return
        error = reset_error(code, has_begun=stream.response.has_begun)
        if (
            code == ErrorCode.CANCEL
            and self._now >= stream.deadline - _DEADLINE_TOLERANCE
        ):
            error = EndedCall(
                Ending.TIMED_OUT, grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"
            )
        self._blocked.pop(stream_id, None)
        stream.unsent = None
        self._finish(stream, error, None)

    def _on_push_promise(self, _flags: int, _stream_id: int, _payload: bytes) -> None:
        # Section 8.4.
        raise _protocol_error("the server pushes, although push is disabled")

    # -- frames of the connection ---------------------------------------------------

    def _on_settings(self, flags: int, _stream_id: int, payload: bytes) -> None:
        if flags & frames.ACK:
            if payload:
                raise PeerViolation(
                    ErrorCode.FRAME_SIZE_ERROR, "an ACK of SETTINGS has a payload"
                )
            if not self.settings_received:
                raise _protocol_error(
                    "the server acknowledges SETTINGS before it sends its own"
                )
            if self.settings_acknowledged:
                self._count_overhead()  # the client sends SETTINGS once
            self.settings_acknowledged = True
            return
        pairs = frames.parse_settings(payload)
        # One frame has room for 2,700 settings. Each of them may change all streams.
        self._count_overhead(1 + len(pairs))
        for key, value in pairs:
            self._apply(key, value)
        self.settings_received = True
        self._queue_control(frames.SETTINGS_ACK)
        if self._waiting or self._blocked:
            self._resume_calls()

    def _apply(self, key: int, value: int) -> None:
        """Apply one setting of the peer (section 6.5.2). Unknown ones are ignored."""
        if key == frames.MAX_CONCURRENT_STREAMS:
            self._peer.max_concurrent_streams = value
        elif key == frames.MAX_FRAME_SIZE:
            self._peer.max_frame_size = value
        elif key == frames.MAX_HEADER_LIST_SIZE:
            self._peer.max_header_list_size = value
        elif key == frames.INITIAL_WINDOW_SIZE:
            # Section 6.9.2: it also changes open streams. A window may become negative.
            change = value - self._peer.initial_window_size
            self._peer.initial_window_size = value
            for stream in self.streams.values():
                stream.send_window += change
                if stream.send_window > frames.MAX_WINDOW:
                    raise PeerViolation(
                        ErrorCode.FLOW_CONTROL_ERROR,
                        "SETTINGS overflow a window",
                    )

    def _on_ping(self, flags: int, _stream_id: int, payload: bytes) -> None:
        frames.parse_ping(payload)
        self._count_overhead()
        if not flags & frames.ACK:
            self._queue_control(frames.ping(payload, ack=True))

    def _on_goaway(self, _flags: int, _stream_id: int, payload: bytes) -> None:
        last, code, debug = frames.parse_goaway(payload)
        if last > self._last_stream_id:  # section 6.8
            raise _protocol_error("the last stream id of GOAWAY increases")
        self._count_overhead()
        self._last_stream_id = last
        self.takes_calls = False
        said = debug[:200].decode("ascii", "backslashreplace")
        text = f"GOAWAY received; {code_name(code)}" + (f": {said}" if said else "")
        streams = [stream for number, stream in self.streams.items() if number > last]
        for stream in streams:
            del self.streams[stream.id]
            self._blocked.pop(stream.id, None)
        self.goaway = text
        streams += self._waiting
        self._waiting.clear()
        for stream in streams:
            # The server did not and will not process the call. If it has sent a part of
            # the response, that is not true.
            how = Ending.CUT_OFF if stream.response.has_begun else Ending.GOAWAY
            self._end(stream, EndedCall(how, grpc.StatusCode.UNAVAILABLE, text))

    def _on_window_update(self, _flags: int, stream_id: int, payload: bytes) -> None:
        increment = frames.parse_window_update(payload)
        if stream_id >= self._next_id or (stream_id and not stream_id & 1):
            raise _protocol_error("WINDOW_UPDATE is on an idle stream")
        self._count_overhead()
        if stream_id == 0:
            if increment == 0:
                raise _protocol_error("the increment of WINDOW_UPDATE is 0")
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
                    ErrorCode.PROTOCOL_ERROR, "the increment of WINDOW_UPDATE is 0"
                )
            stream.send_window += increment
            if stream.send_window > frames.MAX_WINDOW:
                raise StreamViolation(
                    ErrorCode.FLOW_CONTROL_ERROR, "the stream's window overflows"
                )
        if self._blocked:
            self._resume_calls()

    # Plain functions: bound methods would be a reference cycle.
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
