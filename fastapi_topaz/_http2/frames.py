"""
The frames of HTTP/2: RFC 9113, sections 4 and 6.

This module only knows the layout of frames. `receiver` decides which frame is allowed
in which state.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from fastapi_topaz._http2.errors import ErrorCode, PeerViolation


if TYPE_CHECKING:
    from collections.abc import Iterable


__all__ = [
    "ACK",
    "CONTINUATION",
    "DATA",
    "END_HEADERS",
    "END_STREAM",
    "FRAME_HEADER",
    "GOAWAY",
    "HEADERS",
    "HEADER_SIZE",
    "MAX_WINDOW",
    "PADDED",
    "PING",
    "PREFACE",
    "PRIORITY",
    "PUSH_PROMISE",
    "RST_STREAM",
    "SETTINGS",
    "SETTINGS_ACK",
    "WINDOW_UPDATE",
    "data",
    "frame",
    "goaway",
    "headers",
    "parse_goaway",
    "parse_ping",
    "parse_rst_stream",
    "parse_settings",
    "parse_window_update",
    "ping",
    "rst_stream",
    "settings",
    "unpadded",
    "window_update",
    "without_priority",
]


PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""The first bytes that a client sends (section 3.4). A SETTINGS frame follows."""

# Frame types (section 6).
DATA: Final = 0x0
HEADERS: Final = 0x1
PRIORITY: Final = 0x2
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
PING: Final = 0x6
GOAWAY: Final = 0x7
WINDOW_UPDATE: Final = 0x8
CONTINUATION: Final = 0x9

# Flags. ACK and END_STREAM share a bit.
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
_PRIORITY: Final = 0x20

# Settings (section 6.5.2).
HEADER_TABLE_SIZE: Final = 0x1
ENABLE_PUSH: Final = 0x2
MAX_CONCURRENT_STREAMS: Final = 0x3
INITIAL_WINDOW_SIZE: Final = 0x4
MAX_FRAME_SIZE: Final = 0x5
MAX_HEADER_LIST_SIZE: Final = 0x6

MAX_WINDOW: Final = 2**31 - 1
"""The largest flow-control window (section 6.9.1), and the largest stream id."""

HEADER_SIZE: Final = 9

FRAME_HEADER: Final = struct.Struct(">HBBBL")
"""
The frame header (section 4.1): length, type, flags, stream id.

The length has 24 bits. It is unpacked as the upper 16 bits and the lower 8 bits.
"""

_SETTING = struct.Struct(">HL")
_TWO_WORDS = struct.Struct(">LL")
_WORD = struct.Struct(">L")


# -- sent -----------------------------------------------------------------------


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Return one frame (section 4.1)."""
    size = len(payload)
    header = FRAME_HEADER.pack(size >> 8, size & 0xFF, kind, flags, stream_id)
    return header + payload


SETTINGS_ACK: Final = frame(SETTINGS, ACK, 0)


def settings(pairs: Iterable[tuple[int, int]]) -> bytes:
    """Return a SETTINGS frame (section 6.5)."""
    payload = b"".join(_SETTING.pack(key, value) for key, value in pairs)
    return frame(SETTINGS, 0, 0, payload)


def ping(payload: bytes, *, ack: bool = False) -> bytes:
    """Return a PING frame with *payload*, which has eight bytes (section 6.7)."""
    return frame(PING, ACK if ack else 0, 0, payload)


def goaway(code: int, debug: bytes = b"") -> bytes:
    """
    Return a GOAWAY frame (section 6.8).

    Its last stream id is 0, because the server cannot open streams.
    """
    return frame(GOAWAY, 0, 0, _TWO_WORDS.pack(0, code) + debug)


def rst_stream(stream_id: int, code: int) -> bytes:
    """Return an RST_STREAM frame (section 6.4)."""
    return frame(RST_STREAM, 0, stream_id, _WORD.pack(code))


def window_update(stream_id: int, increment: int) -> bytes:
    """Return a WINDOW_UPDATE frame (section 6.9)."""
    return frame(WINDOW_UPDATE, 0, stream_id, _WORD.pack(increment))


def data(stream_id: int, payload: bytes, *, end_stream: bool) -> bytes:
    """Return a DATA frame (section 6.1)."""
    return frame(DATA, END_STREAM if end_stream else 0, stream_id, payload)


def headers(stream_id: int, block: bytes, frame_size: int) -> bytes:
    """
    Return a HEADERS frame with *block* (section 6.2).

    If *block* is longer than *frame_size*, CONTINUATION frames follow (section 6.10).
    """
    if len(block) <= frame_size:
        return frame(HEADERS, END_HEADERS, stream_id, block)
    parts = [block[at : at + frame_size] for at in range(0, len(block), frame_size)]
    last = len(parts) - 1
    return b"".join(
        frame(
            CONTINUATION if number else HEADERS,
            END_HEADERS if number == last else 0,
            stream_id,
            part,
        )
        for number, part in enumerate(parts)
    )


# -- received ---------------------------------------------------------------------


def unpadded(payload: bytes, flags: int) -> bytes:
    """
    Return *payload* without its padding (section 6.1).

    Raises:
        PeerViolation: The padding is as long as the payload, or longer.
    """
    if not flags & PADDED:
        return payload
    if not payload:
        raise PeerViolation(ErrorCode.FRAME_SIZE_ERROR, "a padded frame is empty")
    end = len(payload) - payload[0]
    if end < 1:
        raise PeerViolation(ErrorCode.PROTOCOL_ERROR, "the padding exceeds its frame")
    return payload[1:end]


def without_priority(payload: bytes, flags: int) -> bytes:
    """
    Return the *payload* of HEADERS without the deprecated priority (section 6.2).

    Raises:
        PeerViolation: The payload is too short for a priority.
    """
    if not flags & _PRIORITY:
        return payload
    if len(payload) < 5:
        raise PeerViolation(
            ErrorCode.FRAME_SIZE_ERROR, "a HEADERS frame is too short for its priority"
        )
    return payload[5:]


def parse_settings(payload: bytes) -> list[tuple[int, int]]:
    """
    Return the settings of a SETTINGS frame, after all of them were checked.

    Raises:
        PeerViolation: The size or a value is not allowed (sections 6.5 and 6.5.2).
    """
    if len(payload) % 6:
        raise PeerViolation(
            ErrorCode.FRAME_SIZE_ERROR, f"a SETTINGS frame has {len(payload)} bytes"
        )
    pairs = list(_SETTING.iter_unpack(payload))
    for key, value in pairs:
        if key == ENABLE_PUSH and value != 0:
            # Section 6.5.2: a server may only set it to 0.
            raise PeerViolation(ErrorCode.PROTOCOL_ERROR, "the server enables push")
        if key == INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
            raise PeerViolation(
                ErrorCode.FLOW_CONTROL_ERROR, f"the initial window is {value}"
            )
        if key == MAX_FRAME_SIZE and not 2**14 <= value < 2**24:
            raise PeerViolation(
                ErrorCode.PROTOCOL_ERROR, f"the largest frame size is {value}"
            )
    return pairs


def parse_ping(payload: bytes) -> bytes:
    """
    Return the *payload* of a PING frame (section 6.7).

    Raises:
        PeerViolation: It does not have eight bytes.
    """
    if len(payload) != 8:
        raise PeerViolation(
            ErrorCode.FRAME_SIZE_ERROR, f"a PING frame has {len(payload)} bytes"
        )
    return payload


def parse_rst_stream(payload: bytes) -> int:
    """Return the error code of an RST_STREAM frame (section 6.4)."""
    if len(payload) != 4:
        raise PeerViolation(
            ErrorCode.FRAME_SIZE_ERROR, f"an RST_STREAM frame has {len(payload)} bytes"
        )
    return int.from_bytes(payload)


def parse_goaway(payload: bytes) -> tuple[int, int, bytes]:
    """Return the last stream id, error code and debug data of GOAWAY (section 6.8)."""
    if len(payload) < 8:
        raise PeerViolation(
            ErrorCode.FRAME_SIZE_ERROR, f"a GOAWAY frame has {len(payload)} bytes"
        )
    last, code = _TWO_WORDS.unpack_from(payload)
    return last & MAX_WINDOW, code, payload[8:]


def parse_window_update(payload: bytes) -> int:
    """Return the increment of a WINDOW_UPDATE frame (section 6.9). It may be 0."""
    if len(payload) != 4:
        raise PeerViolation(
            ErrorCode.FRAME_SIZE_ERROR,
            f"a WINDOW_UPDATE frame has {len(payload)} bytes",
        )
    return int.from_bytes(payload) & MAX_WINDOW
