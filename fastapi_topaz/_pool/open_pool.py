"""
One open period of a pool: everything that is bound to its event loop.

Requests change the state here, and `after_change` passes on what follows from a change.
Work that takes time is done for them by the host task of `background`: requests
never connect, probe or close anything.
"""

from __future__ import annotations

import logging
import math
import random
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import anyio

from fastapi_topaz._error_text import safe_text, without_context
from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz._pool.leaks import Leaks
from fastapi_topaz._pool.refusals import Refusals
from fastapi_topaz._pool.state.pool_state import PoolState
from fastapi_topaz.exceptions import PoolClosed


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastapi_topaz._log_limit import LogLimit
    from fastapi_topaz._pool.connector import Connector
    from fastapi_topaz._pool.owner_loop import OwnerLoop
    from fastapi_topaz._pool.state.options import PoolOptions
    from fastapi_topaz._pool.state.slot import Claim, Slot
    from fastapi_topaz._pool.state.status import PoolCounters, PoolObserver


__all__ = ["OpenPool"]


logger = logging.getLogger("fastapi_topaz.pool")

NESTED_FOR = 0.1
"""Seconds. How long a search for nested leases is good for: it takes a millisecond."""

NESTED_MOST = 100
"""Waiting tasks that are searched."""


class OpenPool:
    """
    The pool between one opening and the closing that belongs to it.

    Strictly private.
    """

    # Calls of initialize() under way, and whether one succeeded or a lease was asked
    # for. Until then a cancelled initialize() may close the pool again.
    initializing = 0
    adopted = False
    # The last search for nested leases.
    _nested = (0, 0)
    _nested_at = -math.inf

    def __init__(
        self,
        label: str,
        options: PoolOptions,
        connector: Connector,
        counters: PoolCounters,
        observer: PoolObserver,
        log_limit: LogLimit,
        owner: OwnerLoop,
        count_nested: Callable[[Iterator[object], OpenPool], int],
    ) -> None:
        self.label = label
        # Where it leads, for people and for metrics, but for these not as repr(), which
        # would make a new series of each start.
        self.target = self.series = type(connector).__name__
        try:
            named = getattr(connector, "target", None)
            self.target = str(connector if named is None else named)
            self.series = self.series if named is None else self.target
        except Exception:  # noqa: BLE001  (a connector may raise anything)
            logger.debug("%s: its connector has no readable target", label)
        self.connector = connector
        self.counters = counters
        self.observer = observer
        self.owner = owner
        self.clock = self.owner.clock
        self.now = self.clock.now
        self.perf_counter = self.clock.perf_counter
        self.log_limit = log_limit
        log_limit.clock = self.now
        self.state = PoolState(
            options,
            random.random,
            spreads=getattr(connector, "spreads", False),
            target=self.target,
        )
        self.limiter = anyio.CapacityLimiter(options.capacity)
        # Set: there is something to connect or to close. Replaced by the opener.
        self.work = anyio.Event()
        # Set: an attempt to connect has ended. Replaced each time.
        self.progress = anyio.Event()
        # Set: there are suspects to probe. Replaced by the prober.
        self.suspicion = anyio.Event()
        # Held by the one caller of is_ready() who asks for all others.
        self.readiness = anyio.Lock()
        # Probes so far that were answered with a status of the server.
        self.answered_probes = 0
        # Set once the host has ended and nothing is left.
        self.done = anyio.Event()
        # When the first of those who wait has waited for too long, and the latest
        # deadline of them. Set: the first has moved; replaced by the timekeeper.
        self.alarm = math.inf
        self.earlier = anyio.Event()
        self._latest = 0.0
        # Those who were sent away and have not had their turn yet. Until then each
        # holds a token, but for one that is cancelled in the same moment.
        self._dismissed = 0
        self._count_nested = count_nested
        self._refusals = Refusals(label, self.target, self.state, self.nested_leases)
        self.leaks: Leaks | None = None
        if 0 < options.leak_threshold < math.inf:
            self.leaks = Leaks(label, options.leak_threshold, counters)
        self.attempts: set[anyio.CancelScope] = set()
        # Of the tasks that use a connection, or make one.
        self.coroutines: set[Any] = set()
        self._close_at = math.inf
        self._close_changed = anyio.Event()

    @property
    def options(self) -> PoolOptions:
        """The parameters of the pool, as changed by `resize`."""
        return self.state.options

    def __repr__(self) -> str:
        return f"<OpenPool of {self.label} {self.state.status()}>"

    # -- acquire and release ----------------------------------------------------

    def take(self, claim: Claim) -> bool:
        """Serve *claim* without waiting, if that passes nobody who waits."""
        self.adopted = True
        state = self.state
        # Asked first, because what the limiter raises costs more than all the rest.
        if state.waiting or not state.ready:
            return False
        # As now(), but a backward jump is left to the release: a call costs too much.
        clock = self.clock
        now = clock.source.time() + clock.skew
        claim.held_since = self.perf_counter()
        try:
            self.limiter.acquire_on_behalf_of_nowait(claim)
        except anyio.WouldBlock:
            return False
        taken = state.take(claim, now)
        if not taken:
            self.limiter.release_on_behalf_of(claim)
        if state.unhandled_loss or state.to_probe:
            self.after_change()  # some were unfit
        return taken

    async def wait(self, claim: Claim, timeout: float) -> None:
        """
        Serve *claim* within *timeout* seconds.

        Raises:
            PoolTimeout, PoolSaturated, PoolClosed, ConnectFailed: It was not, and
                holds nothing.
        """
        if timeout <= 0:
            self.state.want_one()
            self.after_change()
            raise self._refusals.timed_out(timeout)
        self._refusals.check_saturation()
        began = self.perf_counter()
        claim.deadline = self.now() + timeout
        served = False
        watched = self._watch(claim.deadline)
        claim.waiter = self.owner.coroutine()
        self.state.enqueue(claim)
        try:
            if watched:
                await self._queue(claim)
            else:
                with self.clock.deadline(claim.deadline):
                    await self._queue(claim)
            # A stream that was handed over beats the deadline, unless the limiter
            # took the token back: it does when both come in one tick of asyncio.
            served = claim.has_token and claim.slot is not None
        finally:
            claim.waiter = None
            if not served:
                self._withdraw(claim)
        if served:
            claim.held_since = self.perf_counter()
            claim.waited = claim.held_since - began
        elif claim.failure is not None:
            raise self._refusals.failed(claim.failure)
        else:
            raise self._refusals.timed_out(timeout)

    async def _queue(self, claim: Claim) -> None:
        """Return when *claim* has a stream, or will not get one."""
        await self.limiter.acquire_on_behalf_of(claim)
        claim.has_token = True
        if claim.slot is None and not claim.dismissed:
            self.after_change()
        if claim.slot is None and not claim.dismissed:
            event = anyio.Event()
            claim.wake = event.set
            await event.wait()

    def discard(self, claim: Claim) -> None:
        """Have the connection of *claim* closed once all its leases are back."""
        if claim.slot is not None:  # pragma: no branch
            self.state.retire(claim.slot, "discarded")

    def release(self, claim: Claim) -> None:
        """Take back what *claim* holds, and serve the next one with it."""
        state = self.state
        # As now(), without a call in the usual case.
        clock = self.clock
        now = clock.source.time() + clock.skew
        if now < clock.last:
            now = clock.now()
        clock.last = now
        state.give_back(claim, now)
        self.limiter.release_on_behalf_of(claim)
        unserved = state.waiting and self._serve(now)
        if unserved or state.to_close or state.to_probe or state.shut:
            self.after_change()
        held = self.perf_counter() - claim.held_since
        self.observer.released(held)
        if self.leaks is not None:
            self.leaks.returned(claim, held)

    def _serve(self, now: float) -> bool:
        """Serve those who may be, and say whether a connection is missing to others."""
        tokens = self.tokens()
        for claim in self.state.serve(tokens, now):
            if claim.wake is not None:
                claim.wake()
        return self.state.in_use < tokens

    def tokens(self) -> int:
        """Return how many are lent to those who have a stream, or may get one."""
        return self.limiter.borrowed_tokens - self._dismissed

    def _withdraw(self, claim: Claim) -> None:
        self.state.withdraw(claim, self.now())
        if claim.dismissed:
            self._dismissed -= 1
        if claim.has_token:
            self.limiter.release_on_behalf_of(claim)
        self.after_change()

    # -- deadlines --------------------------------------------------------------

    # A scope for each who waits would cost more than the rest of the waiting. They are
    # served in order and mostly share one timeout, so the first to come is the first
    # whose time is over, and one task can look after all of them.

    def _watch(self, deadline: float) -> bool:
        """Say whether *deadline* can be watched; one before that of others can not."""
        if self.state.waiting and deadline < self._latest:
            return False
        self._latest = deadline
        if deadline < self.alarm:
            self.alarm = deadline
            self.earlier.set()
        return True

    def expire(self) -> None:
        """Send those away whose time is over, and set the alarm for the next."""
        now, waiting = self.now(), self.state.waiting
        if waiting and next(iter(waiting)).deadline <= now:
            self.nested_leases()  # while these tasks are suspended, and can be searched
        self._send_away(self.state.dismiss(now))
        self.alarm = next(iter(waiting)).deadline if waiting else math.inf

    def nested_leases(self) -> tuple[int, int]:
        """
        Count the leases that are held by tasks that wait for another one, and all.

        The first is a lower bound, and 0 if it is less than half. Both are up to
        `NESTED_FOR` seconds old, because the search takes a while.
        """
        now = self.now()
        if self.state.in_use >= self.options.capacity:
            if now - self._nested_at >= NESTED_FOR:
                waiting = islice(self.state.waiting, NESTED_MOST)
                coroutines = (claim.waiter for claim in waiting)
                held = self._count_nested(coroutines, self)
                # A few are no cause: a pool that is too small has some of them, too.
                self._nested = (
                    held if 2 * held >= self.state.in_use else 0,
                    self.state.in_use,
                )
                self._nested_at = now
        elif now - self._nested_at >= NESTED_FOR:
            return 0, 0
        return self._nested

    def _dismiss(self, failure: Exception) -> None:
        """Send everybody who waits away with *failure*, at once."""
        self._send_away(self.state.fail_waiting(failure))

    def _send_away(self, dismissed: list[Claim]) -> None:
        """Wake those of *dismissed* who sleep, each for itself or in the limiter."""
        # The first of all who wait hold a token; they are awake, or woken here. If one
        # is just about to leave by itself, somebody else gets a token too early, and
        # keeps it: a stream it gets in its turn all the same.
        asleep = len(dismissed) - (self.tokens() - self.state.in_use)
        self._dismissed += len(dismissed)
        for claim in dismissed:
            if claim.wake is not None:
                claim.wake()
        if asleep > 0:
            # They are lent a token for a moment, and nobody else is: they give it back
            # at once. This is how the limiter's public interface lets them go.
            total = self.limiter.total_tokens
            self.limiter.total_tokens = self.limiter.borrowed_tokens + asleep
            self.limiter.total_tokens = total

    def verdict(self, connection: object, error: Exception) -> Verdict | None:
        """Return what *connection* says that *error* means for it."""
        try:
            judge = getattr(connection, "judge", None)
            verdict: Verdict | None = None if judge is None else judge(error)
        except Exception as failure:  # noqa: BLE001  (anybody's error)
            self.log_limit.report(
                logging.WARNING,
                f"judge() failed: {type(failure).__name__}",
                "%s: judge() of a connection failed",
                self.label,
                exc_info=without_context(failure),
            )
            return None
        return verdict

    def judge(self, slot: Slot, error: Exception) -> None:
        """Draw the consequences of *error*, raised by a call on *slot*."""
        verdict = self.verdict(slot.connection, error)
        if verdict is None:
            return
        slot.last_error = safe_text(error)
        now = self.now()
        match verdict:
            case Verdict.ANSWERED:
                slot.proven_at = now
                slot.answered = True
                return
            case Verdict.REFUSED:
                self.state.refused(slot, now)
            case Verdict.UNAVAILABLE:
                self.state.unavailable(slot, now)
            case Verdict.BROKEN:
                self.state.broke(slot, now)
            case Verdict.SILENT:
                self.state.timed_out(slot, now)
        self.after_change()

    def after_change(self) -> None:
        """Pass on what follows from a change of the state."""
        state = self.state
        now = self.now()
        state.retire_expired()
        self._serve(now)
        state.unhandled_loss = False
        if state.unanswered_ends:
            self._count_unanswered()
        if state.to_probe or state.outage.refused:
            self.suspicion.set()
        if (
            state.to_close
            or state.shortfall(self.tokens(), now)
            # The opener has more to look out for than it did when it went to sleep.
            or state.next_attempt() > now
            or (state.waiting and state.connecting)
        ):
            self.work.set()
        if state.shut and not state.in_use:
            self._close_changed.set()

    def _count_unanswered(self) -> None:
        """Count and log the connections that ended before they answered anything."""
        ended, self.state.unanswered_ends = self.state.unanswered_ends, []
        for _ in ended:
            self.counters.count(self.counters.connect_failures, "unanswered")
        # The first in a row; what follows is the same event. A failed health check has
        # logged its own.
        is_news = self.state.first_unanswered and any(
            slot.retired == "lost" for slot in ended
        )
        self.state.first_unanswered = False
        self.log_limit.report(
            logging.WARNING if is_news else logging.DEBUG,
            "unanswered",
            "%s: %s (%s)",
            *(self.label, self.state.attempts.error, self.state.status()),
        )

    # -- life ---------------------------------------------------------------------

    async def warm_up(self) -> None:
        """Wait for `min_connections`, or until it is clear that none will come."""
        state = self.state
        state.keeps_minimum = True
        self.after_change()
        with self.clock.deadline(self.now() + self.options.connection_timeout):
            while not state.shut and not state.outage.declared:
                refused = len(state.outage.refused)
                if len(state.open) - refused >= self.options.min_connections:
                    break
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

    # -- connections --------------------------------------------------------------

    def connections_changed(self) -> None:
        """Pass on that there is one more connection, or one less to hope for."""
        self.progress.set()
        self.progress = anyio.Event()
        self.dismiss_hopeless()
        self.after_change()
        # Also without anything to do now: the opener has a backoff to wait out.
        self.work.set()

    @contextmanager
    def busy_task(self) -> Iterator[None]:
        """Remember the running task as one that uses a connection, or makes one."""
        coroutine = self.owner.coroutine()
        self.coroutines.add(coroutine)
        try:
            yield
        finally:
            self.coroutines.discard(coroutine)

    def dismiss_hopeless(self) -> None:
        """Send those away who wait for what only the end of an outage can bring."""
        error = self.state.attempts.error
        if error is not None and self.state.hopeless(self.now()):
            self._dismiss(error)

    def dismiss_refused(self) -> None:
        """Send all callers away if every connection is refused in an outage."""
        error = self.state.outage.error
        if error is not None and self.state.is_refused:
            self._dismiss(error)

    # -- closing ------------------------------------------------------------------

    def begin_close(self, grace: float) -> None:
        """Refuse and dismiss everybody; leases have *grace* seconds left."""
        self._close_at = min(self._close_at, self.now() + grace)
        if not self.state.shut:
            logger.info(
                "%s: closing, with %g s of grace (%s)",
                *(self.label, grace, self.state.status()),
            )
            self.state.shut_down()
            self._dismiss(PoolClosed(f"{self.label} was closed while waiting"))
            for scope in self.attempts:
                scope.cancel()
            self.after_change()
        self._close_changed.set()

    async def until_closed(self) -> None:
        """Return when the pool is to close, and its leases are back or out of time."""
        while not self.state.shut or (
            self.state.in_use and self._close_at > self.now()
        ):
            self._close_changed = anyio.Event()
            with self.clock.deadline(self._close_at):
                await self._close_changed.wait()
