"""
The calls in flight on one channel.

Two habits of grpc.aio must not reach a caller:

- If a task that awaits a call is cancelled, grpc.aio replaces the CancelledError by one
  of its own, which the cancel scopes of anyio do not recognize (grpc#43502). So each
  call is awaited by a task of its own.
- If a channel is closed, each task that awaits a call gets CancelledError, although it
  was not cancelled. Here the call ends with the outcome None.
"""

from __future__ import annotations

import asyncio
import contextlib
from itertools import chain
from typing import Any, Final, TypeAlias

import grpc.aio

from fastapi_topaz._grpcio.protocol import checked


__all__ = ["Calls", "Outcome"]


Outcome: TypeAlias = bytes | grpc.aio.AioRpcError | None
"""The response, the error, or None if the call ended without either."""

_REPORTED: Final = 0.1
"""
Seconds within which gRPC's core reports the end of a cancelled call to its event loop.

It takes about a millisecond on an idle machine. If the loop is closed by then, the
report raises "Event loop is closed" in another loop of the process.
"""


class Calls:
    """
    The calls in flight on one channel.

    Strictly private.
    """

    def __init__(self) -> None:
        # Each call by the task that awaits it.
        self._running: dict[asyncio.Task[Outcome], Any] = {}
        self._reported: float | None = None

    def __len__(self) -> int:
        return len(self._running)

    async def outcome(self, call: Any) -> Outcome:
        """Return how *call* ends. If this is cancelled, so is the call."""
        task = asyncio.create_task(_end_of(call))
        self._running[task] = call
        task.add_done_callback(lambda task: self._running.pop(task, None))
        try:
            await asyncio.wait([task])
            return None if task.cancelled() else task.result()
        except asyncio.CancelledError:
            self._cancel(call)
            raise
        finally:
            # The frames of an error must not keep the call, because a call keeps the
            # socket of its channel open.
            del call, task

    def _cancel(self, call: Any) -> None:
        call.cancel()
        self._reported = asyncio.get_running_loop().time() + _REPORTED

    async def until_quiet(self, timeout: float) -> None:
        """Return when the last call has ended, or after *timeout* seconds."""
        if self._running:
            await asyncio.wait(self._running, timeout=timeout)

    def cut_off(self) -> None:
        """Cancel all calls. Each ends with the outcome None."""
        for call in self._running.values():
            self._cancel(call)

    async def until_reported(self) -> None:
        """Return when gRPC's core has reported the end of all cancelled calls."""
        if self._reported is not None:
            now = asyncio.get_running_loop().time()
            await asyncio.sleep(max(0.0, self._reported - now))

    def abandon(self) -> None:
        """Cancel all calls, because their event loop was closed."""
        for call in self._running.values():
            # gRPC's core cancels the call. Then grpc.aio needs the loop, and fails.
            with contextlib.suppress(RuntimeError):
                call.cancel()
        self._running.clear()


async def _end_of(call: Any) -> Outcome:
    try:
        response = await call
        metadata = chain(await call.initial_metadata(), await call.trailing_metadata())
    except grpc.aio.AioRpcError as error:
        # Its frames hold the call.
        without_frames: grpc.aio.AioRpcError = error.with_traceback(None)
        return without_frames
    except KeyError:  # gRPC 1.80 has no name for a status that a server makes up
        return None
    except asyncio.CancelledError:
        # The call was cancelled. If this task ended with the error, its frames would
        # make a cycle with the call.
        return None
    # gRPC accepts the status OK without a message, but that answers nothing.
    return checked(response, metadata) if isinstance(response, bytes) else None
