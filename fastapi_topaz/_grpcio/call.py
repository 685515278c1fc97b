"""
One unary-unary call of gRPC, from bytes to bytes.

A `DirectCall` is what grpc.aio does for a call without what it puts around it: a task
and a dozen objects, which take a fifth of the CPU time of a small call. It drives the
coroutine of gRPC's core by the callbacks of the futures that it waits for. That is not
public, so a `TaskCall` of grpc.aio's own is made where it is not as known.

Two habits of grpc.aio are cured by both, because none of them may reach a caller:

- Awaiting a call replaces the CancelledError that anyio threw by one of its own,
  which `move_on_after` and `fail_after` do not recognise (grpc#43502). So nobody awaits
  a call: its end is told.
- `Call.cancel()` leaks about a kilobyte of native memory each time (grpc#43360), that
  of operations whose end nobody waits for. Cancelling the call in the core alone, and
  letting it end by itself, does not.
"""

from __future__ import annotations

import logging
import time
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import grpc.aio

from fastapi_topaz._grpcio.deadline import core_deadline
from fastapi_topaz._grpcio.protocol import checked
from fastapi_topaz._rpc.clock import monotonic


if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["Call", "call_class", "detect_call_class", "is_direct"]


logger = logging.getLogger("fastapi_topaz.transport")

Outcome: TypeAlias = bytes | Exception | None
"""The response, an error, or None: cut off here, or OK without a message."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class DirectCall:
    """A call on the core of grpc.aio."""

    __slots__ = ("_core", "_future", "_on_end", "_outcome", "_work", "deadline")

    def __init__(
        self,
        channel: Any,
        method: str,
        request: bytes,
        timeout: float | None,
        metadata: tuple[Any, ...],
        on_end: Callable[[Call], object],
    ) -> None:
        self.deadline = deadline = None
        if timeout is not None:
            self.deadline = monotonic() + timeout
            deadline = core_deadline(timeout)
        self._on_end = on_end
        self._outcome: Outcome = None
        self._future: Any = None
        self._core: Any = channel._channel.call(method.encode(), deadline, None, None)  # noqa: SLF001
        self._work: Any = self._core.unary_unary(request, metadata, None)
        self._continue(self._work.send(None))

    def _continue(self, future: Any) -> None:
        self._future = future
        # What awaits a future marks it so, and the task that sees the mark removes it.
        future._asyncio_future_blocking = False  # noqa: SLF001
        future.add_done_callback(self._step)

    def _step(self, _future: object) -> None:
        self._future = (
            None  # on trio it refers back, and a circle would keep the socket
        )
        try:
            future = self._work.send(None)
        except StopIteration as stop:
            self._outcome = stop.value
        except Exception as error:  # noqa: BLE001  (the outcome)
            self._outcome = error.with_traceback(None)
        else:
            self._continue(future)
            return
        self._on_end(self)

    def cancel(self, why: str) -> None:
        """Cancel it on the wire; it ends soon."""
        self._core.cancel(why)

    def abandon(self) -> None:
        """Cancel it, whose event loop was closed."""
        self.cancel("event loop closed")
        future = self._future
        if future is not None and future.done():  # its callback was dropped by the loop
            self._step(future)

    def drop(self) -> None:
        """Free what it holds in the core; it has ended, and no task will look at it."""
        if self._future is not None:  # its end was lost, or is yet to be passed on
            self._future.remove_done_callback(self._step)
        self._core = self._work = self._future = None

    def outcome(self) -> Outcome:
        """Return how it ended, which it has; callable from any thread."""
        core = self._core
        outcome = self._outcome
        if core.is_ok():
            # Most answers have neither. The public methods take ten times as long.
            initial = core._initial_metadata or ()  # noqa: SLF001
            trailing = core._status.trailing_metadata() or ()  # noqa: SLF001
            if (initial or trailing) and isinstance(outcome, bytes):
                return checked(outcome, chain(initial, trailing))
            return outcome
        if outcome is not None or core.is_locally_cancelled():
            return outcome
        status = _result(core.status())
        error: Exception = grpc.aio.AioRpcError(
            # gRPC before 1.81 has no name for a number that servers make up.
            _CODES.get(int(status.code()), grpc.StatusCode.UNKNOWN),
            grpc.aio.Metadata(*(_result(core.initial_metadata()) or ())),
            grpc.aio.Metadata(*(status.trailing_metadata() or ())),
            details=status.details(),
            debug_error_string=status.debug_error_string(),
        )
        return error


def _result(finished: Any) -> Any:
    # A coroutine that waits for nothing ends with its first step; that needs no loop.
    try:
        finished.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("gRPC reported the end of a call that has not ended")


class TaskCall:
    """A call as grpc.aio makes it."""

    __slots__ = ("_call", "deadline")

    def __init__(
        self,
        channel: Any,
        method: str,
        request: bytes,
        timeout: float | None,
        metadata: tuple[Any, ...],
        on_end: Callable[[Call], object],
    ) -> None:
        self.deadline = None
        if timeout is not None:
            self.deadline = monotonic() + timeout
            # grpc.aio adds time.time() again.
            timeout = core_deadline(timeout) - time.time()
        # Bytes in, bytes out: grpc.aio swallows what a serializer raises, and sends
        # an empty request.
        begin = channel.unary_unary(method)
        # Those that others have put on all channels; a call with them is no such call.
        begin._interceptors = ()  # noqa: SLF001
        self._call: Any = begin(request, timeout=timeout, metadata=metadata)
        self._call._call_response.add_done_callback(lambda _: on_end(self))  # noqa: SLF001

    def cancel(self, why: str) -> None:
        """Cancel it on the wire; it ends soon."""
        self._call._cancel(why)  # noqa: SLF001

    def abandon(self) -> None:
        """Cancel it, whose event loop was closed."""
        self.cancel("event loop closed")

    def drop(self) -> None:
        """Free what it holds in the core; it has ended, and no task will look at it."""
        self._call = None

    def outcome(self) -> Outcome:
        """Return how it ended, which it has; callable from any thread."""
        # A finished call answers its first step; running it by hand needs no loop.
        call = self._call
        try:
            call.__await__().send(None)
        except StopIteration as stop:
            if stop.value is None:
                return None
            initial = _result(call.initial_metadata())
            trailing = _result(call.trailing_metadata())
            return checked(bytes(stop.value), chain(initial, trailing))
        except grpc.aio.AioRpcError as error:
            failure: Exception = error.with_traceback(None)
            return failure
        except BaseException:  # noqa: BLE001
            # CancelledError, although nobody was cancelled; and KeyError for a status
            # that gRPC 1.80 does not know.
            return None
        return None  # not ended yet: cut off


Call: TypeAlias = DirectCall | TaskCall

_call_class: type[DirectCall | TaskCall] | None = None


def detect_call_class(channel: Any) -> None:
    """Find out, once, how calls are made; in the event loop of *channel*."""
    global _call_class  # noqa: PLW0603  (what gRPC is like is a fact of the process)
    if _call_class is not None:
        return
    try:
        core = channel._channel.call(b"/", None, None, None)  # noqa: SLF001
        # Never begun: nothing is sent.
        core.unary_unary(b"", (), None).close()
        _ = core._initial_metadata, core._status  # noqa: SLF001
        _call_class = DirectCall
    except (AttributeError, TypeError):
        # gRPC's inside is another one than that of 1.80 to 1.85.
        _call_class = TaskCall
        logger.info(
            "gRPC %s is not known from inside: the slower public calls of grpc.aio "
            "are used",
            grpc.__version__,
        )


def call_class() -> type[Call]:
    """
    Return how calls are made: a class to be called with what the call is.

    The last argument is called with the call when it has ended, and not before the
    class has returned it.
    """
    return _call_class or TaskCall


def is_direct() -> bool:
    """Say whether calls may be begun in another thread than that of their loop."""
    return _call_class is DirectCall
