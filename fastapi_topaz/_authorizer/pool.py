"""The pool of connections to an authorizer, and what it lends."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi_topaz._authorizer.calls import AuthorizerCalls
from fastapi_topaz._authorizer.options import AuthorizerOptions, AuthorizerOptionsLike
from fastapi_topaz._checks import check_seconds, safe_repr
from fastapi_topaz._grpcio.connector import GrpcConnector
from fastapi_topaz._pool.acquire import Acquire, explain_missing_await
from fastapi_topaz._pool.handle import Handle
from fastapi_topaz._pool.pool import Pool
from fastapi_topaz._pool.state.options import PoolOptions, fit_minimum
from fastapi_topaz._redaction import boundary
from fastapi_topaz._rpc.metadata import check_metadata
from fastapi_topaz._rpc.statuses import is_reset
from fastapi_topaz._slips import explain_absence
from fastapi_topaz._telemetry.metrics import PoolMetrics, Source
from fastapi_topaz._telemetry.tracing import propagated
from fastapi_topaz.exceptions import PoolMisuse


if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.metrics import MeterProvider

    from fastapi_topaz._pool.connector import Connector
    from fastapi_topaz._pool.open_pool import OpenPool
    from fastapi_topaz._pool.owner_loop import OwnerLoop
    from fastapi_topaz._pool.state.status import PoolCounters, PoolStatus
    from fastapi_topaz._rpc.metadata import Metadata


__all__ = ["ConnectionPool", "PooledConnection"]


EVER = 10.0 * 365 * 86400
"""Seconds. gRPC overflows on deadlines far beyond this, and ends the call at once."""


class PooledConnection(AuthorizerCalls, Handle):
    """
    A connection on loan from a pool, with the calls of the authorizer.

    Each `acquire()` gives a new one, also where it lends the same connection again:
    after its release every use of it raises `PoolMisuse`.
    Identity, metadata and timeout travel with each call and leave nothing behind.
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
        metadata: Metadata = (),
    ) -> Any:
        """
        Make one unary-unary call of any gRPC service the connection reaches.

        Args:
            method: The full name, as `/package.Service/Method`.
            request: The message, or bytes without a serializer.
            request_serializer: Makes bytes of the request.
            response_deserializer: Makes the response from bytes.
            timeout: Seconds until the call fails with DEADLINE_EXCEEDED; None for
                no limit.
            metadata: Pairs of str, sent besides those of the authorizer options.

        Raises:
            grpc.aio.AioRpcError: The call ended with another status than OK.
            ConnectionLost: The connection was closed under the call.
            PoolMisuse: The lease was released before.
            TypeError: The pool's connector makes connections without gRPC calls.
        """
        if not isinstance(method, str):
            raise TypeError(
                "method must be a str such as '/package.Service/Method', got "
                f"{method!r}"
            )
        check_metadata(metadata)
        data = request if request_serializer is None else request_serializer(request)
        if not isinstance(data, bytes):
            raise TypeError(
                "request must be bytes, or request_serializer must make bytes of it, "
                f"got {type(data).__name__}"
            )
        response = await self._send(method, data, timeout, metadata)
        return response_deserializer(response) if response_deserializer else response

    async def _send(
        self, method: str, request: bytes, timeout: float | None, metadata: Metadata
    ) -> bytes:
        # The usual case first; what each call does costs more than it seems, because by
        # the next one it has left the processor's caches.
        if type(timeout) is not float or not 0 < timeout < EVER:
            timeout = _limit(timeout)
        connection = self.connection
        # Not isinstance(): for a runtime protocol it costs more than the lease.
        rpc = getattr(connection, "call", None)
        if rpc is None:
            raise TypeError(
                f"{connection!r} carries no gRPC calls: use the object itself, which "
                "is the attribute `connection`"
            )
        assert self._claim is not None  # noqa: S101  (connection would have raised)
        slot = self._claim.slot
        assert slot is not None  # noqa: S101
        try:
            response: bytes = await rpc(
                method, request, timeout=timeout, metadata=propagated(metadata)
            )
        except Exception as error:
            self._open_pool.judge(slot, error)
            if is_reset(error):
                self._open_pool.state.failed()  # the connection is well, not the server
            raise
        slot.proven_at = self._open_pool.now()
        slot.answered = True
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

    Building one touches no network, thread, file or event loop, so it may be done at
    import time, before a worker process forks. It opens with `initialize()`,
    `async with pool`, or the first `acquire()`; it belongs to that process and event
    loop until `close()`, and can be opened again after it, also elsewhere. The end of
    any `async with pool` closes it for everybody.

    All times are in seconds.

    Args:
        min_connections: Connections kept once the pool is in use, default 2, or 1 if
            *max_connections* is 1. They are made by `initialize()` with *eager_init*,
            else after the first acquire.
        max_connections: Connections at most, default 10, in this process: four
            workers have four pools.
        acquire_timeout: How long `acquire()` may take, queueing and connecting
            together, default 5. 0 does not wait at all.
        connection_timeout: How long one attempt to connect may take, default 10.
        max_idle_time: Idle for longer than this, a connection is closed, but never
            below *min_connections*. Default 300; 0 keeps them all.
        idle_check_interval: How often that is looked for, default 60; 0 is never, and
            0.001 the least.
        health_check_interval: How often connections that have answered nothing
            since are probed, default 30; 0 is never, and 0.001 the least.
        health_check_timeout: How long the answer may take, default 5. Without one
            the connection is probed again at once, and then closed; one that a failed
            call made suspect is closed the first time.
        eager_init: Whether `initialize()` waits for *min_connections*, default
            False.
        retry_on_failure: Whether a failed attempt is repeated for waiting callers,
            default True.
        max_retries: How many times, with growing pauses, default 3.
        streams_per_connection: Leases a connection serves at once, default 1. gRPC
            calls share a connection well: 50, half of the limit that most proxies
            set, makes ten connections carry 500 calls at once.
        max_waiting: Callers that may wait when all is leased, default None, any
            number. One more gets `PoolSaturated` at once.
        max_lifetime: After this time, less up to 10 % at random, a connection is
            replaced, so that load spreads to new servers. Default 3600; 0 is never,
            and 1 the least.
        leak_threshold: Warn of a lease that is held for longer, with the task's name
            and the place, default 0, which is off.
        name: Shown in logs and errors and as the metric attribute `pool`.
        connector: How connections are made; None is gRPC to the authorizer given to
            `configure()`.
        meter_provider: Where metrics go; None is OpenTelemetry's global one.
        semantic_conventions: Whether they go there also under the names that
            OpenTelemetry has for pools of connections, `db.client.connection.*`;
            default False.

    Raises:
        TypeError: A parameter has the wrong type.
        ValueError: A parameter has an impossible value.
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
        name: str | None = None,
        connector: Connector | None = None,
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
            name=name,
        )
        if connector is not None and not callable(getattr(connector, "connect", None)):
            raise TypeError(
                "connector must have a method connect(timeout), got "
                f"{safe_repr(connector)}"
            )
        get_meter = getattr(meter_provider, "get_meter", None)
        if meter_provider is not None and not callable(get_meter):
            raise TypeError(
                "meter_provider must be a MeterProvider, got "
                f"{safe_repr(meter_provider)}"
            )
        if not isinstance(semantic_conventions, bool):
            raise TypeError(
                "semantic_conventions must be True or False, got "
                f"{safe_repr(semantic_conventions)}"
            )

        report = partial(_report, meter_provider, name, semantic_conventions)
        super().__init__(options, connector, report)
        self._authorizer_options: AuthorizerOptions | None = None
        # A connector of the user's own is not replaced by configure().
        self._own_connector = connector is not None

    @property
    def authorizer_options(self) -> AuthorizerOptions | None:
        """Where the authorizer is, if that was configured."""
        return self._authorizer_options

    @boundary
    def configure(self, authorizer_options: AuthorizerOptionsLike) -> None:
        """
        Say where the authorizer is; `TopazConfig` does this.

        A pool with a connector of its own ignores it.

        Args:
            authorizer_options: Those of this package or of `aserto.client`.

        Raises:
            PoolMisuse: The pool is open, to another authorizer.
            TypeError: These are no authorizer options.
        """
        options = AuthorizerOptions.coerce(authorizer_options)
        if self._own_connector:
            return
        if self.authorizer_options == options:
            return
        if self._alive() is not None:
            raise PoolMisuse(f"{self._label()} is open; close() it to configure it")
        self._authorizer_options = options
        self._connector = GrpcConnector(options.target)

    def _start(self, owner: OwnerLoop, connector: Connector) -> OpenPool:
        open_pool = super()._start(owner, connector)
        if isinstance(connector, GrpcConnector):
            connector.opened(open_pool.label)
        return open_pool


# As in `async with pool as conn:`.
explain_absence(ConnectionPool, "a pool is no connection", dir(PooledConnection))
