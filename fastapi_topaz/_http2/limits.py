"""
The bounds of everything that a peer can send.

A bound is either one of gRPC or far above what servers do. A peer that exceeds one
loses the stream, or the connection with ENHANCE_YOUR_CALM (RFC 9113, section 10.5).
"""

from __future__ import annotations

from typing import Final


__all__ = [
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
"""Bytes of a received payload. The initial SETTINGS_MAX_FRAME_SIZE is never raised."""

MAX_MESSAGE: Final = 4 * 1024 * 1024
"""Bytes of a response, as gRPC's default. A larger one ends its stream."""

STREAM_WINDOW: Final = MAX_MESSAGE + 65_536
"""
Bytes: SETTINGS_INITIAL_WINDOW_SIZE.

It is above the largest message, so that no stream needs a WINDOW_UPDATE of its own.
"""

CONNECTION_WINDOW: Final = 4 * STREAM_WINDOW
"""Bytes of the connection's receive window. Half of it is given back at a time."""

MAX_HEADER_LIST_SIZE: Final = 16_384
"""
Bytes of a decoded header list, by the count of RFC 9113, section 6.5.2.

This is the hard limit of gRPC's core. A larger list ends its stream.
"""

MAX_HEADER_BLOCK: Final = 65_536
"""Bytes of an encoded header block. A larger one ends the connection."""

MAX_CONTINUATIONS: Final = 128
"""CONTINUATION frames of one header block. More end the connection."""

MAX_INFORMATIONAL: Final = 16
"""Header blocks with a 1xx status before a response. More end the stream."""

MAX_OVERHEAD_FRAMES: Final = 2_000
"""
Frames without progress of a call, within `OVERHEAD_PERIOD`, between ends of calls.

Such as PING, SETTINGS, empty DATA, and any frame for a closed stream. grpc-go sends a
PING and two WINDOW_UPDATE frames in a burst of calls. More end the connection.
"""

LATE_FRAMES: Final = 300
"""
Frames more for each stream that is reset here, which the server learns later.

The largest response has 257 DATA frames.
"""

MAX_LATE_FRAMES: Final = 1_000 * LATE_FRAMES
"""Such frames at most, for all streams that were reset."""

OVERHEAD_PERIOD: Final = 10.0
"""Seconds."""

MAX_QUEUED_CONTROL: Final = 1_000
"""
Answers to frames of the peer (acks, RST_STREAM) that wait to be sent.

A peer that makes them and does not read is cut off, because they would fill memory.
"""

QUEUE_LIMIT: Final = 262_144
"""Bytes that wait to be sent. Above it new calls wait, and cost nothing if they end."""
