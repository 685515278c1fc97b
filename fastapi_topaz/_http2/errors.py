"""The error codes of HTTP/2 (RFC 9113, section 7), and protocol violations."""

from __future__ import annotations

import enum


__all__ = ["ErrorCode", "PeerViolation", "StreamViolation", "code_name"]


class ErrorCode(enum.IntEnum):
    """The error codes of RST_STREAM and GOAWAY frames (section 7)."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


def code_name(code: int) -> str:
    """Return the name of *code*, or its number if the code is unknown."""
    try:
        return ErrorCode(code).name
    except ValueError:
        return f"error code {code}"


class PeerViolation(Exception):  # noqa: N818  (not an error of this package)
    """
    A connection error: the peer violated the protocol (RFC 9113, section 5.4.1).

    The connection ends with a GOAWAY frame that carries *code*.
    """

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class StreamViolation(PeerViolation):
    """
    A stream error: the peer violated the protocol on one stream (section 5.4.2).

    The stream ends with an RST_STREAM frame that carries *code*.
    """
