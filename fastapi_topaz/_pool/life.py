"""How a pool opens and closes, and tells where it is in its life."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Self

import anyio

from fastapi_topaz._authorizer.options import seconds
from fastapi_topaz._fork import current as process
from fastapi_topaz._log_limit import LogLimit
from fastapi_topaz._pool.background import close_now, host
from fastapi_topaz._pool.connections import CLOSE_LIMIT
from fastapi_topaz._pool.open_pool import Runtime
from fastapi_topaz._pool.owner_loop import Home
from fastapi_topaz._pool.state.snapshot import connection_statuses
from fastapi_topaz._pool.status import ConnectionStatus, PoolCounters, PoolStatus
from fastapi_topaz._redaction import boundary
from fastapi_topaz._telemetry.metrics import PoolMetrics, Source
from fastapi_topaz.exceptions import PoolClosed, PoolMisuse


if TYPE_CHECKING:
    from types import TracebackType

    from opentelemetry.metrics import MeterProvider

    from fastapi_topaz._authorizer.options import PoolOptions
    from fastapi_topaz._pool.connector import Connector


__all__ = ["PoolLife"]


logger = logging.getLogger("fastapi_topaz.pool")


class PoolLife:
    """
    The part of a pool that is there before it opens and after it closed.

    Strictly private. Each opening has a `Runtime` of its own, which belongs to one
    event loop; what is not in it belongs to none.
    """

    def __init__(
        self,
        options: PoolOptions,
        connector: Connector | None,
        meter_provider: MeterProvider | None,
        *,
        semantic_conventions: bool,
    ) -> None:
        self._options = options
        self._connector = connector
        self._counters = PoolCounters()
        # Outlives each opening: a pool that fails may be opened again by each request.
        self._log_limit = LogLimit(logger, self._label())
        self._metrics = PoolMetrics(
            meter_provider,
            options.name,
            Source(self.status, self._counters),
            semantic_conventions=semantic_conventions,
        )
        self._runtime: Runtime | None = None
        # The loop that opens the pool at this moment, by process.
        self._claim: dict[int, Home] = {}
        self._closed = False

    def status(self) -> PoolStatus:
        """Return a snapshot of the pool; never raises, open or not."""
        runtime = self._runtime
        forked = runtime is not None and runtime.home.is_forked()
        if runtime is not None and not forked and not runtime.home.is_gone():
            return runtime.state.status()
        options = self._options
        return PoolStatus(
            total=0,
            idle=0,
            busy=0,
            healthy_connections=0,
            max_connections=options.max_connections,
            min_connections=options.min_connections,
            streams_max=options.capacity,
            # No call will be answered in a process that was forked while it was open.
            failing=forked,
        )

    def connections(self) -> tuple[ConnectionStatus, ...]:
        """
        Return a snapshot of each open connection, the oldest first; never raises.

        For people and incidents: where it leads, how old it is, what it carries, and
        what went wrong on it last.
        """
        runtime = self._runtime
        if runtime is None or runtime.home.is_forked() or runtime.home.is_gone():
            return ()
        return connection_statuses(runtime.state, runtime.clock.peek())

    @boundary
    async def initialize(self) -> None:
        """
        Open the pool; harmless if it is open.

        With `eager_init` it returns once `min_connections` are there. If none comes
        within `connection_timeout` seconds it logs a WARNING with the cause and
        returns as well: the pool goes on trying, and an application may start
        before its authorizer.

        Raises:
            PoolMisuse: The pool is open on another event loop or in another process,
                or was not configured.
            ValueError: What no retry can mend, such as a missing certificate file.
        """
        runtime = self._alive()
        while runtime is not None and runtime.state.shut:
            await runtime.done.wait()
            runtime = self._alive()
        if runtime is None:
            runtime = self._open(validate=True)
        if not self._options.eager_init:
            return
        runtime.initializing += 1
        try:
            await runtime.warm_up()
            runtime.adopted = True
        finally:
            runtime.initializing -= 1
            # Cancelled: as if it had never come, unless somebody else came, too.
            if not runtime.adopted and not runtime.initializing:
                runtime.begin_close(0)

    @boundary
    async def close(self, grace: float = 5.0) -> None:
        """
        Close the pool; harmless if it is closed.

        Waiting callers get `PoolClosed` at once. Leases have *grace* seconds to come
        back, then their connections close under them and their calls end with
        `ConnectionLost`. After it returns no task, thread, timer or socket is left.

        Cancelling it gives up the grace, not the closing.

        Args:
            grace: Seconds, default 5.

        Raises:
            PoolMisuse: The pool is open on another event loop or in another process.
        """
        grace = seconds("grace", grace)
        runtime = self._alive()
        self._closed = True
        if runtime is None:
            return
        runtime.begin_close(grace)
        try:
            await runtime.done.wait()
        except BaseException:
            runtime.begin_close(0)
            with anyio.move_on_after(2 * CLOSE_LIMIT, shield=True):
                await runtime.done.wait()
            raise

    async def __aenter__(self) -> Self:
        await self.initialize()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _alive(self) -> Runtime | None:
        """Return the runtime if the pool is open here, None if it is not open."""
        runtime = self._runtime
        if runtime is None:
            return None
        if runtime.done.is_set() or runtime.home.is_gone():
            # Its loop has ended, and the host with it. Nobody is left to use it.
            self._forget(runtime)
            return None
        runtime.home.check(self._label())
        return runtime

    def _open(self, *, validate: bool = False) -> Runtime:
        """
        Return a new runtime; only one thread can open the pool.

        Raises:
            PoolMisuse: Another thread opens it, or has just opened it.
        """
        home = Home()
        # One step, so the threads need no lock, which a fork might find locked.
        claim = self._claim.setdefault(process.pid, home)
        if claim is not home:
            claim.check(self._label())
        try:
            runtime = self._alive()
            if runtime is None:
                connector = self._configured()
                check = getattr(connector, "validate", None)
                if validate and check is not None:
                    check()
                runtime = self._start(home, connector)
        finally:
            self._claim.clear()
        return runtime

    def _start(self, home: Home, connector: Connector) -> Runtime:
        runtime = Runtime(
            self._label(),
            self._options,
            connector,
            self._counters,
            self._metrics.observer,
            self._log_limit,
            home,
        )

        async def live() -> None:
            try:
                await host(runtime)
            finally:
                # Here, too: who waits for `done` finds the pool closed.
                self._forget(runtime)

        def loop_closed() -> None:
            if home.is_gone():  # and not destroyed in an orderly way
                close_now(runtime)
                self._forget(runtime)

        home.spawn(live, partial(self._forget, runtime), loop_closed)
        self._runtime = runtime
        self._closed = False
        self._metrics.attach(runtime.series)
        logger.info(
            "%s: opened, to %s (min_connections=%d, max_connections=%d)",
            *(runtime.label, runtime.target),
            *(self._options.min_connections, self._options.max_connections),
        )
        return runtime

    def _forget(self, runtime: Runtime) -> None:
        # If the host never began, nobody else wakes those who wait for it.
        if not runtime.done.is_set() and not runtime.home.is_gone():
            runtime.begin_close(0)
            runtime.done.set()
        if self._runtime is runtime:
            self._runtime = None
            self._metrics.detach()
            if self._closed:
                self._log_limit.flush(everything=True)
            self._log_limit.clock = None  # that of the loop, which may go now
            logger.info("%s: closed", runtime.label)

    def _configured(self) -> Connector:
        if self._connector is None:
            raise PoolMisuse(
                f"{self._label()} does not know its authorizer: pass it to TopazConfig "
                "as connection_pool, or call configure(AuthorizerOptions(...))"
            )
        return self._connector

    def _phase(self) -> str:
        if self._runtime is None:
            return "closed" if self._closed else "new"
        return "closing" if self._runtime.state.shut else "open"

    def _label(self) -> str:
        return f"pool {self._options.name!r}" if self._options.name else "the pool"

    def _first_use(self) -> Runtime:
        if self._closed:
            raise self._refused()
        runtime = self._alive()
        return self._open() if runtime is None else runtime

    def _refused(self) -> PoolClosed:
        self._counters.closed += 1
        return PoolClosed(
            f"{self._label()} is closed ({self.status()}); initialize() opens it again"
        )
