"""
Limits for everything that a peer can send (RFC 9113, section 10.5).

Each limit is either that of gRPC, or far above the traffic of normal servers. If a peer
exceeds a limit, the stream ends, or the connection ends with ENHANCE_YOUR_CALM.
"""

from __future__ import annotations

from typing import Final


__all__ = [
    "BYTES_PER_UPDATE",
    "CONNECTION_WINDOW",
    "LATE_FRAMES",
    "MAX_CONTINUATIONS",
    "MAX_FRAME_SIZE",
    "MAX_HEADER_BLOCK",
    "MAX_HEADER_LIST_SIZE",
    "MAX_INFORMATIONAL",
    "MAX_LATE_FRAMES",
    "MAX_MESSAGE",
    "MAX_OVERHEAD_FRAMES",
    "MAX_QUEUED_CONTROL",
    "OVERHEAD_PERIOD",
    "QUEUE_LIMIT",
    "STREAM_WINDOW",
]


MAX_FRAME_SIZE: Final = 16_384
"""
Bytes of the payload of a received frame.

This is the initial value of SETTINGS_MAX_FRAME_SIZE. The client never raises it.
"""

MAX_MESSAGE: Final = 4 * 1024 * 1024
"""
Bytes of a response message by default, as in gRPC. A larger one ends its stream.

A target may set another limit. If that is higher, the windows grow with it.
"""

STREAM_WINDOW: Final = MAX_MESSAGE + 65_536
"""
Bytes of the receive window of each stream: SETTINGS_INITIAL_WINDOW_SIZE.

It is larger than the largest message. So no stream needs its own WINDOW_UPDATE, except
for padding.
"""

CONNECTION_WINDOW: Final = 4 * STREAM_WINDOW
"""Bytes of the connection's receive window. One WINDOW_UPDATE returns half of it."""

MAX_HEADER_LIST_SIZE: Final = 16_384
"""
Bytes of a decoded header list, counted as in RFC 9113, section 6.5.2.

This is the hard limit of gRPC's core. A larger list ends its stream.
"""

MAX_HEADER_BLOCK: Final = 65_536
"""Bytes of an encoded header block. A larger one ends the connection."""

MAX_CONTINUATIONS: Final = 128
"""CONTINUATION frames of one header block. More end the connection."""

MAX_INFORMATIONAL: Final = 16
"""Header blocks with a 1xx status before a response. More end the stream."""

BYTES_PER_UPDATE: Final = 512
"""
Bytes of sent DATA that allow the peer one WINDOW_UPDATE without being overhead.

Each sent DATA frame allows two more: one for its stream, one for the connection.
"""

MAX_OVERHEAD_FRAMES: Final = 2_000
"""
Overhead frames within `OVERHEAD_PERIOD`. More end the connection.

An overhead frame does not advance a call: PING, SETTINGS, WINDOW_UPDATE, empty DATA,
and any frame for a closed stream. The count starts again whenever a call ends. grpc-go
sends a PING and two WINDOW_UPDATE frames in a burst of calls.
"""

LATE_FRAMES: Final = 300
"""
Additional overhead frames for each stream that the client resets.

The server may send the whole response before it receives the reset. The largest
response has 257 DATA frames of full size.
"""

MAX_LATE_FRAMES: Final = 1_000 * LATE_FRAMES
"""The most additional frames that reset streams allow together."""

OVERHEAD_PERIOD: Final = 10.0
"""Seconds over which overhead frames are counted."""

MAX_QUEUED_CONTROL: Final = 1_000
"""
Replies to frames of the peer, such as acknowledgements, that wait to be sent.

A peer that causes replies and does not read them would fill the memory. So the
connection ends.
"""

QUEUE_LIMIT: Final = 262_144
"""
Bytes that wait to be sent.

Above this limit, new calls wait. If such a call ends, nothing of it was queued.
"""
