"""The pool as its users see it; `_runtime` does the work while it is open."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import attrs

from fastapi_topaz._authorizer.options import (
    AuthorizerOptions,
    AuthorizerOptionsLike,
    PoolOptions,
    fit_minimum,
    seconds,
    shown,
)
from fastapi_topaz._grpcio.connector import GrpcConnector
from fastapi_topaz._pool.acquire import Acquire
from fastapi_topaz._pool.handle import PooledConnection
from fastapi_topaz._pool.interrupts import protected
from fastapi_topaz._pool.life import PoolLife
from fastapi_topaz._pool.state.entry import Lease
from fastapi_topaz._redaction import boundary
from fastapi_topaz._slips import LEASE_FORM, NotAsync, NotCopied
from fastapi_topaz.exceptions import PoolMisuse


if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider

    from fastapi_topaz._pool.connector import Connector
    from fastapi_topaz._pool.open_pool import Runtime
    from fastapi_topaz._pool.owner_loop import Home


__all__ = ["ConnectionPool"]


logger = logging.getLogger("fastapi_topaz.pool")


class ConnectionPool(PoolLife, NotAsync, NotCopied):
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
        retry_on_failure: Whether a failed attempt is repeated for those who wait,
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

    _right_form = "write `async with pool:`"
    _copy_form = (
        "its connections belong to one process and one event loop; share the pool, or "
        "build another one"
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
                f"connector must have a method connect(timeout), got {shown(connector)}"
            )
        get_meter = getattr(meter_provider, "get_meter", None)
        if meter_provider is not None and not callable(get_meter):
            raise TypeError(
                f"meter_provider must be a MeterProvider, got {shown(meter_provider)}"
            )
        if not isinstance(semantic_conventions, bool):
            raise TypeError(
                "semantic_conventions must be True or False, got "
                f"{shown(semantic_conventions)}"
            )
        super().__init__(
            options,
            connector,
            meter_provider,
            semantic_conventions=semantic_conventions,
        )
        # A connector of the user's own is not replaced by configure().
        self._own_connector = connector is not None

    def __repr__(self) -> str:
        name = f" {self._options.name!r}" if self._options.name else ""
        return f"<ConnectionPool{name} {self._phase()} {self.status()}>"

    @property
    def options(self) -> PoolOptions:
        """The parameters it was built with, as changed by `resize()`."""
        return self._options

    @property
    def authorizer_options(self) -> AuthorizerOptions | None:
        """Where the authorizer is, if that was configured."""
        connector = self._connector
        return connector.options if isinstance(connector, GrpcConnector) else None

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
        self._connector = GrpcConnector(options)

    def _start(self, home: Home, connector: Connector) -> Runtime:
        runtime = super()._start(home, connector)
        if isinstance(self._connector, GrpcConnector):
            self._connector.opened(runtime.label)
        return runtime

    # -- leases -----------------------------------------------------------------

    def acquire(self, *, timeout: float | None = None) -> Acquire:
        """
        Lease a connection: `async with pool.acquire() as conn`, or `await` it.

        An awaited one goes back with `release()`. Callers are served in the order
        they came. A free connection is given without waiting, and without a
        checkpoint.

        Args:
            timeout: Seconds, instead of `acquire_timeout`; 0 does not wait.

        Raises:
            PoolTimeout: None became available in time.
            PoolSaturated: `max_waiting` callers wait already.
            ConnectFailed: None is open, and the attempts to connect failed.
            PoolClosed: The pool is closed, or was while waiting.
            PoolMisuse: It is open in another process or on another event loop, or does
                not know its authorizer.
        """
        if timeout is not None:
            seconds("timeout", timeout)
        return Acquire(self, timeout)

    async def release(self, conn: PooledConnection, *, discard: bool = False) -> None:
        """
        Give back what `acquire()` gave. Never waits.

        Args:
            conn: The lease.
            discard: Whether the pool closes the connection: after the last of its
                leases is back, and without another lease until then. Default False.
                For an application that knows that the connection is of no more use.

        Raises:
            TypeError: *discard* is no bool.
            ValueError: *conn* is not of this pool, or was released before.
        """
        if not isinstance(discard, bool):
            raise TypeError(f"discard must be True or False, got {shown(discard)}")
        if isinstance(conn, Acquire):
            raise ValueError(  # noqa: TRY004  (as below)
                "release() takes what `await pool.acquire()` returned, and not "
                f"pool.acquire() itself: {LEASE_FORM}"
            )
        if not isinstance(conn, PooledConnection):
            raise ValueError(  # noqa: TRY004  (a foreign object is a wrong value)
                f"release() takes what acquire() of {self._label()} gave, got {conn!r}"
            )
        if conn._pool is not self:  # noqa: SLF001
            raise ValueError(
                f"{conn!r} belongs to {conn._pool!r} and not to {self!r}"  # noqa: SLF001
            )
        self._release(conn, discard=discard)

    def _acquire_nowait(self) -> PooledConnection | None:
        """Lease what is free, if there is anything; None leaves it to `_acquire`."""
        runtime = self._runtime
        if runtime is None or runtime.state.shut or not runtime.home.is_here():
            return None
        lease = Lease()
        return PooledConnection(self, runtime, lease) if runtime.take(lease) else None

    @boundary
    async def _acquire(self, timeout: float | None) -> PooledConnection:
        runtime = self._runtime
        if runtime is None or not runtime.home.is_here():
            runtime = self._first_use()
        while runtime.state.shut:
            if self._closed:
                raise self._refused()
            # Nobody closed it: a cancelled initialize() takes back its opening.
            try:
                await runtime.done.wait()
            except BaseException:
                self._counters.cancelled += 1
                raise
            runtime = self._first_use()
        lease = Lease()
        if not runtime.take(lease):  # pragma: no branch  (nothing was free just now)
            await runtime.wait(
                lease, self._options.acquire_timeout if timeout is None else timeout
            )
        return PooledConnection(self, runtime, lease)

    @protected
    def _release(self, conn: PooledConnection, *, discard: bool = False) -> None:
        lease = conn._lease  # noqa: SLF001
        if lease is None:
            raise ValueError(f"{conn!r} was released to {self._label()} before")
        runtime = conn._runtime  # noqa: SLF001
        if runtime is not self._runtime or not runtime.home.is_near():
            if runtime is not self._runtime or runtime.home.is_gone():
                # The pool was closed since, and nothing is left to be given back.
                conn._lease = None  # noqa: SLF001
                return
            runtime.home.check(self._label())
        conn._lease = None  # noqa: SLF001
        if discard:
            runtime.discard(lease)
        runtime.release(lease)

    # -- telling and changing -----------------------------------------------------

    def resize(self, min_connections: int, max_connections: int) -> None:
        """
        Change the limits, also while the pool is open.

        Surplus connections close when they are idle; a lease is never cut short.

        Raises:
            TypeError, ValueError: As the constructor.
            PoolMisuse: The pool is open on another event loop or in another process.
        """
        options = attrs.evolve(
            self._options,
            min_connections=min_connections,
            max_connections=max_connections,
        )
        runtime = self._alive()
        self._options = options
        if runtime is not None:
            before = runtime.state.status()
            runtime.resize(options)
            logger.info(
                "%s: resized to min_connections=%d, max_connections=%d (%s -> %s)",
                *(runtime.label, min_connections, max_connections),
                *(before, runtime.state.status()),
            )

    def drain(self) -> None:
        """
        Replace every open connection, one after the other.

        Where there is room a new one is made before the old one goes; leases end on
        the connection they have. For a rotated certificate or a moved server.

        Raises:
            PoolMisuse: The pool is open on another event loop or in another process.
        """
        runtime = self._alive()
        if runtime is not None:
            logger.info(
                "%s: draining: each open connection is replaced (%s)",
                *(runtime.label, runtime.state.status()),
            )
            runtime.state.rotation.drain(runtime.state.open)
            runtime.settle()
