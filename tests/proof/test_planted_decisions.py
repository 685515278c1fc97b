"""The model of the decision layers finds bugs: each planted bug breaks an invariant."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from fastapi_topaz import Decision
from fastapi_topaz._decisions.bus import BusLink
from fastapi_topaz._decisions.cache import Cached
from fastapi_topaz._decisions.circuit import Circuit, Outcome, Permit
from fastapi_topaz._decisions.fallback import Fallback
from fastapi_topaz._decisions.flights import Flight
from fastapi_topaz._decisions.invalidation import Invalidations
from fastapi_topaz._decisions.keys import Keys
from fastapi_topaz._decisions.memo import Memo
from fastapi_topaz._decisions.seal import Senders
from fastapi_topaz._decisions.store import Store
from kit.invariants import Broken
from proof.test_model_bus import BusMachine
from proof.test_model_circuit import CircuitMachine
from proof.test_model_decisions import DecisionMachine


# By default the models themselves run. How soon they find a bug depends on constants
# in all imported files, so there are many examples.
pytestmark = [
    pytest.mark.usefixtures("no_log"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

FOUND = settings(
    max_examples=10_000,
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    # Do not shrink failing examples: it takes most of the time, and they are not read.
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def broken(machine):
    """Return the invariants that fail first."""
    with pytest.raises(Broken) as caught:
        run_state_machine_as_test(machine, settings=FOUND)
    return caught.value.names


# The models find these late. Other tests find them sooner.
LATE = [pytest.mark.slow, pytest.mark.timeout(600)]


# -- bugs of the layers ---------------------------------------------------------------


class ForgetsTheIdentity(Keys):
    """A key without all that is asked: here the identity (and the resource)."""

    def key_of(self, question):
        return question.policy_path.encode().ljust(16)[:16]


class ForgetsTheMetadata(Keys):
    """A key without the metadata of the check."""

    def key_of(self, question):
        digest = self._alone.copy()
        digest.update(question.request)
        return digest.digest()


class ReadsByTruth(Cached):
    """A denial is kept as an object, and read by its truth value."""

    def found(self, *args):
        decision = super().found(*args)
        if decision is None:
            return None
        return Decision(True, "cache", decision.age, decision.id)


class AgesFromStoring(Cached):
    """The age counts from when the answer was kept."""

    def keep(self, question, place, key, flight):
        flight.asked_at = self.freshness.clock()
        super().keep(question, place, key, flight)


class KeepsDenialsAsLong(Store):
    """One limit for both answers."""

    def fresh(self, key, valid_from, now, wall):
        entry = self._entries.get(key)
        usable = entry and entry.number > valid_from
        usable = usable and now - entry.asked_at < 9 and wall < entry.expires_at
        return entry if usable else None


class IgnoresTheExpiry(Cached):
    """A decision for a token is used until its age ends."""

    def keep(self, question, place, key, flight):
        super().keep(question, place, key, flight)
        entry = self._cache._store._entries.get(key)
        if entry is not None:
            entry.expires_at = float("inf")


class JoinsTheInvalidated(Cached):
    """A caller joins a question that was asked before the invalidation."""

    def _may_join(self, question, flight, valid_from, now):
        return super()._may_join(question, flight, -1, now)


class NumbersAfterAsking(Cached):
    """A question takes its number when its answer arrives."""

    def keep(self, question, place, key, flight):
        flight.number = self.freshness.invalidations.next_number()
        super().keep(question, place, key, flight)


class ForgetsOldMarks(Invalidations):
    """A mark is dropped after a moment, although older answers are kept."""

    def __init__(self, retention):
        super().__init__(1.0)


class SharesWithNobody(Cached):
    """Each caller asks by itself."""

    def _may_join(self, *args):
        return False


class StrandsTheFollowers(Flight):
    """The followers of a cancelled caller are not woken."""

    def end(self):
        if self.decision is not None or self._error is not None:
            super().end()


class LeavesTheFlight(Cached):
    """A cancelled caller leaves its question under way."""

    async def share(self, question, place, key):
        try:
            return await super().share(question, place, key)
        except BaseException:
            place.flights.setdefault(key, Flight(0, 0.0, took_over=False))
            raise


class SharedErrors(Flight):
    """All followers raise the very exception of the caller that asked."""

    __slots__ = ()

    async def wait(self, budget):
        try:
            await super().wait(budget)
        except Exception as error:  # noqa: BLE001
            raise error.__cause__ or error from None


class StoresErrors(Cached):
    """An error is kept as a denial."""

    async def share(self, question, place, key):
        try:
            return await super().share(question, place, key)
        except Exception:  # noqa: BLE001
            return Decision(allowed=False, origin="cache")


class AnswersFreshChecks(Cached):
    """max_age=0 is ignored."""

    async def __call__(self, question, /):
        object.__setattr__(question, "max_age", question.max_age or None)
        return await super().__call__(question)


class CachesTheExcluded(Cached):
    """Excluded policies are kept."""

    def __init__(self, ask, cache, openings):
        cache._excludes = lambda _question: False
        super().__init__(ask, cache, openings)


class NeverEvicts(Store):
    """The cache grows."""

    def put(self, key, entry):
        self.max_size = 10**9
        super().put(key, entry)


class OutlivesTheOpening(Cached):
    """What was asked in an earlier opening of the pool is used."""

    def __init__(self, ask, cache, openings):
        super().__init__(ask, cache, openings)
        first = openings.current()
        openings.current = lambda: first


class ForgetsWhichRequest(Memo):
    """What one request has asked answers another one."""

    everything = None

    async def __call__(self, question, /):
        if question.http is not None:
            place = type(self).everything = type(self).everything or {}
            question.http.scope["fastapi_topaz"] = place.setdefault(
                id(self), question.http.scope.get("fastapi_topaz")
            )
        decision = await super().__call__(question)
        if question.http is not None:
            place[id(self)] = question.http.scope.get("fastapi_topaz")
        return decision


class AllowsByDefault(Fallback):
    """A fallback that knows no answer allows."""

    async def _decide(self, question, error):
        decision = await super()._decide(question, error)
        if decision is None or decision.origin == "fallback":
            return Decision(allowed=True, origin="fallback")
        return decision


class CountsNothing(Fallback):
    """A fallback that is not counted."""

    async def _decide(self, question, error):
        decision = await super()._decide(question, error)
        self._shared.uses.clear()
        return decision


class ServesTheRevoked(Cached):
    """An older answer is served although it was invalidated."""

    def stale(self, question):
        self.freshness.valid_from, kept = (lambda *_: -1), self.freshness.valid_from
        try:
            return super().stale(question)
        finally:
            self.freshness.valid_from = kept


class NoticesNoGap(Senders):
    """A message of another process that is missing is not noticed."""

    def hear(self, message):
        heard = super().hear(message)
        return "next" if heard in {"gap", "joined"} else heard


class KeepsOverAnOutage(BusLink):
    """The cache is not cleared when the bus is back."""

    def _confirm(self, beat):
        self._clear = lambda: None
        super()._confirm(beat)
        del self._clear


class TrustsTheSilent(BusLink):
    """A bus from which no own message comes back is trusted."""

    def is_reachable(self):
        return self._confirmed_at > -math.inf


class TrustsGarbage(BusLink):
    """A message that cannot be read is ignored."""

    def _reject(self, reason):
        pass


class DropsWhatFails(BusLink):
    """An invalidation that could not be sent is not sent again."""

    async def _send(self):
        waiting = len(self._outbox)
        sent = await super()._send()
        if waiting and not sent:
            self._outbox.popleft()
        return sent


LAYERS = [
    (ForgetsTheIdentity, "each_answers_its_own_question nobody_waits_in_vain"),
    (ForgetsTheMetadata, "each_answers_its_own_question nobody_waits_in_vain"),
    (ReadsByTruth, "no_decision_turns"),
    (AgesFromStoring, "no_answer_is_too_old max_age_is_kept no_answer_is_told_younger"),
    pytest.param(KeepsDenialsAsLong, "no_answer_is_too_old", marks=LATE),
    # A kept answer of a token that expires is rare in the model. The tests of `tokens`
    # and `store` find the bug at once.
    pytest.param(
        *(IgnoresTheExpiry, "no_answer_outlives_its_token"), marks=pytest.mark.nightly
    ),
    (JoinsTheInvalidated, "invalidation_wins"),
    (NumbersAfterAsking, "invalidation_wins"),
    (ForgetsOldMarks, "invalidation_wins equal_questions_are_one_call"),
    (SharesWithNobody, "equal_questions_are_one_call"),
    (StrandsTheFollowers, "nobody_waits_in_vain"),
    (LeavesTheFlight, "no_flight_without_a_leader"),
    (SharedErrors, "errors_are_not_shared"),
    (StoresErrors, "each_decision_was_given"),
    (AnswersFreshChecks, "max_age_is_kept"),
    (CachesTheExcluded, "the_excluded_is_always_asked"),
    (NeverEvicts, "the_size_is_bounded"),
    (OutlivesTheOpening, "no_answer_outlives_its_opening nobody_waits_in_vain"),
    (ForgetsWhichRequest, "a_memo_is_of_one_request"),
    (AllowsByDefault, "no_allow_without_permission"),
    (CountsNothing, "each_fallback_is_counted"),
    (ServesTheRevoked, "invalidation_wins"),
]
BUS = [
    (NoticesNoGap, "invalidation_wins"),
    (KeepsOverAnOutage, "invalidation_wins"),
    (TrustsTheSilent, "a_bad_bus_is_unreachable no_answer_is_too_old"),
    (TrustsGarbage, "a_bad_bus_is_unreachable no_answer_is_too_old"),
    (DropsWhatFails, "each_invalidation_is_sent"),
]
PLACES = {
    Keys: ("fastapi_topaz._decisions.openings.Keys",),
    Flight: ("fastapi_topaz._decisions.sharing.Flight",),
    Store: ("fastapi_topaz._decisions.cache.Store",),
    Invalidations: ("fastapi_topaz._decisions.cache.Invalidations",),
    BusLink: ("fastapi_topaz._decisions.cache.BusLink",),
    Senders: ("fastapi_topaz._decisions.bus.Senders",),
}
MADE = {
    Cached: "make_cached",
    Memo: "make_memo",
    Fallback: "make_fallback",
}


# -- bugs of the circuit --------------------------------------------------------------


class KeepsPermits(Circuit):
    """A trial that says nothing, such as a cancelled one, keeps its permit."""

    def leave(self, permit, outcome, now, connects):
        if outcome is not Outcome.NOTHING:
            super().leave(permit, outcome, now, connects)


class KeepsThePermitOfSuccess(Circuit):
    """A successful trial keeps its permit, so the circuit never closes."""

    def leave(self, permit, outcome, now, connects):
        super().leave(permit, outcome, now, connects)
        if self.state == "half_open":
            self._trials.add(Permit(self.epoch, math.inf))


class WaitsForTheLost(Circuit):
    """A trial whose task is gone counts forever."""

    def enter(self, now, connects, longest):
        return super().enter(now, connects, math.inf)


class CountsTheOld(Circuit):
    """The end of an older check counts in the new state."""

    def leave(self, permit, outcome, now, connects):
        fresh = Permit(self.epoch, permit.expires_at)
        super().leave(fresh, outcome, now, connects)


class FloodsWhenHalfOpen(Circuit):
    """All callers are let through as soon as the pause is over."""

    def enter(self, now, connects, longest):
        permit = super().enter(now, connects, longest)
        return permit or (Permit(self.epoch, 0) if self.state == "half_open" else None)


class BlamesCancellations(Circuit):
    """A cancelled check counts as a failure."""

    def leave(self, permit, outcome, now, connects):
        if outcome is Outcome.NOTHING:
            outcome = Outcome.FAILURE
        super().leave(permit, outcome, now, connects)


class IgnoresConnections(Circuit):
    """A new connection does not end the pause."""

    def enter(self, now, connects, longest):
        return super().enter(now, self._connects, longest)


class PausesWithoutEnd(Circuit):
    """The pause doubles without a limit."""

    def _open(self, reason, now, connects):
        before = self._pause
        super()._open(reason, now, connects)
        self._pause = 2 * before or 1.0
        self._opens_until = now + self._pause


class RefusesWhenClosed(Circuit):
    """A closed circuit with a failure refuses checks."""

    def enter(self, now, connects, longest):
        permit = super().enter(now, connects, longest)
        return None if self.state == "closed" and self.failures > 1 else permit


CLOSES = "a_well_server_closes_the_circuit"
CIRCUITS = [
    (KeepsPermits, "each_permit_comes_back"),
    (
        KeepsThePermitOfSuccess,
        "each_permit_comes_back a_well_server_closes_the_circuit",
    ),
    (WaitsForTheLost, "each_permit_comes_back a_well_server_closes_the_circuit"),
    (CountsTheOld, "what_is_older_changes_nothing each_permit_comes_back"),
    (FloodsWhenHalfOpen, "there_are_not_too_many_trials"),
    (BlamesCancellations, "what_says_nothing_changes_nothing"),
    (IgnoresConnections, "a_new_connection_is_tried_at_once"),
    pytest.param(PausesWithoutEnd, "a_pause_ends", marks=LATE),
    (RefusesWhenClosed, "a_closed_circuit_refuses_nothing"),
]


@pytest.mark.parametrize("bug, invariant", CIRCUITS)
def test_the_model_of_the_circuit_finds_the_bug(bug, invariant):
    machine = type("Machine", (CircuitMachine,), {"make_circuit": bug})
    assert broken(machine).intersection(invariant.split())


@pytest.mark.parametrize("bug, invariant", BUS)
def test_the_model_of_the_bus_finds_the_bug(bug, invariant, monkeypatch):
    look_for(bug, invariant, BusMachine, monkeypatch)


@pytest.mark.parametrize("bug, invariant", LAYERS)
def test_the_model_of_the_layers_finds_the_bug(bug, invariant, monkeypatch):
    look_for(bug, invariant, DecisionMachine, monkeypatch)


def look_for(bug, invariant, base_machine, monkeypatch):
    """Let *base_machine* find *bug*, and check which invariant it breaks."""
    attributes = {}
    for base, places in PLACES.items():
        if issubclass(bug, base):
            for place in places:
                monkeypatch.setattr(place, bug)
    for base, name in MADE.items():
        if issubclass(bug, base):
            attributes[name] = bug
    machine = type("Machine", (base_machine,), attributes)
    assert broken(machine).intersection(invariant.split())
