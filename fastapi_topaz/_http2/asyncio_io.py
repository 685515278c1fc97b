"""
The I/O layer for asyncio, also on uvloop.

It uses `add_reader` and not an asyncio transport. So reads and writes are the same as
on trio, and the socket is closed in one step. A transport that outlives its event loop
would emit a warning.
"""

from __future__ import annotations

import asyncio
import math
from functools import partial
from typing import TYPE_CHECKING

from fastapi_topaz._http2.rpc_connection import NativeConnection
from fastapi_topaz._rpc.clock import monotonic
from fastapi_topaz._rpc.statuses import EndedCall


if TYPE_CHECKING:
    from fastapi_topaz._http2.requests import RequestBlocks
    from fastapi_topaz._http2.rpc_connection import Wire
    from fastapi_topaz._rpc.metadata import Metadata
    from fastapi_topaz._rpc.target import Target


__all__ = ["AsyncioConnection"]


class AsyncioConnection(NativeConnection):
    """
    A connection on the running event loop.

    Strictly private.
    """

    __slots__ = (
        "_armed",
        "_fileno",
        "_flush_due",
        "_has_writer",
        "_is_attached",
        "_loop",
        "_timer",
    )

    def __init__(
        self, wire: Wire, target: Target, blocks: RequestBlocks, peer: str
    ) -> None:
        super().__init__(wire, target, blocks, peer)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._armed = math.inf
        self._flush_due = False
        self._has_writer = False
        self._fileno = wire.fileno()
        self._loop.add_reader(self._fileno, self._on_readable)
        self._is_attached = True

    async def call(
        self,
        method: str,
        request: bytes,
        *,
        timeout: float | None,
        metadata: Metadata,
    ) -> bytes:
        """Make one call; see `NativeConnection.call`."""
        if not self._core.takes_calls and self._sends_again:
            return await self._send_again(method, request, timeout, metadata)
        ended = self._loop.create_future()
        stream = self._begin(method, request, timeout, metadata, partial(_wake, ended))
        if self._core.next_deadline < self._armed:
            self._arm()
        # A single call is written at once. Concurrent calls that begin in the same
        # iteration of the loop are written together, because a send takes 5 us.
        if not self._flush_due:
            is_alone = len(self._core.streams) == 1
            (self._flush if is_alone else self._flush_later)()
        try:
            await ended
            return self._result(stream)
        except asyncio.CancelledError:
            self._core.cancel(stream)
            if not self._flush_due:
                self._flush_later()
            raise
        except GeneratorExit:  # the event loop was closed
            self._core.cancel(stream)
            raise
        except EndedCall as error:
            if not self._is_sent_again(error):
                raise
            timeout = stream.time_left(monotonic())
        finally:
            if self._quiet is not None:
                self._call_ended()
            del stream
        return await self._send_again(method, request, timeout, metadata)

    def _host(self, successor: NativeConnection) -> None:
        """Do nothing: on asyncio, a connection needs no task."""

    # -- the socket -------------------------------------------------------------

    def _on_readable(self) -> None:
        core = self._core
        before = len(core.streams)
        self._wire.read()
        # If several calls ended, their callers may begin new calls in this iteration of
        # the loop. These calls and replies to frames are written together.
        if not self._flush_due and (
            len(core.streams) < before - 1
            or core.has_output
            or core.failure is not None
        ):
            self._flush_later()

    def _flush_later(self) -> None:
        self._flush_due = True
        self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if not self._is_attached:
            return
        # If the socket is full, `_on_writable` continues.
        if not self._has_writer and self._wire.write():
            self._has_writer = True
            self._loop.add_writer(self._fileno, self._on_writable)
        if self._core.failure is not None:
            self._end()

    def _on_writable(self) -> None:
        if not self._wire.write():
            self._has_writer = False
            self._loop.remove_writer(self._fileno)
            if self._core.failure is not None:
                self._end()

    # -- time -------------------------------------------------------------------

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed = self._core.next_deadline
        wait = max(0.0, self._armed - monotonic())
        self._timer = self._loop.call_later(wait, self._on_timer)

    def _on_timer(self) -> None:
        self._armed = math.inf
        self._timer = None
        # uvloop calls timers before readers. After a long turn of the loop, the answer
        # to a PING may be there.
        self._wire.read()
        self._core.expire(monotonic())
        if self._core.next_deadline < math.inf:
            self._arm()
        self._flush()

    def _detach(self) -> None:
        if not self._is_attached:
            return
        self._is_attached = False
        self._loop.remove_reader(self._fileno)
        if self._has_writer:
            self._loop.remove_writer(self._fileno)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _wake(ended: asyncio.Future[None]) -> None:
    if not ended.done():  # its caller may have been cancelled in this iteration
        ended.set_result(None)
