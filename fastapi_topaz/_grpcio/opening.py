"""Opens connections through grpc.aio, on the running backend: asyncio or trio."""

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
    from fastapi_topaz._rpc.connection import RpcConnection
    from fastapi_topaz._rpc.target import Target


__all__ = ["GrpcioOpener"]


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

    async def open(self, timeout: float) -> RpcConnection:
        """
        Open one connection; see `GrpcConnection.open`.

        Raises:
            ConnectFailed: It could not be established, and why.
            PoolMisuse: This process was forked while connections were open, or kept.
        """
        parent = _fork.inherited_from()
        if parent is not None:
            raise PoolMisuse(
                f"process {_fork.current.pid} was forked from {parent}, which had gRPC "
                "connections open, or still referred to closed ones (a kept traceback "
                "does). gRPC does not work after such a fork; open pools after the "
                "fork, in the lifespan or a startup hook"
            )
        try:
            self.validate()
        except ValueError as error:
            raise ConnectFailed(str(error), reason="tls", permanent=True) from error
        if isinstance(current_token().native_token, asyncio.AbstractEventLoop):
            return await GrpcConnection.open(self._target, timeout)
        # Here and not above: asyncio applications need no trio installed.
        from fastapi_topaz._grpcio.trio_connection import TrioGrpcConnection  # noqa: PLC0415

        return await TrioGrpcConnection.open(self._target, timeout)
