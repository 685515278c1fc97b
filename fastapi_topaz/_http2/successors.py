"""
Connections that take over calls of a connection that the server has ended.

A server may send GOAWAY, or close the socket, between a lease and its call. Then the
call was not processed, so it is sent once more on a new connection. grpc.aio does the
same. The pool retires the lost connection when its lease ends.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import anyio

from fastapi_topaz._http2.connection import timed_out
from fastapi_topaz._http2.failures import closed_under
from fastapi_topaz._rpc.clock import left, monotonic
from fastapi_topaz._rpc.statuses import NotSent
from fastapi_topaz.exceptions import ConnectFailed


if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fastapi_topaz._rpc.metadata import Metadata


__all__ = ["Successors"]


class Successor(Protocol):
    """The interface of a successor; see `NativeConnection`."""

    @property
    def has_calls(self) -> bool: ...

    async def call(
        self,
        method: str,
        request: bytes,
        *,
        timeout: float | None,
        metadata: Metadata,
    ) -> bytes: ...

    def is_lost(self) -> bool: ...

    def cut_off(self) -> None: ...

    def abandon(self) -> None: ...


C = TypeVar("C", bound=Successor)


class Successors(Generic[C]):
    """
    The successors of one connection.

    Strictly private.

    Args:
        url: The name of the target in errors.
        connect: Opens a connection. It has no successors itself.
        host: Starts the tasks of a new connection.
    """

    def __init__(
        self,
        url: str,
        connect: Callable[[], Coroutine[Any, Any, C]],
        host: Callable[[C], None],
    ) -> None:
        self._url = url
        self._connect = connect
        self._host = host
        self._lock = anyio.Lock()
        self._connections: list[C] = []
        # The attempt to connect that runs in the task of a caller.
        self._attempt: Coroutine[Any, Any, C] | None = None
        # The cancel scopes of calls that wait for a new connection.
        self._scopes: set[anyio.CancelScope] = set()
        self._closed = False

    @property
    def has_calls(self) -> bool:
        """Whether a call has not ended."""
        return bool(self._scopes) or any(each.has_calls for each in self._connections)

    async def call(
        self, method: str, request: bytes, timeout: float | None, metadata: Metadata
    ) -> bytes:
        """
        Send a call once more; see `NativeConnection.call`.

        If no successor accepts calls, this opens one. So a call opens at most one.

        Raises:
            NotSent: No connection could be opened.
        """
        deadline = None if timeout is None else monotonic() + timeout
        successor = await self._successor(method, timeout)
        try:
            return await successor.call(
                method, request, timeout=left(deadline), metadata=metadata
            )
        finally:
            del successor

    async def _successor(self, method: str, timeout: float | None) -> C:
        """Return a connection that accepts calls. Open one if there is none."""
        scope = anyio.move_on_after(timeout)
        self._scopes.add(scope)
        try:
            with scope:
                async with self._lock:
                    return await self._newest()
        except ConnectFailed as error:
            raise NotSent(method, self._url, str(error)) from None
        finally:
            self._scopes.discard(scope)
        if self._closed:
            raise closed_under(method, self._url)
        raise timed_out()

    async def _newest(self) -> C:
        if self._connections and not self._connections[-1].is_lost():
            return self._connections[-1]
        for each in self._connections[:]:
            if not each.has_calls:
                self._connections.remove(each)
                each.cut_off()
        self._attempt = self._connect()
        try:
            connection = await self._attempt
        finally:
            self._attempt = None
        self._connections.append(connection)
        if self._closed:
            connection.cut_off()
        else:
            self._host(connection)
        return connection

    def cut_off(self) -> None:
        """End all calls as lost, and close all connections."""
        self._closed = True
        for scope in self._scopes:
            scope.cancel()
        for each in self._connections:
            each.cut_off()

    def abandon(self) -> None:
        """Close all sockets without waiting, because the event loop was closed."""
        for each in self._connections:
            each.abandon()
        if self._attempt is not None:
            # Its task never runs again, and the application may keep the task. A cancel
            # scope raises if it is left after its loop has ended.
            with contextlib.suppress(BaseException):
                self._attempt.close()
