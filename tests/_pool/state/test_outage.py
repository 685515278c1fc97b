"""Test when the state is in an outage."""

from __future__ import annotations

import pytest

from fastapi_topaz._pool.state.attempts import BRIEF
from fastapi_topaz._pool.state.outage import ATTEMPT, GRACE, OVERDUE, PAUSE, Outage
from fastapi_topaz._pool.state.pool_state import PoolState
from fastapi_topaz._pool.state.slot import Claim
from kit.states import ERROR, Link, answer, due, make_state, open_some, refuse


# -- an outage ----------------------------------------------------------------------


def test_a_pool_without_refusals_has_no_outage_error():
    state = make_state()
    assert state.error is None
    assert state.status().failing is False


def test_an_outage_starts_after_a_while_without_an_answer():
    state = make_state()
    slots = open_some(state, 2)
    for slot in slots:
        state.refused(slot, 1.0)
    assert not refuse(state, slots[0], 1.0 + GRACE - 0.01)
    assert not state.is_refused
    assert state.status().healthy
    assert refuse(state, slots[1], 1.0 + GRACE)
    assert state.is_refused
    assert state.error is ERROR
    assert not state.status().healthy
    assert not refuse(state, slots[0], 5.0), "it is still the same outage"


def test_one_connection_without_a_refusal_prevents_an_outage():
    state = make_state()
    refused, doubted = open_some(state, 2)
    state.refused(refused, 1.0)
    assert not refuse(state, refused, 1.0)
    assert doubted in state.outage.refused
    assert not refuse(state, refused, 9.0)
    assert not state.outage.declared
    assert refuse(state, doubted, 9.1)


def outage(count=2, **options):
    state = make_state(**options)
    slots = open_some(state, count)
    for slot in slots:
        state.refused(slot, 1.0)
        refuse(state, slot, 2.0)
    assert state.is_refused
    return state, slots


def test_the_first_answer_ends_an_outage():
    state, slots = outage()
    answer(state, slots[0], 3.0)
    assert not state.outage.declared
    assert state.status().healthy
    assert state.status().failing is False
    assert state.error is ERROR, "the other connection is still refused"
    answer(state, slots[1], 3.1)
    assert state.error is None


def test_the_outage_error_is_cleared_if_the_only_connection_answers():
    state, (slot,) = outage(1)
    answer(state, slot, 3.0)
    assert state.error is None
    state.refused(slot, 4.0)
    assert state.error is None


def test_the_outage_error_is_cleared_if_another_connection_answers():
    state, slots = outage(2)
    for slot in slots:
        state.retire(slot, "lifetime")
    assert state.error is ERROR, "no connection has answered since"
    (other,) = open_some(state, 1, 3.0)
    answer(state, other, 3.1)
    assert state.error is None


def test_an_answered_call_ends_an_outage():
    state, slots = outage()
    slots[0].proven_at = 2.0
    state.refused(slots[1], 3.1)
    assert state.outage.declared, "the connection had answered before"
    slots[0].proven_at = 3.0
    state.refused(slots[1], 3.1)
    assert state.status().failing is False


def test_an_outage_lasts_while_connections_are_lost_and_replaced():
    state, slots = outage()
    for slot in slots:
        state.lost(slot, "lost", 3.0)
    assert not state.is_refused, "an attempt may help"
    assert not state.status().healthy
    for slot in slots:
        state.closed(slot)
    assert state.shortfall(tokens=0, now=3.0) == 1, (
        "one attempt, to find the end of the outage"
    )
    slot = state.begin(3.0)
    state.connected(slot, Link(), 3.1)
    refuse(state, slot, 3.1, began=3.05)
    assert state.is_refused
    assert due(state, 3.1 + PAUSE - 0.01) == [], (
        "the pause is as long as that of the others"
    )
    assert due(state, 3.1 + PAUSE) == [slot]


def test_during_an_outage_no_connection_is_reaped_or_replaced():
    state, slots = outage(max_idle_time=10, max_lifetime=0)
    state.reap(100.0)
    state.rotation.drain(slots)
    state.retire_expired()
    assert state.shortfall(tokens=0, now=100.0) == 0
    assert not state.to_close
    for slot in slots:
        answer(state, slot, 100.0)
    state.reap(200.0)
    assert len(state.to_close) == 2


def test_without_answers_attempts_are_rare_and_single():
    state = make_state(max_connections=5)
    (slot,) = open_some(state, 1)
    for _ in range(3):
        state.enqueue(Claim())
    state.refused(slot, 1.0)
    assert state.shortfall(tokens=3, now=1.0) == 2
    refuse(state, slot, 1.0)
    assert state.shortfall(tokens=3, now=1.0) == 1
    attempt = state.begin(1.0)
    assert state.next_attempt() == 1.0 + ATTEMPT
    assert due(state, 1.0 + PAUSE - 0.01) == [], (
        "an answered call counts like an answered probe"
    )
    state.attempts.cancelled(attempt)
    assert state.shortfall(tokens=3, now=1.5) == 0
    assert state.shortfall(tokens=3, now=1.0 + ATTEMPT) == 1
    answer(state, slot, 1.6)
    assert state.shortfall(tokens=3, now=1.6) == 2


def test_an_outage_is_overdue_if_no_probe_ends_for_a_while():
    state, _ = outage()
    assert not state.outage.is_overdue(2.0 + OVERDUE - 0.01)
    assert state.outage.is_overdue(2.0 + OVERDUE)
    assert not Outage().is_overdue(2.0)


def test_a_clock_set_back_delays_nothing_for_long():
    state, slots = outage()
    state.begin(2.0)
    now = -1000.0
    assert state.outage.next_at(now) <= now + OVERDUE
    assert due(state, now)
    state.shortfall(tokens=0, now=now)
    assert state.next_attempt() <= now + ATTEMPT
    assert state.outage.is_overdue(now)
    answer(state, slots[0], now)
    state.refused(slots[0], now)
    for step in range(10):
        refuse(state, slots[0], now + step)
        refuse(state, slots[1], now + step)
    assert state.is_refused


def test_a_pause_over_twice_the_longest_means_a_clock_set_back():
    state, (slot,) = outage(1)
    refuse(state, slot, 3.0)
    assert due(state, 3.0 - 0.9 * PAUSE) == []
    assert due(state, 3.0 - 1.5 * PAUSE) == [slot]


# -- connections that end -----------------------------------------------------------


def lost(*, answered=False, lived=100.0, reason="lost", **history):
    """Return a state with one connection that ended after the given history."""
    state = make_state()
    (slot,) = open_some(state, 1)
    slot.answered = answered
    if history.get("leased"):
        assert state.take(Claim(), 0.0)
    if history.get("refused"):
        state.refused(slot, 1.0)
    if history.get("broken"):
        state.broke(slot, lived)
    state.lost(slot, reason, lived)
    return state, slot


@pytest.mark.parametrize(
    "history, failed",
    [
        ({"lived": BRIEF - 0.1}, True),
        ({"lived": BRIEF}, False),
        ({"leased": True}, True),
        ({"leased": True, "reason": "unhealthy"}, False),
        ({"broken": True, "reason": "unhealthy"}, True),
        ({"lived": 0.0, "answered": True}, False),
        ({"leased": True, "answered": True}, False),
        ({"broken": True, "answered": True}, False),
        ({"leased": True, "refused": True}, False),
    ],
)
def test_an_unanswered_end_is_a_failure_unless_idle_and_late(history, failed):
    state, slot = lost(**history)
    assert state.unanswered_ends == [slot] * failed
    assert state.attempts.failures == failed
    assert state.first_unanswered is failed
    if failed:
        assert state.attempts.error.reason == "unanswered"
        assert "topaz:8282" in str(state.attempts.error)


def test_the_error_of_an_unanswered_connection_has_its_last_error():
    state = make_state()
    (slot,) = open_some(state, 1)
    slot.answered, slot.last_error = False, "Socket closed"
    state.lost(slot, "lost", 0.0)
    assert str(state.attempts.error).endswith(": Socket closed")


def test_the_error_omits_unknown_details():
    state = PoolState(make_state().options, lambda: 1.0)
    (slot,) = open_some(state, 1)
    slot.answered = False
    state.lost(slot, "lost", 0.0)
    assert str(state.attempts.error) == (
        "cannot connect to the server: the server accepted the connection, and "
        "closed it before or together with its first answer"
    )


def test_the_first_unanswered_end_is_kept_until_it_is_logged():
    state = make_state()
    for _ in range(2):
        slot = state.begin(0.0)
        state.connected(slot, Link(), 0.0)
        state.lost(slot, "lost", 0.1)
        assert state.first_unanswered


def test_only_the_first_unanswered_end_is_recorded():
    state = make_state()
    for slot in open_some(state, 3):
        slot.answered = False
        state.lost(slot, "lost", 0.1)
        assert state.first_unanswered is (len(state.unanswered_ends) == 1)
        state.first_unanswered = False


def test_a_newer_answered_connection_ends_the_series_of_unanswered_ones():
    state = make_state()
    for now in (0.0, 1.0):
        (slot,) = open_some(state, 1, now)
        slot.answered = False
        state.lost(slot, "lost", now)
    assert state.attempts.unanswered == 2
    open_some(state, 1, 2.0)
    (slot,) = open_some(state, 1, 3.0)
    slot.answered = False
    state.lost(slot, "lost", 3.0)
    assert state.attempts.unanswered == 1


def test_a_silence_lasts_until_the_last_refused_connection_is_gone():
    state, slots = outage(2)
    state.retire(slots[0], "lifetime")
    assert state.outage.is_silent
    state.retire(slots[1], "lifetime")
    assert not state.outage.is_silent
