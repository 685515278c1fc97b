"""A circuit breaker under any outcomes in any order, without a loop and without I/O."""

from __future__ import annotations

import itertools

from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import integers, sampled_from

from fastapi_topaz._decisions.circuit import Circuit, Outcome, Rules
from kit.invariants import Broken
from proof.model_decisions import Held
from proof.stepwise import chosen_settings


EXAMPLES, STEPS = 100, 60
LONGEST = 5.0
NUMBERS = integers(0, 999)
SETUPS = list(itertools.product((1, 3), (1, 2), (1, 2), (2.0, 5.0), (4, 100)))
OUTCOMES = [
    *(Outcome.FAILURE, Outcome.FAILURE, Outcome.SUCCESS, Outcome.SLOW),
    Outcome.NOTHING,
]


class CircuitMachine(RuleBasedStateMachine):
    """A circuit, and the books that the machine keeps beside it."""

    make_circuit = Circuit

    def __init__(self):
        super().__init__()
        self.now, self.connects = 0.0, 0
        # Permits out: each with the epoch of the books, and when it was given.
        self.out = []
        self.series = self.epoch = 0
        self.changes = []
        self.opened_at = None
        self.outcomes = []

    @initialize(setup=sampled_from(SETUPS))
    def begin(self, setup):
        failures, successes, trials, pause, calls = setup
        self.rules = Rules(
            failure_threshold=failures,
            success_threshold=successes,
            half_open_max_requests=trials,
            recovery_timeout=pause,
            minimum_calls=calls,
        )
        self.circuit = self.make_circuit(self.rules, lambda: 0.5, self.changed)

    def changed(self, before, after, _reason, _now):
        self.changes.append((before, after))
        self.epoch += 1
        self.tried = 0
        if after == "open":
            self.opened_at = self.now

    @rule()
    def ask(self):
        state, reconnected = self.circuit.state, self.connects > self.connects_then()
        permit = self.circuit.enter(self.now, self.connects, LONGEST)
        if permit is None and state == "closed":
            self.broken("a_closed_circuit_refuses_nothing", state)
        if permit is None and state == "open":
            if reconnected:
                self.broken("a_new_connection_is_tried_at_once", self.now)
            if self.now - self.opened_at >= self.rules.recovery_timeout:
                self.broken("a_pause_ends", self.now - self.opened_at)
        if permit is not None:
            self.out.append((permit, self.epoch, self.now))
        living = [x for x in self.out if x[1] == self.epoch and self.is_living(x)]
        if self.circuit.state == "half_open":
            most = self.rules.half_open_max_requests
            if len(living) > most:
                self.broken("there_are_not_too_many_trials", len(living))
            if permit is None and len(living) < most:
                self.broken("each_permit_comes_back", len(living))

    ask_often = ask

    @precondition(lambda self: self.out)
    @rule(number=NUMBERS, outcome=sampled_from(OUTCOMES))
    def ends(self, number, outcome):
        entry = self.out.pop(number % len(self.out))
        permit, epoch, _ = entry
        before, counted = self.circuit.state, len(self.changes)
        failures = self.circuit.failures
        self.outcomes.append(outcome)
        self.circuit.leave(permit, outcome, self.now, self.connects)
        self.after_open()
        is_old = epoch != self.epoch and len(self.changes) == counted
        if is_old and self.circuit.failures != failures:
            self.broken("what_is_older_changes_nothing", entry)
        if len(self.changes) > counted:
            after = self.circuit.state
            late = before == "half_open" and not self.is_living(entry)
            if epoch != self.epoch - 1 or late:
                self.broken("what_is_older_changes_nothing", entry)
            if outcome is Outcome.NOTHING:
                self.broken("what_says_nothing_changes_nothing", after)
            if after == "open" and outcome is Outcome.SUCCESS:
                self.broken("a_success_never_opens", before)

    ends_often = ends

    @rule(number=NUMBERS)
    def is_lost(self, number):
        """A trial whose task never runs again."""
        if self.out:
            self.out.pop(number % len(self.out))
            self.now += LONGEST + 1.5

    @rule(seconds=sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 11.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def reconnects(self):
        self.connects += 1

    def teardown(self):
        """From any state, a server that is well closes the circuit in bounded time."""
        if not hasattr(self, "circuit") or self.is_broken:
            return
        for _ in range(4 * self.rules.success_threshold + 4):
            permit = self.circuit.enter(self.now, self.connects, LONGEST)
            if permit is not None:
                self.circuit.leave(permit, Outcome.SUCCESS, self.now, self.connects)
            if self.circuit.state == "closed":
                return
            self.now += self.rules.recovery_timeout + LONGEST + 1
        self.broken("a_well_server_closes_the_circuit", self.circuit.state)

    # -- the books --------------------------------------------------------------------

    is_broken = False
    connects_at = 0

    def connects_then(self):
        return self.connects_at

    def after_open(self):
        is_open = self.changes and self.changes[-1][1] == "open"
        if is_open and self.opened_at == self.now:
            self.connects_at = self.connects

    def is_living(self, entry):
        return self.now < entry[2] + LONGEST + 1.0

    def broken(self, name, detail):
        self.is_broken = True
        raise Broken([(Held(name), detail)])


def test_a_circuit_keeps_all_invariants_under_any_sequence_of_outcomes():
    run_state_machine_as_test(CircuitMachine, settings=chosen_settings(EXAMPLES, STEPS))
