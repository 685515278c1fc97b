"""
The state of an HTTP/2 connection of a gRPC client, without I/O (RFC 9113).

The I/O layer passes received bytes to `receive`, and sends the bytes that `take_output`
returns. The time is an argument, from any monotonic clock. At `next_deadline` the I/O
layer calls `expire`. So a connection needs one timer, and not one for each call.

`Receiver` has the effects of the server's frames. `ClientConnection` has the actions of
the client.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Final

import grpc

from fastapi_topaz._http2 import frames
from fastapi_topaz._http2.errors import ErrorCode, PeerViolation
from fastapi_topaz._http2.failures import not_sent
from fastapi_topaz._http2.limits import MAX_MESSAGE, QUEUE_LIMIT
from fastapi_topaz._http2.receiver import Receiver
from fastapi_topaz._http2.requests import NO_TABLE
from fastapi_topaz._http2.responses import PREFIX_SIZE
from fastapi_topaz._rpc.statuses import EndedCall, Ending, too_large
from fastapi_topaz.exceptions import ConnectionLost


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._http2.stream import Stream


__all__ = ["PING_TIMEOUT", "SILENCE", "ClientConnection"]


SILENCE: Final = 1.0
"""Seconds of a call without a byte from the server, after which a PING is sent."""

PING_TIMEOUT: Final = 1.0
"""Seconds within which the server must answer a PING, or send anything else."""

_MAX_PINGS: Final = 2
"""
The most PINGs that the client sends without a response of a call in between.

At the fourth one, grpc-go ends the connection with GOAWAY too_many_pings. Instead of a
third PING, an empty SETTINGS frame is sent. The server must acknowledge it too (section
6.5.3), and grpc-go does not count it.
"""

_UNAVAILABLE: Final = grpc.StatusCode.UNAVAILABLE

_PREFIX = struct.Struct(">BL")
# The header of a DATA frame and the prefix of the message in it, in one step.
_WHOLE_MESSAGE = struct.Struct(">HBBBLBL")
_PING_PAYLOAD: Final = b"fa-topaz"


class ClientConnection(Receiver):
    """
    The state of one connection and of its calls.

    Args:
        target: The name of the server in errors.
        silence: Seconds of a call without a byte, after which a PING is sent.
        ping_timeout: Seconds within which the server must answer a PING.
        max_message: The most bytes of a request or response.
    """

    __slots__ = (
        "_asked_by",
        "_busy_since",
        "_ping_deadline",
        "_ping_timeout",
        "_silence",
        "next_deadline",
        "on_silence",
    )

    def __init__(
        self,
        target: str,
        silence: float = SILENCE,
        ping_timeout: float = PING_TIMEOUT,
        max_message: int = MAX_MESSAGE,
    ) -> None:
        super().__init__(target, max_message)
        self.next_deadline = math.inf
        """When to call `expire`: at the nearest deadline, or earlier."""
        self.on_silence: Callable[[], object] | None = None
        """Called if the connection ends because the server did not answer a PING."""
        self._silence = silence
        self._ping_timeout = ping_timeout
        self._ping_deadline = math.inf
        self._asked_by = "a PING"
        # When the first of the current calls began.
        self._busy_since = -math.inf

    # -- calls ------------------------------------------------------------------

    def begin(self, stream: Stream, method: str, now: float) -> None:
        """
        Begin the call of *stream* at *now*. When it ends, its `wake` is called.

        Raises:
            EndedCall: The connection accepts no new calls, or the peer does not allow
                such large headers.
        """
        if not self.takes_calls:
            why = self.failure or "it takes no more calls"
            raise not_sent(method, self.target, why)
        limit = self._peer.max_header_list_size
        if stream.header_list_size > limit:
            raise EndedCall(
                Ending.STATUS,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the headers of the call {method} have {stream.header_list_size} "
                f"bytes, and {self.target} allows {limit}",
            )
        if len(stream.message) > self.max_message:
            raise too_large(method, self.target, len(stream.message), self.max_message)
        stream.response.max_message = self.max_message
        self.next_deadline = min(self.next_deadline, stream.deadline)
        if not self.has_calls:
            self._busy_since = now
            self.next_deadline = min(self.next_deadline, now + self._silence)
        if self._has_room():
            self._open(stream)
        else:
            self._waiting[stream] = None

    def cancel(self, stream: Stream) -> None:
        """End the call of *stream* because its caller was cancelled, without `wake`."""
        if stream.outcome is None:
            self._remove(stream, ErrorCode.CANCEL)

    def _remove(self, stream: Stream, code: ErrorCode) -> None:
        """Remove *stream*. If it was opened, reset it with *code*."""
        if not stream.id:
            self._waiting.pop(stream, None)
        elif self.streams.pop(stream.id, None) is not None:
            self._blocked.pop(stream.id, None)
            self._queue(frames.rst_stream(stream.id, code))
            self._expect_late_frames()
            self._resume_calls()

    def _has_room(self) -> bool:
        return (
            len(self.streams) < self._peer.max_concurrent_streams
            and self._queued < QUEUE_LIMIT
        )

    def _open(self, stream: Stream) -> None:
        """Send HEADERS and as much of the DATA of *stream* as the windows allow."""
        stream.id = self._next_id
        self._next_id += 2
        if self._next_id > frames.MAX_WINDOW:
            # Section 5.1.1: no ids are left, so a new connection is needed.
            self.takes_calls = False
        stream.send_window = self._peer.initial_window_size
        self.streams[stream.id] = stream
        block = stream.block if stream.id > 1 else NO_TABLE + stream.block
        message = stream.message
        size = len(message) + PREFIX_SIZE
        most = self._peer.max_frame_size
        if len(block) <= most and size <= min(
            most, stream.send_window, self._send_window
        ):
            # The usual call. To build it in one step saves 2 us.
            length = len(block)
            self._queue(
                b"".join(
                    (
                        frames.FRAME_HEADER.pack(
                            length >> 8,
                            length & 0xFF,
                            frames.HEADERS,
                            frames.END_HEADERS,
                            stream.id,
                        ),
                        block,
                        _WHOLE_MESSAGE.pack(
                            size >> 8,
                            size & 0xFF,
                            frames.DATA,
                            frames.END_STREAM,
                            stream.id,
                            0,
                            len(message),
                        ),
                        message,
                    )
                )
            )
            stream.send_window -= size
            self._send_window -= size
        else:
            self._queue(frames.headers(stream.id, block, most))
            stream.unsent = memoryview(_PREFIX.pack(0, len(message)) + message)
            self._blocked[stream.id] = stream
            self._send_blocked()

    def _send_blocked(self) -> None:
        """Send DATA that waited for a window (section 5.2) or for the socket."""
        for stream in list(self._blocked.values()):
            while stream.unsent and self._queued < QUEUE_LIMIT:
                size = min(
                    len(stream.unsent),
                    self._peer.max_frame_size,
                    stream.send_window,
                    self._send_window,
                )
                if size <= 0:
                    break
                part, stream.unsent = stream.unsent[:size], stream.unsent[size:]
                self._queue(
                    frames.data(stream.id, bytes(part), end_stream=not stream.unsent)
                )
                stream.send_window -= size
                self._send_window -= size
                self._expect_window_updates(size)
            if not stream.unsent:
                stream.unsent = None
                del self._blocked[stream.id]

    def _resume_calls(self) -> None:
        if self._blocked:
            self._send_blocked()
        while self._waiting and self.takes_calls and self._has_room():
            stream = next(iter(self._waiting))
            del self._waiting[stream]
            self._open(stream)
        if self._waiting and not self.takes_calls:
            self._end_waiting()

    def _end_waiting(self) -> None:
        """End the waiting calls, because no stream id is left for them."""
        waiting = [*self._waiting]
        self._waiting.clear()
        for stream in waiting:
            self._end(
                stream,
                EndedCall(
                    Ending.NOT_SENT,
                    grpc.StatusCode.UNAVAILABLE,
                    f"the call was not sent: the connection to {self.target} has no "
                    "stream ids left",
                ),
            )

    # -- the socket -------------------------------------------------------------

    def take_output(self) -> bytes:
        """Return bytes to send now. Call it again until it returns nothing."""
        if not self._out:
            return b""
        self._first_unsent_id = self._next_id
        output = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out.clear()
        self._queued = 0
        self._queued_control = 0
        if self._blocked or self._waiting:
            self._resume_calls()
        return output

    @property
    def has_output(self) -> bool:
        """Whether there are bytes to send."""
        return bool(self._out)

    def sent_some(self, now: float) -> None:
        """
        Record that the socket took a part of the output at *now*.

        It has no room for the rest, because the peer reads slowly. But the peer reads,
        and the answer to a PING must wait until it has read what is before the PING.
        """
        self._now = now
        self._heard = True

    def receive(self, data: bytes, now: float) -> None:
        """Process *data*, which arrived at *now*. It raises no errors."""
        if self.failure is not None:
            return
        try:
            self._receive(data, now)
        except PeerViolation as violation:
            code = violation.code.name
            self.lose(f"the server violated HTTP/2 ({code}): {violation.reason}")
            self._queue(frames.goaway(violation.code, violation.reason.encode()))

    def lose(self, reason: str) -> None:
        """
        End all calls, because the connection ended for *reason*.

        Calls of which `take_output` returned no byte end as not sent. They may be sent
        on another connection, so their frames are dropped here.
        """
        if self.failure is not None:
            return
        self._out.clear()
        cut_off = f"the connection to {self.target} ended during the call: {reason}"
        not_sent = (
            f"the call was not sent: the connection to {self.target} ended before: "
            f"{reason}"
        )

        def error(stream: Stream) -> EndedCall:
            if self._first_unsent_id <= stream.id or not stream.id:
                return EndedCall(Ending.NOT_SENT, _UNAVAILABLE, not_sent)
            return EndedCall(Ending.CUT_OFF, _UNAVAILABLE, cut_off)

        self._end_all(reason, error)

    def shut_down(self) -> None:
        """Close the connection with GOAWAY (section 6.8), and end all calls as lost."""
        if self.failure is not None:
            return
        self._queue(frames.goaway(ErrorCode.NO_ERROR))
        error = (
            f"a call to {self.target} ended without a response: the connection was "
            "closed during the call"
        )
        self._end_all("the client closed it", lambda _: ConnectionLost(error))

    @property
    def has_calls(self) -> bool:
        """Whether a call has not ended."""
        return bool(self.streams or self._waiting)

    def forget_calls(self) -> None:
        """End the connection without sending anything and without waking callers."""
        self.streams.clear()
        self._waiting.clear()
        self._out.clear()
        self._end_all("its event loop was closed", lambda _: RuntimeError())

    # -- time -------------------------------------------------------------------

    def expire(self, now: float) -> None:
        """
        End the calls whose deadline has come at *now*, and set `next_deadline`.

        Bytes that have arrived must be received before. Otherwise a server that has
        answered seems silent if the event loop was blocked.
        """
        if now >= self._ping_deadline:
            self._ping_deadline = math.inf
            if not self._heard:
                self._lose_silent()
                return
        # Waiting calls first. Otherwise the end of an open call could open a waiting
        # call that is also due.
        calls = [*self._waiting, *self.streams.values()]
        silent = self._silent_at() <= now
        for stream in calls:
            if stream.deadline <= now:
                silent |= stream.id > 0
                self._remove(stream, ErrorCode.CANCEL)
                self._end(stream, timed_out())
        if silent:
            self._ping(now)
        self.next_deadline = min(
            (stream.deadline for stream in (*self.streams.values(), *self._waiting)),
            default=math.inf,
        )
        self.next_deadline = min(
            self.next_deadline, self._ping_deadline, self._silent_at()
        )

    def _silent_at(self) -> float:
        """Return when the peer has been silent for too long, if it sends nothing."""
        if self._ping_deadline < math.inf:
            return math.inf  # it is asked already
        if not self.has_calls:
            return math.inf
        return max(self._busy_since, self._now) + self._silence

    def _ping(self, now: float) -> None:
        """Make the server send something. Any byte of it will do."""
        if self._ping_deadline < math.inf:
            return
        self._heard = False
        self._ping_deadline = now + self._ping_timeout
        if self._pings < _MAX_PINGS:
            self._pings += 1
            self._asked_by = "a PING"
            self._queue(frames.ping(_PING_PAYLOAD))
        else:
            self._asked_by = "SETTINGS"
            self._queue(frames.settings(()))

    def _lose_silent(self) -> None:
        self.lose(
            f"the server did not answer {self._asked_by} within "
            f"{self._ping_timeout:g} s"
        )
        if self.on_silence is not None:
            self.on_silence()


def timed_out() -> EndedCall:
    """Return the error of a call whose deadline was exceeded."""
    return EndedCall(
        Ending.TIMED_OUT, grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"
    )
