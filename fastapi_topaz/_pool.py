"""The pool as its users see it; `_runtime` does the work while it is open."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

from fastapi_topaz._entry import Lease
from fastapi_topaz._lease import PooledConnection
from fastapi_topaz._life import PoolLife
from fastapi_topaz._options import (
    AuthorizerOptions,
    AuthorizerOptionsLike,
    PoolOptions,
    fit_minimum,
    seconds,
    shown,
)
from fastapi_topaz._redaction import boundary
from fastapi_topaz._transport import GrpcConnector
from fastapi_topaz.exceptions import PoolError


if TYPE_CHECKING:
    from collections.abc import Generator
    from types import TracebackType

    from opentelemetry.metrics import MeterProvider

    from fastapi_topaz._runtime import Runtime
    from fastapi_topaz._transport import Connector


__all__ = ["ConnectionPool"]


logger = logging.getLogger("fastapi_topaz.pool")


class ConnectionPool(PoolLife):
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
            PoolError: The pool is open, to another authorizer.
            TypeError: These are no authorizer options.
        """
        options = AuthorizerOptions.coerce(authorizer_options)
        if self._own_connector:
            return
        if self.authorizer_options == options:
            return
        if self._alive() is not None:
            raise PoolError(f"{self._label()} is open; close() it to configure it")
        self._connector = GrpcConnector(options)

    def _open(self) -> Runtime:
        runtime = super()._open()
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
            PoolError: It is open in another process or on another event loop.
        """
        if timeout is not None:
            seconds("timeout", timeout)
        return Acquire(self, timeout)

    async def release(self, conn: PooledConnection) -> None:
        """
        Give back what `acquire()` gave. Never waits.

        Raises:
            ValueError: *conn* is not of this pool, or was released before.
        """
        if not isinstance(conn, PooledConnection):
            raise ValueError(  # noqa: TRY004  (a foreign object is a wrong value)
                f"release() takes what acquire() of {self._label()} gave, got {conn!r}"
            )
        if conn._pool is not self:  # noqa: SLF001
            raise ValueError(
                f"{conn!r} belongs to {conn._pool!r} and not to {self!r}"  # noqa: SLF001
            )
        self._release(conn)

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

    def _release(self, conn: PooledConnection) -> None:
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
        runtime.release(lease)

    # -- telling and changing -----------------------------------------------------

    def resize(self, min_connections: int, max_connections: int) -> None:
        """
        Change the limits, also while the pool is open.

        Surplus connections close when they are idle; a lease is never cut short.

        Raises:
            TypeError, ValueError: As the constructor.
            PoolError: The pool is open on another event loop or in another process.
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
            PoolError: The pool is open on another event loop or in another process.
        """
        runtime = self._alive()
        if runtime is not None:
            logger.info(
                "%s: draining: each open connection is replaced (%s)",
                *(runtime.label, runtime.state.status()),
            )
            runtime.state.rotation.drain(runtime.state.open)
            runtime.settle()


class Acquire:
    """
    The result of `pool.acquire()`: to be awaited, or entered with `async with`.

    Strictly private.
    """

    _conn: PooledConnection | None = None
    _entered = False

    def __init__(self, pool: ConnectionPool, timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout

    def __await__(self) -> Generator[Any, Any, PooledConnection]:
        conn = self._pool._acquire_nowait()  # noqa: SLF001
        if conn is None:
            waiting = self._pool._acquire(self._timeout)  # noqa: SLF001
            del self  # this frame is in the traceback of an error
            conn = yield from waiting.__await__()
        return conn

    async def __aenter__(self) -> PooledConnection:
        if self._entered:
            raise PoolError("this acquire() is entered already; call acquire() again")
        # Before the wait, or two tasks could share it, and one lease be lost.
        self._entered = True
        try:
            conn = self._pool._acquire_nowait()  # noqa: SLF001
            if conn is None:
                conn = await self._pool._acquire(self._timeout)  # noqa: SLF001
        except BaseException:
            self._entered = False
            del self  # this frame is in the traceback
            raise
        self._conn = conn
        return conn

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del exc, traceback  # this frame would keep them
        conn, self._conn = self._conn, None
        self._entered = False
        # Who released it inside the block has said so clearly enough.
        if conn is None or conn._lease is None:  # noqa: SLF001
            return
        if exc_type is GeneratorExit:
            # Maybe of a task that is garbage, which is collected at any moment, in the
            # midst of whatever the pool does. The loop has it done in its turn.
            conn._runtime.home.call_soon(partial(self._give_back, conn))  # noqa: SLF001
        else:
            self._pool._release(conn)  # noqa: SLF001

    def _give_back(self, conn: PooledConnection) -> None:
        if conn._lease is not None:  # noqa: SLF001
            self._pool._release(conn)  # noqa: SLF001
