"""The interface of a connection that carries gRPC calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fastapi_topaz._pool.connector import Connection, Verdict


if TYPE_CHECKING:
    from fastapi_topaz._rpc.metadata import Metadata


__all__ = ["RpcConnection"]


class RpcConnection(Connection, Protocol):
    """A connection that carries gRPC calls, such as a connection to an authorizer."""

    async def call(
        self,
        method: str,
        request: bytes,
        *,
        timeout: float | None,
        metadata: Metadata,
    ) -> bytes:
        """Make one unary-unary call that ends within *timeout* seconds."""
        ...

    def judge(self, error: BaseException, /) -> Verdict | None:
        """
        Return what *error*, which a call raised, means for the connection.

        None means that it says nothing about the connection.
        """
        ...

    def is_lost(self) -> bool:
        """Return whether the server has gone away. Takes at most a microsecond."""
        ...

    @property
    def peer(self) -> str | None:
        """The address of the server, or None if it is unknown."""
        ...
