"""Test the transitions of the pure state: no event loop, no clock, no I/O."""

from __future__ import annotations

import attrs
import pytest

from fastapi_topaz._pool.state.attempts import BRIEF, PATIENCE
from fastapi_topaz._pool.state.pool_state import RAMP, PoolState
from fastapi_topaz._pool.state.slot import Claim
from fastapi_topaz.exceptions import ConnectFailed
from kit.states import fail_one, make_state, open_one, taken


def waiting(state, count=1):
    leases = [Claim() for _ in range(count)]
    for claim in leases:
        state.enqueue(claim)
    return leases


# -- leases -------------------------------------------------------------------------


def test_an_empty_pool_gives_no_lease():
    state = make_state()
    assert not state.take(Claim(), 0.0)
    assert state.in_use == 0


def test_waiting_callers_fill_a_connection_to_its_streams():
    state = make_state(max_connections=2, streams_per_connection=3)
    slot = open_one(state)
    waiters = waiting(state, 4)
    assert state.serve(tokens=4, now=0.0) == waiters[:3]
    assert slot.leases == 3
    state.give_back(waiters[0], 0.0)
    assert slot.leases == 2
    assert state.serve(tokens=3, now=0.0) == waiters[3:]
    assert slot.leases == 3


def test_a_caller_knows_when_it_was_served():
    state = make_state()
    open_one(state)
    assert taken(state, 7.0).acquired_at == 7.0


def test_waiting_callers_get_a_connection_until_its_proof_is_too_old():
    state = make_state()
    interval = state.options.health_check_interval
    too_old = 2 * (interval + state.options.health_check_timeout)
    slot = open_one(state)
    waiters = waiting(state, 2)
    assert state.serve(tokens=1, now=too_old) == waiters[:1]
    state.give_back(waiters[0], too_old)
    assert state.serve(tokens=1, now=too_old + 0.1) == []
    assert slot.suspect


def test_the_state_does_not_spread_connections_by_default():
    state = PoolState(make_state().options, lambda: 1.0)
    slot = open_one(state)
    other = open_one(state)
    state.lost(slot, "lost", 10.0)
    state.rotation.expire(state.open, 1000.0)
    assert state.rotation.next() is None
    assert other in state.open


def test_a_new_caller_does_not_overtake_waiting_callers():
    state = make_state()
    open_one(state)
    (waiter,) = waiting(state)
    assert not state.take(Claim(), 0.0)
    assert state.serve(tokens=1, now=0.0) == [waiter]


def test_waiters_are_served_in_order_and_only_with_a_token():
    state = make_state(max_connections=3)
    first, second, third = waiting(state, 3)
    open_one(state)
    open_one(state)
    open_one(state)
    assert state.serve(tokens=2, now=0.0) == [first, second]
    assert state.serve(tokens=2, now=0.0) == []
    assert state.serve(tokens=3, now=0.0) == [third]


def test_a_returned_stream_can_be_taken_again():
    state = make_state()
    open_one(state)
    claim = taken(state)
    assert not state.take(Claim(), 0.0)
    state.give_back(claim, 1.0)
    assert state.in_use == 0
    assert taken(state)


def test_a_withdrawn_caller_leaves_the_queue_or_returns_its_lease():
    state = make_state()
    open_one(state)
    first, second, third = waiting(state, 3)
    assert state.serve(tokens=1, now=0.0) == [first]
    state.withdraw(second, 1.0)
    state.withdraw(first, 1.0)
    assert state.in_use == 0
    assert state.serve(tokens=1, now=1.0) == [third]


# -- connecting ---------------------------------------------------------------------


def test_no_connection_is_wanted_without_callers():
    state = make_state(min_connections=2)
    assert state.shortfall(tokens=0, now=0.0) == 0


def test_a_pool_in_use_is_filled_to_its_minimum():
    state = make_state(min_connections=2)
    state.keeps_minimum = True
    assert state.shortfall(tokens=0, now=0.0) == 2
    state.attempts.begin(0.0)
    assert state.shortfall(tokens=0, now=0.0) == 1


def test_a_waiting_caller_puts_the_pool_in_use():
    state = make_state(min_connections=2)
    (waiter,) = waiting(state)
    state.withdraw(waiter, 0.0)
    assert state.shortfall(tokens=0, now=0.0) == 2


def test_want_one_requests_nothing_later_if_there_is_one():
    state = make_state(max_idle_time=10.0)
    open_one(state)
    claim = taken(state)
    state.want_one()
    state.give_back(claim, 1.0)
    state.reap(11.0)
    assert not state.open
    assert state.shortfall(tokens=0, now=11.0) == 0


def test_want_one_requests_one_connection_if_there_is_none():
    state = make_state()
    state.want_one()
    assert state.shortfall(tokens=0, now=0.0) == 1
    attempt = state.attempts.begin(0.0)
    assert state.shortfall(tokens=0, now=0.0) == 0
    state.connect_failed(attempt, ConnectFailed("no"), 0.0)
    assert state.unawaited_demand == 0
    open_one(state)
    state.want_one()
    assert state.shortfall(tokens=0, now=9.0) == 0


def test_a_caller_that_does_not_wait_puts_the_pool_in_use():
    state = make_state(min_connections=2)
    state.want_one()
    assert state.shortfall(tokens=0, now=0.0) == 2


def test_attempts_continue_without_callers_until_one_succeeds():
    # Otherwise a pool without connections would report a failure without end. A load
    # balancer that routes by health would then never send another request.
    state = make_state(min_connections=0)
    state.want_one()
    for now in (0.0, 9.0, 18.0):
        attempt = state.attempts.begin(now)
        state.connect_failed(attempt, ConnectFailed("no"), now)
        assert state.shortfall(tokens=0, now=now + 9.0) == 1
    open_one(state)
    assert state.shortfall(tokens=0, now=99.0) == 0


@pytest.mark.parametrize(
    "streams, waiters, wanted", [(1, 1, 1), (4, 4, 1), (4, 5, 2), (50, 51, 2)]
)
def test_the_wanted_connections_cover_the_waiting_streams(streams, waiters, wanted):
    state = make_state(streams_per_connection=streams)
    waiting(state, waiters)
    assert state.shortfall(tokens=waiters, now=0.0) == wanted


def test_attempts_ramp_up_from_two_to_the_number_of_connections():
    state = make_state(max_connections=30)
    waiting(state, 30)
    assert state.shortfall(tokens=30, now=0.0) == RAMP == 2
    for usable, wanted in ((1, 2), (2, 2), (3, 3), (4, 4)):
        open_one(state)
        assert state.shortfall(tokens=30, now=0.0) == wanted, usable
    state.attempts.begin(0.0)
    assert state.shortfall(tokens=30, now=0.0) == 3
    state.serve(tokens=30, now=0.0)
    state.retire(next(iter(state.open)), "drain")
    assert state.shortfall(tokens=30, now=0.0) == 2, "this connection is leaving"


def test_callers_without_a_token_want_no_connection():
    state = make_state()
    waiting(state, 5)
    assert state.shortfall(tokens=1, now=0.0) == 1


def test_open_connecting_and_closing_never_exceed_the_maximum():
    state = make_state(max_connections=3)
    open_one(state)
    state.attempts.begin(0.0)
    closing = open_one(state)
    state.retire(closing, "idle")
    assert len(state.closing) == 1
    waiting(state, 9)
    assert state.shortfall(tokens=9, now=0.0) == 0
    state.closed(closing)
    assert state.shortfall(tokens=9, now=0.0) == 1


def test_after_a_failure_attempts_are_single_and_wait_for_the_backoff():
    state = make_state(random=lambda: 1.0)
    waiting(state, 5)
    fail_one(state, now=1.0)
    assert state.next_attempt() == pytest.approx(1.1)
    assert state.shortfall(tokens=5, now=1.05) == 0
    assert state.shortfall(tokens=5, now=1.11) == 1
    state.attempts.begin(1.11)
    assert state.shortfall(tokens=5, now=1.5) == 0
    open_one(state, now=1.5)
    assert state.shortfall(tokens=5, now=1.5) == 1
    state.attempts.begin(1.5)
    assert state.shortfall(tokens=5, now=1.5) == 0, "two attempts are in progress"


def test_the_backoff_is_shorter_while_callers_wait():
    state = make_state(random=lambda: 1.0, min_connections=1)
    (waiter,) = waiting(state)
    for _ in range(5):
        fail_one(state)
    assert state.next_attempt() == 0.5
    assert state.shortfall(tokens=1, now=0.5) == 1
    state.withdraw(waiter, 0.0)
    assert state.next_attempt() == 1.6
    assert state.shortfall(tokens=0, now=1.5) == 0


def test_after_an_unanswered_connection_attempts_are_paced_and_single():
    state = make_state(random=lambda: 1.0)
    waiting(state, 5)
    state.lost(open_one(state), "lost", now=0.5)
    assert state.shortfall(tokens=5, now=0.55) == 0
    assert state.shortfall(tokens=5, now=0.6) == 1
    assert state.shortfall(tokens=5, now=0.6 + BRIEF) == 1
    open_one(state, now=0.6)
    assert state.shortfall(tokens=5, now=0.65) == 0, "the backoff continues"
    assert state.shortfall(tokens=5, now=0.6 + BRIEF) == 2


def test_hanging_attempts_are_doubled_only_for_waiting_callers():
    state = make_state(min_connections=2)
    (waiter,) = waiting(state)
    state.attempts.begin(0.0)
    state.attempts.begin(0.0)
    assert state.shortfall(tokens=1, now=PATIENCE) == 0
    assert state.attempts.overdue(PATIENCE)
    assert state.shortfall(tokens=1, now=PATIENCE) == 2
    state.withdraw(waiter, PATIENCE)
    assert state.shortfall(tokens=0, now=PATIENCE) == 0


def test_waiting_is_not_hopeless_with_a_connection_open_or_in_progress():
    state = make_state(max_retries=0)
    slot = open_one(state)
    taken(state)
    fail_one(state)
    assert not state.hopeless(0.0)
    state.suspect(slot, 0.0)
    assert not state.hopeless(0.0), "the probe decides"
    state.retire(slot, "unhealthy")
    assert state.hopeless(0.0), "the connection takes no more leases"
    state.attempts.begin(0.0)
    assert not state.hopeless(0.0)
    state.attempts.overdue(PATIENCE)
    assert state.hopeless(PATIENCE)


def test_waiting_callers_get_the_error_if_waiting_is_hopeless():
    state = make_state()
    first, second = waiting(state, 2)
    error = ConnectFailed("no")
    assert state.fail_waiting(error) == [first, second]
    assert first.failure is second.failure is error
    assert not state.waiting
    state.withdraw(first, 0.0)
    assert state.in_use == 0


# -- closing ------------------------------------------------------------------------


def test_a_retired_connection_closes_with_its_last_released_lease():
    state = make_state(streams_per_connection=2)
    slot = open_one(state)
    leases = [taken(state), taken(state)]
    state.retire(slot, "drain")
    assert state.to_close == []
    state.give_back(leases[0], 1.0)
    assert state.to_close == []
    assert not state.take(Claim(), 0.0), "no new lease on a retired connection"
    state.give_back(leases[1], 2.0)
    assert state.to_close == [slot]


def test_the_first_closing_reason_counts():
    state = make_state()
    slot = open_one(state)
    taken(state)
    state.retire(slot, "unhealthy")
    state.retire(slot, "close")
    assert slot.retired == "unhealthy"


def test_the_reaper_closes_idle_connections_down_to_the_minimum():
    state = make_state(min_connections=1, max_idle_time=10.0)
    old, older, fresh = (open_one(state, now) for now in (1.0, 0.0, 5.0))
    state.reap(9.9)
    assert state.to_close == []
    state.reap(11.0)
    assert state.to_close == [older, old]
    state.reap(1000.0)
    assert list(state.open) == [fresh], "the last connection is the minimum"


def test_the_reaper_leaves_leased_connections_alone():
    state = make_state(max_idle_time=1.0)
    open_one(state)
    claim = taken(state)
    state.reap(100.0)
    assert state.to_close == []
    state.give_back(claim, 100.0)
    state.reap(100.5)
    assert state.to_close == [], "the connection was just used"


def test_max_idle_time_0_reaps_nothing():
    state = make_state(max_idle_time=0.0)
    open_one(state)
    state.reap(1e9)
    assert state.to_close == []


def test_lowering_the_maximum_retires_idle_connections_first():
    state = make_state(max_connections=3)
    slots = [open_one(state, float(n)) for n in range(3)]
    busy = taken(state).slot
    state.resize(attrs.evolve(state.options, max_connections=1))
    idle = [slot for slot in slots if slot is not busy]
    assert state.to_close == idle
    assert busy.retired is None


def test_lowering_the_maximum_below_the_leases_closes_on_release():
    state = make_state(max_connections=2)
    open_one(state)
    open_one(state)
    leases = [taken(state), taken(state)]
    state.resize(attrs.evolve(state.options, max_connections=1))
    assert state.to_close == []
    retired = [claim for claim in leases if claim.slot.retired == "resize"]
    assert len(retired) == 1
    state.give_back(retired[0], 1.0)
    assert len(state.to_close) == 1


def test_shutting_down_closes_idle_connections_and_waits_for_leases():
    state = make_state(max_connections=2)
    open_one(state)
    open_one(state)
    claim = taken(state)
    busy = claim.slot
    state.shut_down()
    assert len(state.to_close) == 1
    assert state.shortfall(tokens=9, now=0.0) == 0
    state.abandon()
    assert busy in state.to_close
    state.give_back(claim, 1.0)
    assert state.in_use == 0
    assert len(state.to_close) == 2, "the connection is closed once"


def test_a_connection_made_after_the_shutdown_is_closed():
    state = make_state()
    slot = state.attempts.begin(0.0)
    state.shut_down()
    state.connected(slot, object(), 1.0)
    assert state.to_close == [slot]
    assert not state.take(Claim(), 0.0)


# -- cleanup ------------------------------------------------------------------------


def test_a_returned_claim_holds_no_slot():
    state = make_state()
    open_one(state)
    claim = taken(state)
    state.give_back(claim, 1.0)
    assert claim.slot is None


def test_dismissed_and_failed_waiters_know_the_reason():
    state = make_state()
    first, second = waiting(state, 2)
    first.deadline = 5.0
    assert state.dismiss(4.9) == []
    assert state.dismiss(5.0) == [first]
    assert (first.dismissed, first.failure, second.dismissed) == (True, None, False)
    error = ConnectFailed("no")
    assert state.fail_waiting(error) == [second]
    assert (second.dismissed, second.failure) == (True, error)


def test_a_dismissed_caller_counts_until_its_task_withdraws_it():
    state = make_state()
    assert state.dismissed == 0
    first, second, third = waiting(state, 3)
    first.deadline = 5.0
    state.dismiss(5.0)
    assert state.dismissed == 1
    state.fail_waiting(ConnectFailed("no"))
    assert state.dismissed == 3
    for left, claim in [(2, first), (1, third), (0, second)]:
        state.withdraw(claim, 6.0)
        assert state.dismissed == left
    (cancelled,) = waiting(state)
    state.withdraw(cancelled, 7.0)
    assert state.dismissed == 0


def test_the_last_failure_is_kept():
    state = make_state()
    error = ConnectFailed("no")
    state.connect_failed(state.attempts.begin(0.0), error, 0.0)
    assert state.attempts.error is error


def test_a_retired_connection_is_not_reported_as_lost():
    state = make_state()
    slot = open_one(state)
    claim = taken(state)
    state.retire(slot, "drain")
    state.lost(slot, "lost", 0.1)
    assert slot.retired == "drain"
    assert state.next_attempt() == float("-inf"), "the connection was not short-lived"
    state.give_back(claim, 0.2)
    state.lost(slot, "lost", 0.3)
    assert state.next_attempt() == float("-inf")


def test_each_retired_connection_knows_its_reason():
    state = make_state(max_idle_time=10)
    idle = open_one(state)
    state.reap(10.0)
    other = open_one(state, 10.0)
    state.shut_down()
    assert (idle.retired, other.retired) == ("idle", "close")


def test_an_abandoned_state_leases_no_connection():
    state = make_state(streams_per_connection=2)
    open_one(state)
    taken(state)
    state.shut_down()
    state.abandon()
    assert not state.ready
    assert not state.open
    assert len(state.to_close) == 1


# -- how many connections are wanted ------------------------------------------------


def test_a_state_spreads_connections_only_if_its_connector_does():
    state = make_state(max_lifetime=0)
    state.lost(open_one(state), "lost", 9.0)
    assert state.rotation.next_at(state.open) == float("inf")


def test_a_lost_leased_connection_is_recorded_as_an_unhandled_loss():
    state = make_state(max_connections=1)
    slot = open_one(state)
    taken(state)
    assert not state.unhandled_loss
    state.lost(slot, "lost", 1.0)
    assert state.unhandled_loss
    assert not state.to_close + state.to_probe


def test_lease_holders_want_no_second_connection_for_their_token():
    state = make_state(max_connections=3)
    open_one(state)
    taken(state)
    state.enqueue(Claim())
    assert state.shortfall(tokens=1, now=0.0) == 0
    assert state.shortfall(tokens=2, now=0.0) == 1


def test_no_attempt_probes_an_outage_while_a_connection_remains():
    state = make_state()
    open_one(state)
    for now in (10.0, 20.0):
        fail_one(state, now)
    assert state.attempts.failures == 2
    assert state.shortfall(tokens=0, now=99.0) == 0


def test_a_connection_made_after_the_shutdown_has_that_closing_reason():
    state = make_state()
    slot = state.attempts.begin(0.0)
    state.shut_down()
    state.connected(slot, object(), 1.0)
    assert slot.retired == "close"


def test_the_wanted_connections_fit_into_the_maximum():
    state = make_state(max_connections=2)
    state.retire(open_one(state), "drain")
    assert (len(state.closing), state.room()) == (1, 1)
    for _ in range(2):
        state.enqueue(Claim())
    assert state.shortfall(tokens=2, now=0.0) == 1


def test_a_shut_down_pool_with_room_wants_no_connection():
    state = make_state(min_connections=2)
    state.enqueue(Claim())
    state.shut_down()
    assert state.shortfall(tokens=1, now=0.0) == 0


def test_a_stream_of_a_withdrawn_caller_counts_as_used_until_then():
    state = make_state()
    slot = open_one(state)
    state.withdraw(taken(state), 7.0)
    assert slot.last_used_at == 7.0


def test_a_closed_expired_connection_does_not_block_other_replacements():
    state = make_state()
    slot = open_one(state)
    taken(state)
    state.rotation.drain([slot])
    state.retire(slot, "drain")
    assert not state.rotation.is_idle()
    state.abandon()
    assert state.rotation.is_idle()


# -- when waiting becomes hopeless --------------------------------------------------


@pytest.mark.parametrize(
    "timeout, after, hopeless",
    [(0.5, 0.4, False), (0.5, 0.5, True), (0.0, 0.0, False), (0.0, 99.0, False)],
)
def test_waiting_is_hopeless_after_a_nonzero_acquire_timeout(timeout, after, hopeless):
    state = make_state(acquire_timeout=timeout)
    fail_one(state)
    assert state.hopeless(after) is hopeless


def test_an_error_without_a_permanent_flag_is_not_permanent():
    state = make_state()
    fail_one(state, error=OSError("no"))
    assert not state.hopeless(0.0)
