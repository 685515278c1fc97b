"""
The I/O layer for trio.

The pool starts `run` of a connection in its own task group. It reads and keeps the
deadlines. A second task writes. So the tasks end with the pool, and no system task and
no thread is needed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from fastapi_topaz._http2.rpc_connection import NativeConnection
from fastapi_topaz._rpc.clock import monotonic
from fastapi_topaz._rpc.statuses import EndedCall


if TYPE_CHECKING:
    from fastapi_topaz._http2.requests import RequestBlocks
    from fastapi_topaz._http2.rpc_connection import Wire
    from fastapi_topaz._rpc.metadata import Metadata
    from fastapi_topaz._rpc.target import Target


__all__ = ["TrioConnection"]


class _Parked:
    """A place where one task sleeps until `wake` is called."""

    __slots__ = ("task",)

    def __init__(self) -> None:
        self.task: trio.lowlevel.Task | None = None

    def wake(self) -> None:
        task, self.task = self.task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    async def park(self) -> None:
        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            self.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        self.task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)


class TrioConnection(NativeConnection):
    """
    A connection on trio. It works only while `run` is running.

    Strictly private.
    """

    __slots__ = (
        "_armed",
        "_began",
        "_hosted",
        "_is_full",
        "_timer",
        "_writer",
    )

    def __init__(
        self, wire: Wire, target: Target, blocks: RequestBlocks, peer: str
    ) -> None:
        super().__init__(wire, target, blocks, peer)
        self._began = False
        # The nursery of the writer, and of successors, which outlive this connection.
        self._hosted: trio.Nursery | None = None
        self._timer: trio.CancelScope | None = None
        self._armed = math.inf
        self._writer = _Parked()
        self._is_full = False

    # Ctrl-C between the begin of a call and its wait would let the core wake a task
    # that does not sleep. Then trio aborts the program.
    @trio.lowlevel.enable_ki_protection
    async def call(
        self,
        method: str,
        request: bytes,
        *,
        timeout: float | None,
        metadata: Metadata,
    ) -> bytes:
        """Make one call; see `NativeConnection.call`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if not (self._began or self._closed):
            await self._until_began()
        if not self._core.takes_calls and self._sends_again:
            return await self._send_again(method, request, timeout, metadata)
        caller = _Parked()
        stream = self._begin(method, request, timeout, metadata, caller.wake)
        if self._core.next_deadline < self._armed:
            self._arm()
        # A single call is written at once. The writer sends concurrent calls together,
        # because a send takes 5 us.
        if len(self._core.streams) == 1 and self._writer.task is not None:
            self._flush()
        else:
            self._writer.wake()
        try:
            if stream.outcome is None:
                await caller.park()
            return self._result(stream)
        except trio.Cancelled:
            self._core.cancel(stream)
            self._writer.wake()
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

    @property
    def _sends_again(self) -> bool:
        return super()._sends_again and self._hosted is not None

    def _host(self, successor: NativeConnection) -> None:
        """Start the tasks of *successor* in the nursery of this connection."""
        assert isinstance(successor, TrioConnection)  # noqa: S101
        if self._hosted is None:  # the pool has ended `run`
            successor.cut_off()
        else:
            self._hosted.start_soon(successor.run)

    async def _until_began(self) -> None:
        """Return when `run`, which the pool has just started, has begun."""
        for _ in range(10):
            await trio.lowlevel.checkpoint()
            if self._began:
                return
        raise RuntimeError(
            f"{self!r} works only while its run() runs; start it in a nursery, or use "
            "a ConnectionPool, which does so"
        )

    def _arm(self) -> None:
        self._armed = self._core.next_deadline
        if self._timer is not None:
            self._timer.deadline = trio.current_time() + (self._armed - monotonic())

    def _flush(self) -> None:
        """Send the queued bytes. If the socket is full, the writer continues."""
        self._is_full = self._wire.write()
        if self._is_full:
            self._writer.wake()
        self._stop_if_over()

    def _stop_if_over(self) -> None:
        if self._core.failure is not None:
            self._end()

    # Protected like `call`: otherwise Ctrl-C would end the pool, not the application.

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Read, write and keep deadlines until the connection is closed."""
        self._began = True
        try:
            async with trio.open_nursery() as self._hosted:
                self._hosted.start_soon(self._write_on)
                try:
                    self._flush()
                    await self._read_on()
                finally:
                    # Also if the pool ends. Otherwise calls would wait for responses
                    # that no task reads.
                    self._end()
                if self._sends_again:
                    # The server ended the connection. Successors may start tasks.
                    await trio.sleep_forever()
        finally:
            self._hosted = None

    # The connection can end at any time, which ends the wait of these tasks. But a task
    # that was already woken continues to its next wait, which needs an open socket.

    @trio.lowlevel.enable_ki_protection
    async def _read_on(self) -> None:
        while self._wire.is_open:
            with trio.CancelScope() as self._timer:
                self._arm()
                while self._wire.is_open:
                    try:
                        await trio.lowlevel.wait_readable(self._wire)
                    except trio.ClosedResourceError:
                        return
                    self._wire.read()
                    if self._core.has_output:
                        self._writer.wake()
                    self._stop_if_over()
                return
            # The deadline of the timer has passed.
            self._core.expire(monotonic())
            self._flush()

    @trio.lowlevel.enable_ki_protection
    async def _write_on(self) -> None:
        while self._wire.is_open:
            if self._is_full:
                try:
                    await trio.lowlevel.wait_writable(self._wire)
                except trio.ClosedResourceError:
                    return
            elif not self._core.has_output:
                await self._writer.park()
            self._is_full = self._wire.write()
            self._stop_if_over()

    def _detach(self) -> None:
        if self._closed and self._hosted is not None:
            # Not if the server ended the connection, because successors run there.
            self._hosted.cancel_scope.cancel()
        if self._wire.is_open:
            # No task may wait for the socket when it is closed.
            trio.lowlevel.notify_closing(self._wire)
            self._writer.wake()
