"""Test which checks may wait, without a pool and without a clock."""

from __future__ import annotations

import pytest

from fastapi_topaz._pool.state.admission import Admission, Load


pytestmark = pytest.mark.real_clock

FULL = Load(waiting=0, in_use=10, limit=10)


def admission(held=0.05, count=100, now=0.0):
    """Return an admission that has seen leases and answers of this duration."""
    made = Admission()
    returned(made, held, count, now)
    return made


def returned(made, held, count=1, now=0.0):
    made.held += held * count
    made.ended += count
    made.last_end = now
    made.calls.extend([(now, held)] * min(count, 64))


def full(waiting):
    return FULL._replace(waiting=waiting)


def test_without_any_returned_lease_every_check_may_wait():
    made = Admission()
    assert made.wait(full(1000), 0) == 0
    assert made.refuses(full(1000), 0.001, 0.001, 0) is None


def test_the_wait_is_the_interval_of_returned_leases_times_the_place_in_the_queue():
    made = admission(held=0.05)
    assert made.wait(full(0), 0) == pytest.approx(0.005)
    assert made.wait(full(99), 0) == pytest.approx(0.5)
    assert made.wait(Load(99, 2, 2), 0) == pytest.approx(2.5)


def test_a_check_is_refused_if_its_wait_and_its_call_exceed_what_is_left():
    made = admission(held=0.05)
    # 100 x 0.005 of wait, and 0.05 for the call.
    assert made.refuses(full(99), 0.551, 10, 0) is None
    assert made.refuses(full(99), 0.549, 10, 0) == pytest.approx(0.5)


def test_with_no_call_under_way_a_check_is_never_refused():
    made = admission(held=100)
    assert made.refuses(Load(50, 0, 10), 0.1, 0.1, 0) is None


def test_a_queue_that_stands_is_kept_below_a_quarter_of_the_budget():
    made = admission(held=0.05)
    made.queue_begins(0)
    # A quarter of 1 s, less the call: 0.2 s, so 39 callers.
    for now in (0.0, 0.5):
        assert made.refuses(full(50), 1, 1, now) is None
    assert made.refuses(full(38), 1, 1, 0.6) is None
    assert made.refuses(full(50), 1, 1, 0.6) is not None
    # From now on the bound holds for a second.
    made.queue_begins(0.7)
    assert made.refuses(full(50), 1, 1, 0.8) is not None
    assert made.refuses(full(50), 1, 1, 1.9) is None


def test_a_queue_for_connections_that_are_being_opened_does_not_stand():
    made = admission(held=0.05)
    made.queue_begins(0)
    assert made.refuses(Load(50, 9, 10), 1, 1, 0.9) is None
    assert made.refuses(Load(50, 10, 10), 1, 1, 0.9) is not None


def test_a_short_wait_shows_that_the_queue_does_not_stand():
    made = admission(held=0.05)
    made.queue_begins(0)
    made.refuses(full(0), 1, 1, 0)
    made.served(0.2, 0.4)
    assert made.refuses(full(50), 1, 1, 0.55) is not None
    made = admission(held=0.05)
    made.queue_begins(0)
    made.refuses(full(0), 1, 1, 0)
    made.served(0.1, 0.4)
    assert made.refuses(full(50), 1, 1, 0.55) is None


def test_if_a_call_takes_most_of_a_quarter_an_eighth_of_the_budget_is_the_bound():
    made = admission(held=0.2)
    made.queue_begins(0)
    made.refuses(full(0), 1, 1, 0)
    # 0.125 s at intervals of 0.02 s.
    assert made.refuses(full(5), 1, 1, 0.6) is None
    assert made.refuses(full(6), 1, 1, 0.6) is not None


def test_two_intervals_of_wait_are_always_allowed():
    made = admission(held=0.2)
    one = Load(waiting=0, in_use=1, limit=1)
    made.queue_begins(0)
    assert made.refuses(one._replace(waiting=1), 0.7, 0.7, 0.6) is None
    assert made.refuses(one._replace(waiting=2), 0.9, 0.9, 0.6) is not None


def test_the_smallest_budget_of_the_last_seconds_decides_for_all():
    made = admission(held=0.01)
    made.queue_begins(0)
    made.refuses(full(0), 0.2, 0.2, 0)
    assert made.least_budget == 0.2
    made.last_end = 5
    # A quarter of 0.2 s, less the call: 0.04 s, at intervals of 0.001 s.
    assert made.refuses(full(38), 10, 10, 5) is None
    assert made.refuses(full(45), 10, 10, 5) is not None
    assert made.least_budget == 0.2
    made.refuses(full(0), 10, 10, 11)
    made.refuses(full(0), 10, 10, 22)
    assert made.least_budget == 10


def test_a_slower_server_is_noticed_within_some_leases_and_a_faster_one_later():
    made = admission(held=0.05, count=1000)
    made.refuses(full(0), 1, 1, 0)
    returned(made, 0.5, count=20, now=0.5)
    made.refuses(full(0), 1, 1, 0.5)
    slow = made.wait(full(0), 0.5)
    assert 0.03 < slow < 0.05
    returned(made, 0.05, count=20, now=0.6)
    assert slow * 0.1 < made.wait(full(0), 0.6) < slow


def test_an_old_estimate_loses_half_each_second():
    made = admission(held=1, now=0)
    for age, share in ((0, 1), (1, 1), (2, 0.5), (4, 0.125)):
        assert made.wait(Load(0, 5, 10), age) == pytest.approx(0.1 * share)


def test_a_full_pool_without_returned_leases_for_two_seconds_is_stalled():
    made = admission(held=0.01, now=0)
    made.queue_begins(1)
    # The queue began at 1, so the stall counts from there.
    assert made.wait(full(1), 3) < 0.01
    assert made.wait(full(1), 8) == pytest.approx(2 * 5 / 10)
    # Without a queue, or with a free lease, the pool was just not used.
    assert made.wait(full(0), 8) < 0.01
    assert made.wait(Load(1, 9, 10), 8) < 0.01


def test_the_usual_time_of_a_call_is_the_median_of_the_last_64():
    made = Admission()
    assert made.call == 0
    made.calls.extend([(0.0, 9.0)] * 64)
    made.calls.extend([(0.0, 0.01)] * 33)
    assert made.call == 0.01


def test_calls_that_ended_long_before_the_last_one_do_not_count():
    """Otherwise a pool with few checks would hide for long that a server is slow."""
    made = Admission()
    made.calls.extend([(0.1 * each, 0.01) for each in range(60)])
    made.calls.extend([(9.0 + 0.1 * each, 5.0) for each in range(10)])
    assert made.call == 5.0


def test_a_few_calls_count_however_old_they_are():
    made = Admission()
    made.calls.extend([(0.0, 0.01)] * 7)
    made.calls.append((100.0, 5.0))
    assert made.call == 0.01


def test_an_estimate_for_the_status_changes_nothing():
    made = admission(held=0.05)
    before = (made.held, made.ended)
    made.wait(full(3), 0)
    assert (made.held, made.ended) == before


def test_a_new_server_is_met_without_a_past():
    made = admission(held=5.0)
    made.queue_begins(0)
    made.refuses(full(50), 100, 10, 0)
    made.refuses(full(50), 100, 10, 6)
    returned(made, 5.0, now=6)
    made.forget()
    assert made.wait(full(9), 6) == 0
    returned(made, 0.05, now=6)
    assert made.wait(full(9), 6) == pytest.approx(0.05)
    made.queue_begins(6)
    # The short bound no longer holds.
    assert made.refuses(full(499), 100, 10, 6.5) is None


def test_leases_count_once():
    made = admission(held=0.05)
    made.refuses(full(0), 1, 1, 0)
    returned(made, 0.05, count=10)
    assert made.wait(full(0), 0) == pytest.approx(0.005)


def test_the_smallest_budget_is_remembered_for_one_more_period():
    made = admission()
    least = []
    for now, budget in [(0, 1), (1, 0.5), (2, 2), (11, 10), (12, 4), (22, 10)]:
        made.refuses(full(0), budget, budget, now)
        least.append(made.least_budget)
    assert least == [1, 0.5, 0.5, 0.5, 0.5, 4]


def test_a_wait_below_an_eighth_of_the_budget_is_short():
    made = admission()
    made.refuses(full(0), 1, 1, 0)
    for waited, since in [(0.12, 5.0), (0.13, 0.0)]:
        made.queue_begins(0)
        made.served(waited, 5.0)
        assert made.stands_since == since


def test_if_a_call_takes_less_than_half_of_a_quarter_that_is_the_bound():
    made = admission(held=0.1)
    made.queue_begins(0)
    made.refuses(full(0), 1, 1, 0)
    # 0.25 - 0.1 s, at intervals of 0.01 s.
    assert made.refuses(full(13), 1, 1, 0.6) is None
    assert made.refuses(full(15), 1, 1, 0.6) is not None
