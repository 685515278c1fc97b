"""The two protocols through which a pool meets the thing it pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


__all__ = ["Connection", "Connector", "Metadata", "RpcConnection"]


Metadata = Sequence[tuple[str, str | bytes]]


class Connection(Protocol):
    """One established connection, of whatever kind."""

    async def probe(self, timeout: float, /) -> None:
        """
        Return if the other side answers within *timeout* seconds.

        Raises:
            Exception: It does not; the pool closes the connection.
        """

    async def close(self, grace: float, /) -> None:
        """
        Close the connection; calls in flight have *grace* seconds to end.

        Called once, whatever happened before. Must not wait much longer than
        *grace*.
        """


class Connector(Protocol):
    """
    Makes the connections of a pool.

    An attribute `target` (str), if there is one, names the other side in messages.
    A method `validate()`, if there is one, is called by `initialize()` and raises
    what no retry can mend, such as a missing file.

    What it makes needs `async probe(timeout)`, which raises if the other side does not
    answer, and `async close(grace)`. With `async call(method, request, *, timeout,
    metadata)` from bytes to bytes and `is_lost(error)` besides, leases of it make
    gRPC calls. None of them may shield itself from cancellation for long: the pool
    ends them by cancelling.
    """

    async def connect(self, timeout: float, /) -> Connection:
        """
        Establish one connection within *timeout* seconds.

        Raises:
            ConnectFailed: It could not be established, and why. Any other exception
                counts as a failure that may be retried.
        """
        ...


class RpcConnection(Connection, Protocol):
    """A connection that carries gRPC calls, as those of an authorizer do."""

    async def call(
        self,
        method: str,
        request: bytes,
        *,
        timeout: float | None,
        metadata: Metadata,
    ) -> bytes:
        """Make one unary-unary call and return the response."""
        ...

    def is_lost(self, error: BaseException, /) -> bool:
        """Say whether *error*, raised by a call, accuses the connection itself."""
        ...
