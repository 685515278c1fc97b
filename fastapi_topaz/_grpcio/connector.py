"""The connector of a pool of gRPC connections."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from anyio.lowlevel import current_token

from fastapi_topaz import _fork
from fastapi_topaz._grpcio.certificates import root_certificates
from fastapi_topaz._grpcio.connection import GrpcConnection
from fastapi_topaz._grpcio.loopback import is_loopback
from fastapi_topaz._rpc.target import Target
from fastapi_topaz.exceptions import ConnectFailed, PoolMisuse


if TYPE_CHECKING:
    from fastapi_topaz._rpc.connection import RpcConnection


__all__ = ["GrpcConnector"]


logger = logging.getLogger("fastapi_topaz.transport")


class GrpcConnector:
    """
    Makes gRPC connections for a pool, on the running backend: asyncio or trio.

    Each connection has a TCP connection of its own. A `ConnectionPool` with this
    connector pools the connections of any gRPC service: `call()` of a lease makes a
    call of it.

    Args:
        target: Where the server is, and how to talk to it.

    Raises:
        TypeError: *target* is no `Target`.
    """

    # One address may stand for several servers, and gRPC picks one of several.
    spreads = True
    # A channel is READY before the server has answered anything, also behind a proxy
    # whose server is down, and to a server without the Authorizer.
    probes = True

    def __init__(self, target: Target) -> None:
        if not isinstance(target, Target):
            raise TypeError(f"target must be a Target, got a {type(target).__name__}")
        self._target = target
        self.target: str = target.url
        # Whether a key is sent in plaintext across a network, and no log says so yet.
        self._exposes_key = (
            any(key == "authorization" for key, _ in target.metadata)
            and target.insecure
            and not is_loopback(target.url)
        )

    def __repr__(self) -> str:
        return f"<GrpcConnector to {self.target}>"

    def opened(self, pool: str) -> None:
        """Log a warning, the first time, if *pool* sends its key in plaintext."""
        if self._exposes_key:
            self._exposes_key = False
            logger.warning(
                "%s: a key (api_key, or authorization metadata) is sent to %s "
                "without TLS because of insecure=True; anyone on the network path can "
                "read it. Use TLS or a loopback address",
                *(pool, self.target),
            )

    def validate(self) -> None:
        """
        Check what no retry can mend.

        Raises:
            ValueError: The certificate file cannot be read, or is not a PEM file of
                certificates.
        """
        root_certificates(self._target)

    async def connect(self, timeout: float, /) -> RpcConnection:
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
