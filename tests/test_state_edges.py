"""The edges of the state: what mutants of it would have survived without these."""

from __future__ import annotations

import pytest

from fastapi_topaz import ConnectionPool
from fastapi_topaz._pool.state.attempts import BRIEF, FORGIVEN, Attempts
from fastapi_topaz._pool.state.pool_state import PoolState
from fastapi_topaz._pool.state.slot import Claim, Slot
from fastapi_topaz.exceptions import ConnectFailed


def make(*, random=lambda: 1.0, **options):
    return PoolState(
        ConnectionPool(**{"min_connections": 0, **options}).options, random
    )


def open_one(state, now=0.0, connection=None):
    slot = state.attempts.begin(now)
    state.connected(slot, connection or object(), now)
    return slot


def fail_one(state, now=0.0, error=None):
    slot = state.attempts.begin(now)
    state.connect_failed(slot, error or ConnectFailed("no"), now)


def taken(state, now=0.0):
    claim = Claim()
    assert state.take(claim, now)
    return claim


def pause(attempts, now):
    """Return how long those who wait have to wait for the next attempt."""
    return pytest.approx(attempts.next_attempt(waiting=True) - now)


def end(attempts, now):
    """End a connection that never answered."""
    attempts.ended(Slot(started_at=now), ConnectFailed("ended"), now)


# -- connections that cannot tell whether they are lost -----------------------------


class Silent:
    """A connection without the attribute: looking for it raises."""

    @property
    def is_lost(self):
        raise ZeroDivisionError


class Confused:
    def is_lost(self):
        raise ZeroDivisionError


def test_a_connection_whose_is_lost_cannot_be_had_is_never_asked():
    slot = Slot()
    slot.watch(Silent())
    assert slot.is_lost is None
    assert not slot.is_gone()
    assert slot.last_error is None


def test_a_connection_that_fails_to_tell_is_not_gone_and_not_asked_again():
    slot = Slot()
    slot.watch(Confused())
    assert not slot.is_gone()
    assert slot.is_lost is None
    assert slot.last_error == "is_lost() raised ZeroDivisionError"


def test_a_connection_that_fails_to_tell_is_leased_all_the_same():
    state = make()
    slot = open_one(state, connection=Confused())
    assert taken(state).slot is slot
    assert not state.to_probe


# -- how many connections are wanted ------------------------------------------------


def test_nothing_has_failed_before_the_first_attempt():
    assert Attempts(lambda: 1.0).error is None


def test_a_state_spreads_nothing_unless_its_connector_does():
    state = make(max_lifetime=0)
    state.lost(open_one(state), "lost", 9.0)
    assert state.rotation.next_at(state.open) == float("inf")


def test_a_leased_one_that_is_lost_is_news_though_nothing_is_to_be_done_for_it():
    state = make(max_connections=1)
    slot = open_one(state)
    taken(state)
    assert not state.unhandled_loss
    state.lost(slot, "lost", 1.0)
    assert state.unhandled_loss
    assert not state.to_close + state.to_probe


def test_those_who_hold_a_stream_want_no_second_connection_for_their_token():
    state = make(max_connections=3)
    open_one(state)
    taken(state)
    state.enqueue(Claim())
    assert state.shortfall(tokens=1, now=0.0) == 0
    assert state.shortfall(tokens=2, now=0.0) == 1


def test_an_outage_is_not_probed_by_attempts_while_a_connection_is_left():
    state = make()
    open_one(state)
    for now in (10.0, 20.0):
        fail_one(state, now)
    assert state.attempts.failures == 2
    assert state.shortfall(tokens=0, now=99.0) == 0


def test_a_connection_that_comes_after_the_shutdown_goes_because_of_it():
    state = make()
    slot = state.attempts.begin(0.0)
    state.shut_down()
    state.connected(slot, object(), 1.0)
    assert slot.retired == "close"


def test_no_more_connections_are_wanted_than_there_is_room_for():
    state = make(max_connections=2)
    state.retire(open_one(state), "drain")
    assert (len(state.closing), state.room()) == (1, 1)
    for _ in range(2):
        state.enqueue(Claim())
    assert state.shortfall(tokens=2, now=0.0) == 1


def test_a_pool_that_was_shut_down_wants_no_connection_though_there_is_room():
    state = make(min_connections=2)
    state.enqueue(Claim())
    state.shut_down()
    assert state.shortfall(tokens=1, now=0.0) == 0


def test_a_stream_that_is_taken_back_from_who_gave_up_was_used_until_then():
    state = make()
    slot = open_one(state)
    state.withdraw(taken(state), 7.0)
    assert slot.last_used_at == 7.0


def test_an_expired_connection_that_closed_keeps_no_other_from_being_replaced():
    state = make()
    slot = open_one(state)
    taken(state)
    state.rotation.drain([slot])
    state.retire(slot, "drain")
    assert not state.rotation.is_idle()
    state.abandon()
    assert state.rotation.is_idle()


# -- since when, and what next ------------------------------------------------------


def test_the_second_timeout_is_when_the_suspicion_begins():
    state = make()
    slot = open_one(state)
    state.timed_out(slot, 1.0)
    state.timed_out(slot, 2.0)
    assert slot.suspected_at == 2.0


def test_a_suspect_that_answered_a_call_meanwhile_is_suspected_anew():
    state = make()
    slot = open_one(state)
    state.suspect(slot, 1.0)
    state.to_probe.clear()
    slot.proven_at = 2.0
    state.unanswered(slot, 5.0)
    assert slot.retired is None
    assert state.to_probe == [slot]
    state.unanswered(slot, 9.0)
    assert slot.retired == "unhealthy"


def test_those_that_are_suspected_with_an_unhealthy_one_are_so_from_then_on():
    state = make(max_connections=2)
    slot, other = open_one(state), open_one(state)
    state.suspect(slot, 1.0)
    state.unanswered(slot, 6.0)
    assert (other.suspect, other.suspected_at) == (True, 6.0)


# -- two things at the same time ----------------------------------------------------


def test_an_answer_in_the_moment_of_a_timeout_is_none_since_it():
    state = make()
    slot = open_one(state)
    slot.proven_at = 1.0
    state.timed_out(slot, 1.0)
    assert not slot.suspect
    state.timed_out(slot, 2.0)
    assert slot.suspect


def test_who_is_suspected_in_the_moment_of_its_last_answer_has_not_answered_since():
    state = make()
    slot = open_one(state)
    state.suspect(slot, 0.0)
    state.unanswered(slot, 5.0)
    assert slot.retired == "unhealthy"


def test_pauses_between_attempts_end_exactly_when_the_caution_does():
    attempts = Attempts(lambda: 1.0)
    end(attempts, 0.5)
    attempts.succeeded(attempts.begin(0.5))
    later = attempts.next_attempt(waiting=False) + BRIEF
    assert not attempts.is_cautious(later)
    attempts.begin(later)
    assert attempts.next_attempt(waiting=False) < later


def test_a_loss_exactly_when_the_last_one_would_be_forgiven_still_counts_with_it():
    attempts = Attempts(lambda: 1.0)
    end(attempts, 0.5)
    later = attempts.next_attempt(waiting=False) + FORGIVEN
    end(attempts, later)
    assert pause(attempts, later) == 0.2


def test_a_loss_exactly_at_the_end_of_a_pause_is_another_one():
    attempts = Attempts(lambda: 1.0)
    end(attempts, 0.5)
    later = attempts.next_attempt(waiting=False)
    end(attempts, later)
    assert pause(attempts, later) == 0.2


# -- hope ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "timeout, after, hopeless",
    [(0.5, 0.4, False), (0.5, 0.5, True), (0.0, 0.0, False), (0.0, 99.0, False)],
)
def test_hope_ends_with_the_time_of_one_demand_unless_that_is_no_time(
    timeout, after, hopeless
):
    state = make(acquire_timeout=timeout)
    fail_one(state)
    assert state.hopeless(after) is hopeless


def test_an_error_that_does_not_say_whether_it_is_permanent_is_not():
    state = make()
    fail_one(state, error=OSError("no"))
    assert not state.hopeless(0.0)
