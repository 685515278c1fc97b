"""
What the end of a gRPC call means: for the call, for its connection, and for a retry.

Both transports raise `EndedCall`, which carries how the call ended.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz.exceptions import (
    CircuitOpen,
    ConnectFailed,
    ConnectionLost,
    PoolSaturated,
    PoolTimeout,
)


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._rpc.metadata import Metadata


__all__ = [
    "EndedCall",
    "Ending",
    "LateCredentials",
    "NotSent",
    "blames_server",
    "ending",
    "is_from_service",
    "is_out_of_time",
    "is_reset",
    "is_unprocessed",
    "is_worth_a_retry",
    "lacks_answer",
    "lacks_decision",
    "lacks_status",
    "status_number",
    "too_large",
    "verdict",
]


UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

STOPPING = frozenset({UNAVAILABLE, grpc.StatusCode.CANCELLED})
"""
A server that stops ends calls with these, which it has received and not begun.

A caller who cancels a check gets the cancellation and not this error. So an error with
CANCELLED comes from the server.
"""


class Ending(enum.Enum):
    """How a call ended, if not with OK."""

    STATUS = enum.auto()
    """With a status of the other side, or one that is unknown here."""
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


class EndedCall(grpc.aio.AioRpcError):  # type: ignore[misc]
    """
    An error that carries how its call ended, so that its text need not be parsed.

    For callers it is a normal `AioRpcError`. Only this package checks the class.
    """

    def __init__(
        self,
        how: Ending,
        code: grpc.StatusCode,
        details: str,
        initial_metadata: Metadata = (),
        trailing_metadata: Metadata = (),
        debug: str | None = None,
    ) -> None:
        super().__init__(
            code,
            grpc.aio.Metadata(*initial_metadata),
            grpc.aio.Metadata(*trailing_metadata),
            details,
            debug_error_string=details if debug is None else debug,
        )
        self.how = how

    def __reduce__(self) -> tuple[Any, ...]:
        return EndedCall, (
            self.how,
            self.code(),
            self.details(),
            tuple(self.initial_metadata()),
            tuple(self.trailing_metadata()),
            self.debug_error_string(),
        )


class NotSent(EndedCall):
    """
    The call was not sent: its connection had ended, and it could not connect again.

    *why* is the reason.
    """

    def __init__(self, method: str, target: str, why: str) -> None:
        super().__init__(
            Ending.NOT_SENT,
            grpc.StatusCode.UNAVAILABLE,
            f"the call {method} was not sent: the connection to {target} has ended "
            f"(GOAWAY, or the socket was closed), and a new one failed: {why}",
        )


class LateCredentials(EndedCall):
    """The call was not sent: the callable for its metadata had no value in time."""

    def __reduce__(self) -> tuple[Any, ...]:
        return LateCredentials, super().__reduce__()[1]


def too_large(method: str, target: str, size: int, limit: int) -> EndedCall:
    """Return the error of a request that is too large to be sent."""
    return EndedCall(
        Ending.STATUS,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"the call {method} to {target} was not sent: its request has {size} bytes, "
        f"and max_message_bytes={limit} allows no more",
    )


def ending(error: grpc.aio.AioRpcError) -> Ending:
    """
    Return how the call ended that raised *error*.

    An error that is not an `EndedCall` comes from a connector of the application. It
    has only a status.
    """
    if isinstance(error, EndedCall):
        return error.how
    is_late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    return Ending.TIMED_OUT if is_late else Ending.STATUS


def status_number(error: BaseException) -> int | None:
    """
    Return the number of the gRPC status that *error* carries, such as 14.

    None means that no status ended the call, or that there was no call.
    """
    code = getattr(error, "code", None)
    try:
        status = code() if callable(code) else None
    except Exception:  # noqa: BLE001  (a foreign class, whose methods may raise)
        return None
    return int(status.value[0]) if isinstance(status, grpc.StatusCode) else None


def is_unprocessed(error: BaseException) -> bool:
    """
    Return whether the server certainly did not process the call.

    RFC 9113, sections 6.8 and 8.7: the server did not process a stream above the last
    one of a GOAWAY, or one that it reset with REFUSED_STREAM. Such a call may be sent
    again, and so may a call that was never sent.
    """
    return isinstance(error, grpc.aio.AioRpcError) and ending(error) in {
        Ending.REFUSED_STREAM,
        Ending.GOAWAY,
        Ending.NOT_SENT,
    }


def is_out_of_time(error: BaseException) -> bool:
    """Return whether *error* is DEADLINE_EXCEEDED."""
    return (
        isinstance(error, grpc.aio.AioRpcError)
        and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    )


def is_reset(error: BaseException) -> bool:
    """Return whether *error* is a reset stream: an answer without a `grpc-status`."""
    return isinstance(error, grpc.aio.AioRpcError) and ending(error) in {
        Ending.REFUSED_STREAM,
        Ending.RESET,
    }


def is_worth_a_retry(error: BaseException) -> bool:
    """Return whether a check that ended with *error* may succeed elsewhere."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code() in STOPPING
    return isinstance(error, ConnectionLost)


def lacks_answer(error: BaseException) -> bool:
    """Return whether the call ended with its connection, and not with an answer."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return True
    return ending(error) in {Ending.CUT_OFF, Ending.NOT_SENT, Ending.GOAWAY}


def is_from_service(error: grpc.aio.AioRpcError) -> bool:
    """
    Return whether a `grpc-status` of the service itself ended the call.

    UNAVAILABLE does not count: a proxy says that for a service which is down.
    """
    return ending(error) is Ending.STATUS and error.code() is not UNAVAILABLE


_FAILED = STOPPING | {
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
}
"""The statuses of a server, or of a call to it, that has no answer."""

_NOT_ITS_OWN = frozenset({grpc.StatusCode.NOT_FOUND})
"""
Topaz sends NOT_FOUND for an identity that it does not know, and also if its directory
is down. So it says nothing about the server.
"""


def blames_server(error: BaseException) -> bool | None:
    """
    Return whether *error* of a check shows that the server fails.

    Returns:
        True if it gave no answer. False if it answered, even with an error of its own.
        None if *error* says nothing about the server: for example, the check had no
        connection, or was cancelled.
    """
    if isinstance(error, ConnectionLost):
        return True
    if not isinstance(error, grpc.aio.AioRpcError) or isinstance(
        error, LateCredentials
    ):
        return None
    if error.code() in _FAILED:
        return True
    return None if error.code() in _NOT_ITS_OWN else False


def lacks_decision(error: BaseException) -> bool:
    """
    Return whether a check ended with *error* because no decision could be got now.

    False for an error that only a change can repair, such as a wrong policy path, wrong
    credentials or a certificate that is not trusted.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectFailed) and cause.permanent:
            return False
        cause = cause.__cause__
    lacking = ConnectFailed | PoolTimeout | PoolSaturated | CircuitOpen
    return isinstance(error, lacking) or blames_server(error) is True


def lacks_status(error: grpc.aio.AioRpcError) -> bool:
    """Return whether the answer has no `grpc-status`, such as a page of a proxy."""
    return ending(error) in {Ending.NO_STATUS, Ending.RESET, Ending.CUT_OFF}


_VERDICTS = {
    Ending.TIMED_OUT: Verdict.SILENT,
    # RFC 9113, section 5.4.2: a stream error. The connection is well. A server does
    # this if it has too many streams.
    Ending.REFUSED_STREAM: Verdict.ANSWERED,
    Ending.RESET: Verdict.ANSWERED,
    # An orderly end, which says nothing about other connections.
    Ending.GOAWAY: Verdict.UNAVAILABLE,
    Ending.NOT_SENT: Verdict.UNAVAILABLE,
    Ending.CUT_OFF: Verdict.BROKEN,
    Ending.NO_STATUS: Verdict.REFUSED,
}


def verdict(error: BaseException, is_lost: Callable[[], bool]) -> Verdict | None:
    """
    Return what *error* says about the connection that the call used.

    Args:
        error: What the call raised.
        is_lost: Returns whether the connection has ended by now.

    Returns:
        None if *error* says nothing about the connection.
    """
    if isinstance(error, ConnectionLost):
        return Verdict.BROKEN
    if not isinstance(error, grpc.aio.AioRpcError):
        return None
    found = ending(error)
    # A proxy may quote the GOAWAY of its own connection. Then this one is not lost.
    quoted = found is Ending.GOAWAY and not is_lost()
    if found is not Ending.STATUS and not quoted:
        return _VERDICTS[found]
    if error.code() not in STOPPING:
        return Verdict.ANSWERED
    if is_lost():
        return Verdict.BROKEN
    # The connection is up, so the other side itself sent this status.
    refused = error.code() is UNAVAILABLE
    return Verdict.REFUSED if refused else Verdict.UNAVAILABLE
