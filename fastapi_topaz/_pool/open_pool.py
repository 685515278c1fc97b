"""
The open pool: everything that lives from one opening of a pool to its closing.

It is bound to one event loop. Requests change the state here, and `after_change` wakes
the tasks that have to act on a change. The host task in `background` does all work that
takes time. So a request never connects, probes or closes anything itself.
"""

from __future__ import annotations

import logging
import math
import random
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import anyio

from fastapi_topaz._error_text import safe_text, without_context
from fastapi_topaz._pool.connector import Verdict, names_of
from fastapi_topaz._pool.leaks import Leaks
from fastapi_topaz._pool.nested_search import NestedSearch
from fastapi_topaz._pool.overload import Overload
from fastapi_topaz._pool.owner_loop import coroutine_of
from fastapi_topaz._pool.refusals import Refusals
from fastapi_topaz._pool.state.pool_state import PoolState
from fastapi_topaz._pool.state.slot import Check
from fastapi_topaz.exceptions import PoolClosed


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from anyio.abc import TaskGroup

    from fastapi_topaz._log_limit import LogLimit
    from fastapi_topaz._pool.connector import Connector
    from fastapi_topaz._pool.events import Events
    from fastapi_topaz._pool.owner_loop import OwnerLoop
    from fastapi_topaz._pool.state.options import PoolOptions
    from fastapi_topaz._pool.state.slot import Claim, Slot
    from fastapi_topaz._pool.state.status import (
        PoolCounters,
        PoolObserver,
        PoolStatus,
    )


__all__ = ["OpenPool"]


logger = logging.getLogger("fastapi_topaz.pool")

NO_SCOPE: AbstractContextManager[object] = nullcontext()
"""In place of the scope of a caller whose deadline the timekeeper watches."""


class OpenPool:
    """A pool from one opening to the closing that follows. Strictly private."""

    # Slots, because beyond 30 attributes an instance loses its fast lookup (3.11).
    __slots__ = (
        "__weakref__",
        *("_admission", "_close_at", "_close_changed", "_latest", "_refusals"),
        *("adopted", "alarm", "answered_probes", "attempts", "clock"),
        *("connector", "coroutines", "counters", "done", "earlier", "events"),
        *(
            "initializing",
            "label",
            "leaks",
            "limiter",
            "log_limit",
            "nested_leases",
            "now",
        ),
        *(
            "observer",
            "overload",
            "owner",
            "progress",
            "readiness",
            "series",
        ),
        *("state", "suspicion", "target", "tasks", "work"),
    )

    def __init__(
        self,
        label: str,
        options: PoolOptions,
        connector: Connector,
        counters: PoolCounters,
        events: Events,
        observer: PoolObserver,
        log_limit: LogLimit,
        owner: OwnerLoop,
        count_nested: Callable[[Iterator[object], OpenPool], int],
    ) -> None:
        self.label = label
        # The calls of initialize() under way.
        self.initializing = 0
        # Set once an initialize() succeeded or another caller used the pool. Before
        # that, a cancelled initialize() closes the pool again.
        self.adopted = False
        self.target, self.series = names_of(connector, label)
        self.connector = connector
        self.counters, self.events = counters, events
        self.observer = observer
        self.owner = owner
        self.clock = self.owner.clock
        self.now = self.clock.now
        self.log_limit = log_limit
        log_limit.clock = self.now
        self.state = PoolState(
            options,
            random.random,
            spreads=getattr(connector, "spreads", False),
            target=self.target,
        )
        self.overload = Overload(label, self.state, counters)
        self._admission = self.overload.admission
        self.limiter = anyio.CapacityLimiter(self.state.limit)
        # Set if there is a connection to open or to close. The opener replaces it.
        self.work = anyio.Event()
        # Set, and replaced at once, by connections_changed(): wakes all its waiters.
        self.progress = anyio.Event()
        # Set if there are connections to probe. The prober replaces it.
        self.suspicion = anyio.Event()
        # Held by the caller of is_ready() that asks the server on behalf of all others.
        self.readiness = anyio.Lock()
        # The number of probes that the server has answered with a status.
        self.answered_probes = 0
        # Set once the host task has ended and has closed everything.
        self.done = anyio.Event()
        # The timekeeper wakes at `alarm`, the next deadline. If that becomes earlier,
        # `earlier` is set. `_latest` is the latest deadline that it watches.
        self.alarm = math.inf
        self.earlier = anyio.Event()
        self._latest = 0.0
        self.nested_leases = NestedSearch(
            lambda tasks: count_nested(map(coroutine_of, tasks), self),
            self.state,
            self.now,
        )
        self._refusals = Refusals(label, self.target, self.state, self.nested_leases)
        self.leaks: Leaks | None = None
        if 0 < options.leak_threshold < math.inf:
            self.leaks = Leaks(label, options.leak_threshold, counters)
        # The task group of the host task, which sets it.
        self.tasks: TaskGroup
        # The scopes of the attempts to connect: begin_close() cancels them.
        self.attempts: set[anyio.CancelScope] = set()
        # The coroutines of the tasks that use or open a connection; see `busy_task`.
        self.coroutines: set[Any] = set()
        self._close_at = math.inf
        self._close_changed = anyio.Event()

    @property
    def options(self) -> PoolOptions:
        """The parameters of the pool, as changed by `resize`."""
        return self.state.options

    def __repr__(self) -> str:
        return f"<OpenPool of {self.label} {self.state.status()}>"

    def status(self) -> PoolStatus:
        """Return a snapshot of the numbers. Thread-safe."""
        return self.state.status(self.overload.estimated_wait(self.clock.peek()))

    # -- acquire and release ----------------------------------------------------

    def take(self, claim: Claim) -> bool:
        """
        Serve *claim* at once, if a slot is ready. No caller may wait already.

        A pool that is closing has no ready slot.
        """
        self.adopted = True
        state = self.state
        # Checked before the limiter, because to raise and catch WouldBlock costs more
        # than the rest of this method.
        if not state.ready or state.in_use >= state.limit:
            return False
        # The code of now(), inlined: the usual case then needs no call of it.
        clock = self.clock
        now = clock.source.time()
        if now < clock.last:
            now = clock.now()
        clock.last = now
        try:
            self.limiter.acquire_on_behalf_of_nowait(claim)
        except anyio.WouldBlock:
            return False
        try:
            taken = state.take_ready(claim, now)
        except BaseException:
            self.limiter.release_on_behalf_of(claim)
            raise
        if not taken:
            self.limiter.release_on_behalf_of(claim)
        if state.unhandled_loss or state.to_probe:
            self.after_change()  # some were unfit
        return taken

    async def lease(self, claim: Claim, timeout: float) -> None:
        """
        Serve *claim*, which found nothing free a moment ago, within *timeout* seconds.

        Raises:
            PoolTimeout, PoolSaturated, PoolClosed, ConnectFailed: The claim was not
                served. It holds no token and no stream.
        """
        overload = self.overload
        if overload.joined(claim):
            self.apply_limit()
        try:
            # Opening the pool, or room beyond the limit, may have changed that.
            if not self.state.waiting and self.take(claim):
                return
            now = self.now()
            watched, served = self._join(claim, timeout, now), False
            try:
                with NO_SCOPE if watched else self.clock.deadline(claim.deadline):
                    await self.limiter.acquire_on_behalf_of(claim)
                    claim.has_token = True
                    # The claim may be served already: once the limiter lends the token,
                    # `_serve` counts it, which may be before this task runs.
                    if claim.slot is None and not claim.dismissed:
                        self.after_change()
                    if claim.slot is None and not claim.dismissed:
                        event = anyio.Event()
                        claim.wake = event.set
                        await event.wait()
                # If a stream came, the caller gets it even after the deadline. If both
                # happen in one tick of asyncio, the limiter takes the token back.
                served = claim.has_token and claim.slot is not None
            finally:
                claim.waiter = None
                if not served:
                    self._withdraw(claim)
            if not served:
                raise self._refusals.not_served(claim, now)
            claim.waited = claim.acquired_at - now
            if isinstance(claim, Check):
                self._admission.served(claim.waited, claim.acquired_at)
        except BaseException:
            overload.left(claim)
            self.limiter.total_tokens = self.state.limit
            raise

    def _join(self, claim: Claim, timeout: float, now: float) -> bool:
        """
        Add *claim* to the queue; return whether its deadline is watched: see `_watch`.

        Raises:
            PoolTimeout, PoolSaturated: It may not wait.
        """
        state = self.state
        if timeout <= 0:
            state.want_one()
            self.after_change()
            raise self._refusals.timed_out(timeout)
        if state.options.max_waiting is not None:
            self._refusals.check_saturation(state.options.max_waiting)
        claim.deadline = now + timeout
        if isinstance(claim, Check):
            self._admit(claim, now)
        if not state.waiting:
            self._admission.queue_begins(now)
        watched = self._watch(claim.deadline)
        claim.waiter = self.owner.task()
        state.enqueue(claim)
        return watched

    def _admit(self, claim: Check, now: float) -> None:
        """Let the check of *claim* wait, but not until its answer would be late."""
        wait = self.overload.admit(claim, now)
        if wait is not None:
            raise self._refusals.overloaded(wait, claim.due - now)
        latest = self._latest if self.state.waiting else 0.0
        start = self.overload.latest_start(claim, latest)
        claim.deadline = min(claim.deadline, start)

    def discard(self, claim: Claim) -> None:
        """Retire the connection of *claim*: it closes once all its leases are back."""
        if claim.slot is not None:  # pragma: no branch
            self.state.retire(claim.slot, "discarded")

    def release(self, claim: Claim) -> None:
        """Take back the stream of *claim*, and serve the next waiting caller."""
        state = self.state
        # As in take().
        clock = self.clock
        now = clock.source.time()
        if now < clock.last:
            now = clock.now()
        clock.last = now
        admission = self._admission
        held = now - claim.acquired_at
        slot = claim.slot
        assert slot is not None  # noqa: S101
        # How long a connection took to break says nothing about the next leases. The
        # slot has an error then. It is asked first, because that takes less time.
        if slot.retired is None and (slot.last_error is None or not claim.cut_off):
            admission.held += held
            admission.ended += 1
        admission.last_end = now
        state.give_back(claim, now)
        # The limiter lends the token to the next caller in its queue at once. So
        # `_serve` comes after this line. Then it counts the token that the next caller
        # has just got.
        self.limiter.release_on_behalf_of(claim)
        if type(claim) is Check:
            if self.overload.end(claim, held, now):
                self.apply_limit()
        elif self.overload.counted and self.overload.shrink():
            self.limiter.total_tokens = state.limit
        if (
            (state.waiting and self._serve(now))
            or state.to_close
            or state.to_probe
            or state.shut
        ):
            self.after_change()
        self.observer.released(held)
        if self.leaks is not None:
            self.leaks.returned(claim, held)

    def apply_limit(self) -> None:
        # If it is raised, the limiter lends tokens to waiting callers at once.
        self.limiter.total_tokens = self.state.limit
        self.after_change()

    def _serve(self, now: float) -> bool:
        """Serve waiting callers; return whether a caller with a token got no stream."""
        tokens = self.limiter.borrowed_tokens - self.state.dismissed
        for claim in self.state.serve(tokens, now):
            if claim.wake is not None:
                claim.wake()
        return self.state.in_use < tokens

    def tokens(self) -> int:
        """Return the number of tokens lent, without those of dismissed callers."""
        return self.limiter.borrowed_tokens - self.state.dismissed

    def _withdraw(self, claim: Claim) -> None:
        self.state.withdraw(claim, self.now())
        if claim.has_token:
            self.limiter.release_on_behalf_of(claim)
        self.after_change()

    # -- deadlines --------------------------------------------------------------

    # A cancel scope for each waiting caller would cost more than the rest of its wait.
    # Callers are served in order and mostly share one timeout. So the first in the
    # queue is also the first to time out, and one task can watch all deadlines.

    def _watch(self, deadline: float) -> bool:
        """
        Have the timekeeper watch *deadline*, and return True.

        If a caller that waits already has a later deadline, return False: then the
        queue is not in the order of deadlines, and the new caller needs its own scope.
        """
        if self.state.waiting and deadline < self._latest:
            return False
        self._latest = deadline
        if deadline < self.alarm:
            self.alarm = deadline
            self.earlier.set()
        return True

    def expire(self) -> None:
        """Dismiss the callers whose deadline has passed, and set the next alarm."""
        now, waiting = self.now(), self.state.waiting
        if waiting and next(iter(waiting)).deadline <= now:
            # Search before the callers wake: only a suspended task can be searched.
            self.nested_leases()
        self._send_away(self.state.dismiss(now))
        self.alarm = next(iter(waiting)).deadline if waiting else math.inf

    def _dismiss(self, failure: Exception) -> None:
        """Wake all waiting callers now, and have each of them raise *failure*."""
        self._send_away(self.state.fail_waiting(failure))

    def _send_away(self, dismissed: list[Claim]) -> None:
        """Wake the *dismissed* callers that sleep on their event or in the limiter."""
        # The callers at the head of the queue hold a token: `wake` wakes them, or they
        # are awake already. The others sleep in the limiter, so `asleep` counts them.
        # If one of them gives up at this moment, its token goes to a caller that was
        # not dismissed. That is harmless: it still gets its stream in its turn.
        asleep = self.state.in_use - self.tokens()
        for claim in dismissed:
            if claim.wake is not None:
                claim.wake()
        if asleep > 0:
            # The limiter's public interface cannot wake one borrower. So its limit is
            # raised for a moment: it lends a token to each of the `asleep` callers, and
            # to no other. They give the tokens back as soon as they run.
            total = self.limiter.total_tokens
            self.limiter.total_tokens = self.limiter.borrowed_tokens + asleep
            self.limiter.total_tokens = total

    def verdict(self, connection: object, error: Exception) -> Verdict | None:
        """Return the verdict of the *connection* on *error*, None if it has none."""
        try:
            judge = getattr(connection, "judge", None)
            verdict: Verdict | None = None if judge is None else judge(error)
        except Exception as failure:  # noqa: BLE001  (a connection may raise anything)
            self.log_limit.report(
                logging.WARNING,
                f"judge() failed: {type(failure).__name__}",
                "%s: judge() of a connection failed",
                self.label,
                exc_info=without_context(failure),
            )
            return None
        return verdict

    def answered(self, claim: Claim) -> None:
        """Record that a call on the lease of *claim* was answered."""
        slot = claim.slot
        if slot is not None:
            slot.proven_at = self.now()
            slot.answered = True
        claim.answered = True

    def judge(self, claim: Claim, slot: Slot, error: Exception) -> None:
        """Change the state of *slot* after a call on it raised *error*."""
        verdict = self.verdict(slot.connection, error)
        if verdict is None:
            return
        slot.last_error = safe_text(error)
        now = self.now()
        match verdict:
            case Verdict.ANSWERED:
                slot.proven_at = now
                slot.answered = claim.answered = True
                return
            case Verdict.REFUSED:
                self.state.refused(slot, now)
            case Verdict.UNAVAILABLE:
                claim.cut_off = True
                self.state.unavailable(slot, now)
            case Verdict.BROKEN:
                claim.cut_off = True
                self.state.broke(slot, now)
            case Verdict.SILENT:
                claim.unanswered = True
                self.state.timed_out(slot, now)
        self.after_change()

    def after_change(self) -> None:
        """
        Serve waiting callers and wake the host's loops, after a change of the state.

        Call it after every change that may need a connection, a probe or a closing.
        """
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
            # The opener computes its next wake-up when it goes to sleep. It may have to
            # wake earlier now: for the next attempt, or for an attempt that takes too
            # long.
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
        # Only the first in a row is a WARNING: the next ones belong to the same event.
        # If a failed health check ended the connection, that was logged already.
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
        """
        Wait for `min_connections` open connections, up to `connection_timeout`.

        Return early if the pool shuts, in an outage, or after a permanent error.
        """
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
                "%s: no connection to %s at startup; the pool keeps trying (%s): %s",
                self.label,
                self.target,
                state.status(),
                state.attempts.error or "the first attempt has not ended yet",
            )

    def resize(self, options: PoolOptions) -> None:
        """Apply the new limits in *options*."""
        self.state.resize(options)
        self.overload.resize()
        self.limiter.total_tokens = self.state.limit
        self.connections_changed()

    # -- connections --------------------------------------------------------------

    def connections_changed(self) -> None:
        """Wake the tasks that wait for `progress`, and act on changed connections."""
        self.progress.set()
        self.progress = anyio.Event()
        self.dismiss_hopeless()
        self.after_change()
        # Set even if there is no work. The opener must compute its next wake-up again,
        # because the backoff may be new.
        self.work.set()

    @contextmanager
    def busy_task(self) -> Iterator[None]:
        """Record the running task while it uses or opens a connection."""
        coroutine = coroutine_of(self.owner.task())
        self.coroutines.add(coroutine)
        try:
            yield
        finally:
            self.coroutines.discard(coroutine)

    def dismiss_hopeless(self) -> None:
        """Dismiss all waiting callers if nothing can serve them; see `hopeless`."""
        error = self.state.attempts.error
        if error is not None and self.state.hopeless(self.now()):
            self._dismiss(error)

    def dismiss_refused(self) -> None:
        """Dismiss all waiting callers if every connection is refused in an outage."""
        error = self.state.outage.error
        if error is not None and self.state.is_refused:
            self._dismiss(error)

    # -- closing ------------------------------------------------------------------

    def begin_close(self, grace: float) -> None:
        """
        Start to close the pool: dismiss waiting callers and refuse new ones.

        Leases have *grace* seconds to come back. A later call may shorten that.
        """
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
        """Wait until the pool shuts and all leases are back, or the grace has ended."""
        while not self.state.shut or (
            self.state.in_use and self._close_at > self.now()
        ):
            self._close_changed = anyio.Event()
            with self.clock.deadline(self._close_at):
                await self._close_changed.wait()
