"""Test how the adaptive limit follows the calls, without a pool."""

from __future__ import annotations

import pytest

from fastapi_topaz._pool.state.limit import AdaptiveLimit, _Hold
from fastapi_topaz._pool.state.slot import Check


pytestmark = pytest.mark.real_clock


class Calls:
    """Makes calls at a limit, at a time that moves with each cohort."""

    def __init__(self, connections=10, capacity=500, budget=1.0):
        self.limit = AdaptiveLimit(connections, capacity)
        self.budget = budget
        self.now = 0.0

    def begin(self, in_use=None, left=None):
        claim = Check()
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
    # That is now the usual time of the server, so the limit rises.
    assert calls.cohort(0.15, refused=100) == 256
    assert calls.limit.reason == "quick"


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
    calls = Calls(budget=5.0)
    for _ in range(calls.limit._size):
        calls.begin()
    begun = calls.limit._begun
    calls.now = 9.9
    calls.begin()
    assert calls.limit._begun == begun
    calls.now = 10.1
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


# -- each rule at its bounds ----------------------------------------------------------

IDLE = {"full": False}
PRESSED = {"refused": 100}


def limits(*cohorts, start=0.0, **options):
    """Return the limit after each cohort: a time for its calls, and more arguments."""
    calls = Calls(**options)
    calls.now = start
    return [calls.cohort(held, **more) for held, more in cohorts]


@pytest.mark.parametrize(
    "cohorts, expected",
    [
        # Quick is less than 0.15 of the budget. Very quick is less than 1.3 times the
        # shortest usual time, or than 0.1.
        ([(0.12, {})], [32]),
        ([(0.05, {}), (0.08, {})], [32, 64]),
        ([(0.05, {}), (0.11, {})], [32, 36]),
        # Between 0.15 and 0.2: a trial, if it is at most 1.5 times the shortest time.
        ([(0.1, IDLE), (0.18, {})], [16, 16]),
        # A trial that is judged by sqrt(2) times the answers.
        ([(0.17, {}), (0.233, {})], [32, 32]),
        # Pressure: a tenth refused, or a twentieth lost, or long and longer than usual.
        ([(0.25, {"refused": 3})] * 2, [16, 16]),
        ([(0.25, {"refused": 4})] * 2, [16, 11]),
        ([(0.25, {"lost": 1 / 32})] * 2, [16, 16]),
        ([(0.25, {"lost": 3 / 32})] * 2, [16, 11]),
        ([(0.2, IDLE), (0.45, IDLE)], [16, 8]),
        ([(0.1, IDLE), (0.25, IDLE), (0.25, IDLE)], [16, 16, 16]),
        ([(0.45, IDLE)] * 3, [16, 16, 16]),
        # The cut is to between 0.5 and 0.7.
        ([(0.35, PRESSED)] * 2, [16, 9]),
        ([(0.5, PRESSED)], [8]),
        # A cohort that is not slow in between: then it takes two again.
        ([(0.25, PRESSED), (0.01, {}), (0.25, PRESSED)], [16, 32, 32]),
        ([(0.25, PRESSED), (0.17, IDLE), (0.25, PRESSED)], [16, 16, 16]),
        # Losses: less than 0.3 is no cut.
        ([(0.01, {"lost": 6 / 32})], [32]),
        ([(0.01, {"lost": 1 / 32})], [32]),
        # After losses the limit rises again also if the pool is not full.
        ([(0.05, IDLE), (0.05, {"lost": 0.5}), (0.05, IDLE)], [16, 2, 4]),
        ([(0.05, IDLE), (0.05, {"lost": 0.5}), (0.1, IDLE)], [16, 2, 2]),
        (
            [(0.05, IDLE), (0.05, {"lost": 0.5}), (0.3, IDLE), (0.05, IDLE)],
            [16, 2, 2, 2],
        ),
        # A smoothed median is remembered, so one quick cohort changes little.
        ([(0.1, IDLE), (0.02, IDLE), (0.102, {})], [16, 16, 32]),
        ([(0.1, IDLE), (0.132, {})], [16, 18]),
        # A cohort with losses does not count for it.
        ([(0.1, IDLE), (0.01, {"lost": 0.2, **IDLE}), (0.12, {})], [16, 16, 32]),
        # No time passes.
        ([(0.0, {})], [32]),
    ],
)
def test_each_rule_of_the_limit_at_its_bounds(cohorts, expected):
    assert limits(*cohorts) == expected


def test_a_cut_that_costs_few_answers_stays():
    quick = [(0.02, {})] * 3
    # Half of the calls, 0.68 of the answers: more than 0.5 ** 0.6.
    assert limits(*quick, (0.5, PRESSED), (0.3677, {}))[3:] == [64, 64]
    assert limits(*quick, (0.5, PRESSED), (0.39, {}))[3:] == [64, 128]


def test_after_a_cut_that_was_undone_such_calls_are_left_alone_for_two_seconds():
    calls = Calls()
    for _ in range(3):
        calls.cohort(0.02)
    assert [calls.cohort(0.3, refused=100) for _ in range(2)] == [64, 128]
    # Longer than a fifth of the budget. But the limit may rise on trial.
    after = [calls.cohort(0.3, refused=100) for _ in range(5)]
    assert after == [256, 500, 500, 500, 500]
    assert [calls.cohort(0.3, refused=100) for _ in range(2)] == [500, 333]


def test_calls_that_take_much_longer_than_those_of_an_undone_cut_are_slow_again():
    calls = Calls()
    for _ in range(3):
        calls.cohort(0.02)
    assert [calls.cohort(0.3, refused=100) for _ in range(2)] == [64, 128]
    assert [calls.cohort(0.45, refused=100) for _ in range(2)] == [128, 89]


def test_the_shortest_usual_time_is_remembered_for_a_minute():
    for pause, expected in [(50, 16), (61, 18)]:
        calls = Calls()
        calls.now = 1000.0
        calls.cohort(0.02, full=False)
        calls.now += pause
        assert calls.cohort(0.1) == expected


def test_a_short_budget_leaves_each_call_five_milliseconds():
    assert limits((0.001, IDLE), (0.0085, PRESSED), budget=0.1) == [16, 16]
    assert limits((0.001, IDLE), (0.0095, PRESSED), budget=0.1) == [16, 16]
    assert limits((0.001, IDLE), (0.0185, PRESSED), budget=0.1) == [16, 8]


def test_times_count_as_a_share_of_the_budget():
    assert limits((0.2, {}), budget=2.0) == [32]
    assert limits((0.5, PRESSED), (0.5, PRESSED), budget=2.0) == [16, 11]


@pytest.mark.parametrize("budget, expected", [(1.0, 4), (4.0, 4)])
def test_after_losses_the_limit_is_what_the_server_answers_in_the_time_for_a_call(
    budget, expected
):
    # After 29 calls, 17 are answered: 16 * 17 / (17 * 0.08 + 12) = 20.4 in one budget.
    # A call may take 0.2 of it.
    assert limits((0.08 * budget, {"lost": 12 / 32}), budget=budget) == [expected]


def test_the_smallest_limit_is_one():
    calls = Calls(2, 2)
    assert [calls.cohort(0.9, lost=1.0) for _ in range(2)] == [1, 1]


@pytest.mark.parametrize("full, expected", [(16, 32), (13, 16)])
def test_a_pool_is_full_if_it_was_for_half_of_the_calls(full, expected):
    calls = Calls()
    claims = [calls.begin(None if number < full else 0) for number in range(32)]
    for claim in claims:
        calls.end(claim, 0.01)
    assert calls.limit.limit == expected


@pytest.mark.parametrize("full, expected", [(None, 32), (0, 16)])
def test_cancelled_calls_do_not_say_whether_the_pool_is_full(full, expected):
    calls = Calls()
    claims = []
    for _ in range(calls.limit._size):
        calls.end(calls.begin(), 0.9, "cancelled")
        claims.append(calls.begin(full))
    for claim in claims:
        calls.end(claim, 0.01)
    assert calls.limit.limit == expected


def test_the_median_of_the_calls_counts():
    calls = Calls()
    claims = [calls.begin() for _ in range(32)]
    for number, claim in enumerate(claims):
        calls.end(claim, 0.01 if number < 14 else 0.3)
    assert calls.limit.limit == 16


def test_only_a_change_is_reported():
    calls = Calls()
    changes = [calls.end(claim, 0.01) for claim in [calls.begin(0) for _ in range(32)]]
    assert not any(changes)
    changes = [calls.end(claim, 0.01) for claim in [calls.begin() for _ in range(32)]]
    assert changes.count(True) == 1
    assert not calls.limit.wait(0.0, 0.001, 1.0, 0.1)
    assert calls.limit.wait(0.0, 0.001, 1.0, 0.3)
    at_capacity = Calls(capacity=16)
    assert not at_capacity.limit.wait(0.0, 0.001, 1.0, 100)


def test_a_trial_that_cannot_raise_the_limit_is_not_judged():
    assert limits((0.17, {}), (0.34, {}), (0.17, {}), capacity=16) == [16] * 3


def test_once_the_calls_were_slow_the_pool_no_longer_begins():
    calls = Calls()
    calls.cohort(0.3)
    calls.cohort(0.01)
    assert not calls.limit.grows
    calls = Calls()
    calls.cohort(0.01, lost=0.4)
    assert not calls.limit.grows


def test_at_its_capacity_the_pool_no_longer_begins_and_with_a_larger_one_again():
    calls = Calls(capacity=64)
    calls.cohort(0.01)
    assert calls.limit.grows
    calls.cohort(0.01)
    assert (calls.limit.reason, calls.limit.grows) == ("capacity", False)
    calls.limit.resize(10, 500)
    assert (calls.limit.limit, calls.limit.reason, calls.limit.grows) == (
        *(64, "start"),
        True,
    )
    calls.cohort(0.01)
    calls.limit.restart()
    assert calls.limit.reason == "quick"
    calls.limit.resize(1, 8)
    assert (calls.limit.reason, calls.limit.grows) == ("capacity", False)


def test_a_limit_that_recovers_from_losses_is_raised_because_calls_are_quick():
    calls = Calls()
    calls.cohort(0.05, lost=0.5)
    calls.cohort(0.05, full=False)
    assert calls.limit.reason == "quick"


def test_a_restart_and_a_new_size_forget_what_was_before():
    calls = Calls()
    calls.cohort(0.05, lost=0.5)
    calls.limit.restart()
    assert calls.cohort(0.05, full=False) == 16, "it does not recover from losses"
    calls.cohort(0.25, refused=100)
    calls.limit.restart()
    assert calls.cohort(0.25, refused=100) == 16, "that was the first slow cohort"
    calls = Calls()
    calls.cohort(0.17)
    calls.limit.resize(10, 500)
    assert calls.cohort(0.34) == 32, "the trial is over"


def test_a_call_with_half_of_its_budget_left_is_evidence():
    calls = Calls()
    calls.now = 100.0
    calls.begin(left=0.5)
    assert calls.limit._begun == 1
    calls.begin(left=0.49)
    assert calls.limit._begun == 1


def test_the_pause_after_a_change_that_did_not_help_doubles_up_to_a_minute():
    hold, pauses, now = _Hold(), [], 0.0
    for _ in range(7):
        hold.begin(now)
        pauses.append(hold.until - now)
        now = hold.until + 59
    assert pauses == [2, 4, 8, 16, 32, 60, 60]
    hold.begin(now + 2)
    assert hold.until == now + 4


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


def test_calls_that_have_not_ended_count_with_their_time_so_far():
    calls = Calls(budget=10.0)
    calls.now = 100.0
    claims = [calls.begin() for _ in range(calls.limit._size)]
    for claim in claims[:10]:
        calls.end(claim, 0.01)
    assert looked(calls, 101.01, last_end=101.0) == 32


def test_a_limit_that_calls_without_end_have_raised_is_not_judged():
    calls = Calls()
    assert calls.cohort(0.17) == 32
    calls.limit.wait(0.0, 0.001, 1.0, 10.0)
    assert calls.limit.limit == 64
    assert calls.cohort(0.34) == 64
