"""
Test the connect attempts: rounds, pauses, giving up, and servers that close at once.
"""

from __future__ import annotations

import heapq
from itertools import count
from random import Random

import pytest

from fastapi_topaz import ConnectionPool
from fastapi_topaz._pool.state.attempts import BRIEF, FORGIVEN, PATIENCE, Attempts
from fastapi_topaz._pool.state.backoff import DEMAND_CAP, FLOOR
from fastapi_topaz._pool.state.pool_state import PoolState
from fastapi_topaz._pool.state.slot import Slot
from fastapi_topaz.exceptions import ConnectFailed


def pause(attempts, now):
    """Return how long waiting callers have to wait for the next attempt."""
    return pytest.approx(attempts.next_attempt(waiting=True) - now)


def make_attempts(random=1.0):
    return Attempts(lambda: random, 1)


def fail(attempts, now=0.0, **options):
    attempts.failed(attempts.begin(now), ConnectFailed("no", **options), now)


def succeed(attempts, now=0.0):
    attempts.succeeded(attempts.begin(now))


def hopeless(attempts, now=0.0, **options):
    return attempts.hopeless(ConnectionPool(**options).options, now)


def pauses(attempts, now=0.0):
    """Return the pauses before the next attempt: without and with waiting callers."""
    return tuple(
        pytest.approx(attempts.next_attempt(waiting=waiting) - now)
        for waiting in (False, True)
    )


# -- rounds and pauses --------------------------------------------------------------


def test_the_first_attempt_starts_at_once():
    attempts = make_attempts()
    for waiting in (False, True):
        assert attempts.next_attempt(waiting=waiting) == float("-inf")


def test_attempts_begun_together_fail_as_one_round():
    attempts = make_attempts(random=0.5)
    slots = [attempts.begin(0.0) for _ in range(5)]
    for slot in slots:
        attempts.failed(slot, ConnectFailed("no"), 1.0)
    assert attempts.failures == 1
    assert pauses(attempts, now=1.0) == (0.05, 0.05)


def test_a_late_failure_of_a_round_does_not_lengthen_its_pause():
    attempts = make_attempts()
    first, second = attempts.begin(0.0), attempts.begin(0.0)
    attempts.failed(first, ConnectFailed("no"), 1.0)
    attempts.failed(second, ConnectFailed("still no"), 1.09)
    assert attempts.failures == 1
    assert pauses(attempts, now=1.0) == (0.1, 0.1)
    assert str(attempts.error) == "still no"


def test_an_attempt_begun_after_a_failure_is_in_the_next_round():
    attempts = make_attempts()
    fail(attempts)
    fail(attempts)
    assert attempts.failures == 2


def test_the_pause_doubles_up_to_a_cap_that_is_lower_with_waiters():
    attempts = make_attempts()
    seen = []
    for _ in range(7):
        fail(attempts, now=10.0)
        seen.append(attempts.next_attempt(waiting=False) - 10.0)
        demanded = attempts.next_attempt(waiting=True) - 10.0
        assert demanded == pytest.approx(min(DEMAND_CAP, seen[-1]))
    assert seen == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0])


def test_no_pause_is_shorter_than_its_floor():
    attempts = make_attempts(random=0.0)
    for _ in range(3):
        fail(attempts)
        assert pauses(attempts) == (FLOOR, FLOOR)


def test_one_success_resets_all_failures():
    attempts = make_attempts()
    for _ in range(5):
        fail(attempts)
    succeed(attempts)
    assert attempts.failures == 0
    assert attempts.error is None
    assert attempts.next_attempt(waiting=False) == float("-inf")
    fail(attempts)
    assert pauses(attempts) == (0.1, 0.1)


def test_a_cancelled_attempt_is_not_a_failure():
    attempts = make_attempts()
    slot = attempts.begin(0.0)
    attempts.cancelled(slot)
    assert not attempts.under_way
    assert attempts.failures == 0
    attempts.cancelled(slot)  # as after each attempt that has ended


# -- attempts that take too long ----------------------------------------------------


def test_an_overdue_attempt_does_not_count_for_waiting_callers():
    attempts = make_attempts()
    attempts.begin(10.0)
    attempts.begin(10.5)
    assert attempts.next_overdue() == 10.0 + PATIENCE
    assert not attempts.overdue(10.0 + PATIENCE - 0.01)
    assert attempts.coming(waiting=True) == 2
    assert attempts.overdue(10.0 + PATIENCE)
    assert not attempts.overdue(10.0 + PATIENCE), "an attempt becomes overdue only once"
    assert attempts.coming(waiting=True) == 1
    assert attempts.coming(waiting=False) == 2
    assert attempts.next_overdue() == 10.5 + PATIENCE


def test_without_a_pending_attempt_none_becomes_overdue():
    attempts = make_attempts()
    assert attempts.next_overdue() == float("inf")
    assert not attempts.overdue(1e9)
    attempts.begin(0.0)
    attempts.overdue(PATIENCE)
    assert attempts.next_overdue() == float("inf"), "the attempt is already overdue"


# -- when waiting becomes hopeless --------------------------------------------------


def test_waiting_is_hopeless_after_max_retries():
    attempts = make_attempts()
    for round_ in range(3):
        assert not hopeless(attempts, max_retries=2), round_
        fail(attempts)
    assert hopeless(attempts, max_retries=2)


def test_without_retries_waiting_is_hopeless_after_the_first_round():
    attempts = make_attempts()
    fail(attempts)
    assert hopeless(attempts, max_retries=5, retry_on_failure=False)
    assert not hopeless(attempts, max_retries=5)


def test_waiting_is_hopeless_an_acquire_timeout_after_the_first_failure():
    attempts = make_attempts()
    slow = attempts.begin(10.0)
    attempts.failed(slow, ConnectFailed("no"), 13.0)
    fail(attempts, now=13.5)
    assert not hopeless(attempts, 14.9, acquire_timeout=5, max_retries=9)
    assert hopeless(attempts, 15.0, acquire_timeout=5, max_retries=9)
    assert not hopeless(attempts, 1e9, acquire_timeout=float("inf"), max_retries=9)


def test_a_success_restarts_the_count_of_an_outage():
    attempts = make_attempts()
    fail(attempts, now=10.0)
    succeed(attempts, now=11.0)
    fail(attempts, now=12.0)
    assert not hopeless(attempts, 16.9, acquire_timeout=5)
    assert hopeless(attempts, 17.0, acquire_timeout=5)


def test_a_permanent_failure_is_hopeless_at_once():
    attempts = make_attempts()
    fail(attempts, reason="tls", permanent=True)
    assert hopeless(attempts, max_retries=5)


def test_waiting_is_not_hopeless_while_an_attempt_is_on_time():
    attempts = make_attempts()
    fail(attempts, permanent=True)
    attempts.begin(0.0)
    assert not hopeless(attempts)
    attempts.overdue(PATIENCE)
    assert hopeless(attempts, PATIENCE)
    attempts.begin(PATIENCE)
    assert not hopeless(attempts, PATIENCE)


def test_waiting_is_not_hopeless_before_an_attempt_fails():
    attempts = make_attempts()
    attempts.begin(0.0)
    attempts.overdue(PATIENCE)
    assert not hopeless(attempts, 1e9, max_retries=0)


# -- connections that end before their first answer ----------------------------------


def end(attempts, now, *, answered=False):
    """End a connection. This is a failure unless the connection *answered*."""
    error = None if answered else ConnectFailed("ended", reason="unanswered")
    attempts.ended(Slot(started_at=now, answered=answered), error, now)


def test_unanswered_connections_pace_the_next_attempts_with_growing_pauses():
    attempts = make_attempts()
    seen, now = [], 0.0
    for number in range(1, 6):
        succeed(attempts, now)
        end(attempts, now)
        assert (attempts.failures, attempts.unanswered) == (1, number)
        assert pauses(attempts, now)[0] == pauses(attempts, now)[1]
        seen.append(attempts.next_attempt(waiting=True) - now)
        now += 1.0
    assert seen == pytest.approx([0.1, 0.2, 0.4, DEMAND_CAP, DEMAND_CAP])
    assert attempts.error.reason == "unanswered"


def test_without_retries_an_unanswered_connection_makes_it_hopeless():
    attempts = make_attempts()
    succeed(attempts)
    end(attempts, 0.0)
    assert hopeless(attempts, retry_on_failure=False)
    assert not hopeless(attempts, max_retries=1)
    succeed(attempts)
    assert not hopeless(attempts, retry_on_failure=False)


def test_an_unanswered_connection_is_hopeless_after_an_acquire_timeout():
    attempts = make_attempts()
    attempts.ended(Slot(started_at=1.0), ConnectFailed("ended"), 3.0)
    attempts.ended(Slot(started_at=2.0), ConnectFailed("ended"), 4.0)
    assert not hopeless(attempts, 5.9, acquire_timeout=5)
    assert hopeless(attempts, 6.0, acquire_timeout=5)


def test_an_attempt_failing_with_an_unanswered_connection_counts_once():
    attempts = make_attempts()
    together = attempts.begin(0.0)
    end(attempts, 0.0)
    attempts.failed(together, ConnectFailed("no"), 0.0)
    assert attempts.failures == 1
    fail(attempts)
    assert attempts.failures == 2


def test_a_running_attempt_is_in_the_round_of_an_unanswered_connection():
    attempts = make_attempts()
    fail(attempts)
    succeed(attempts)
    together = attempts.begin(0.0)
    end(attempts, 0.0)
    attempts.failed(together, ConnectFailed("no"), 0.0)
    assert attempts.failures == 1


def test_the_end_of_an_answered_connection_causes_no_pause():
    attempts = make_attempts()
    end(attempts, 0.0, answered=True)
    assert attempts.next_attempt(waiting=True) == float("-inf")
    assert not attempts.is_cautious(0.0)
    assert (attempts.failures, attempts.error) == (0, None)


def test_a_late_idle_end_is_not_a_failure_and_resets_none():
    attempts = make_attempts()
    end(attempts, 0.0)
    attempts.ended(Slot(), None, 1.0)
    assert attempts.unanswered == 1
    end(attempts, 2.0)
    assert pauses(attempts, now=2.0) == (0.2, 0.2)


def test_an_answered_connection_resets_the_pauses():
    attempts = make_attempts()
    for now in (0.0, 1.0, 2.0):
        end(attempts, now)
    end(attempts, 3.0, answered=True)
    succeed(attempts, 3.0)
    end(attempts, 4.0)
    assert pauses(attempts, now=4.0) == (0.1, 0.1)
    assert attempts.failures == 1


def test_unanswered_connections_that_end_together_count_once():
    attempts = make_attempts()
    for _ in range(9):
        end(attempts, 0.0)
    assert pauses(attempts) == (0.1, 0.1)
    assert attempts.failures == 1


def test_a_success_does_not_end_the_pause_after_an_unanswered_connection():
    attempts = make_attempts()
    end(attempts, 0.0)
    succeed(attempts, 0.05)
    # The next attempt may not follow that success at once either.
    assert pauses(attempts) == (0.15, 0.15)


def test_the_longer_of_two_pauses_counts():
    attempts = make_attempts()
    end(attempts, 0.0)
    fail(attempts)
    fail(attempts)
    assert pauses(attempts) == (0.4, 0.4), "these are failures two and three"
    end(attempts, 0.35)
    assert pauses(attempts) == (0.55, 0.55), "the second of these failures"


def test_attempts_are_single_for_a_while_after_an_unanswered_connection():
    attempts = make_attempts()
    assert not attempts.is_cautious(0.0)
    end(attempts, 0.0)
    succeed(attempts, 0.05)
    assert attempts.is_cautious(0.1 + BRIEF - 0.01)
    assert not attempts.is_cautious(0.1 + BRIEF)
    fail(attempts, now=9.0)
    assert attempts.is_cautious(1e9)
    succeed(attempts)
    assert not attempts.is_cautious(1e9)


def test_a_connection_begun_after_a_failure_is_newer():
    attempts = make_attempts()
    fail(attempts, now=1.0)
    newer = [attempts.is_newer(Slot(started_at=now)) for now in (0.9, 1.0, 1.1)]
    assert newer == [False, True, True]
    end(attempts, 2.0)
    assert not attempts.is_newer(Slot(started_at=1.9))


@pytest.mark.parametrize("minimum", [1, 2, 5])
@pytest.mark.parametrize("connects_in, lives", [(0.001, 0.001), (0.01, 0.05)])
def test_a_server_that_accepts_and_closes_gets_few_attempts(
    minimum, connects_in, lives
):
    options = ConnectionPool(min_connections=minimum).options
    random = Random(0).random
    state = PoolState(options, random)
    state.want_one()
    begun, order, now = 0, count(), 0.0
    events = [(0.0, next(order), "look", None)]
    while events[0][0] < 10.0:
        now, _, what, slot = heapq.heappop(events)
        if what == "connected":
            state.connected(slot, object(), now)
            then = now + lives * (0.5 + random())
            heapq.heappush(events, (then, next(order), "hangs up", slot))
        elif what == "hangs up":
            state.lost(slot, "lost", now)
            state.closed(slot)
        for _ in range(state.shortfall(0, now)):
            begun += 1
            then = now + connects_in * (0.5 + random())
            new = state.attempts.begin(now)
            heapq.heappush(events, (then, next(order), "connected", new))
        if state.next_attempt() > now:
            then = state.next_attempt()
            heapq.heappush(events, (then, next(order), "look", None))
    assert 20 < begun < 20 * 10


# -- edge cases ---------------------------------------------------------------------


def test_a_later_round_counts_once_too():
    attempts = make_attempts()
    fail(attempts)
    for failures in (2, 3, 4):
        for slot in [attempts.begin(0.0) for _ in range(3)]:
            attempts.failed(slot, ConnectFailed("no"), 0.0)
        assert attempts.failures == failures


def test_a_late_end_of_an_old_round_does_not_count_again():
    attempts = make_attempts()
    late = attempts.begin(0.0)
    for _ in range(3):
        fail(attempts)
    attempts.failed(late, ConnectFailed("no"), 0.0)
    assert attempts.failures == 3


@pytest.mark.parametrize("timeout, is_hopeless", [(0, False), (0.5, True)])
def test_an_acquire_timeout_of_0_does_not_make_it_hopeless(timeout, is_hopeless):
    attempts = make_attempts()
    fail(attempts)
    assert hopeless(attempts, 1.0, acquire_timeout=timeout) is is_hopeless


def test_a_foreign_error_is_worth_a_retry():
    attempts = make_attempts()
    attempts.failed(attempts.begin(0.0), OSError("no such luck"), 0.0)
    assert not hopeless(attempts, max_retries=3)


def test_unanswered_connections_are_forgotten_after_exactly_a_minute():
    for later, pause in ((FORGIVEN, 0.2), (FORGIVEN + 0.001, 0.1)):
        attempts = make_attempts()
        end(attempts, 0.0)
        until = attempts.next_attempt(waiting=True)
        end(attempts, until + later)
        assert pauses(attempts, until + later)[1] == pause


def test_an_unanswered_end_exactly_at_the_end_of_a_pause_counts_as_next():
    attempts = make_attempts()
    end(attempts, 0.0)
    until = attempts.next_attempt(waiting=True)
    end(attempts, until)
    assert pauses(attempts, until)[1] == 0.2


def test_a_failure_after_a_later_success_is_not_an_outage():
    attempts = make_attempts()
    late = attempts.begin(0.0)
    fail(attempts)
    succeed(attempts)
    attempts.failed(late, ConnectFailed("no"), 0.0)
    assert (attempts.failures, attempts.error) == (0, None)


def test_only_a_failure_without_a_next_attempt_is_forgotten():
    for now, forgotten in ((1.1, False), (1.11, True)):
        attempts = make_attempts()
        assert not attempts.forget(now), "there is no failure"
        fail(attempts)  # and the next attempt may start at 0.1
        assert attempts.forget(now) is forgotten
        assert attempts.failures == (not forgotten)
        assert (attempts.error is None) is forgotten


def test_no_failure_is_forgotten_during_an_attempt():
    attempts = make_attempts()
    attempts.begin(0.0)
    fail(attempts)
    assert not attempts.forget(60.0)


def test_the_last_failure_of_a_round_starts_the_forget_timer():
    attempts = make_attempts()
    first, last = attempts.begin(0.0), attempts.begin(0.0)
    attempts.failed(first, ConnectFailed("no"), 0.0)
    attempts.failed(last, ConnectFailed("no"), 10.0)
    assert not attempts.forget(11.0)
    assert attempts.forget(11.1)


def test_no_failure_exists_before_the_first_attempt():
    assert Attempts(lambda: 1.0, 1).error is None


# -- simultaneous events ------------------------------------------------------------


def test_pauses_between_attempts_end_exactly_with_the_caution():
    attempts = Attempts(lambda: 1.0, 1)
    end(attempts, 0.5)
    attempts.succeeded(attempts.begin(0.5))
    later = attempts.next_attempt(waiting=False) + BRIEF
    assert not attempts.is_cautious(later)
    attempts.begin(later)
    assert attempts.next_attempt(waiting=False) < later


def test_a_loss_exactly_at_the_forget_time_counts_with_the_last_one():
    attempts = Attempts(lambda: 1.0, 1)
    end(attempts, 0.5)
    later = attempts.next_attempt(waiting=False) + FORGIVEN
    end(attempts, later)
    assert pause(attempts, later) == 0.2


def test_a_loss_exactly_at_the_end_of_a_pause_counts_separately():
    attempts = Attempts(lambda: 1.0, 1)
    end(attempts, 0.5)
    later = attempts.next_attempt(waiting=False)
    end(attempts, later)
    assert pause(attempts, later) == 0.2
