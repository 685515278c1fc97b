"""
One open period of a pool: everything that is bound to its event loop.

Requests change the state here, and `settle` passes on what follows from a change.
Work that takes time is done for them by the host task of `_maintenance`: requests
never connect, probe or close anything.
"""

from __future__ import annotations

import logging
import math
import os
import random
import traceback
from typing import TYPE_CHECKING

import anyio

from fastapi_topaz._host import Home
from fastapi_topaz._state import PoolState
from fastapi_topaz._transport import Verdict
from fastapi_topaz.exceptions import (
    ConnectFailed,
    PoolClosed,
    PoolError,
    PoolSaturated,
    PoolTimeout,
)


if TYPE_CHECKING:
    from fastapi_topaz._entry import Lease, PoolEntry
    from fastapi_topaz._options import PoolOptions
    from fastapi_topaz._status import PoolCounters, PoolObserver
    from fastapi_topaz._transport import Connector


__all__ = ["Runtime", "told"]


logger = logging.getLogger("fastapi_topaz.pool")

STACK_DEPTH = 8
"""Frames shown of the place where a leaked lease was taken."""

_PACKAGE = os.path.dirname(__file__) + os.sep  # noqa: PTH120  (a prefix of file names)


def told(error: Exception) -> str:
    """Return what *error* says, without what an authorizer may name in its details."""
    try:
        code = getattr(error, "code", None)
        if callable(code):
            return str(getattr(code(), "name", code()))
        return str(error) or repr(error)
    except Exception:  # noqa: BLE001  (it is anybody's error, and this is for a log)
        return type(error).__name__


class Runtime:
    """
    The pool between one opening and the closing that belongs to it.

    Strictly private.
    """

    def __init__(
        self,
        label: str,
        options: PoolOptions,
        connector: Connector,
        counters: PoolCounters,
        observer: PoolObserver,
    ) -> None:
        self.label = label
        self.target: str = getattr(connector, "target", repr(connector))
        self.connector = connector
        self.counters = counters
        self.observer = observer
        self.home = Home()
        self.now = self.home.now
        self.state = PoolState(
            options, random.random, spreads=getattr(connector, "spreads", False)
        )
        self.limiter = anyio.CapacityLimiter(options.capacity)
        # Set: there is something to connect or to close. Replaced by the opener.
        self.work = anyio.Event()
        # Set: an attempt to connect has ended. Replaced each time.
        self.progress = anyio.Event()
        # Set: there are suspects to probe. Replaced by the prober.
        self.suspicion = anyio.Event()
        # Set once the host has ended and nothing is left.
        self.done = anyio.Event()
        # Leases in the order they were taken, if leaks are looked for.
        self.leases: dict[Lease, None] = {}
        # Calls of initialize() under way, and whether one succeeded or a lease was
        # asked for: until then nobody counts on the pool being open.
        self.initializing = 0
        self.adopted = False
        self.attempts: set[anyio.CancelScope] = set()
        self._close_at = math.inf
        self._close_changed = anyio.Event()

    @property
    def options(self) -> PoolOptions:
        """The parameters of the pool, as changed by `resize`."""
        return self.state.options

    def __repr__(self) -> str:
        return f"<Runtime of {self.label} {self.state!r}>"

    # -- acquire and release ----------------------------------------------------

    def take(self, lease: Lease) -> bool:
        """Serve *lease* without waiting, if that passes nobody who waits."""
        self.adopted = True
        now = lease.acquired_at = self.now()
        try:
            self.limiter.acquire_on_behalf_of_nowait(lease)
        except anyio.WouldBlock:
            return False
        taken = self.state.take(lease, now)
        if not taken:
            self.limiter.release_on_behalf_of(lease)
        if self.state.to_probe or self.state.to_close:
            self.settle()  # some were unfit
        if taken:
            self.counters.acquisitions += 1
            self.observer.acquired(0.0)
        return taken

    async def wait(self, lease: Lease, timeout: float) -> None:
        """
        Serve *lease* within *timeout* seconds.

        Raises:
            PoolTimeout, PoolSaturated, PoolClosed, ConnectFailed: It was not, and
                holds nothing.
        """
        if timeout <= 0:
            self.state.want_one()
            self.settle()
            raise self._timed_out(timeout)
        self._check_saturation()
        began = self.now()
        has_token = served = False
        self.state.enqueue(lease)
        try:
            with anyio.CancelScope(deadline=began + timeout):
                await self.limiter.acquire_on_behalf_of(lease)
                has_token = True
                self.settle()
                if lease.entry is None and lease.failure is None:
                    event = anyio.Event()
                    lease.wake = event.set
                    await event.wait()
            # A stream that was handed over beats the deadline, unless the limiter
            # took the token back: it does when both come in one tick of asyncio.
            served = has_token and lease.entry is not None
        except BaseException:
            self.counters.cancelled += 1
            raise
        finally:
            if not served:
                self._withdraw(lease, has_token=has_token)
        if served:
            self.counters.acquisitions += 1
            lease.acquired_at = self.now()
            self.observer.acquired(lease.acquired_at - began)
        elif lease.failure is not None:
            raise self._failed(lease.failure)
        else:
            raise self._timed_out(timeout)

    def release(self, lease: Lease) -> None:
        """Take back what *lease* holds, and serve the next one with it."""
        self.state.give_back(lease, self.now())
        self.limiter.release_on_behalf_of(lease)
        state = self.state
        if state.waiting or state.to_close or state.shut:
            self.settle()

    def judge(self, entry: PoolEntry, error: Exception) -> None:
        """Draw the consequences of *error*, raised by a call on *entry*."""
        try:
            judge = getattr(entry.connection, "judge", None)
            verdict = None if judge is None else judge(error)
        except Exception:
            logger.warning(
                "%s: judge() of a connection failed", self.label, exc_info=True
            )
            return
        if verdict is None:
            return
        entry.last_error = told(error)
        now = self.now()
        match verdict:
            case Verdict.ANSWERED:
                entry.proven_at = now
                return
            case Verdict.UNAVAILABLE:
                self.state.suspect(entry, now)
            case Verdict.BROKEN:
                self.state.broke(entry, now)
            case Verdict.SILENT:
                self.state.timed_out(entry, now)
        self.settle()

    def settle(self) -> None:
        """Pass on what follows from a change of the state."""
        state = self.state
        now = self.now()
        state.rotate()
        tokens = self.limiter.borrowed_tokens
        for lease in state.serve(tokens, now):
            if lease.wake is not None:
                lease.wake()
        if state.to_probe:
            self.suspicion.set()
        if (
            state.to_close
            or state.shortfall(tokens, now)
            # The opener has more to look out for than it did when it went to sleep.
            or (state.waiting and (state.connecting or state.next_attempt() > now))
        ):
            self.work.set()
        if state.shut and not state.in_use:
            self._close_changed.set()

    def _withdraw(self, lease: Lease, *, has_token: bool) -> None:
        self.state.withdraw(lease, self.now())
        if has_token:
            self.limiter.release_on_behalf_of(lease)
        self.settle()

    def _dismiss(self, failure: Exception) -> None:
        """Send everybody who waits away with *failure*, at once."""
        for lease in self.state.fail_waiting(failure):
            if lease.wake is not None:
                lease.wake()
        # Those in the limiter's queue wake when they get a token; lending each one
        # for a moment is how its public interface lets them go.
        total = self.limiter.total_tokens
        self.limiter.total_tokens = math.inf
        self.limiter.total_tokens = total

    # -- life ---------------------------------------------------------------------

    async def warm_up(self) -> None:
        """Wait for `min_connections`, or until it is clear that none will come."""
        state = self.state
        state.warm = True
        self.settle()
        with anyio.move_on_after(self.options.connection_timeout):
            while len(state.open) < self.options.min_connections and not state.shut:
                if getattr(state.attempts.error, "permanent", False):
                    break
                await self.progress.wait()
        if not state.open and self.options.min_connections and not state.shut:
            logger.warning(
                "%s: no connection to %s at startup; it goes on trying (%s): %s",
                self.label,
                self.target,
                state.status(),
                state.attempts.error or "the first attempt has not ended yet",
            )

    def resize(self, options: PoolOptions) -> None:
        """Work with other limits from now on."""
        self.state.resize(options)
        self.limiter.total_tokens = options.capacity
        self.connections_changed()

    # -- errors -----------------------------------------------------------------

    def _check_saturation(self) -> None:
        allowed = self.options.max_waiting
        if allowed is None or self.limiter.available_tokens > 0:
            return
        # Those who hold a token wait for a connection, not for capacity.
        entitled = self.limiter.borrowed_tokens - self.state.in_use
        if len(self.state.waiting) - entitled >= allowed:
            self.counters.rejected += 1
            raise PoolSaturated(
                f"{self.label} is saturated: max_waiting={allowed} callers wait for "
                f"{self.target} already ({self.state.status()})"
            )

    def _timed_out(self, timeout: float) -> PoolTimeout:
        self.counters.timeouts += 1
        cause = self.state.attempts.error
        if cause is not None:
            hint = f"; the last attempt to connect failed: {cause}"
        elif self.state.in_use >= self.options.capacity:
            hint = (
                f"; all {self.state.in_use} leases are out: raise max_connections or "
                "streams_per_connection, or look for leaks with leak_threshold"
            )
        else:
            hint = ""
        error = PoolTimeout(
            f"{self.label}: no connection to {self.target} became available within "
            f"{timeout:g} s ({self.state.status()}){hint}"
        )
        error.__cause__ = cause
        return error

    def _failed(self, failure: Exception) -> PoolError:
        if isinstance(failure, PoolClosed):
            self.counters.closed += 1
            return PoolClosed(f"{failure} ({self.state.status()})")
        self.counters.failed += 1
        # A new exception for each caller: they would share one traceback.
        error = ConnectFailed(
            f"{self.label}: {failure} ({self.state.status()})",
            reason=getattr(failure, "reason", "other"),
            permanent=getattr(failure, "permanent", False),
        )
        error.__cause__ = failure
        return error

    # -- connections --------------------------------------------------------------

    def connections_changed(self) -> None:
        """Pass on that there is one more connection, or one less to hope for."""
        self.progress.set()
        self.progress = anyio.Event()
        self.dismiss_hopeless()
        self.settle()
        # Also without anything to do now: the opener has a backoff to wait out.
        self.work.set()

    def dismiss_hopeless(self) -> None:
        """Send those away who wait for what only the end of an outage can bring."""
        error = self.state.attempts.error
        if error is not None and self.state.hopeless(self.now()):
            self._dismiss(error)

    # -- closing ------------------------------------------------------------------

    def begin_close(self, grace: float) -> None:
        """Refuse and dismiss everybody; leases have *grace* seconds left."""
        self._close_at = min(self._close_at, self.now() + grace)
        if not self.state.shut:
            self.state.shut_down()
            self._dismiss(PoolClosed(f"{self.label} was closed while waiting"))
            for scope in self.attempts:
                scope.cancel()
            self.settle()
        self._close_changed.set()

    async def until_closed(self) -> None:
        """Return when the pool is to close, and its leases are back or out of time."""
        while not self.state.shut or (
            self.state.in_use and self._close_at > self.now()
        ):
            self._close_changed = anyio.Event()
            with anyio.CancelScope(deadline=self._close_at):
                await self._close_changed.wait()

    # -- leaks --------------------------------------------------------------------

    def remember(self, lease: Lease) -> None:
        """Note who took *lease*, for a warning if it does not come back."""
        task = anyio.get_current_task()
        frames = [
            frame
            for frame in traceback.extract_stack()
            if not frame.filename.startswith(_PACKAGE)
        ]
        stack = "".join(traceback.format_list(frames[-STACK_DEPTH:]))
        lease.holder = f"task {task.name!r}, which took it here:\n{stack}"
        self.leases[lease] = None
