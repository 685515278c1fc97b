"""
The state of a pool and all its changes, without I/O and without a clock.

A slot has room for one connection. It is always in exactly one of three collections,
which is its state, until it is gone:

    connecting ──connected──▶ open ──retire, last lease back──▶ closing ──closed──▶ ∅
        └─────connect_failed─────────────────────────────────────────────────────▶ ∅

An open slot is *ready* while it has a free stream and may take another lease. A
*suspect* slot waits for a probe, a *retired* one for its last lease to come back:
neither is ready. An *expired* slot still serves, until a new one replaces it.

A slot becomes suspect after a call that was cut off, two calls in a row without an
answer, or a failed probe. If the probe of a suspect slot fails, it is retired.

These invariants hold after every method:

- open + connecting + closing never grows beyond `max_connections`. If `resize` lowers
  the limit, leases and attempts still finish.
- A slot has at most `streams` leases, and `in_use` is the sum over all slots.
- Claims are served in the order in which they came. None overtakes a waiting one.
- No claim waits that could be served: see `serve`.
- A slot with leases is never closed, until `abandon` ends the grace of close().

Methods are synchronous, so no other task sees a half-done change, and no lock is
needed. They take the time (in seconds) as an argument. They leave effects to the
caller: `to_close` collects the slots to close, `to_probe` the slots to probe at once.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from fastapi_topaz._pool.state.attempts import (
    Attempts,
    is_failed_attempt,
    unanswered_end,
)
from fastapi_topaz._pool.state.outage import Outage
from fastapi_topaz._pool.state.rotation import Rotation
from fastapi_topaz._pool.state.snapshot import counts
from fastapi_topaz._pool.state.status import PoolStatus
from fastapi_topaz._pool.state.turns import emptier, least_used, surplus, were_enough


if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from fastapi_topaz._pool.state.options import PoolOptions
    from fastapi_topaz._pool.state.slot import Claim, Slot
    from fastapi_topaz._pool.state.status import CloseReason, LimitReason


__all__ = ["PoolState"]


RAMP = 2
"""The attempts at once at first. Later there may be as many as open connections."""


class PoolState:
    """The slots of one open pool, and its waiting claims. Strictly private."""

    def __init__(
        self,
        options: PoolOptions,
        random: Callable[[], float],
        *,
        spreads: bool = False,
        target: str = "the server",
    ) -> None:
        self.options = options
        self._target = target
        self.streams = options.streams_per_connection
        self.attempts = Attempts(random, self.streams)
        self.rotation = Rotation(random, spreads=spreads)
        self.outage = Outage()

        self.connecting = self.attempts.under_way
        self.open: dict[Slot, None] = {}
        self.closing: set[Slot] = set()
        self.to_close: list[Slot] = []
        self.to_probe: list[Slot] = []
        self.unanswered_ends: list[Slot] = []
        self.first_unanswered = False
        # The number of failures. And whether, since the last one, a connection has
        # answered that is closed now: its slot no longer shows it to `is_ready`.
        self.failures = 0
        self._closed_answered = False

        # A queue: all connections take turns. See `turns`. It is a dict, because any
        # slot may have to leave it.
        self.ready: dict[Slot, None] = {}
        self.waiting: OrderedDict[Claim, None] = OrderedDict()
        # The dismissed claims whose tasks have not run since. Each keeps its token
        # until then, unless its task is cancelled at the same moment.
        self.dismissed = 0
        self.in_use = 0
        # The most leases at once now. `Overload` changes it.
        self.limit = options.capacity
        self.limit_reason: LimitReason = "capacity"
        # By number of leases: when that many were last out at once.
        self.needed_at: dict[int, float] = {}
        # At the last search, only what was needed after this time was needed.
        self._needed_since = float("-inf")

        # Set at the first use: only then the pool keeps `min_connections`.
        self.keeps_minimum = False
        # Connections wanted by callers that did not wait for them (timeout 0).
        self.unawaited_demand = 0
        self.shut = False
        # A connection was lost, and `after_change` has not run since. A replacement may
        # be needed now, before the lost slot closes.
        self.unhandled_loss = False
        # Health checks probe each connection before its last proof is older than this.
        # If one is older, the clock has jumped, or the process was stopped.
        interval = options.health_check_interval
        self._stale_after = (
            2 * (interval + options.health_check_timeout) if interval else float("inf")
        )

    # -- leases -----------------------------------------------------------------

    def take(self, claim: Claim, now: float) -> bool:
        """Serve *claim* at once; return False if no slot is ready or a claim waits."""
        return not self.waiting and bool(self.ready) and self.take_ready(claim, now)

    def take_ready(self, claim: Claim, now: float) -> bool:
        """Serve *claim*, whose turn it is, if one of the ready slots is fit."""
        # The code of _pick() and is_gone(), inlined: this runs for almost every lease.
        ready = self.ready
        slots = iter(ready)
        slot = next(slots)
        if slot.leases or slot.rests:
            slot = emptier(slot, slots)
        try:
            fit = slot.is_lost is None or not slot.is_lost()
        except Exception as error:  # noqa: BLE001  (a connection may raise anything)
            slot.cannot_tell(error)
            fit = True
        if not fit or now - slot.proven_at > self._stale_after:
            if (picked := self._pick(now)) is None:
                return False
            slot = picked
        del ready[slot]
        slot.leases += 1
        if slot.leases < slot.streams:
            ready[slot] = None
        self.in_use += 1
        claim.slot = slot
        claim.acquired_at = now
        return True

    def enqueue(self, claim: Claim) -> None:
        """Add *claim* to the end of the queue."""
        self.keeps_minimum = True
        self.waiting[claim] = None

    def withdraw(self, claim: Claim, now: float) -> None:
        """Remove *claim* from the queue; if it was served meanwhile, give it back."""
        self.waiting.pop(claim, None)
        self.dismissed -= claim.dismissed
        if claim.slot is not None:
            self.give_back(claim, now)

    def serve(self, tokens: int, now: float) -> list[Claim]:
        """
        Serve waiting claims in their order, and return them.

        *tokens* is the number that the limiter has lent, without those of dismissed
        claims. The limiter's queue and `waiting` are in the same order. So the claims
        with a token and without a stream, `tokens - in_use` of them, come first.
        """
        served = []
        while self.in_use < tokens and self.waiting and self.ready:
            claim = next(iter(self.waiting))
            if not self.take_ready(claim, now):
                break
            del self.waiting[claim]
            served.append(claim)
        return served

    def _pick(self, now: float) -> Slot | None:
        while self.ready:
            slots = iter(self.ready)
            slot = emptier(next(slots), slots)
            if now - slot.proven_at <= self._stale_after and not slot.is_gone():
                return slot
            self.suspect(slot, now)
        return None

    def give_back(self, claim: Claim, now: float) -> None:
        """Take the stream of *claim* back; a retired slot closes after the last one."""
        slot = claim.slot
        assert slot is not None  # noqa: S101
        claim.slot = None
        slot.leases -= 1
        slot.last_used_at = now
        in_use = self.in_use
        self.needed_at[in_use] = now
        self.in_use = in_use - 1
        if slot.retired is not None:
            self.retire(slot, slot.retired)
        elif not slot.suspect:
            self.ready[slot] = None

    def fail_waiting(self, failure: Exception) -> list[Claim]:
        """Dismiss all waiting claims with *failure*, and return them."""
        failed = self.dismiss(float("inf"))
        for claim in failed:
            claim.failure = failure
        return failed

    def dismiss(self, deadline: float) -> list[Claim]:
        """Dismiss waiting claims up to the first with a later deadline; return them."""
        dismissed = []
        while self.waiting and next(iter(self.waiting)).deadline <= deadline:
            claim, _ = self.waiting.popitem(last=False)
            claim.dismissed = True
            dismissed.append(claim)
        self.dismissed += len(dismissed)
        return dismissed

    # -- connecting -------------------------------------------------------------

    def shortfall(self, tokens: int, now: float) -> int:
        """
        Return the number of attempts to start now.

        Connections are needed for claims with a token and without a stream, for the
        minimum once the pool is in use, and to replace an expired slot. At first two
        attempts run at once, later as many as there are connections. In an outage one
        runs at a time, each after its backoff.
        """
        room = self.room()
        self.outage.clock_is(now)
        if room <= 0 or self.shut or now < self.next_attempt():
            return 0
        coming = self.attempts.coming(waiting=bool(self.waiting))
        cautious = self.attempts.is_cautious(now) or self.outage.is_silent
        ramp = 1 if cautious else max(RAMP, self._usable())
        entitled = min(len(self.waiting), tokens - self.in_use)
        needed = -(-entitled // self.attempts.expected_streams) - coming
        floor = self.options.min_connections if self.keeps_minimum else 0
        # After a failure, the pool wants a connection until one succeeds. Otherwise it
        # would not notice the end of the outage.
        failing = bool(self.attempts.failures or self.outage.declared)
        floor = max(floor, self.unawaited_demand, int(failing))
        needed = max(needed, floor - self._usable() - coming)
        if not coming and self._next_expired() is not None:
            needed = max(needed, 1)
        return max(0, min(needed, room, ramp - coming))

    def next_attempt(self) -> float:
        """Return when the next attempt may begin; that time may be in the past."""
        return max(
            self.attempts.next_attempt(waiting=bool(self.waiting)),
            self.outage.next_attempt,
        )

    def begin(self, now: float) -> Slot:
        """Add a slot whose connection is being established."""
        self.outage.attempted(now)
        return self.attempts.begin(now)

    def connected(self, slot: Slot, connection: Any, now: float) -> None:
        """Open *slot* with *connection*; one success ends the failures to connect."""
        self.unawaited_demand = 0
        if self.attempts.failures and not self._usable():
            # The first server after an outage. The others come back one by one, so the
            # connections are spread again later.
            self.rotation.lost(now)
        slot.watch(connection)
        slot.limit_streams(self.streams)
        self.attempts.succeeded(slot)
        slot.grown_at = slot.opened_at = slot.last_used_at = slot.proven_at = now
        self.rotation.begin(slot, self.options.max_lifetime, now)
        self.open[slot] = None
        if self.shut:
            self.retire(slot, "close")
            return
        self.ready[slot] = None
        expired = self.rotation.next()
        if expired is not None:
            slot.grown_at = expired.grown_at
            self.retire(expired, self.rotation.reason(expired))
        self._trim()

    def connect_failed(self, slot: Slot, error: Exception, now: float) -> None:
        """Remove *slot*, whose attempt failed with *error*."""
        self.unawaited_demand = 0
        self.failed()
        self.attempts.failed(slot, error, now)

    def want_one(self) -> None:
        """Ask for a connection, if there is none, for the callers that come next."""
        self.keeps_minimum = True
        # If there is one, the demand is not kept until that one closes.
        self.unawaited_demand = int(not self._usable())

    def hopeless(self, now: float) -> bool:
        """Return whether no connection can serve the waiting claims soon."""
        return not self._usable() and self.attempts.hopeless(self.options, now)

    @property
    def is_refused(self) -> bool:
        """Whether an outage is declared, and every usable connection is refused."""
        return self.outage.declared and self.outage.is_total(self._all_usable())

    @property
    def error(self) -> Exception | None:
        """The cause if nothing can be leased: the last failed attempt or refusal."""
        if self.outage.declared and self.outage.refused:
            return self.outage.error
        return self.attempts.error or self.outage.error

    # -- slots that close -------------------------------------------------------

    def retire(self, slot: Slot, reason: CloseReason) -> None:
        """Give no new lease of *slot*, and close it when its last lease is back."""
        if slot.retired is None:
            slot.retired = reason
        self.ready.pop(slot, None)
        self.outage.forget(slot)
        if not slot.leases and slot in self.open:
            self._close(slot)

    def lost(self, slot: Slot, reason: CloseReason, now: float) -> None:
        """Retire *slot*, whose connection is lost, for *reason*."""
        if slot.retired is not None or slot not in self.open:
            return
        if any(other.answered and self.attempts.is_newer(other) for other in self.open):
            self.attempts.unanswered = 0
        first = not self.attempts.unanswered
        failure = None
        if is_failed_attempt(slot, now, was_lost=reason == "lost"):
            failure = unanswered_end(slot, self._target)
            self.unanswered_ends.append(slot)
            self.failed()
        self.attempts.ended(slot, failure, now)
        self.first_unanswered |= first and self.attempts.unanswered > 0
        self.rotation.lost(now)
        self.unhandled_loss = True
        self.retire(slot, reason)

    def retire_if_lost(self, slot: Slot, now: float) -> bool:
        """Retire *slot* if its server has gone away; return whether it was retired."""
        if slot.retired is not None or not slot.is_gone():
            return False
        self.lost(slot, "lost", now)
        return True

    def suspect(self, slot: Slot, now: float) -> None:
        """Give no new lease of *slot* until it answers a probe, to be made at once."""
        self.ready.pop(slot, None)
        if slot.suspect or slot.retired is not None or slot not in self.open:
            return
        # A probe would make a lost channel connect again, maybe to another server.
        if self.retire_if_lost(slot, now):
            return
        slot.suspect = True
        slot.suspected_at = now
        self.to_probe.append(slot)

    def unavailable(self, slot: Slot, now: float) -> None:
        """Suspect *slot*: the server is unavailable, or has ended it in order."""
        if slot.retired is None and not self.retire_if_lost(slot, now):
            self.failed()
            self.suspect(slot, now)

    def broke(self, slot: Slot, now: float) -> None:
        """
        Suspect *slot*, on which a call was cut off, and the other slots with it.

        The cause may have broken all connections to the same server.
        """
        self.failed()
        self.suspect(slot, now)
        if not slot.broken:
            slot.broken = True
            self._suspect_others(slot, now, now)

    def timed_out(self, slot: Slot, now: float) -> None:
        """Suspect *slot* if that was the second call in a row without an answer."""
        self.failed()
        if slot.proven_at <= slot.timed_out_at:
            self.suspect(slot, now)
        slot.timed_out_at = now

    def answered(self, slot: Slot, now: float) -> None:
        """Make *slot* ready again, because it has answered a probe."""
        slot.proven_at = now
        slot.answered = True
        self._clear(slot)
        self.outage.answered(slot, now)

    def _clear(self, slot: Slot) -> None:
        slot.suspect = slot.broken = slot.excused = False
        if slot in self.open and slot.retired is None and slot.leases < slot.streams:
            self.ready.setdefault(slot)

    def unanswered(self, slot: Slot, now: float) -> None:
        """Suspect *slot*, which failed a probe; if it was suspect, retire it."""
        self.failed()
        self.outage.forget(slot)
        if not slot.suspect:
            self.suspect(slot, now)
        elif slot.proven_at > slot.suspected_at:
            # A call was answered since it became suspect: so this failed probe counts
            # as the first one.
            slot.suspected_at = now
            self.to_probe.append(slot)
        else:
            self.lost(slot, "unhealthy", now)
            # Slots that have answered since then are not affected.
            self._suspect_others(slot, slot.suspected_at, now)

    def _suspect_others(self, slot: Slot, since: float, now: float) -> None:
        for other in list(self.open):
            if other is not slot and other.proven_at < since:
                self.suspect(other, now)

    def refused(self, slot: Slot, now: float) -> None:
        """Give no new lease of *slot* until it answers a probe: a call was refused."""
        self.failed()
        if slot.retired is not None or slot not in self.open:
            return
        self.outage.saw_answer(self._answered_at())
        if not slot.suspect and not self.retire_if_lost(slot, now):
            self._doubt(slot, 1, now)

    def probe_refused(
        self, slot: Slot, error: Exception, began: float, now: float
    ) -> bool:
        """
        Record that a probe of *slot*, begun at *began*, was refused with *error*.

        Returns:
            Whether an outage begins now.
        """
        self.failed()
        if slot.retired is not None or self.retire_if_lost(slot, now):
            return False
        self.ready.pop(slot, None)
        if not slot.suspect:
            slot.suspect = True
            slot.suspected_at = began
        answered_at = self._answered_at()
        self.outage.saw_answer(answered_at)
        self.outage.probe_refused(slot, error, began, answered_at, now)
        for other in self._all_usable():
            if self.outage.is_silent:
                # Calls on it may be refused, too. Probe it now, so that a probe finds
                # this out and not a caller.
                if not other.suspect and other.proven_at <= slot.suspected_at:
                    self._doubt(other, 0, now)
            elif (
                other in self.outage.refused
                and other.answered
                and other.proven_at > other.suspected_at
            ):
                # A call on it was answered, so only a share of all calls is refused.
                self.outage.forget(other)
                self._clear(other)
        return self.outage.declare(self._all_usable(), now)

    # -- readiness --------------------------------------------------------------

    def failed(self) -> None:
        """Record a failure: the pool is not ready until the next answer."""
        self.failures += 1
        self._closed_answered = False
        for slot in self.open:
            if slot.answered:
                slot.answered = "before"

    @property
    def is_ready(self) -> bool:
        """Whether the last answer is newer than the last failure. Thread-safe."""
        answered = self._closed_answered or any(
            slot.answered is True for slot in tuple(self.open)
        )
        return answered and not self.shut

    def newest_proof(self, asked: Collection[Slot], now: float) -> Slot | None:
        """Return the slot with the latest proof, except those in *asked*, or None."""
        well = [
            slot
            for slot in list(self.open)
            if not (slot.suspect or slot in asked or self.retire_if_lost(slot, now))
            and slot.retired is None
        ]
        return max(well, key=lambda slot: slot.proven_at, default=None)

    def _doubt(self, slot: Slot, refusals: int, now: float) -> None:
        self.ready.pop(slot, None)
        slot.suspect = True
        slot.suspected_at = now
        self.outage.add(slot, refusals, now)

    def _answered_at(self) -> float:
        answered = (x.proven_at for x in self._all_usable() if x.answered)
        return max(answered, default=float("-inf"))

    def reap(self, now: float) -> None:
        """Retire slots not needed for `max_idle_time`, but keep `min_connections`."""
        self._needed_since = since = now - (self.options.max_idle_time or float("inf"))
        slots = [x for x in self._all_usable() if x not in self.outage.refused]
        spare = self._usable() - self.options.min_connections
        for slot in surplus(slots, spare, self.in_use, self.needed_at, since):
            self.retire(slot, "idle")

    def retire_expired(self) -> None:
        """
        Retire the next expired slot, unless its replacement can be opened before.

        If there is room for one more connection, `shortfall` asks for it, and
        `connected` retires the old slot. Without room, an idle expired slot is retired
        first, and so is a surplus one. Only one leased slot at a time is retired,
        because each retired slot reduces the capacity.
        """
        slot = self._next_expired()
        if slot is None or self.closing:
            return
        floor = self.options.min_connections if self.keeps_minimum else 0
        others = sum(each.streams for each in self._all_usable()) - slot.streams
        surplus = not slot.leases and not self.waiting and self._usable() > floor
        surplus &= were_enough(others, self.in_use, self.needed_at, self._needed_since)
        full = self.room() <= 0 and not self.connecting and not self.attempts.failures
        if surplus or (full and (self.rotation.is_idle() or not slot.leases)):
            self.retire(slot, self.rotation.reason(slot))

    def _next_expired(self) -> Slot | None:
        # In an outage, a new connection is not better than an old one.
        return None if self.outage.declared else self.rotation.next()

    def resize(self, options: PoolOptions) -> None:
        """Apply the new limits in *options*."""
        self.options = options
        self._trim()

    def shut_down(self) -> None:
        """Begin no more attempts, and retire all slots."""
        self.shut = True
        for slot in list(self.open):
            self.retire(slot, "close")

    def abandon(self) -> None:
        """Close all open slots, also leased ones: the grace of close() has ended."""
        for slot in list(self.open):
            self._close(slot)

    def closed(self, slot: Slot) -> None:
        """Forget *slot*, whose connection is closed, and free its room."""
        self.closing.discard(slot)

    def _close(self, slot: Slot) -> None:
        del self.open[slot]
        self._closed_answered |= slot.answered is True
        self.rotation.forget(slot)
        self.closing.add(slot)
        self.to_close.append(slot)

    def _trim(self) -> None:
        excess = self._usable() - self.options.max_connections
        for slot in least_used(self._all_usable())[: max(0, excess)]:
            self.retire(slot, "resize")

    def _usable(self) -> int:
        return sum(slot.retired is None for slot in self.open)

    def _all_usable(self) -> list[Slot]:
        return [slot for slot in self.open if slot.retired is None]

    def room(self) -> int:
        """Return how many more connections there may be."""
        taken = len(self.open) + len(self.connecting) + len(self.closing)
        return self.options.max_connections - taken

    def status(self, estimated_wait: float = 0.0) -> PoolStatus:
        """Return a snapshot of the numbers. Thread-safe."""
        return PoolStatus(
            **counts(self.open),
            max_connections=self.options.max_connections,
            min_connections=self.options.min_connections,
            waiting=len(self.waiting),
            connecting=len(self.connecting),
            streams_in_use=self.in_use,
            streams_max=self.options.max_connections * self.streams,
            failing=self.attempts.failures > 0 or self.outage.declared,
            ready=self.is_ready,
            limit=self.limit,
            limit_reason=self.limit_reason,
            estimated_wait=estimated_wait,
        )
