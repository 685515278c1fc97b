"""The public methods of a pool. While the pool is open, `open_pool` does the work."""

from __future__ import annotations

import logging
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import anyio
import attrs

from fastapi_topaz._checks import check_seconds, safe_repr
from fastapi_topaz._fork import current as process
from fastapi_topaz._fork import keep
from fastapi_topaz._log_limit import LogLimit
from fastapi_topaz._pool.acquire import Acquire
from fastapi_topaz._pool.background import close_now, run_pool
from fastapi_topaz._pool.budget import Budget
from fastapi_topaz._pool.connections import CLOSE_LIMIT
from fastapi_topaz._pool.events import Events
from fastapi_topaz._pool.handle import Handle
from fastapi_topaz._pool.interrupts import protected
from fastapi_topaz._pool.nesting import count_nested
from fastapi_topaz._pool.open_pool import OpenPool
from fastapi_topaz._pool.owner_loop import OwnerLoop
from fastapi_topaz._pool.state.slot import Check, Claim
from fastapi_topaz._pool.state.snapshot import connection_statuses
from fastapi_topaz._pool.state.status import ConnectionStatus, PoolCounters, PoolStatus
from fastapi_topaz._redaction import boundary, clear_frames
from fastapi_topaz._slips import LEASE_FORM, NotAsync, NotCopied
from fastapi_topaz.exceptions import PoolClosed, PoolMisuse


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from fastapi_topaz._pool.connector import Connector
    from fastapi_topaz._pool.state.options import PoolOptions
    from fastapi_topaz._pool.state.status import PoolReport


__all__ = ["Pool"]


logger = logging.getLogger("fastapi_topaz.pool")

_new: Callable[[type[Any]], Any] = object.__new__

H = TypeVar("H", bound=Handle)


class Pool(NotAsync, NotCopied, Generic[H]):
    """
    A pool of connections of any kind. Its leases are handles of class *H*.

    Strictly private; `ConnectionPool` is the public class.
    """

    _right_form = "write `async with pool:`"
    _copy_form = (
        "its connections belong to one process and one event loop; share the pool, or "
        "build another one"
    )
    # The class of the leases, and the class of the result of acquire().
    _handle: Any = Handle
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
        # On the instance too: there Python 3.11 finds them several times faster.
        self._handle, self._acquiring = self._handle, self._acquiring
        self._counters = PoolCounters()
        self._events = Events()
        # One limit for all openings: if the host task fails, the next request opens the
        # pool again. With a limit for each opening, every request could log.
        self._log_limit = LogLimit(logger, self._label())
        self._metrics = report(self.status, self._counters)
        self._open_pool: OpenPool | None = None
        # Maps the process ID to the event loop that is opening the pool right now. The
        # key is the process, so an entry copied by a fork does not count in the child.
        self._opening_loop: dict[int, OwnerLoop] = {}
        # They run in the host task of each opening.
        self._companions: list[Callable[[], Awaitable[None]]] = []
        self._closed = False

    def __repr__(self) -> str:
        name = f" {self._options.name!r}" if self._options.name else ""
        return f"<{type(self).__name__}{name} {self._phase()} {self.status()}>"

    @property
    def options(self) -> PoolOptions:
        """The parameters of the pool: the constructor's, as changed by `resize()`."""
        return self._options

    # -- leases -----------------------------------------------------------------

    def acquire(
        self, *, timeout: float | None = None, budget: float | None = None
    ) -> Acquire[H]:
        """
        Lease a connection: `async with pool.acquire() as conn`, or `await` it.

        If you `await` it, give the lease back with `release()`. Callers are served in
        the order of their calls. If a connection is free, the caller gets it without a
        wait and without a checkpoint.

        Args:
            timeout: The longest wait in seconds. The default is `acquire_timeout` of
                the pool; 0 does not wait.
            budget: Seconds within which the whole use of the lease must end: the wait
                and the call. With it, the pool treats the lease as a check, and
                refuses it at once if it would probably end too late. None, the
                default: the pool does not refuse it for overload.

        Raises:
            PoolTimeout: No connection became available in time.
            PoolSaturated: `max_waiting` callers wait already, or the *budget* is
                probably too short for the wait and the call.
            ConnectFailed: No connection is open, and the attempts to connect failed.
            PoolClosed: The pool is closed, or was closed during the wait.
            PoolMisuse: The pool is open in another process or on another event loop, or
                it was not configured.
            TypeError, ValueError: *timeout* is not a number of seconds.
        """
        if timeout is not None:
            check_seconds("timeout", timeout)
        acquire = self._acquiring(self, timeout)
        if budget is not None:
            check_seconds("budget", budget, zero=False, infinite=False)
            acquire.budget = Budget(budget)
        return acquire

    async def release(self, conn: H, *, discard: bool = False) -> None:
        """
        Give a lease back to the pool. Never waits.

        Args:
            conn: The lease that `await pool.acquire()` returned.
            discard: If True, the pool closes the connection once all its leases are
                back, and gives no new lease of it. Use it if your application knows
                that the connection is useless. Default False.

        Raises:
            TypeError: *discard* is not a bool.
            ValueError: *conn* is not a lease of this pool, or was released before.
            PoolMisuse: The pool is open in another process or in another thread.
        """
        if discard is not False and discard is not True:
            raise TypeError(f"discard must be True or False, got {safe_repr(discard)}")
        if not isinstance(conn, Handle):
            if isinstance(conn, Acquire):
                raise ValueError(  # noqa: TRY004  (as below)
                    "release() takes what `await pool.acquire()` returned, and not "
                    f"pool.acquire() itself: {LEASE_FORM}"
                )
            raise ValueError(  # noqa: TRY004  (a foreign object is a wrong value)
                f"release() takes what acquire() of {self._label()} gave, got {conn!r}"
            )
        if conn._pool is not self:  # noqa: SLF001
            raise ValueError(
                f"{conn!r} belongs to {conn._pool!r} and not to {self!r}"  # noqa: SLF001
            )
        self._release(conn, discard=discard)

    def _acquire_nowait(self, budget: Budget | None) -> H | None:
        """Lease a free connection; return None if the caller has to use `_acquire`."""
        open_pool = self._open_pool
        if open_pool is None or open_pool.state.waiting:
            return None
        # The code of is_current_loop(), inlined: a call is 2 % of the cost of a lease.
        owner = open_pool.owner
        try:
            if owner.current() is not owner.native or owner.pid != process.pid:
                return None
        except RuntimeError:
            return None
        claim: Any = Claim() if budget is None else _check(budget, open_pool)
        if not open_pool.take(claim):
            return None
        if budget is not None:
            open_pool.overload.checks += 1
            open_pool.overload.begin(claim)
        # As in _acquire(). The code of Handle() is inlined: this runs for almost every
        # lease.
        self._counters.acquisitions += 1
        open_pool.observer.acquired(0.0)
        if open_pool.leaks is not None:
            open_pool.leaks.taken(claim)
        conn: H = _new(self._handle)
        conn._pool, conn._open_pool, conn._claim = self, open_pool, claim  # noqa: SLF001
        return conn

    async def _acquire(self, timeout: float | None, budget: Budget | None) -> H:
        if timeout is None:
            timeout = self._options.acquire_timeout
        claim: Claim | None = None
        try:
            open_pool = self._open_pool
            if open_pool is None or not open_pool.owner.is_current_loop():
                open_pool = self._first_use()
            while open_pool.state.shut:
                if self._closed:
                    raise self._refused()
                # A cancelled initialize() closes the pool that it has just opened.
                await open_pool.done.wait()
                open_pool = self._first_use()
            claim = Claim() if budget is None else _check(budget, open_pool)
            await open_pool.lease(claim, timeout)
        except BaseException as error:
            self._counters.count_refused(error)
            # As `boundary` does it, whose wrapper takes 4 % of the time of a wait.
            del self, budget
            open_pool = claim = None
            clear_frames(error)
            raise
        self._counters.acquisitions += 1
        open_pool.observer.acquired(claim.waited)
        if isinstance(claim, Check):
            open_pool.overload.begin(claim)
        if open_pool.leaks is not None:
            open_pool.leaks.taken(claim)
        handle: H = self._handle(self, open_pool, claim)
        return handle

    @protected
    def _release(self, conn: H, *, discard: bool = False) -> None:
        claim = conn._claim  # noqa: SLF001
        if claim is None:
            raise ValueError(f"{conn!r} was released to {self._label()} before")
        open_pool = conn._open_pool  # noqa: SLF001
        # The thread and not the loop: it is faster, and enough for what never waits.
        owner = open_pool.owner
        if (
            open_pool is not self._open_pool
            or owner.thread != get_ident()
            or owner.pid != process.pid
        ):
            if (
                open_pool is not self._open_pool
                or owner.is_closed()
                or self._is_inherited(open_pool)
            ):
                # The pool was closed after this acquire(), and its connections with it;
                # or the lease belongs to the parent of this process.
                conn._claim = None  # noqa: SLF001
                return
            owner.check(self._label())
        conn._claim = None  # noqa: SLF001
        if discard:
            open_pool.discard(claim)
        open_pool.release(claim)

    # -- opening and closing ----------------------------------------------------

    @boundary
    async def initialize(self) -> None:
        """
        Open the pool. If it is open already, this does nothing.

        With `eager_init` it returns once `min_connections` connections are open. If
        none opens within `connection_timeout` seconds, it logs a WARNING with the cause
        and returns. The pool continues to connect, so an application may start before
        its authorizer.

        Raises:
            PoolMisuse: The pool is open on another event loop or in another process,
                or was not configured.
            ValueError: The configuration has an error that no retry can repair, such as
                a missing certificate file.
        """
        open_pool = self._alive()
        while open_pool is not None and open_pool.state.shut:
            await open_pool.done.wait()
            open_pool = self._alive()
        if open_pool is None:
            open_pool = self._open(validate=True)
        if not self._options.eager_init:
            return
        open_pool.initializing += 1
        try:
            await open_pool.warm_up()
            open_pool.adopted = True
        finally:
            open_pool.initializing -= 1
            # This call was cancelled. It closes the pool that it opened, unless another
            # initialize() runs, or the pool is in use.
            if not open_pool.adopted and not open_pool.initializing:
                open_pool.begin_close(0)

    @boundary
    async def close(self, grace: float = 5.0) -> None:
        """
        Close the pool. If it is closed already, this does nothing.

        Waiting callers get `PoolClosed` at once. Leases have *grace* seconds to come
        back. After that the pool closes their connections, and their calls end with
        `ConnectionLost`. When it returns, no task, thread, timer or socket is left.

        If this call is cancelled, the grace ends at once, and the pool still closes.

        Args:
            grace: Seconds that leases have to come back, default 5.

        Raises:
            PoolMisuse: The pool is open on another event loop or in another process.
            TypeError, ValueError: *grace* is not a number of seconds.
        """
        grace = check_seconds("grace", grace)
        open_pool = self._alive()
        self._closed = True
        if open_pool is None:
            return
        open_pool.begin_close(grace)
        try:
            await open_pool.done.wait()
        except BaseException:
            open_pool.begin_close(0)
            # The shield lets the closing end. The limit is longer than any closing, so
            # it matters only if the host task hangs.
            with anyio.move_on_after(2 * CLOSE_LIMIT, shield=True):
                await open_pool.done.wait()
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

    # -- status and limits ------------------------------------------------------

    def status(self) -> PoolStatus:
        """Return a snapshot of the pool's numbers, open or not. Never raises."""
        open_pool = self._open_pool
        forked = open_pool is not None and open_pool.owner.is_forked()
        if open_pool is not None and not forked and not open_pool.owner.is_closed():
            return open_pool.status()
        options = self._options
        return PoolStatus(
            total=0,
            idle=0,
            busy=0,
            healthy_connections=0,
            max_connections=options.max_connections,
            min_connections=options.min_connections,
            streams_max=options.capacity,
            # If the process was forked while the pool was open, and its connections do
            # not survive that, no call of the child gets an answer.
            failing=forked and not self._is_inherited(open_pool),
        )

    def connections(self) -> tuple[ConnectionStatus, ...]:
        """
        Return a snapshot of each open connection, oldest first. Never raises.

        Use it to look into an incident. It gives the address, the age, the number of
        leases and the last error of each connection.
        """
        open_pool = self._open_pool
        if (
            open_pool is None
            or open_pool.owner.is_forked()
            or open_pool.owner.is_closed()
        ):
            return ()
        return connection_statuses(open_pool.state.open, open_pool.clock.peek())

    def resize(self, min_connections: int, max_connections: int) -> None:
        """
        Change the limits of the pool, open or not.

        The pool closes surplus connections once they are idle. It never ends a lease.

        Args:
            min_connections: The new minimum, as in the constructor.
            max_connections: The new limit, as in the constructor.

        Raises:
            TypeError, ValueError: The constructor does not accept these values.
            PoolMisuse: The pool is open on another event loop or in another process.
        """
        options = attrs.evolve(
            self._options,
            min_connections=min_connections,
            max_connections=max_connections,
        )
        open_pool = self._alive()
        self._options = options
        if open_pool is not None:
            before = open_pool.state.status()
            open_pool.resize(options)
            logger.info(
                "%s: resized to min_connections=%d, max_connections=%d (%s -> %s)",
                *(open_pool.label, min_connections, max_connections),
                *(before, open_pool.state.status()),
            )

    def drain(self) -> None:
        """
        Replace every open connection, one after the other.

        Use it after a change of certificates or of the server's address. If the limit
        leaves room, the pool opens each new connection before it closes the old one.
        Leases keep their connection until they are released.

        Raises:
            PoolMisuse: The pool is open on another event loop or in another process.
        """
        open_pool = self._alive()
        if open_pool is not None:
            logger.info(
                "%s: draining: each open connection is replaced (%s)",
                *(open_pool.label, open_pool.state.status()),
            )
            open_pool.state.rotation.drain(open_pool.state.open)
            open_pool.after_change()

    # -- the open pool ----------------------------------------------------------

    def _accompany(self, companion: Callable[[], Awaitable[None]]) -> None:
        """
        Run *companion* from each opening of the pool to its closing, and now if open.

        If it is known already, this does nothing. It is cancelled at the end of
        `close()`. Thread-safe: a configuration may be made in any thread.
        """
        if companion in self._companions:
            return
        self._companions.append(companion)
        open_pool = self._open_pool
        if open_pool is not None:
            open_pool.owner.call_soon(open_pool.work.set)

    def _alive(self) -> OpenPool | None:
        """
        Return the open pool, or None if the pool is not open.

        Raises:
            PoolMisuse: The pool is open on another event loop or in another process.
        """
        open_pool = self._open_pool
        if open_pool is None:
            return None
        if self._is_inherited(open_pool):
            open_pool.owner.check_new_loop(self._label())
            return None
        if open_pool.done.is_set() or open_pool.owner.is_closed():
            # The event loop has ended, and so has the host task. No task is left that
            # could use this open pool.
            self._forget(open_pool)
            return None
        open_pool.owner.check(self._label())
        return open_pool

    def _open(self, *, validate: bool = False) -> OpenPool:
        """
        Open the pool and return the new open pool; only one thread can do this.

        Raises:
            PoolMisuse: Another thread is opening the pool, or has just opened it.
        """
        owner = OwnerLoop()
        # setdefault() is atomic, so the threads need no lock. A child process that was
        # forked while a lock was held could never take it.
        opener = self._opening_loop.setdefault(process.pid, owner)
        if opener is not owner:
            opener.check(self._label())
        try:
            open_pool = self._alive()
            if open_pool is None:
                connector = self._configured()
                check = getattr(connector, "validate", None)
                if validate and check is not None:
                    check()
                if self._open_pool is not None:
                    self._drop_inherited(self._open_pool)
                open_pool = self._start(owner, connector)
        finally:
            self._opening_loop.clear()
        return open_pool

    def _start(self, owner: OwnerLoop, connector: Connector) -> OpenPool:
        open_pool = OpenPool(
            self._label(),
            self._options,
            connector,
            self._counters,
            self._events,
            self._metrics.observer,
            self._log_limit,
            owner,
            count_nested,
        )

        async def live() -> None:
            try:
                await run_pool(open_pool, self._companions)
            finally:
                # `spawn` calls `_forget` again when the task has ended. That is too
                # late for a task that waits for `done`: it must find the pool closed
                # when it wakes.
                self._forget(open_pool)

        def loop_closed() -> None:
            if owner.is_closed():  # otherwise the timer was cancelled, as after close()
                close_now(open_pool)
                self._forget(open_pool)

        owner.spawn(live, partial(self._forget, open_pool), loop_closed)
        self._open_pool = open_pool
        self._closed = False
        self._metrics.attach(open_pool.series)
        self._events.add("pool opened")
        logger.info(
            "%s: opened, to %s (min_connections=%d, max_connections=%d)",
            *(open_pool.label, open_pool.target),
            *(self._options.min_connections, self._options.max_connections),
        )
        return open_pool

    def _forget(self, open_pool: OpenPool) -> None:
        # If the host task never began, no other code wakes the tasks that wait for
        # `done`.
        if not open_pool.done.is_set() and not open_pool.owner.is_closed():
            open_pool.begin_close(0)
            open_pool.done.set()
        if self._open_pool is open_pool:
            self._open_pool = None
            self._metrics.detach()
            if self._closed:
                self._log_limit.flush(everything=True)
            self._events.add("pool closed")
            self._log_limit.clock = None  # do not keep the loop's clock alive
            logger.info("%s: closed", open_pool.label)

    def _is_inherited(self, open_pool: OpenPool | None) -> bool:
        """Return whether this process was forked, and may open a pool of its own."""
        return (
            open_pool is not None
            and open_pool.owner.is_forked()
            and getattr(open_pool.connector, "survives_fork", False) is True
        )

    def _drop_inherited(self, open_pool: OpenPool) -> None:
        """Forget *open_pool*, which belongs to the parent process, without a change."""
        self._open_pool = None
        keep(open_pool)
        self._counters.reset()
        self._log_limit = LogLimit(logger, self._label())
        logger.info(
            "%s: process %d was forked from %d; it has a pool of its own from now on",
            *(open_pool.label, process.pid, open_pool.owner.pid),
        )

    def _configured(self) -> Connector:
        if self._connector is None:
            raise PoolMisuse(f"{self._label()} {self._unconfigured}")
        return self._connector

    def _phase(self) -> str:
        if self._open_pool is None or self._is_inherited(self._open_pool):
            return "closed" if self._closed else "new"
        return "closing" if self._open_pool.state.shut else "open"

    def _label(self) -> str:
        return f"pool {self._options.name!r}" if self._options.name else "the pool"

    def _first_use(self) -> OpenPool:
        if self._closed:
            raise self._refused()
        open_pool = self._alive()
        return self._open() if open_pool is None else open_pool

    def _refused(self) -> PoolClosed:
        return PoolClosed(
            f"{self._label()} is closed ({self.status()}); initialize() opens it again"
        )


def _check(budget: Budget, open_pool: OpenPool) -> Check:
    """Return the claim of a caller that needs its answer within *budget*."""
    claim = Check()
    claim.budget = budget.seconds
    claim.due = open_pool.now() + budget.left()
    return claim
