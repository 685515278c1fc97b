"""
A pool under any events in any order, on both backends, in virtual time.

After each step, once no task can continue by itself, all `invariants` hold. At the end
the full capacity is available at once, and the closed pool leaves nothing.
"""

from __future__ import annotations

import itertools
import logging
import sys
from functools import partial

import pytest
from hypothesis.stateful import (
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import integers, lists, sampled_from

from fastapi_topaz.testing import fail, hang, ok, slow
from proof.model_pool import PoolBooks, at_once
from proof.stepwise import OnAsyncio, OnTrio, chosen_settings


EXAMPLES, STEPS = 40, 40
"""
For one backend. By default, half of EXAMPLES run.

`--hypothesis-profile=deep` multiplies EXAMPLES.
"""

NUMBERS = integers(0, 999)
SETUPS = [
    {"max_connections": most, "streams_per_connection": streams, **rest}
    for most, streams, rest in itertools.product(
        (2, 1, 3),
        (1, 2),
        (
            {"min_connections": 0},
            {"min_connections": 1, "max_lifetime": 40},
            {"min_connections": 1, "max_waiting": 2, "max_retries": 1},
        ),
    )
]
FATES = ["hung up", "dead", "frozen", "refused", "well"]
MODES = [ok(), ok(), slow(1.5), fail(), hang()]


class PoolMachine(PoolBooks):
    """The events of a pool on asyncio; `OnTrioMachine` is the same on trio."""

    @initialize(setup=sampled_from(SETUPS), opened=sampled_from([True, False]))
    def begin(self, setup, opened):
        self.pool = self.make_pool(
            connector=self.server,
            acquire_timeout=1000,
            connection_timeout=10,
            max_idle_time=15,
            idle_check_interval=7,
            health_check_interval=11,
            health_check_timeout=2,
            **setup,
        )
        self.do(*([self.start_opening] if opened else []))

    # -- callers ----------------------------------------------------------------------

    @rule(timeout=sampled_from([1000, 1000, 3, 0.5, 0]))
    def acquire(self, timeout):
        self.do(partial(self.start_caller, timeout))

    @rule(count=integers(2, 4), timeout=sampled_from([1000, 2]))
    def many_acquire(self, count, timeout):
        self.do(*[partial(self.start_caller, timeout)] * count)

    @rule(count=integers(1, 4), budget=sampled_from([5, 1, 0.3]))
    def check(self, count, budget):
        """Begin checks, which the pool may refuse if their answer would be late."""
        self.do(*[partial(self.start_caller, 1000, budget)] * count)

    @precondition(lambda self: self.holders)
    @rule(number=NUMBERS)
    def release_explicitly(self, number):
        self.do(partial(self.release, self.one_of(number, self.holders)))

    @precondition(lambda self: self.holders)
    @rule(number=NUMBERS, last_words=sampled_from([True, False]))
    def leave_the_block(self, number, last_words):
        """
        Release, perhaps after a call that a bad connection breaks or leaves unanswered.
        """
        caller = self.one_of(number, self.holders)
        caller.last_words = last_words
        self.do(caller.leave.set)

    @precondition(lambda self: self.given_back)
    @rule(number=NUMBERS)
    def release_twice(self, number):
        conn = self.one_of(number, self.given_back[-5:])

        def again():
            with pytest.raises(ValueError, match="before"):
                at_once(self.pool.release(conn))

        self.do(again)

    @precondition(lambda self: self.waiters)
    @rule(number=NUMBERS, natively=sampled_from([False, True]))
    def cancel_a_waiter(self, number, natively):
        waiter = self.one_of(number, self.waiters)
        self.do(partial(self.cancel, waiter, natively=natively))

    @precondition(lambda self: self.holders)
    @rule(number=NUMBERS, natively=sampled_from([False, True]))
    def cancel_a_holder(self, number, natively):
        holder = self.one_of(number, self.holders)
        self.do(partial(self.cancel, holder, natively=natively))

    @rule(numbers=lists(NUMBERS, min_size=2, max_size=4))
    def do_in_one_tick(self, numbers):
        """Race: a hand-over against a cancellation, a close, or a new caller."""
        self.do(*[self.action(number) for number in numbers])

    # -- the server -------------------------------------------------------------------

    @rule(mode=sampled_from(MODES))
    def server_changes(self, mode):
        self.server.default = mode
        self.do()

    @rule(closes=sampled_from(["at once", "at once", "never", "with an error"]))
    def closing_changes(self, closes):
        self.server.closes = closes
        self.do()

    @precondition(lambda self: self.server.open)
    @rule(number=NUMBERS, how=sampled_from(FATES))
    def connection_changes(self, number, how):
        """Choose the outcome of the next call, loss check or probe."""
        conn = self.one_of(number, self.server.open)
        conn.hung_up = conn.hung_up or how == "hung up"
        conn.alive, conn.frozen = how != "dead", how == "frozen"
        conn.refuses = "no upstream" if how == "refused" else ""
        conn.was_unwell |= how in {"hung up", "dead", "frozen"}
        if conn.hung_up:
            self.well_for = 0.0  # the next connections are made after longer pauses
        self.do()

    @precondition(lambda self: self.server.open)
    @rule()
    def all_are_refused(self):
        """
        Refuse calls until it is an outage, if a call or a health check detects it.
        """
        self.is_well = False
        for conn in self.server.open:
            conn.alive, conn.frozen, conn.refuses = True, False, "no upstream"
        for caller in self.holders[:1]:
            caller.last_words = True
            self.do(caller.leave.set)
        self.driver.advance(2, self.look)
        self.do()

    # -- time, and what the application does ------------------------------------------

    @rule(seconds=sampled_from([0.05, 0.2, 0.5, 1, 2, 2, 5, 12, 30]))
    def time_passes(self, seconds):
        self.is_well = False
        self.driver.advance(seconds, self.look)
        self.do()

    @rule(seconds=sampled_from([0.5, 3, 30]))
    def time_jumps(self, seconds):
        """Jump, as when the process was stopped or the loop was blocked."""
        self.driver.jump(seconds)
        self.looked_at = self.now
        self.do()

    @rule(least=integers(0, 2), more=integers(0, 2))
    def resize(self, least, more):
        self.do(partial(self.set_limits, least, max(1, least + more)))

    @rule()
    def drain(self):
        self.do(self.pool.drain)

    @precondition(lambda self: self.should_be_open and self.aged > 8)
    @rule(grace=sampled_from([0, 1, 10]))
    def close(self, grace):
        self.do(partial(self.start_closing, grace))

    @precondition(lambda self: self.should_be_open and self.aged > 8)
    @rule(grace=sampled_from([1, 10]))
    def close_while_connecting(self, grace):
        """Close with one open lease, for which the grace exists."""
        self.server.default = ok()
        self.do(partial(self.start_caller, 1000))
        self.server.default = slow(1.5)
        self.do(*[partial(self.start_caller, 1000)] * 3)
        self.do(partial(self.start_closing, grace))

    @precondition(lambda self: self.closers)
    @rule()
    def cancel_close(self):
        """Cancel a close, which gives up the grace but still closes."""
        if self.grace_given:
            self.close_by = min(self.close_by, self.now)
        self.do(self.closers[0].cancel)

    @precondition(lambda self: self.phase != "open")
    @rule()
    def reopen(self):
        self.do(self.start_opening)

    reopen_soon = reopen_at_last = reopen

    # -- the end ----------------------------------------------------------------------

    def teardown(self):
        try:
            if self.is_well and hasattr(self, "pool"):
                self.quiesce()
        finally:
            self.driver.close()

    def quiesce(self):
        """The full capacity is available, and the closed pool leaves nothing."""
        self.server.default, self.server.closes = ok(), "at once"
        for conn in self.server.open:
            conn.alive, conn.frozen, conn.refuses = True, False, ""
        self.do(*[caller.leave.set for caller in self.callers])
        self.time_passes(60)
        assert not self.callers, "all callers were served and have left"
        if self.phase != "open":
            self.reopen()
        capacity = self.pool.status().streams_max
        self.do(*[partial(self.start_caller, 10)] * capacity)
        assert len(self.held) == capacity, (
            "the full capacity is available without waiting"
        )
        self.acquire(0)
        assert len(self.held) == capacity, "and not more"
        self.do(*[caller.leave.set for caller in self.callers])
        self.close(0)
        assert [conn.closed for conn in self.server.connections] == (
            [1] * len(self.server.connections)
        ), "each connection was closed once"


class OnTrioMachine(PoolMachine):
    driver = OnTrio


class OnEagerAsyncioMachine(PoolMachine):
    driver = partial(OnAsyncio, eager=True)


MACHINES = [PoolMachine, OnTrioMachine]
if sys.version_info >= (3, 12):
    MACHINES.append(OnEagerAsyncioMachine)


@pytest.fixture(autouse=True)
def _no_log(caplog):
    caplog.set_level(logging.ERROR, logger="fastapi_topaz")


@pytest.mark.parametrize("machine", MACHINES)
def test_the_pool_keeps_all_invariants_under_any_sequence_of_events(machine):
    chosen = chosen_settings(EXAMPLES, STEPS)
    machine.steps = 0
    run_state_machine_as_test(machine, settings=chosen)
    print(f"{chosen.max_examples} examples, {machine.steps} steps")  # noqa: T201
