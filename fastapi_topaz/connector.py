"""The connector of a pool of gRPC connections, which picks their transport."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias, get_args

from fastapi_topaz._checks import safe_repr
from fastapi_topaz._rpc.credentials import CredentialedConnection
from fastapi_topaz._rpc.loopback import is_loopback
from fastapi_topaz._rpc.target import Target


if TYPE_CHECKING:
    from fastapi_topaz._rpc.connection import RpcConnection


__all__ = ["TRANSPORT_VARIABLE", "GrpcConnector", "Transport", "chosen_transport"]


_logger = logging.getLogger("fastapi_topaz.transport")

Transport: TypeAlias = Literal["native", "grpcio"]
"""How calls are made: by the HTTP/2 client of this package, or by grpc.aio."""

TRANSPORT_VARIABLE: Final = "FASTAPI_TOPAZ_TRANSPORT"
"""The environment variable with the transport to use where none is passed."""

_DEFAULT: Final[Transport] = "native"


def chosen_transport(transport: object) -> Transport:
    """
    Return *transport*, or the value of the environment variable if it is None.

    Raises:
        ValueError: It is not the name of a transport. The message says where it was
            set.
    """
    where = "transport"
    if transport is None:
        transport = os.environ.get(TRANSPORT_VARIABLE) or _DEFAULT
        where = f"the environment variable {TRANSPORT_VARIABLE}"
    for known in get_args(Transport):
        if transport == known:
            found: Transport = known
            return found
    raise ValueError(
        f"{where} must be 'native' or 'grpcio', got {safe_repr(transport)}"
    )


class _Opener(Protocol):
    def validate(self) -> None: ...

    async def open(self, timeout: float) -> RpcConnection: ...


def _opener(transport: Transport, target: Target) -> _Opener:
    # Imported here, because an application uses only one of them, and an import of this
    # package should load neither.
    if transport == "native":
        from fastapi_topaz._http2.opening import NativeOpener  # noqa: PLC0415

        return NativeOpener(target)
    from fastapi_topaz._grpcio.opening import GrpcioOpener  # noqa: PLC0415

    return GrpcioOpener(target)


class GrpcConnector:
    """
    Makes gRPC connections for a pool, on the running backend.

    The transport `native` works on asyncio and trio, `grpcio` only on asyncio.

    Each connection has a TCP connection of its own. A `ConnectionPool` with this
    connector pools the connections of any gRPC service. `stub()` of a lease makes a
    generated stub of that service, and `call()` makes one call by its name.

    Args:
        target: Where the server is, and how to talk to it.
        transport: `"native"` is the HTTP/2 client of this package, `"grpcio"` is
            grpc.aio. None, the default, means the environment variable
            `FASTAPI_TOPAZ_TRANSPORT`, and `"native"` if that is not set or empty.

    Raises:
        TypeError: *target* is not a `Target`.
        ValueError: *transport*, or the environment variable, is not the name of a
            transport. Or the transport cannot use an option of *target*.
    """

    spreads = True
    """Connections may lead to different servers, because a name has many addresses."""
    probes = True
    """
    The pool probes each new connection.

    A connection is ready before the server has answered any call, also behind a proxy
    whose server is down, and to a server without the Authorizer.
    """

    def __init__(self, target: Target, transport: Transport | None = None) -> None:
        if not isinstance(target, Target):
            raise TypeError(f"target must be a Target, got a {type(target).__name__}")
        self._target = target
        self.target: str = target.url
        self.transport: Transport = chosen_transport(transport)
        """The transport in use."""
        # gRPC's core hangs in a forked child.
        self.survives_fork: bool = self.transport == "native"
        self._opener = _opener(self.transport, target)
        # Whether a key is sent in plaintext over a network, and no log says so yet.
        # The metadata of any key may be secret, except for that of a tenant.
        self._exposes_key = (
            (
                target.credentials is not None
                or any(key != "aserto-tenant-id" for key, _ in target.metadata)
            )
            and target.insecure
            and not is_loopback(target.url)
        )

    def __repr__(self) -> str:
        return f"<GrpcConnector to {self.target} transport={self.transport}>"

    def check_backend(self) -> None:
        """
        Check that the transport works on the running event loop.

        Raises:
            ValueError: The transport is grpcio, and the event loop is not one of
                asyncio.
        """
        if self.transport == "grpcio":
            from fastapi_topaz._grpcio.opening import require_asyncio  # noqa: PLC0415

            require_asyncio()

    def opened(self, pool: str) -> None:
        """Log the transport of *pool*, and once that it sends its key in plaintext."""
        _logger.info("%s: its transport is %s", pool, self.transport)
        if self._exposes_key:
            self._exposes_key = False
            _logger.warning(
                "%s: a key (api_key, extra_metadata, credentials, or metadata of a "
                "Target) is sent to %s without TLS because of insecure=True; anyone on "
                "the network path can read it. Use TLS or a loopback address",
                *(pool, self.target),
            )

    def validate(self) -> None:
        """
        Check for errors that no retry can repair.

        Raises:
            ValueError: A file with certificates, or with the key, cannot be used.
            ConnectFailed: The native transport finds no root certificates to trust.
        """
        self._opener.validate()

    async def servers(self) -> tuple[str, ...]:
        """
        Return the addresses of the target, such as `ipv4:10.0.0.7:8282`.

        Empty if only gRPC's core can resolve the url.

        Raises:
            OSError: The name cannot be resolved.
        """
        # Here and not above, as for the native transport.
        from fastapi_topaz._http2.addresses import parse  # noqa: PLC0415

        try:
            endpoint = parse(self._target.url)
        except ValueError:
            return ()
        return tuple(address.text for address in await endpoint.resolve())

    async def connect(self, timeout: float, /) -> RpcConnection:
        """
        Open one connection that is ready for calls.

        Raises:
            ConnectFailed: It could not be established within *timeout* seconds, and
                why.
            PoolMisuse: The transport is grpcio, and this process was forked while
                connections were open, or kept.
            ValueError: The transport is grpcio, and the event loop is not one of
                asyncio.
        """
        connection = await self._opener.open(timeout)
        if self._target.credentials is None:
            return connection
        return CredentialedConnection(connection, self._target)
