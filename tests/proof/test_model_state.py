"""
The state of a pool under any changes in any order, without a loop and without I/O.

The machine does to the state everything that an open pool does, and keeps its own
books. After each step all `invariants` of a state hold. At the end nothing is left.
"""

from __future__ import annotations

import itertools
from random import Random

import attrs
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import integers, sampled_from

from fastapi_topaz import ConnectionPool
from fastapi_topaz._pool.state.pool_state import PoolState
from fastapi_topaz._pool.state.slot import Claim
from fastapi_topaz.exceptions import ConnectFailed
from kit.invariants import EVERYWHERE, OF_THE_STATE, check, usable
from kit.states import Link
from proof.stepwise import chosen_settings


EXAMPLES, STEPS = 60, 60
"""The defaults. `--hypothesis-profile=deep` multiplies the first."""

# One number decides everything about a step. If a step draws many values, Hypothesis
# varies a few examples instead of making new ones.
NUMBERS = integers(0, 2**16 - 1)
SETUPS = [*itertools.product((4, 3, 2, 1), (0, 1, 2), (1, 2, 3), *[(True, False)] * 2)]


class StateMachine(RuleBasedStateMachine):
    """A state, and the books that the machine keeps beside it."""

    make_state = PoolState
    steps = 0

    def __init__(self):
        super().__init__()
        self.is_well = True
        self.numbers = itertools.count(1)
        self.now = 0.0
        # In the order of arrival; which callers hold a token; which were served.
        self.queue, self.holders, self.held = [], set(), []
        self.came, self.unfit = {}, set()
        self.served_now, self.begun_now = [], []
        # In the order in which they began, unlike the set of the state.
        self.slots, self.being_closed, self.gone, self.probing = [], [], [], []
        self.number_before = self.tokens_before = 0
        self.declared_before, self.refused_now = False, []
        # When each slot last became ready or was leased, by the number of the step.
        self.turns, self.chosen_now = {}, []
        # The leases at each time, and the slots before and after each search.
        self.levels, self.reaped_now = [], []
        self.answered_before, self.unanswered_now = set(), []
        self.grace_is_over = False

    @initialize(setup=sampled_from(SETUPS))
    def begin(self, setup):
        maximum, minimum, streams, prompt, spreads = setup
        options = ConnectionPool(
            min_connections=min(minimum, maximum),
            max_connections=maximum,
            streams_per_connection=streams,
            max_idle_time=20,
            max_lifetime=60,
        ).options
        self.state = self.make_state(options, Random(0).random, spreads=spreads)
        # Whether the host's tasks run after each change, or only as separate steps.
        self.at_rest = prompt

    # -- the books -----------------------------------------------------------------

    @invariant()
    def all_invariants_hold(self):
        self.is_well = False
        self.unanswered_now = self.state.unanswered_ends[:]
        self.state.unanswered_ends.clear()
        self.levels.append((self.now, len(self.held)))
        self.levels = [each for each in self.levels if each[0] > self.idle_since]
        check(self, EVERYWHERE, OF_THE_STATE)
        state = self.state
        served = {claim.slot for claim in self.served_now}
        self.turns = {
            slot: self.turns.get(slot, type(self).steps)
            if slot not in served
            else type(self).steps
            for slot in state.ready
        }
        self.chosen_now, self.reaped_now = [], []
        self.number_before = len(self.slots)
        self.tokens_before = self.tokens
        self.unfit = {
            x for x in state.open if x.connection.lost or x.retired is not None
        }
        self.served_now, self.begun_now, self.refused_now = [], [], []
        self.declared_before = state.outage.declared
        self.answered_before = {x for x in usable(state) if x.answered}
        type(self).steps += 1
        self.is_well = True

    def step(self, number=0):
        self.is_well = False
        self.number = number

    def one_of(self, things):
        self.number, which = divmod(self.number, len(things))
        return things[which]

    @property
    def tokens(self):
        return len(self.holders)

    @property
    def idle_since(self):
        return self.now - self.state.options.max_idle_time

    @property
    def peak(self):
        """The most leases at once that were out since `idle_since`."""
        return max(level for at, level in self.levels if at > self.idle_since)

    @property
    def under_way(self):
        return [slot for slot in self.slots if slot in self.state.connecting]

    # -- the steps that an open pool makes by itself -------------------------------

    def after_change(self):
        # Like the limiter: in the order of the waiting callers.
        for claim in self.queue:
            if len(self.holders) < self.state.options.capacity:
                self.holders.add(claim)
        self.state.retire_expired()
        self.served(self.state.serve(self.tokens, self.now))
        if self.at_rest:
            self.host()

    def served(self, leases):
        self.queue = [claim for claim in self.queue if claim not in leases]
        self.held += leases
        self.served_now += leases

    def host(self):
        state = self.state
        self.being_closed += state.to_close
        state.to_close.clear()
        for slot in state.to_probe:
            self.probe(slot)
        state.to_probe.clear()
        while (slot := state.outage.due(self.now)) is not None:
            assert slot.retired is None
            self.probing.append(slot)
        assert state.outage.next_at(self.now) > self.now, (
            "no connection is overdue any more"
        )
        if state.attempts.overdue(self.now) or state.room() <= 0:
            self.dismiss_hopeless()
        assert state.attempts.next_overdue() > self.now, "an overdue attempt is marked"
        wanted = state.shortfall(self.tokens, self.now)
        if wanted and state.attempts.forget(self.now):
            wanted = state.shortfall(self.tokens, self.now)
        for _ in range(wanted):
            coming = state.attempts.coming(waiting=bool(state.waiting))
            cautious = state.attempts.is_cautious(self.now) or state.outage.is_silent
            self.begun_now.append((coming, cautious, len(usable(state))))
            self.slots.append(state.begin(self.now))
        assert not state.shortfall(self.tokens, self.now), "no attempt is left over"

    def probe(self, slot):
        if slot.retired is None and not slot.probing:
            slot.probing = True
            self.probing.append(slot)

    def connections_changed(self):
        self.dismiss_hopeless()
        self.after_change()

    def dismiss_hopeless(self):
        if self.state.hopeless(self.now):
            assert self.state.attempts.failures
            assert not usable(self.state)
            assert all(slot.overdue for slot in self.state.connecting)
            self.dismiss(self.state.fail_waiting(ConnectFailed("no")))

    def dismiss(self, dismissed):
        self.holders.difference_update(dismissed)
        self.queue = [claim for claim in self.queue if claim not in dismissed]

    def ended(self, slot):
        self.slots.remove(slot)
        self.gone.append(slot)

    # -- callers ---------------------------------------------------------------------

    @precondition(lambda self: not self.state.shut)
    @rule(number=NUMBERS)
    def acquire(self, number):
        self.step(number)
        claim = Claim()
        claim.deadline = self.now + self.one_of([1000, 1000, 3])
        self.came[claim] = next(self.numbers)
        free = len(self.holders) < self.state.options.capacity
        ready = {slot: slot.leases for slot in self.state.ready}
        if free and self.state.take(claim, self.now):
            self.holders.add(claim)
            self.served([claim])
            self.chosen_now.append((claim.slot, ready))
            if self.state.unhandled_loss or self.state.to_probe:
                self.after_change()
        else:
            self.state.enqueue(claim)
            self.queue.append(claim)
            self.after_change()

    acquire_often = acquire_more_often = acquire

    @precondition(lambda self: not self.state.shut)
    @rule()
    def acquire_without_waiting(self):
        self.step()
        self.state.want_one()
        self.after_change()

    @precondition(lambda self: self.held)
    @rule(number=NUMBERS)
    def give_back(self, number):
        self.step(number)
        claim = self.one_of(self.held)
        self.held.remove(claim)
        if self.one_of([True, False]):
            claim.slot.proven_at, claim.slot.answered = self.now, True
        self.state.give_back(claim, self.now)
        self.holders.remove(claim)
        self.after_change()

    give_back_often = give_back

    @precondition(lambda self: self.queue or self.held)
    @rule(number=NUMBERS)
    def withdraw(self, number):
        """Cancel a caller, even in the tick in which it is served."""
        self.step(number)
        claim = self.one_of(self.queue + self.held)
        self.state.withdraw(claim, self.now)
        (self.queue if claim in self.queue else self.held).remove(claim)
        self.holders.discard(claim)
        self.after_change()

    @precondition(lambda self: self.queue)
    @rule()
    def time_is_over(self):
        """
        A caller in front leaves. The pool handles callers behind it in another way.
        """
        self.step()
        self.dismiss(self.state.dismiss(self.now))
        self.after_change()

    @precondition(lambda self: self.state.open)
    @rule(number=NUMBERS)
    def call_ends(self, number):
        """Release a lease. Its connection may have ended before it."""
        self.step(number)
        state, slot = self.state, self.one_of([*self.state.open, *self.gone[-1:]])
        if self.one_of([True, False]):
            slot.proven_at, slot.answered = self.now, True
        self.one_of([state.suspect, state.broke, state.timed_out])(slot, self.now)
        self.after_change()

    @precondition(lambda self: self.state.open)
    @rule(number=NUMBERS)
    def call_is_refused(self, number):
        self.step(number)
        slot = self.one_of([*self.state.open, *self.gone[-1:]])
        if slot.retired is None:
            self.refused_now.append(slot)
        self.state.refused(slot, self.now)
        self.after_change()

    # -- connections -----------------------------------------------------------------

    @precondition(lambda self: self.state.connecting)
    @rule(number=NUMBERS)
    def attempt_succeeds(self, number):
        self.step(number)
        slot = self.one_of(self.under_way)
        limit = self.one_of([1, None, 2, float("inf")])
        self.state.connected(slot, Link(limit), self.now)
        self.connections_changed()

    attempt_succeeds_often = attempt_succeeds_mostly = attempt_succeeds

    @precondition(lambda self: self.state.connecting)
    @rule(number=NUMBERS)
    def attempt_fails(self, number):
        self.step(number)
        slot = self.one_of(self.under_way)
        self.ended(slot)
        how = self.one_of(["error", "error", "permanent error", "cancelled"])
        if how == "cancelled":
            self.state.attempts.cancelled(slot)
        else:
            error = ConnectFailed("no", permanent=how == "permanent error")
            self.state.connect_failed(slot, error, self.now)
        self.connections_changed()

    @precondition(lambda self: self.probing)
    @rule(number=NUMBERS)
    def probe_ends(self, number):
        self.step(number)
        slot = self.one_of(self.probing)
        self.probing.remove(slot)
        how = self.one_of(["answered", "unanswered", "refused", "answered"])
        if how == "answered":
            self.state.answered(slot, self.now)
        elif slot.retired is None and how == "refused":
            self.refused_now.append(slot)
            began = max(slot.opened_at, self.now - self.one_of([0.0, 0.01, 3.0]))
            error = ConnectFailed("refused", reason="unavailable")
            self.state.probe_refused(slot, error, began, self.now)
            if self.state.is_refused:
                self.dismiss(self.state.fail_waiting(error))
        elif slot.retired is None:
            self.state.unanswered(slot, self.now)
        slot.probing = False
        self.connections_changed()

    probe_ends_often = probe_ends

    @precondition(lambda self: self.state.outage.refused)
    @rule(number=NUMBERS)
    def all_are_refused(self, number):
        """Refuse each probe for long enough to be an outage, but not in every run."""
        self.step(number)
        if self.one_of(range(4)):
            return
        error = ConnectFailed("refused", reason="unavailable")
        for _ in range(6):
            for slot in usable(self.state):
                self.state.probe_refused(slot, error, self.now, self.now)
            self.now += 0.2
        if self.state.is_refused:
            self.dismiss(self.state.fail_waiting(error))
        self.connections_changed()

    @precondition(lambda self: self.state.open)
    @rule(number=NUMBERS)
    def other_side_hangs_up(self, number):
        self.step(number)
        self.one_of([*self.state.open]).connection.lost = True
        if self.one_of([True, False]):
            for slot in [*self.state.open]:
                unhandled_loss = slot.connection.lost and slot.retired is None
                assert self.state.retire_if_lost(slot, self.now) == unhandled_loss
            self.connections_changed()

    @precondition(lambda self: self.being_closed)
    @rule(number=NUMBERS)
    def closing_ends(self, number):
        self.step(number)
        slot = self.one_of(self.being_closed)
        self.being_closed.remove(slot)
        self.state.closed(slot)
        self.ended(slot)
        self.after_change()

    closing_ends_often = closing_ends

    # -- maintenance -----------------------------------------------------------------

    @rule(number=NUMBERS)
    def time_passes(self, number):
        self.step(number)
        self.now += self.one_of([0.0, 0.01, 0.1, 1.0, 2.0, 5.0, 30.0, 90.0])
        if self.at_rest or self.one_of([True, False]):
            self.host()

    @precondition(lambda self: self.state.open)
    @rule()
    def check_health(self):
        self.step()
        for slot in self.state.open:
            if not slot.suspect:
                self.probe(slot)

    @precondition(lambda self: self.state.open)
    @rule()
    def reap(self):
        self.step()
        self.levels.append((self.now, len(self.held)))
        before = {slot: slot.streams for slot in usable(self.state)}
        self.state.reap(self.now)
        left = {slot: slot.streams for slot in usable(self.state)}
        refused = self.state.outage.refused
        well = {slot: each for slot, each in left.items() if slot not in refused}
        self.reaped_now.append((before, left, well, self.peak))
        self.after_change()
        self.all_invariants_hold()
        assert len(left) >= min(len(before), self.state.options.min_connections)

    @precondition(lambda self: self.state.open)
    @rule(number=NUMBERS)
    def retire_expired(self, number):
        self.step(number)
        rotation = self.state.rotation
        if self.one_of([True, False]):
            rotation.drain(self.state.open)
        rotation.expire(self.state.open, self.now)
        assert rotation.next_at(self.state.open) > self.now
        self.after_change()

    @rule(number=NUMBERS)
    def resize(self, number):
        self.step(number)
        maximum = self.one_of([4, 3, 2, 1, 5])
        minimum = self.one_of(range(maximum))
        limits = {"min_connections": minimum, "max_connections": maximum}
        self.state.resize(attrs.evolve(self.state.options, **limits))
        self.connections_changed()

    @precondition(lambda self: len(self.gone) > 6 and not self.state.shut)
    @rule()
    def shut_down(self):
        self.step()
        self.state.shut_down()
        self.dismiss(self.state.fail_waiting(ConnectFailed("no")))
        self.after_change()

    # -- the end ---------------------------------------------------------------------

    def teardown(self):
        if self.is_well and hasattr(self, "state"):
            self.quiesce()

    def quiesce(self):
        """Whatever happened, nothing may be left."""
        state = self.state
        self.shut_down()
        self.all_invariants_hold()
        for slot in self.under_way[::2]:
            state.connected(slot, Link(), self.now)
        for slot in self.under_way:
            state.attempts.cancelled(slot)
            self.ended(slot)
        for claim in self.held[::2]:
            self.held.remove(claim)
            self.holders.remove(claim)
            state.give_back(claim, self.now)
        self.all_invariants_hold()
        state.abandon()
        self.grace_is_over = True
        self.all_invariants_hold()
        assert not state.open
        for claim in self.held:
            state.give_back(claim, self.now)
        self.host()
        for slot in self.being_closed:
            state.closed(slot)
            self.ended(slot)
        assert not self.slots, "each connection was closed"
        assert state.rotation.is_idle()
        assert not any((state.open, state.connecting, state.closing, state.waiting))
        assert state.in_use == 0


def test_the_state_keeps_all_invariants_under_any_sequence_of_events():
    chosen = chosen_settings(EXAMPLES, STEPS)
    StateMachine.steps = 0
    run_state_machine_as_test(StateMachine, settings=chosen)
    print(f"{chosen.max_examples} examples, {StateMachine.steps} steps")  # noqa: T201
