"""Test how the adaptive limit follows the calls, without a pool."""

from __future__ import annotations

import pytest

from fastapi_topaz._pool.state.limit import AdaptiveLimit
from fastapi_topaz._pool.state.slot import Claim


pytestmark = pytest.mark.real_clock


class Calls:
    """Makes calls at a limit, at a time that moves with each cohort."""

    def __init__(self, connections=10, capacity=500, budget=1.0):
        self.limit = AdaptiveLimit(connections, capacity)
        self.budget = budget
        self.now = 0.0

    def begin(self, in_use=None, left=None):
        claim = Claim()
        claim.budget = self.budget
        claim.acquired_at = self.now
        claim.due = self.now + (self.budget if left is None else left)
        in_use = self.limit.limit if in_use is None else in_use
        self.limit.begin(claim, in_use)
        return claim

    def end(self, claim, held, how="answered"):
        if how == "answered":
            claim.answered = True
        elif how == "unanswered":
            claim.unanswered = True
        return self.limit.end(claim, held, claim.acquired_at + held)

    def cohort(self, held, *, lost=0.0, refused=0, full=True):
        """Begin calls until the cohort has ended; return the new limit."""
        for _ in range(refused):
            self.limit.refused()
        in_use = None if full else 0
        claims = [self.begin(in_use) for _ in range(self.limit._size)]
        silent = round(lost * len(claims))
        for claim in claims[:silent]:
            self.end(claim, self.budget, "unanswered")
        for claim in claims[silent:]:
            self.end(claim, held)
        assert self.limit._begun == 0, "the cohort has not ended"
        self.now += held + 0.1
        return self.limit.limit


def test_it_starts_at_one_for_each_connection_or_16_and_at_most_at_the_capacity():
    assert AdaptiveLimit(10, 500).limit == 16
    assert AdaptiveLimit(40, 500).limit == 40
    assert AdaptiveLimit(10, 10).limit == 10
    assert AdaptiveLimit(10, 500).reason == "start"
    assert AdaptiveLimit(10, 10).reason == "capacity"


def test_quick_calls_double_it_up_to_the_capacity():
    calls = Calls()
    assert [calls.cohort(0.01) for _ in range(6)] == [32, 64, 128, 256, 500, 500]
    assert calls.limit.reason == "capacity"


def test_a_pool_that_is_not_full_keeps_its_limit():
    calls = Calls()
    assert [calls.cohort(0.01, full=False) for _ in range(5)] == [16] * 5


def test_slow_calls_lower_it_only_twice_in_a_row_and_under_pressure():
    calls = Calls()
    calls.cohort(0.15)
    before = calls.limit.limit
    for _ in range(5):
        assert calls.cohort(0.3, full=False) == before
    calls = Calls()
    for _ in range(3):
        calls.cohort(0.02)
    assert calls.limit.limit == 128
    assert calls.cohort(0.15, refused=100) == 128
    assert calls.cohort(0.15, refused=100) < 128
    assert calls.limit.reason == "slow"


def test_very_slow_calls_lower_it_at_once():
    calls = Calls()
    for _ in range(3):
        calls.cohort(0.02)
    assert calls.cohort(0.5, refused=100) == 64


def test_lost_calls_halve_it_at_least_and_it_never_falls_below_one():
    calls = Calls()
    assert calls.cohort(0.5, lost=0.5) <= 8
    assert calls.limit.reason == "lost"
    assert min(calls.cohort(0.9, lost=0.9) for _ in range(20)) >= 1


def test_without_any_answer_it_is_halved_and_no_more():
    calls = Calls()
    assert calls.cohort(1.0, lost=1.0) == 8
    assert calls.cohort(1.0, lost=1.0) in {4, 16}


def test_a_restart_begins_as_at_first_if_the_limit_is_lower():
    calls = Calls()
    calls.cohort(1.0, lost=1.0)
    calls.limit.restart()
    assert (calls.limit.limit, calls.limit.reason) == (16, "start")
    assert calls.cohort(0.01) == 32
    calls.limit.restart()
    assert calls.limit.limit == 32


def test_a_cut_that_makes_no_call_quicker_is_undone():
    calls = Calls()
    for _ in range(3):
        calls.cohort(0.02)
    calls.cohort(0.15, refused=100)
    assert calls.cohort(0.15, refused=100) < 128
    # A slow server, and not a queue: with fewer calls at once it answers fewer.
    assert calls.cohort(0.15, refused=100) == 128
    assert calls.limit.reason == "undone"
    # It is then left alone for two seconds.
    assert calls.cohort(0.15, refused=100) == 128


def test_a_trial_without_more_answers_is_undone():
    calls = Calls()
    calls.cohort(0.17)
    assert (calls.limit.limit, calls.limit.reason) == (32, "trial")
    # Twice the time for twice the calls: the server does no more.
    calls.cohort(0.34)
    assert (calls.limit.limit, calls.limit.reason) == (16, "undone")
    assert calls.cohort(0.17) == 16
    calls.now += 2
    assert calls.cohort(0.17) == 32


def test_cancelled_calls_and_calls_lost_with_their_connection_do_not_count():
    calls = Calls()
    for _ in range(200):
        assert not calls.end(calls.begin(), 0.9, "lost with its connection")
    assert calls.limit.limit == 16
    assert calls.cohort(0.01) == 32


def test_a_call_that_began_with_too_little_time_is_no_evidence():
    calls = Calls()
    for _ in range(200):
        assert not calls.end(calls.begin(left=0.4), 0.4, "unanswered")
    assert calls.limit.limit == 16
    # But a new pool whose callers wait for so long is overloaded.
    assert not calls.limit.grows


def test_an_answer_after_its_time_counts_as_lost():
    calls = Calls()
    claims = [calls.begin() for _ in range(calls.limit._size)]
    for claim in claims:
        calls.end(claim, 1.1)
    assert calls.limit.reason == "lost"


def test_calls_that_began_before_a_change_do_not_count_after_it():
    calls = Calls()
    old = [calls.begin() for _ in range(10)]
    calls.limit.stalled()
    for claim in old:
        calls.end(claim, 1.0, "unanswered")
    assert calls.cohort(0.01) == 32


def test_a_few_calls_that_never_end_do_not_hold_a_cohort():
    calls = Calls()
    claims = [calls.begin() for _ in range(calls.limit._size)]
    changed = [calls.end(claim, 0.01) for claim in claims[: -(len(claims) // 10)]]
    assert any(changed)


def test_many_calls_that_never_end_begin_a_new_cohort_after_two_budgets():
    calls = Calls()
    for _ in range(calls.limit._size):
        calls.begin()
    begun = calls.limit._begun
    calls.now = 1.9
    calls.begin()
    assert calls.limit._begun == begun
    calls.now = 2.1
    calls.begin()
    assert calls.limit._begun == 1


@pytest.mark.parametrize(
    "before, after, limit, reason",
    [
        ((10, 10), (20, 20), 20, "capacity"),
        ((10, 500), (5, 250), 16, "start"),
        ((10, 500), (1, 8), 8, "capacity"),
        ((40, 40), (40, 500), 40, "start"),
    ],
)
def test_resize_keeps_it_between_one_and_the_capacity(before, after, limit, reason):
    made = AdaptiveLimit(*before)
    made.resize(*after)
    assert (made.limit, made.reason) == (limit, reason)


# -- calls that do not end ------------------------------------------------------------


def looked(calls, now, *, last_end=0.0, call=0.001):
    calls.limit.wait(last_end, call, calls.budget, now)
    return calls.limit.limit


def test_if_no_call_ends_for_a_fifth_of_the_budget_the_limit_is_doubled():
    calls = Calls(budget=1.0)
    for _ in range(16):
        calls.begin()
    assert looked(calls, 0.19) == 16
    assert looked(calls, 0.21) == 32
    assert calls.limit.reason == "trial"
    # The next time after as long again.
    assert looked(calls, 0.4) == 32
    assert looked(calls, 0.42) == 64
    assert looked(calls, 0.7, last_end=0.6) == 64


def test_the_pool_waits_for_calls_for_at_most_a_second():
    calls = Calls(budget=60.0)
    assert looked(calls, 0.99) == 16
    assert looked(calls, 1.01) == 32


def test_calls_that_usually_take_longer_have_more_time():
    calls = Calls(budget=1.0)
    assert looked(calls, 0.9, call=0.25) == 16
    assert looked(calls, 1.1, call=0.25) == 32


def test_a_limit_at_its_capacity_stays_there():
    calls = Calls(capacity=16)
    assert looked(calls, 100) == 16


def test_while_the_limit_grows_a_few_long_calls_do_not_hold_the_cohort():
    calls = Calls()
    claims = [calls.begin() for _ in range(calls.limit._size)]
    for claim in claims[15:]:
        calls.end(claim, 0.01)
    # Calls end all the time, but 15 of the 32 do not.
    assert looked(calls, 0.19, last_end=0.19) == 16
    assert looked(calls, 0.21, last_end=0.21) == 32
    assert calls.limit.reason == "quick"


def test_while_the_limit_grows_many_long_calls_do_not_raise_it():
    calls = Calls()
    claims = [calls.begin() for _ in range(calls.limit._size)]
    for claim in claims[:10]:
        calls.end(claim, 0.01)
    assert looked(calls, 0.25, last_end=0.25) == 16
    assert not calls.limit.grows
