"""Opens connections through grpc.aio, on asyncio."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from anyio.lowlevel import current_token

from fastapi_topaz import _fork
from fastapi_topaz._grpcio.channel import check_names
from fastapi_topaz._grpcio.connection import GrpcConnection
from fastapi_topaz._rpc.certificates import client_pair, root_certificates
from fastapi_topaz.exceptions import ConnectFailed, PoolMisuse


if TYPE_CHECKING:
    from fastapi_topaz._rpc.target import Target


__all__ = ["GrpcioOpener", "require_asyncio"]


class GrpcioOpener:
    """
    Opens connections to one target.

    Strictly private.

    Raises:
        ValueError: gRPC cannot use the `authority` of *target*.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        check_names(target)

    def validate(self) -> None:
        """
        Check for errors that no retry can repair.

        Raises:
            ValueError: A file with certificates, or with the key, cannot be used.
        """
        root_certificates(self._target)
        client_pair(self._target)

    async def open(self, timeout: float) -> GrpcConnection:
        """
        Open one connection; see `GrpcConnection.open`.

        Raises:
            ConnectFailed: It could not be established, and why.
            PoolMisuse: This process was forked while connections were open, or kept.
            ValueError: The event loop is not one of asyncio.
        """
        require_asyncio()
        parent = _fork.inherited_from()
        if parent is not None:
            raise PoolMisuse(
                f"process {_fork.current.pid} was forked from {parent}, which had gRPC "
                "connections open, or still referred to closed ones (a kept traceback "
                "does). gRPC does not work after such a fork; open pools after the "
                "fork, in the lifespan or a startup hook, or use transport='native'"
            )
        try:
            self.validate()
        except ValueError as error:
            raise ConnectFailed(str(error), reason="tls", permanent=True) from error
        return await GrpcConnection.open(self._target, timeout)


def require_asyncio() -> None:
    """
    Check that the running event loop is one of asyncio.

    Raises:
        ValueError: It is one of trio.
    """
    is_asyncio = isinstance(current_token().native_token, asyncio.AbstractEventLoop)
    if not is_asyncio:
        raise ValueError(
            "transport='grpcio' works on asyncio only, and this event loop is trio's; "
            "use transport='native', or unset FASTAPI_TOPAZ_TRANSPORT"
        )
