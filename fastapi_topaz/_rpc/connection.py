"""What a connection offers that carries gRPC calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fastapi_topaz._pool.connector import Connection, Verdict


if TYPE_CHECKING:
    from fastapi_topaz._rpc.metadata import Metadata


__all__ = ["RpcConnection"]


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
        """Make one unary-unary call that ends within *timeout* seconds."""
        ...

    def judge(self, error: BaseException, /) -> Verdict | None:
        """Return what *error*, raised by a call, says of the connection itself."""
        ...

    def is_lost(self) -> bool:
        """Say whether the other side has gone away; takes a microsecond at most."""
        ...

    def refresh_liveness(self) -> None:
        """Find out what `is_lost` cannot without taking longer."""

    @property
    def peer(self) -> str | None:
        """The address of the other side, if it is known."""
        ...
