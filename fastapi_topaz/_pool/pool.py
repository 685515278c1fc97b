"""The pool as its users see it; `open_pool` does the work while it is open."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast

import anyio
import attrs

from fastapi_topaz._checks import seconds, shown
from fastapi_topaz._fork import current as process
from fastapi_topaz._log_limit import LogLimit
from fastapi_topaz._pool.acquire import Acquire
from fastapi_topaz._pool.background import close_now, host
from fastapi_topaz._pool.connections import CLOSE_LIMIT
from fastapi_topaz._pool.handle import Handle
from fastapi_topaz._pool.interrupts import protected
from fastapi_topaz._pool.nesting import count_nested
from fastapi_topaz._pool.open_pool import Runtime
from fastapi_topaz._pool.owner_loop import Home
from fastapi_topaz._pool.state.entry import Lease
from fastapi_topaz._pool.state.snapshot import connection_statuses
from fastapi_topaz._pool.state.status import ConnectionStatus, PoolCounters, PoolStatus
from fastapi_topaz._redaction import boundary
from fastapi_topaz._slips import LEASE_FORM, NotAsync, NotCopied
from fastapi_topaz.exceptions import PoolClosed, PoolMisuse


if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from fastapi_topaz._pool.connector import Connector
    from fastapi_topaz._pool.state.options import PoolOptions
    from fastapi_topaz._pool.state.status import PoolReport


__all__ = ["Pool"]


logger = logging.getLogger("fastapi_topaz.pool")

H = TypeVar("H", bound=Handle)


class Pool(NotAsync, NotCopied, Generic[H]):
    """
    A pool of connections of any kind, whose leases are handles of class *H*.

    Strictly private; `ConnectionPool` is the public one.
    """

    _right_form = "write `async with pool:`"
    _copy_form = (
        "its connections belong to one process and one event loop; share the pool, or "
        "build another one"
    )
    # The classes of leases, and of what acquire() returns.
    _handle: type[Handle] = Handle
    _acquiring: type[Acquire[Any]] = Acquire
    _unconfigured = "has no connector"

    def __init__(
        self,
        options: PoolOptions,
        connector: Connector | None,
        report: Callable[[Callable[[], PoolStatus], PoolCounters], PoolReport],
    ) -> None:
        self._options = options
        self._connector = connector
        self._counters = PoolCounters()
        # Outlives each opening: a pool that fails may be opened again by each request.
        self._log_limit = LogLimit(logger, self._label())
        self._metrics = report(self.status, self._counters)
        self._runtime: Runtime | None = None
        # The loop that opens the pool at this moment, by process.
        self._claim: dict[int, Home] = {}
        self._closed = False

    def __repr__(self) -> str:
        name = f" {self._options.name!r}" if self._options.name else ""
        return f"<{type(self).__name__}{name} {self._phase()} {self.status()}>"

    @property
    def options(self) -> PoolOptions:
        """The parameters it was built with, as changed by `resize()`."""
        return self._options

    # -- leases -----------------------------------------------------------------

    def acquire(self, *, timeout: float | None = None) -> Acquire[H]:
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
        return self._acquiring(self, timeout)

    async def release(self, conn: H, *, discard: bool = False) -> None:
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
        if not isinstance(conn, Handle):
            raise ValueError(  # noqa: TRY004  (a foreign object is a wrong value)
                f"release() takes what acquire() of {self._label()} gave, got {conn!r}"
            )
        if conn._pool is not self:  # noqa: SLF001
            raise ValueError(
                f"{conn!r} belongs to {conn._pool!r} and not to {self!r}"  # noqa: SLF001
            )
        self._release(conn, discard=discard)

    def _acquire_nowait(self) -> H | None:
        """Lease what is free, if there is anything; None leaves it to `_acquire`."""
        runtime = self._runtime
        if runtime is None or runtime.state.shut or not runtime.home.is_here():
            return None
        lease = Lease()
        return self._lend(runtime, lease) if runtime.take(lease) else None

    def _lend(self, runtime: Any, lease: Lease) -> H:
        return cast("H", self._handle(self, runtime, lease))

    @boundary
    async def _acquire(self, timeout: float | None) -> H:
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
        return self._lend(runtime, lease)

    @protected
    def _release(self, conn: H, *, discard: bool = False) -> None:
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

    # -- opening and closing ----------------------------------------------------

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

    # -- telling and changing ---------------------------------------------------

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
        return connection_statuses(runtime.state.open, runtime.clock.peek())

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

    # -- what an open pool needs ------------------------------------------------

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
            count_nested,
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
            raise PoolMisuse(f"{self._label()} {self._unconfigured}")
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
