"""
Checks in any order, with a cache, shared calls, fallbacks, invalidation and time.

After each step, once no task can continue by itself, the invariants of
`model_decisions` hold. At the end each caller has ended, and nothing is left.
"""

from __future__ import annotations

import itertools
from functools import partial

import grpc
import pytest
from hypothesis.stateful import (
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import integers, sampled_from

from fastapi_topaz import ConnectFailed, ConnectionLost
from kit.decisions import http_request
from proof.model_decisions import ABOUT, SUBJECTS, DecisionBooks
from proof.stepwise import OnAsyncio, OnTrio, chosen_settings


pytestmark = pytest.mark.usefixtures("no_log")

EXAMPLES, STEPS = 40, 40
"""For one backend. `--hypothesis-profile=deep` multiplies the first."""

NUMBERS = integers(0, 999)
# Whether there is a cache, the fallback, whether there is a breaker, and a bus.
SETUPS = [
    *itertools.product(
        *((True,), ("error", "cache_then_error", "cache_then_deny")),
        *((False, True), (False,)),
    ),
    (True, "allow", True, False),
    (False, "error", False, False),
    (False, "deny", True, False),
]


def ended(code):
    metadata = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, metadata, metadata, "")


ERRORS = [
    lambda: ended(grpc.StatusCode.UNAVAILABLE),
    lambda: ended(grpc.StatusCode.INVALID_ARGUMENT),
    lambda: ConnectionLost("lost"),
    lambda: ConnectFailed("no", reason="refused"),
]


class DecisionMachine(DecisionBooks):
    """The events on asyncio; `OnTrioMachine` is the same on trio."""

    make_world = OnAsyncio

    @initialize(setup=sampled_from(SETUPS))
    def begin(self, setup):
        self.build(setup)

    @rule(number=NUMBERS, max_age=sampled_from([None, None, None, 2.0, 0]))
    def ask(self, number, max_age):
        self.do(partial(self.start, *self.who(number), max_age))

    @rule(number=NUMBERS, count=integers(2, 4))
    def many_ask(self, number, count):
        self.do(*[partial(self.start, *self.who(number), None)] * count)

    ask_often = many_ask

    @precondition(lambda self: self.server.open)
    @rule(number=NUMBERS, allowed=sampled_from([True, True, False]))
    def answer(self, number, allowed):
        call = self.server.open[number % len(self.server.open)]
        self.do(partial(call.answer, allowed))

    answer_often = answer

    @precondition(lambda self: self.server.open)
    @rule(number=NUMBERS, make_error=sampled_from(ERRORS))
    def fail(self, number, make_error):
        call = self.server.open[number % len(self.server.open)]
        self.do(partial(call.fail, make_error()))

    @precondition(lambda self: self.waiting())
    @rule(number=NUMBERS, natively=sampled_from([False, True]))
    def cancel(self, number, natively):
        waiting = self.waiting()
        self.do(partial(self.cancel_one, waiting[number % len(waiting)], natively))

    @precondition(lambda self: self.server.open)
    @rule(number=NUMBERS, natively=sampled_from([False, True]))
    def answer_and_cancel(self, number, natively):
        """The caller that asks is cancelled as its answer arrives."""
        call = self.server.open[number % len(self.server.open)]
        leader = next(c for c in self.callers if c.question is call.question)
        self.do(partial(self.cancel_one, leader, natively), partial(call.answer, True))

    @rule(about=sampled_from(ABOUT))
    def invalidate(self, about):
        self.do(partial(self.invalidate_now, about))

    @precondition(lambda self: self.server.open)
    @rule(about=sampled_from(ABOUT), number=NUMBERS)
    def invalidate_and_answer(self, about, number):
        call = self.server.open[number % len(self.server.open)]
        self.do(partial(self.invalidate_now, about), partial(call.answer, True))

    @precondition(lambda self: self.cache is not None)
    @rule()
    def clear(self):
        def clear():
            with pytest.raises(StopIteration):
                self.cache.clear().send(None)
            self.invalidations.append((self.tick(), {}))

        self.do(clear)

    @rule(seconds=sampled_from([0.0, 0.1, 1.0, 2.0, 3.0, 4.5, 6.0, 9.5, 15.0]))
    def time_passes(self, seconds):
        self.pass_time(seconds)

    @rule(seconds=sampled_from([-30.0, 30.0, -3600.0]))
    def wall_clock_changes(self, seconds):
        self.wall_shift += seconds
        self.do()

    @rule()
    def pool_reopens(self):
        def reopen():
            self.openings.reopen()
            self.opened += 1

        self.do(reopen)

    @rule()
    def pool_reconnects(self):
        self.pool.connects += 1
        self.do()

    # -- actions ----------------------------------------------------------------------

    def who(self, number):
        subject = SUBJECTS[number % len(SUBJECTS)]
        http = [*self.https, None, http_request()][number // len(SUBJECTS) % 4]
        return subject, http

    def cancel_one(self, caller, natively):
        caller.cancelled = True
        if natively and caller.cancel_task is not None:
            caller.cancel_task()
        else:
            caller.scope.cancel()

    def invalidate_now(self, about):
        about_all = {"identity": None, "policy_path": None, "resource": None, **about}
        self.freshness.invalidate(**about_all)
        self.invalidations.append((self.tick(), about))
        if self.bus is not None:
            self.bus.own.append(about)

    def teardown(self):
        if not hasattr(self, "layers"):
            return
        try:
            if not self.found:
                self.quiesce()
        finally:
            self.world.close()

    def quiesce(self):
        """Whatever happened, every caller ends and leaves nothing."""
        for _ in range(len(self.callers) + 1):
            self.do(*[partial(call.answer, True) for call in self.server.open])
        assert not self.waiting()
        assert not self.server.open
        assert not self.openings.current().flights
        for http in self.https:
            answers = http.scope.get("fastapi_topaz")
            assert answers is None or not answers.flights
        if self.cache is not None:
            self.all_hold()


class OnTrioMachine(DecisionMachine):
    """The same on trio."""

    make_world = OnTrio


@pytest.mark.parametrize("machine", [DecisionMachine, OnTrioMachine])
def test_the_layers_keep_all_invariants_under_any_sequence_of_events(machine):
    chosen = chosen_settings(EXAMPLES, STEPS)
    machine.steps = 0
    run_state_machine_as_test(machine, settings=chosen)
    print(f"{chosen.max_examples} examples, {machine.steps} steps")  # noqa: T201
