"""
How a call ended, as far as only gRPC's text of the error tells.

gRPC reports a status that it made up itself like one that the server has sent: there
is one code, and one text. So the text decides. It is read from its beginning, because
a proxy may quote the same words: "upstream reset: Connection reset by peer" is an
answer. gRPC 1.81 and newer put their own words into "Stream removed (...)".
"""

from __future__ import annotations

import enum
import re

import grpc
import grpc.aio


__all__ = ["Ending", "NotSent", "ending", "is_unprocessed"]


class Ending(enum.Enum):
    """How a call ended that did not end OK."""

    STATUS = enum.auto()
    """With a status of the other side, or one of gRPC with a text unknown here."""
    NO_STATUS = enum.auto()
    """With an HTTP answer without a `grpc-status`, as the error page of a proxy."""
    REFUSED_STREAM = enum.auto()
    """The other side reset the stream and did not process the call."""
    RESET = enum.auto()
    """The other side reset the stream for another reason."""
    GOAWAY = enum.auto()
    """The other side ended the connection and did not process the call."""
    CUT_OFF = enum.auto()
    """The connection ended under the call."""
    TIMED_OUT = enum.auto()
    """By its deadline."""
    NOT_SENT = enum.auto()
    """Here, because its connection had ended before."""


class NotSent(grpc.aio.AioRpcError):  # type: ignore[misc]
    """
    The error of a call that was not sent: its connection had ended, and *why* tells
    why it could not be made again.

    Callers get it as any UNAVAILABLE. Only this package asks for the class.
    """

    def __init__(self, method: str, target: str, why: str) -> None:
        super().__init__(
            grpc.StatusCode.UNAVAILABLE,
            grpc.aio.Metadata(),
            grpc.aio.Metadata(),
            f"the call {method} was not sent: the connection to {target} has ended "
            f"(GOAWAY, or the socket was closed), and then: {why}",
        )


# The first match wins. The text of an RST_STREAM or GOAWAY may be followed by more.
_TEXTS = (
    (r"(RST_STREAM \()?Received RST_STREAM with error code 7\b", Ending.REFUSED_STREAM),
    (r"(RST_STREAM \()?Received RST_STREAM", Ending.RESET),
    (r"GOAWAY received", Ending.GOAWAY),
    (r"Received http2 header with status: |No status received", Ending.NO_STATUS),
    (r"Data frame with END_STREAM", Ending.NO_STATUS),
    (
        r"Socket closed|(recvmsg|sendmsg|writev?):|Connection reset|Broken pipe",
        Ending.CUT_OFF,
    ),
)
_KNOWN = tuple((re.compile(text), ending) for text, ending in _TEXTS)
_WRAPPED = re.compile(r"Stream removed( \(|$)")


def ending(error: grpc.aio.AioRpcError) -> Ending:
    """Return how the call ended that raised *error*."""
    if isinstance(error, NotSent):
        return Ending.NOT_SENT
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Ending.TIMED_OUT
    details = error.details() or ""
    wrapped = _WRAPPED.match(details)
    start = wrapped.end() if wrapped else 0
    for text, found in _KNOWN:
        if text.match(details, start):
            return found
    # With other codes gRPC refuses the answer itself, as one that is too large.
    unknown = error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN}
    return Ending.CUT_OFF if wrapped and unknown else Ending.STATUS


def is_unprocessed(error: BaseException) -> bool:
    """
    Say whether the server certainly did not process the call that raised *error*.

    RFC 9113, sections 6.8 and 8.7: a stream above the last one of a GOAWAY, or one
    that was reset with REFUSED_STREAM, was not processed. It may be sent again. So may
    one that was never sent.
    """
    return isinstance(error, grpc.aio.AioRpcError) and ending(error) in {
        Ending.REFUSED_STREAM,
        Ending.GOAWAY,
        Ending.NOT_SENT,
    }


def is_reset(error: BaseException) -> bool:
    """Say whether *error* is a reset stream: an answer, but without a `grpc-status`."""
    return isinstance(error, grpc.aio.AioRpcError) and ending(error) in {
        Ending.REFUSED_STREAM,
        Ending.RESET,
    }
