"""The calls in flight on one channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi_topaz._grpcio.call import call_class
from fastapi_topaz._grpcio.closed_loop import call_later
from fastapi_topaz._grpcio.failures import in_time
from fastapi_topaz._rpc.statuses import NotSent, too_large
from fastapi_topaz.exceptions import ConnectionLost


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._grpcio.call import Call
    from fastapi_topaz._rpc.metadata import Metadata
    from fastapi_topaz._rpc.target import Target


__all__ = ["LAST_CALLS", "Calls"]


LAST_CALLS = 1.0
"""Seconds that operations of gRPC get to end by themselves after they were cut off."""


class Calls:
    """
    Those who wait for a call on one channel, and the end of it.

    Strictly private. Used in one thread, but for what says otherwise.
    """

    def __init__(self, channel: Any, target: Target) -> None:
        self._call_class = call_class()
        self._channel = channel
        self._target = target.url
        self._metadata = tuple(target.metadata)
        self._max_message = target.max_message_bytes
        # Maps each call to the callback that runs when it ends.
        self._waiting: dict[Call, Callable[[], object]] = {}
        self._on_quiet: Callable[[], object] | None = None
        self.closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def begin(
        self,
        on_end: Callable[[], object],
        method: str,
        request: bytes,
        timeout: float | None,
        metadata: Metadata,
    ) -> Call:
        """
        Begin a call; *on_end* is called when it has ended.

        Raises:
            ConnectionLost: The connection is closed.
            grpc.aio.AioRpcError: The request is too large to be sent.
        """
        if self.closed:
            raise self.lost(method)
        if len(request) > self._max_message:
            raise too_large(method, self._target, len(request), self._max_message)
        pairs = (*self._metadata, *metadata) if metadata else self._metadata
        call = self._call_class(
            self._channel, method, request, timeout, pairs, self._ended
        )
        self._waiting[call] = on_end
        return call

    def result(self, call: Call, method: str) -> bytes:
        """
        Return the response of *call*, which has ended.

        Raises:
            grpc.aio.AioRpcError: The call ended with another status than OK.
            ConnectionLost: The connection was closed under the call.
        """
        outcome = call.outcome()
        deadline = call.deadline
        # The frames of an error live as long as somebody keeps it. A call in one of
        # them keeps its socket open, even that of a closed channel; the error itself
        # makes a circle, which all of them wait in for the garbage collector.
        del call
        try:
            if isinstance(outcome, bytes):
                return outcome
            # OK without a message gRPC lets pass, but nothing was answered.
            raise self.lost(method) if outcome is None else in_time(outcome, deadline)
        finally:
            del outcome

    def lost(self, method: str) -> ConnectionLost:
        """Return the error of a call whose connection was closed; from any thread."""
        return ConnectionLost(
            f"the call {method} to {self._target} ended without an answer: the "
            "connection was closed under it, or the server broke the protocol"
        )

    def not_sent(self, method: str, why: str) -> Exception:
        """Return the error of a call for which there is no connection."""
        return self.lost(method) if self.closed else NotSent(method, self._target, why)

    def cut_off(self) -> None:
        """Cancel all calls, and let those who wait for them go at once."""
        for call, on_end in list(self._waiting.items()):
            self._waiting[call] = _nobody
            call.cancel("connection closed")
            on_end()

    def abandon(self) -> None:
        """Cancel all calls, whose tasks will never go on."""
        self.closed = True
        for call in list(self._waiting):
            # Its task may be kept, and a call in its frames keeps the socket open.
            self._waiting[call] = call.drop
            call.abandon()
        if self._waiting:
            call_later(LAST_CALLS, self._drop)

    def _drop(self) -> None:
        # The loop had queued the ends of these calls when it closed, so they are lost.
        for call in list(self._waiting):
            call.drop()

    def when_quiet(self, then: Callable[[], object]) -> None:
        """Call *then*, once, when the last of the calls has ended."""
        self._on_quiet = then

    def _ended(self, call: Call) -> None:
        self._waiting.pop(call)()
        if not self._waiting and (on_quiet := self._on_quiet) is not None:
            self._on_quiet = None
            on_quiet()


def _nobody() -> None:
    """Ignore the end of a call whose caller has left."""
