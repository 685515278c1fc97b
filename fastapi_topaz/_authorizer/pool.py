"""The pool of connections to an authorizer, and the leases that it gives."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi_topaz._authorizer.calls import AuthorizerCalls
from fastapi_topaz._authorizer.options import AuthorizerOptions, AuthorizerOptionsLike
from fastapi_topaz._checks import check_provider, check_seconds, safe_repr
from fastapi_topaz._pool.acquire import Acquire, explain_missing_await
from fastapi_topaz._pool.handle import Handle
from fastapi_topaz._pool.pool import Pool
from fastapi_topaz._pool.state.options import PoolOptions, fit_minimum
from fastapi_topaz._redaction import boundary
from fastapi_topaz._rpc.metadata import checked_metadata
from fastapi_topaz._rpc.statuses import is_reset
from fastapi_topaz._rpc.stubs import make_stub
from fastapi_topaz._slips import explain_absence
from fastapi_topaz._telemetry.metrics import PoolMetrics, Source
from fastapi_topaz._telemetry.tracing import propagated
from fastapi_topaz.connector import GrpcConnector, chosen_transport
from fastapi_topaz.exceptions import PoolMisuse


if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.metrics import MeterProvider

    from fastapi_topaz._pool.connector import Connector
    from fastapi_topaz._pool.open_pool import OpenPool
    from fastapi_topaz._pool.owner_loop import OwnerLoop
    from fastapi_topaz._pool.state.status import PoolCounters, PoolStatus
    from fastapi_topaz._rpc.metadata import Metadata
    from fastapi_topaz.connector import Transport


__all__ = ["ConnectionPool", "PooledConnection"]


T = TypeVar("T")

EVER = 10.0 * 365 * 86400
"""Longest deadline in seconds. With a much longer one, gRPC overflows: it fails now."""


class PooledConnection(AuthorizerCalls, Handle):
    """
    A lease of a pooled connection, with the calls of the authorizer.

    Each `acquire()` returns a new lease, even for the same connection. After the lease
    is released, every use of it raises `PoolMisuse`.
    Identity, metadata and timeout belong to one call. The connection does not keep
    them.
    """

    __slots__ = ()

    @boundary
    async def call(
        self,
        method: str,
        request: Any,
        *,
        request_serializer: Callable[[Any], bytes] | None = None,
        response_deserializer: Callable[[bytes], Any] | None = None,
        timeout: float | None = None,
        metadata: Metadata | None = (),
    ) -> Any:
        """
        Make one unary-unary call to any gRPC service on this connection.

        Args:
            method: The full name, as `/package.Service/Method`.
            request: The message. Without *request_serializer* it must be bytes.
            request_serializer: Converts the request to bytes. Default None.
            response_deserializer: Converts the bytes of the response. Default None:
                the call returns bytes.
            timeout: Seconds until the call fails with DEADLINE_EXCEEDED. None, the
                default, means no limit.
            metadata: Pairs of key and value, or a `grpc.aio.Metadata`. They are sent
                in addition to the metadata of the authorizer options. Default none.

        Raises:
            grpc.aio.AioRpcError: The call ended with a status other than OK.
            ConnectionLost: The connection was closed during the call.
            CredentialsFailed: The `credentials` of the options failed.
            PoolMisuse: The lease is already released.
            TypeError: The connections of the pool's connector carry no gRPC calls, or
                an argument has the wrong type.
            ValueError: The timeout or the metadata cannot be sent.
        """
        if not isinstance(method, str):
            raise TypeError(
                "method must be a str such as '/package.Service/Method', got "
                f"{method!r}"
            )
        pairs = checked_metadata(metadata)
        data = request if request_serializer is None else request_serializer(request)
        if not isinstance(data, bytes):
            raise TypeError(
                "request must be bytes, or request_serializer must make bytes of it, "
                f"got {type(data).__name__}"
            )
        response = await self._send(method, data, timeout, pairs)
        return response_deserializer(response) if response_deserializer else response

    @boundary
    def stub(self, cls: Callable[[Any], T]) -> T:
        """
        Return a generated stub whose calls use this connection.

        Await its unary-unary methods, on asyncio or trio. They take *timeout* and
        *metadata* as with grpc.aio, and raise the errors of `call()`. They also raise
        `grpc.aio.AioRpcError` with INTERNAL if the response cannot be read. Methods
        with streams raise `NotImplementedError` when they are called.

        Args:
            cls: The class that protoc's gRPC plugin generates for a service, such as
                `GreeterStub`.

        Raises:
            PoolMisuse: The lease is already released.
            TypeError: *cls* is not a class, or it cannot be made from a channel alone.
        """
        self._held()
        return make_stub(cls, self.call)

    async def _send(
        self, method: str, request: bytes, timeout: float | None, metadata: Metadata
    ) -> bytes:
        # The usual case first. Code that runs once per call is slower than it looks:
        # before the next call, it has left the caches of the processor.
        if type(timeout) is not float or not 0 < timeout < EVER:
            timeout = _limit(timeout)
        connection = self.connection
        # Not isinstance(): with a runtime protocol it takes longer than the lease.
        rpc = getattr(connection, "call", None)
        if rpc is None:
            raise TypeError(
                f"{connection!r} carries no gRPC calls: use the object itself: "
                "is the attribute `connection`"
            )
        claim = self._claim
        assert claim is not None  # noqa: S101  (connection would have raised)
        slot = claim.slot
        assert slot is not None  # noqa: S101
        try:
            response: bytes = await rpc(
                method, request, timeout=timeout, metadata=propagated(metadata)
            )
        except Exception as error:
            self._open_pool.judge(claim, slot, error)
            if is_reset(error):
                self._open_pool.state.failed()  # the server failed, not the connection
            raise
        self._open_pool.answered(claim)
        return response


def _limit(timeout: float | None) -> float | None:
    if timeout is None or check_seconds("timeout", timeout, infinite=False) > EVER:
        return None
    return timeout


def _report(
    provider: MeterProvider | None,
    name: str | None,
    semantic_conventions: bool,
    status: Callable[[], PoolStatus],
    counters: PoolCounters,
) -> PoolMetrics:
    return PoolMetrics(
        provider,
        name,
        Source(status, counters),
        semantic_conventions=semantic_conventions,
    )


class AcquireConnection(Acquire[PooledConnection]):
    """
    The result of `ConnectionPool.acquire()`.

    Strictly private.
    """


explain_missing_await(AcquireConnection, PooledConnection)


class ConnectionPool(Pool[PooledConnection]):
    """
    A pool of connections to the Topaz authorizer, on asyncio or trio.

    The constructor uses no network, thread, file or event loop. So a module may create
    a pool at import time, before a worker process forks.

    `initialize()`, `async with pool` or the first `acquire()` opens the pool. Until
    `close()`, it belongs to the process and event loop that opened it. After that it
    can be opened again, also in another process or loop. The end of any
    `async with pool` closes the pool for all its users.

    All times are in seconds.

    Args:
        min_connections: Connections that stay open once the pool is in use. Default
            2, or 1 if *max_connections* is 1. With *eager_init*, `initialize()`
            opens them. Otherwise they open after the first acquire.
        max_connections: Maximum number of connections in this process, default 10.
            Four worker processes have four pools.
        acquire_timeout: Time limit for `acquire()`, which includes waiting and
            connecting. Default 5. With 0, `acquire()` never waits.
        connection_timeout: Time limit for one attempt to connect, default 10.
        max_idle_time: A connection is closed if the others were enough for all leases
            for so long, and more than *min_connections* are open. Default 300; 0 means
            never.
        idle_check_interval: Time between two searches for idle connections, default
            60. 0 means never; otherwise at least 0.001.
        health_check_interval: Time between two rounds of health checks, default 30. A
            round probes the connections that answered nothing since the last round.
            0 means never; otherwise at least 0.001.
        health_check_timeout: Time limit for the answer to a probe, default 5. If none
            arrives, the connection is probed once more, then closed. If a failed call
            made the connection suspect, the first missing answer closes it.
        eager_init: Whether `initialize()` waits for *min_connections*, default
            False.
        retry_on_failure: Whether the pool repeats a failed attempt to connect while
            callers wait, default True.
        max_retries: Maximum number of these repetitions, default 3. The pauses
            between them grow.
        streams_per_connection: Maximum number of leases on one connection at once,
            default 1. gRPC calls can share a connection. With 50, half of the limit
            of most proxies, ten connections carry 500 calls at once.
        max_waiting: Maximum number of waiting callers, default None, which means no
            limit. If it is reached, a further caller gets `PoolSaturated` at once.
        max_lifetime: A connection is replaced at this age, minus up to 10 % at
            random, so that load moves to new servers. Default 3600. 0 means never;
            otherwise at least 1.
        adaptive_limit: Whether the number of leases at once follows the server.
            Default True: if checks take too much of their budget, or get no answer,
            the pool lowers the number below `max_connections *
            streams_per_connection`, so that no queue grows in the server. It raises
            the number again when the server is quick.
        leak_threshold: If a lease is held for longer, the pool logs a warning with
            the name of the task and the place. Default 0, which means off.
        name: The name of the pool in logs, errors and the metric attribute `pool`.
            Default None.
        connector: The object that makes connections. None, the default, means gRPC
            to the authorizer given to `configure()`.
        transport: Which code makes gRPC calls: `"native"` is the HTTP/2 client of this
            package, `"grpcio"` is grpc.aio, on asyncio only. None, the default, means
            the environment variable `FASTAPI_TOPAZ_TRANSPORT`, and `"native"` if that
            is not set. It cannot be combined with *connector*.
        meter_provider: The OpenTelemetry provider for metrics. None, the default,
            means the global one.
        semantic_conventions: Whether to report the metrics also under OpenTelemetry's
            standard names for connection pools, `db.client.connection.*`. Default
            False.

    Raises:
        TypeError: A parameter has the wrong type.
        ValueError: A parameter has an impossible value, or both *connector* and
            *transport* are given.
    """

    _handle = PooledConnection
    _acquiring = AcquireConnection
    _unconfigured = (
        "does not know its authorizer: pass it to TopazConfig as connection_pool, or "
        "call configure(AuthorizerOptions(...))"
    )

    @fit_minimum
    def __init__(
        self,
        *,
        min_connections: int = 2,
        max_connections: int = 10,
        acquire_timeout: float = 5.0,
        connection_timeout: float = 10.0,
        max_idle_time: float = 300.0,
        idle_check_interval: float = 60.0,
        health_check_interval: float = 30.0,
        health_check_timeout: float = 5.0,
        eager_init: bool = False,
        retry_on_failure: bool = True,
        max_retries: int = 3,
        streams_per_connection: int = 1,
        max_waiting: int | None = None,
        max_lifetime: float = 3600.0,
        leak_threshold: float = 0.0,
        adaptive_limit: bool = True,
        name: str | None = None,
        connector: Connector | None = None,
        transport: Transport | None = None,
        meter_provider: MeterProvider | None = None,
        semantic_conventions: bool = False,
    ) -> None:
        options = PoolOptions(
            min_connections=min_connections,
            max_connections=max_connections,
            acquire_timeout=acquire_timeout,
            connection_timeout=connection_timeout,
            max_idle_time=max_idle_time,
            idle_check_interval=idle_check_interval,
            health_check_interval=health_check_interval,
            health_check_timeout=health_check_timeout,
            eager_init=eager_init,
            retry_on_failure=retry_on_failure,
            max_retries=max_retries,
            streams_per_connection=streams_per_connection,
            max_waiting=max_waiting,
            max_lifetime=max_lifetime,
            leak_threshold=leak_threshold,
            adaptive_limit=adaptive_limit,
            name=name,
        )
        if connector is not None and not callable(getattr(connector, "connect", None)):
            raise TypeError(
                "connector must have a method connect(timeout), got "
                f"{safe_repr(connector)}"
            )
        if connector is not None and transport is not None:
            raise ValueError(
                "connector and transport exclude each other, got transport="
                f"{safe_repr(transport)}; pass transport to GrpcConnector instead"
            )
        check_provider("meter_provider", meter_provider, "get_meter", "MeterProvider")
        if not isinstance(semantic_conventions, bool):
            raise TypeError(
                "semantic_conventions must be True or False, got "
                f"{safe_repr(semantic_conventions)}"
            )

        report = partial(_report, meter_provider, name, semantic_conventions)
        super().__init__(options, connector, report)
        self._authorizer_options: AuthorizerOptions | None = None
        # configure() does not replace a connector that the user passed.
        self._own_connector = connector is not None
        self._transport: Transport | None = None
        if not self._own_connector:
            self._transport = chosen_transport(transport)

    @property
    def authorizer_options(self) -> AuthorizerOptions | None:
        """The authorizer's address and credentials, or None if not configured."""
        return self._authorizer_options

    @boundary
    def configure(self, authorizer_options: AuthorizerOptionsLike) -> None:
        """
        Set the authorizer to connect to. `TopazConfig` calls this method.

        If the pool was created with a *connector*, this changes nothing.

        Args:
            authorizer_options: An `AuthorizerOptions` of this package or of
                `aserto.client`.

        Raises:
            PoolMisuse: The pool is open with another authorizer.
            TypeError: *authorizer_options* has the wrong type.
        """
        options = AuthorizerOptions.coerce(authorizer_options)
        if self._own_connector:
            return
        if self.authorizer_options == options:
            return
        if self._alive() is not None:
            raise PoolMisuse(f"{self._label()} is open; close() it to configure it")
        # First, because it may refuse the url.
        connector = GrpcConnector(options.target, self._transport)
        self._authorizer_options = options
        self._connector = connector

    def _start(self, owner: OwnerLoop, connector: Connector) -> OpenPool:
        if isinstance(connector, GrpcConnector):
            connector.check_backend()
        open_pool = super()._start(owner, connector)
        if isinstance(connector, GrpcConnector):
            connector.opened(open_pool.label)
        return open_pool


# For the mistake `async with pool as conn:`, which uses the pool as a lease.
explain_absence(ConnectionPool, "a pool is not a connection", dir(PooledConnection))
