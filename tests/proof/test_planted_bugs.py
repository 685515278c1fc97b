"""The models find bugs: each planted bug here breaks an invariant."""

from __future__ import annotations

import logging

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from fastapi_topaz._pool import pool as _pool
from fastapi_topaz._pool.open_pool import OpenPool
from fastapi_topaz._pool.state.pool_state import PoolState
from fastapi_topaz.exceptions import PoolSaturated
from kit.invariants import Broken
from proof.stepwise import Stuck
from proof.test_model_pool import OnTrioMachine, PoolMachine
from proof.test_model_state import StateMachine


# By default the models themselves run, with other examples. How soon they find a bug
# depends on the constants in all imported files, so there are many examples.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FIXED = settings(
    max_examples=80,
    stateful_step_count=50,
    derandomize=True,
    database=None,
    deadline=None,
    # Do not shrink failing examples: it takes most of the time, and they are not read.
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def _no_log(caplog):
    caplog.set_level(logging.CRITICAL + 1, logger="fastapi_topaz")


class CountsTwice(PoolState):
    """Double count on release."""

    def give_back(self, claim, now):
        super().give_back(claim, now)
        self.in_use -= 1


class TakesTwice(PoolState):
    """A stream is returned twice."""

    def give_back(self, claim, now):
        slot = claim.slot
        super().give_back(claim, now)
        slot.leases -= 1


class ForgetsToOffer(PoolState):
    """Lost wake-up: a returned stream is offered to no waiting caller."""

    def give_back(self, claim, now):
        slot = claim.slot
        super().give_back(claim, now)
        if self.waiting:
            self.ready.pop(slot, None)


class ServesTheLastFirst(PoolState):
    """New caller overtaking: the queue is a stack."""

    def enqueue(self, claim):
        super().enqueue(claim)
        self.waiting.move_to_end(claim, last=False)


class ServesTheNewcomer(PoolState):
    """New caller overtaking: a returned stream goes to the first caller that looks."""

    def serve(self, tokens, now):
        served = []
        while self.waiting and self.in_use < tokens and self.ready:
            claim = next(reversed(self.waiting))
            if not self.take_ready(claim, now):
                break
            del self.waiting[claim]
            served.append(claim)
        return served


class ReapsWhatIsLeased(PoolState):
    """Reaper closing a leased connection: it checks the time but not the leases."""

    def reap(self, now):
        super().reap(now)
        for slot in list(self.open):
            if slot.leases and now - slot.last_used_at >= self.options.max_idle_time:
                slot.retired = "idle"
                self.ready.pop(slot, None)
                self._close(slot)


class LeasesTheLastUsed(PoolState):
    """The connection that was ready last is leased first: some are rarely used."""

    def take(self, claim, now):
        ready = [*self.ready]
        self.ready = dict.fromkeys([*ready[-1:], *ready[:-1]])
        return super().take(claim, now)


class LeasesTheFirstOfTwo(PoolState):
    """The connection whose turn it is gets the lease, although it has more of them."""

    def take(self, claim, now):
        first, *others = self.ready or [None]
        if first is None or first.is_gone():
            return super().take(claim, now)
        self.ready = {first: None}
        taken = super().take(claim, now)
        self.ready = dict.fromkeys([*others, *self.ready])
        return taken


class ReapsWhatIsNeeded(PoolState):
    """The reaper looks only at the leases that are out now."""

    def reap(self, now):
        self.needed_at.clear()
        super().reap(now)
        for slot in self.open:
            slot.rests = False


class ReapsNothing(PoolState):
    """The reaper looks for one that was not used lately, and all take turns."""

    def reap(self, now):
        for slot in self.open:
            slot.rests = False


class LetsRestForEver(PoolState):
    """A connection that is leased at a search rests until it closes."""

    def reap(self, now):
        resting = [slot for slot in self.open if slot.rests or slot.leases]
        super().reap(now)
        for slot in resting:
            slot.rests = True


class ExceedsTheServersLimit(PoolState):
    """More leases than the server allows: the fast path compares with the option."""

    def take(self, claim, now):
        taken = super().take(claim, now)
        if taken and claim.slot.leases < self.streams:
            self.ready.setdefault(claim.slot)
        return taken


class OpensWhileClosing(PoolState):
    """Close that forgets a connecting slot: the connection opens after the end."""

    def connected(self, slot, connection, now):
        shut, self.shut = self.shut, False
        super().connected(slot, connection, now)
        self.shut = shut


class LeasesTheRefused(PoolState):
    """A refused connection is leased again before a probe was answered."""

    def refused(self, slot, now):
        super().refused(slot, now)
        if slot in self.outage.refused and slot.leases < slot.streams:
            self.ready.setdefault(slot)


class ForgetsTheRefused(PoolState):
    """A refused connection is never probed."""

    def _doubt(self, slot, refusals, now):
        super()._doubt(slot, refusals, now)
        self.outage.forget(slot)


class ClosesTheRefused(PoolState):
    """A refused probe counts as a failed probe: the connection is closed."""

    def probe_refused(self, slot, error, began, now):
        self.unanswered(slot, now)
        return False


class HasAnOutageOfOne(PoolState):
    """One refused connection counts as an outage."""

    def probe_refused(self, slot, error, began, now):
        super().probe_refused(slot, error, began, now)
        self.outage.declared = True
        return True


class BlamesOrderlyEnds(PoolState):
    """A connection that answered and then ended counts as a failed attempt."""

    def lost(self, slot, reason, now):
        before = slot.answered, slot.broken
        slot.answered, slot.broken = False, True
        super().lost(slot, reason, now)
        slot.answered, slot.broken = before


class ProbesWithoutPause(PoolState):
    """In an outage, probes are sent as fast as they are answered."""

    def probe_refused(self, slot, error, began, now):
        begins = super().probe_refused(slot, error, began, now)
        self.outage._pause_until = slot.probe_at = now + 0.05
        return begins


class KeepsTheToken(OpenPool):
    """Lost token on cancel."""

    def _withdraw(self, claim):
        if not claim.dismissed and claim.failure is None:
            claim.has_token = False
        super()._withdraw(claim)


class WakesNobody(OpenPool):
    """Lost wake-up: a served caller is not woken."""

    def _serve(self, now):
        self.state.serve(self.tokens(), now)
        return self.state.in_use < self.tokens()


class ServesNobodyOnRelease(OpenPool):
    """Lost wake-up: a stream is free, and no task assigns it."""

    releasing = False

    def release(self, claim):
        self.releasing = True
        super().release(claim)
        self.releasing = False

    def _serve(self, now):
        return False if self.releasing else super()._serve(now)


class ForgetsTheConnecting(OpenPool):
    """Close that forgets a connecting slot: the attempt continues."""

    def begin_close(self, grace):
        attempts, self.attempts = self.attempts, set()
        super().begin_close(grace)
        self.attempts = attempts


class RefusesWithoutCalls(OpenPool):
    """An old estimate refuses a check although no call is under way."""

    def _admit(self, claim, now):
        if not self.state.in_use and self.counters.acquisitions > 5:
            raise PoolSaturated("about 1.4 s of queue, 0.8 s of budget")
        super()._admit(claim, now)


class KeepsTheLimiter(OpenPool):
    """The limit changes, and the limiter keeps its tokens."""

    def resize(self, options):
        total = self.limiter.total_tokens
        super().resize(options)
        self.limiter.total_tokens = total


REAPING = "what_was_needed_stays what_is_not_needed_goes what_is_needed_does_not_rest"
"""The invariants of the search for connections that are not needed."""

OF_THE_STATE = [
    (CountsTwice, "leases_are_counted_once"),
    (TakesTwice, "each_connection_counts_its_leases"),
    (ForgetsToOffer, "what_may_be_leased_is_ready"),
    (ServesTheLastFirst, "the_queue_is_those_who_wait"),
    (ServesTheNewcomer, "nobody_is_overtaken"),
    (ReapsWhatIsLeased, "none_is_closed_under_a_lease"),
    (LeasesTheLastUsed, "connections_take_turns"),
    (LeasesTheFirstOfTwo, "connections_take_turns"),
    (ReapsWhatIsNeeded, REAPING),
    (ReapsNothing, REAPING),
    (LetsRestForEver, REAPING),
    (ExceedsTheServersLimit, "what_may_be_leased_is_ready"),
    (LeasesTheRefused, "a_refused_one_waits_for_its_probe"),
    (ForgetsTheRefused, "a_suspect_is_probed"),
    (ClosesTheRefused, "none_is_closed_for_a_refusal"),
    (HasAnOutageOfOne, "an_outage_is_one_of_all"),
    (BlamesOrderlyEnds, "only_what_never_answered_fails"),
    # The model of the pool rarely reaches this: a closing pool cancels its attempts.
    (OpensWhileClosing, "what_is_too_much_is_on_its_way_out"),
]
# Bugs that the pool has settled before its model checks, or that break another
# invariant.
ELSEWHERE = {
    *(OpensWhileClosing, ServesTheNewcomer, ClosesTheRefused, BlamesOrderlyEnds),
    # The connections of the other model have no limit.
    *(HasAnOutageOfOne, ExceedsTheServersLimit),
    # Only the model of the state knows whose turn it is, and what was needed.
    *(LeasesTheLastUsed, LeasesTheFirstOfTwo, LetsRestForEver),
    *(ReapsWhatIsNeeded, ReapsNothing),
}
OF_THE_POOL = [
    *[x for x in OF_THE_STATE if x[0] not in ELSEWHERE],
    (ClosesTheRefused, "a_connection_that_answers_is_kept"),
    # Without an outage in which all are refused, it is probed as in normal operation.
    (HasAnOutageOfOne, "an_outage_is_one_of_all an_outage_is_probed_rarely"),
    (ProbesWithoutPause, "an_outage_is_probed_rarely"),
    # Or the caller gets a stream without a token, and then neither waits nor has a
    # lease.
    (ServesTheNewcomer, "nobody_is_overtaken the_queue_is_those_who_wait"),
    # Later the bug shows in other counts too, so another check may find it first.
    (KeepsTheToken, "tokens_are_lent_to_those_in_front leases_are_counted_once"),
    (WakesNobody, "leases_are_counted_once"),
    (ServesNobodyOnRelease, "nobody_who_may_be_served_waits"),
    # Or anyio cancels the attempt again and again, because it is shielded.
    (ForgetsTheConnecting, "closing_ends_all_waiting stuck"),
    (RefusesWithoutCalls, "nobody_is_sent_away_without_cause stuck"),
    (KeepsTheLimiter, "the_limiter_has_the_limit"),
]


# What breaks them is rare, and `test_turns.py` has it without chance.
RARE = {ReapsWhatIsNeeded, ReapsNothing, LetsRestForEver}


def planted(bugs):
    return [
        pytest.param(*each, marks=pytest.mark.nightly if each[0] in RARE else ())
        for each in bugs
    ]


def broken(machine):
    """Return the invariants that fail first, or `stuck` if the tasks never rest."""
    with pytest.raises((Broken, Stuck)) as caught:
        run_state_machine_as_test(machine, settings=settings(FIXED, max_examples=9000))
    return getattr(caught.value, "names", {"stuck"})


@pytest.mark.parametrize("bug, invariant", planted(OF_THE_STATE))
def test_the_model_of_the_state_finds_the_bug(bug, invariant):
    class Machine(StateMachine):
        make_state = bug

    assert broken(Machine).intersection(invariant.split())


BACKENDS = [PoolMachine, OnTrioMachine]


@pytest.mark.parametrize("machine", BACKENDS)
@pytest.mark.parametrize("bug, invariant", planted(OF_THE_POOL))
def test_the_model_of_the_pool_finds_the_bug(bug, invariant, machine, monkeypatch):
    if issubclass(bug, OpenPool):
        monkeypatch.setattr(_pool, "OpenPool", bug)
    else:
        monkeypatch.setattr("fastapi_topaz._pool.open_pool.PoolState", bug)
    assert broken(machine).intersection(invariant.split())


@pytest.mark.parametrize("machine", [StateMachine, *BACKENDS])
def test_without_a_planted_bug_the_models_find_nothing(machine):
    run_state_machine_as_test(machine, settings=FIXED)
