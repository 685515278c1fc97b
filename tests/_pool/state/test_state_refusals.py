"""Test how the state handles refusals and ended connections: no clock, no I/O."""

from __future__ import annotations

import itertools

import pytest

from fastapi_topaz._pool.state.outage import (
    AT_ONCE,
    FIRST_PAUSE,
    OVERDUE,
    PAUSE,
)
from fastapi_topaz._pool.state.slot import Claim
from kit.states import answer, due, make_state, open_some, refuse


def run(state, until, now, *, refused=lambda _entry: True):
    """Answer probes at once until the given time, and return the time of each probe."""
    made = []
    while (now := max(now, state.outage.next_at(now))) < until:
        for slot in due(state, now):
            made.append(now)
            (refuse if refused(slot) else answer)(state, slot, now)
        now += 1e-6
    return made


# -- refused calls ------------------------------------------------------------------


def test_a_refused_connection_is_not_leased_until_its_probe_is_answered():
    state = make_state()
    (slot,) = open_some(state, 1)
    state.refused(slot, 1.0)
    assert not state.take(Claim(), 1.0)
    assert (state.status().suspect, state.status().healthy) == (1, True)
    assert state.outage.next_at(1.0) == 1.0
    assert due(state, 1.0) == [slot]
    assert due(state, 1.0) == [], "a probe is in progress"
    answer(state, slot, 1.1)
    assert state.take(Claim(), 1.1)
    assert not state.outage.refused
    assert state.outage.next_at(1.1) == float("inf")


def test_a_refusal_is_ignored_for_leaving_closed_or_suspect_connections():
    state = make_state()
    leaving, lost, suspect = open_some(state, 3)
    claim = Claim()
    assert state.take(claim, 0.0)
    leaving = claim.slot
    state.retire(leaving, "drain")
    others = [x for x in state.open if x is not leaving]
    lost, suspect = others
    lost.connection.lost = True
    state.suspect(suspect, 0.5)
    for slot in (leaving, lost, suspect):
        state.refused(slot, 1.0)
    assert not state.outage.refused
    assert lost.retired == "lost"
    assert not refuse(state, leaving, 1.0)
    assert not refuse(state, lost, 1.0)
    assert not state.outage.refused


@pytest.mark.parametrize(
    "accuse",
    [
        lambda state, slot: state.unavailable(slot, 1.0),
        lambda state, slot: state.refused(slot, 1.0),
        lambda state, slot: refuse(state, slot, 1.0),
    ],
)
def test_a_connection_refused_and_ended_before_any_answer_is_a_failure(accuse):
    state = make_state()
    (slot,) = open_some(state, 1)
    slot.answered, slot.connection.lost = False, True
    accuse(state, slot)
    assert slot.retired == "lost"
    assert state.attempts.failures == 1


def test_an_unavailable_call_is_followed_by_a_probe_of_its_connection():
    state = make_state()
    (slot,) = open_some(state, 1)
    state.unavailable(slot, 1.0)
    assert state.to_probe == [slot]
    assert slot.suspected_at == 1.0


def test_a_suspect_with_a_refused_probe_becomes_refused():
    state = make_state()
    (slot,) = open_some(state, 1)
    state.suspect(slot, 1.0)
    refuse(state, slot, 1.1)
    assert list(state.outage.refused) == [slot]
    assert slot.retired is None


def test_a_connection_with_a_refused_health_check_is_not_leased():
    state = make_state()
    (slot,) = open_some(state, 1)
    refuse(state, slot, 1.1, began=1.0)
    assert not state.take(Claim(), 1.1)
    assert state.status().suspect == 1
    assert (slot.suspected_at, slot.refusals) == (1.0, 1)


def test_a_refused_leaving_connection_is_not_probed_again():
    state = make_state()
    (slot,) = open_some(state, 1)
    assert state.take(Claim(), 0.0)
    state.refused(slot, 1.0)
    state.retire(slot, "drain")
    assert due(state, 1.0) == []
    assert state.outage.next_at(1.0) == float("inf")


def test_a_refused_connection_that_answers_a_call_is_probed_again():
    state = make_state()
    (slot,) = open_some(state, 1)
    state.refused(slot, 1.0)
    slot.proven_at = 1.5
    state.unanswered(slot, 6.0)
    assert state.to_probe == [slot]
    assert not state.outage.refused, "a second probe would be made"
    assert slot.retired is None


def test_a_silent_refused_connection_is_closed():
    state = make_state()
    (slot,) = open_some(state, 1)
    state.refused(slot, 1.0)
    state.unanswered(slot, 6.0)
    assert slot.retired == "unhealthy"
    assert not state.outage.refused


def test_a_lost_refused_connection_is_forgotten():
    state = make_state()
    slot, other = open_some(state, 2)
    state.refused(slot, 1.0)
    state.refused(other, 1.0)
    state.lost(slot, "lost", 2.0)
    assert list(state.outage.refused) == [other]
    assert state.status().total == 1


# -- the rate of probes -------------------------------------------------------------


def test_pauses_between_refused_probes_grow_up_to_a_limit():
    state = make_state()
    (slot,) = open_some(state, 1)
    state.refused(slot, 1.0)
    made = run(state, 3.0, 1.0)
    pauses = [b - a for a, b in itertools.pairwise(made)]
    assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3], abs=1e-4)
    assert (FIRST_PAUSE, PAUSE) == (0.05, 0.3)


@pytest.mark.parametrize("count", [1, 3, 10])
def test_during_an_outage_at_most_four_probes_a_second_are_made(count):
    state = make_state()
    slots = open_some(state, count)
    for slot in slots:
        state.refused(slot, 1.0)
    made = run(state, 3.0, 1.0)
    assert len(made) <= 3 + 2 * 4
    later = run(state, 33.0, 3.0)
    assert 30 * 3 <= len(later) <= 30 * 4
    assert max(e.refusals for e in slots) - min(e.refusals for e in slots) <= 3


def test_connections_without_a_refused_call_are_probed_first_in_batches():
    state = make_state()
    slots = open_some(state, 6)
    state.refused(slots[0], 1.0)
    refuse(state, *due(state, 1.0), 1.1, began=1.0)
    assert set(state.outage.refused) == set(slots)
    assert not state.ready
    first = due(state, 1.1)
    assert len(first) == AT_ONCE == 2
    assert slots[0] not in first
    answer(state, first[0], 1.2)
    assert due(state, 1.2) != []


def test_a_connection_proven_after_the_refusal_stays_ready():
    state = make_state()
    slot, answering, silent = open_some(state, 3)
    state.refused(slot, 1.0)
    answering.proven_at = 1.05
    refuse(state, *due(state, 1.0), 1.1, began=1.0)
    assert not state.outage.is_silent
    assert list(state.outage.refused) == [slot]
    assert {*state.ready} == {answering, silent}


def test_a_connection_proven_exactly_at_a_refusal_is_doubted():
    state = make_state()
    slot, other = open_some(state, 2, now=1.0)
    state.refused(slot, 1.0)
    refuse(state, slot, 1.1)
    assert state.outage.is_silent
    assert other.suspect


def test_only_an_answer_newer_than_the_refusal_clears_a_connection():
    state = make_state()
    slot, refused, answering = open_some(state, 3)
    state.refused(slot, 1.0)
    state.refused(refused, 1.0)
    refused.proven_at, answering.proven_at = 1.0, 1.2
    refuse(state, slot, 1.3)
    assert not state.outage.is_silent
    assert set(state.outage.refused) == {slot, refused}


@pytest.mark.parametrize("at", [1.0, 1.05, 1.1])
@pytest.mark.parametrize("closes", [False, True])
def test_an_answered_probe_prevents_silence_even_if_it_closes(at, closes):
    state = make_state()
    refused, answering = open_some(state, 2)
    state.refused(refused, 1.0)
    answer(state, answering, at)
    if closes:
        state.retire(answering, "drain")
    refuse(state, refused, 1.1)
    assert not state.outage.is_silent


def test_a_call_answered_exactly_at_a_refused_probe_prevents_silence():
    state = make_state()
    refused, answering = open_some(state, 2)
    state.refused(refused, 1.0)
    answering.proven_at = 1.1
    refuse(state, refused, 1.1)
    assert not state.outage.is_silent


def test_a_long_refused_connection_does_not_end_a_silence():
    state = make_state()
    old, new = open_some(state, 2)
    state.refused(old, 1.0)
    new.proven_at = 5.0
    refuse(state, old, 5.1)
    assert not state.outage.is_silent
    state.refused(new, 6.0)
    refuse(state, new, 6.1)
    assert state.outage.is_silent
    refuse(state, old, 6.2)
    assert state.outage.is_silent
    new.proven_at = 6.3
    refuse(state, old, 6.4)
    assert not state.outage.is_silent
    assert list(state.outage.refused) == [old], (
        "a call on the other connection was answered"
    )


def test_refused_connections_among_good_ones_share_four_probes_a_second():
    state = make_state()
    slots = open_some(state, 10)
    for slot in slots[:5]:
        state.refused(slot, 1.0)
    well, now, made = slots[9], 1.0, []
    while now < 31.0:
        well.proven_at = now
        for slot in due(state, now):
            made.append(now)
            (refuse if slot in slots[:5] else answer)(state, slot, now)
        now += 0.01
    later = [at for at in made if at > 11.0]
    assert 20 * 2 <= len(later) <= 20 * 4
    assert set(state.outage.refused) == set(slots[:5])


def test_pauses_of_a_refused_connection_among_good_ones_grow_to_a_limit():
    state = make_state()
    refused, well = open_some(state, 2)
    state.refused(refused, 1.0)
    now, made = 1.001, []
    while len(made) < 7:
        well.proven_at = now
        if due(state, now):
            made.append(now)
            refuse(state, refused, now)
        now += 0.001
    pauses = [b - a for a, b in itertools.pairwise(made)]
    assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.3, 0.3, 0.3], abs=0.003)


def test_the_last_refused_connection_waits_for_only_one_pause():
    state = make_state()
    *refused, well = open_some(state, 6)
    for slot in refused:
        state.refused(slot, 1.0)
    well.proven_at = 1.05
    for _ in range(4):
        for slot in refused:
            refuse(state, slot, 1.05)
    last, *others = refused
    for slot in others:
        answer(state, slot, 1.1)
    refuse(state, last, 1.1)
    assert due(state, 1.1 + PAUSE - 0.01) == []
    assert due(state, 1.1 + PAUSE) == [last]


def test_no_probe_is_due_while_the_maximum_is_running():
    state = make_state()
    *refused, well = open_some(state, AT_ONCE + 2)
    for slot in refused:
        state.refused(slot, 1.0)
    first, *_ = due(state, 1.0)
    assert state.outage.next_at(1.0) == 1.0 + OVERDUE
    well.proven_at = 1.1
    refuse(state, first, 1.1)
    assert state.outage.next_at(1.1) <= 1.1


def test_no_probe_is_due_while_the_only_refused_one_is_probed():
    state = make_state()
    (slot,) = open_some(state, 1)
    state.refused(slot, 1.0)
    refuse(state, slot, 1.0)
    assert state.outage.is_silent
    assert due(state, 1.1) == [slot]
    assert state.outage.next_at(1.1) == 1.1 + OVERDUE


def test_a_probe_begun_exactly_at_a_refusal_is_in_the_next_round():
    state = make_state()
    one, other = open_some(state, 2)
    state.refused(one, 1.0)
    state.refused(other, 1.0)
    refuse(state, one, 1.0)
    refuse(state, other, 1.2, began=1.0)
    assert due(state, 1.29) == []
    assert len(due(state, 1.31)) == 1


def test_concurrent_refused_probes_cause_one_pause():
    state = make_state()
    one, other = open_some(state, 2)
    state.refused(one, 1.0)
    state.refused(other, 1.0)
    assert len(due(state, 1.0)) == 2
    refuse(state, one, 1.1, began=1.0)
    refuse(state, other, 1.12, began=1.0)
    assert due(state, 1.16) == []
    assert len(due(state, 1.18)) == 1


def test_hanging_probes_do_not_block_other_probes():
    state = make_state()
    slots = open_some(state, 4)
    for slot in slots:
        state.refused(slot, 1.0)
    for slot in due(state, 1.0):
        refuse(state, slot, 1.0)
    found = [len(due(state, 1.1 + n * PAUSE)) for n in range(5)]
    assert found == [1, 1, 1, 1, 0]


def test_the_first_answer_makes_all_others_due_for_a_probe():
    state = make_state()
    slots = open_some(state, 5)
    for slot in slots:
        state.refused(slot, 1.0)
    run(state, 20.0, 1.0)
    (one,) = due(state, 21.0)
    assert due(state, 21.0) == []
    answer(state, one, 21.1)
    assert state.outage.next_at(21.1) <= 21.1
    assert len(due(state, 21.1)) == AT_ONCE


def test_the_first_answer_in_a_short_silence_probes_the_others_at_once():
    state = make_state()
    slots = open_some(state, 3)
    for slot in slots:
        state.refused(slot, 1.0)
        refuse(state, slot, 1.0)
    assert not state.outage.declared
    answer(state, slots[0], 1.01)
    assert set(due(state, 1.01)) == set(slots[1:])
