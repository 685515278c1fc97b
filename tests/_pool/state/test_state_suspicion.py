"""Test how the state handles failed calls and probes, and lost connections."""

from __future__ import annotations

import pytest

from fastapi_topaz._pool.state.attempts import BRIEF
from fastapi_topaz._pool.state.slot import Claim
from kit.states import make_state, open_one, taken


def open_several(state, count):
    return [open_one(state) for _ in range(count)]


def probes(state):
    """Return and clear the slots to be probed now."""
    slots = list(state.to_probe)
    state.to_probe.clear()
    return slots


def suspects(*slots):
    return [slot.suspect for slot in slots]


# -- suspects -----------------------------------------------------------------------


def test_a_suspect_is_not_leased_until_a_probe_is_answered():
    state = make_state()
    slot = open_one(state)
    state.suspect(slot, 1.0)
    assert not state.take(Claim(), 1.0)
    assert state.status().healthy_connections == 0
    state.answered(slot, 2.0)
    assert taken(state, 2.0).slot is slot


def test_a_suspect_is_probed_once_and_at_once():
    state = make_state()
    slot = open_one(state)
    state.suspect(slot, 1.0)
    state.suspect(slot, 2.0)
    assert probes(state) == [slot]
    assert slot.suspected_at == 1.0


def test_a_suspect_with_a_returned_lease_still_waits_for_its_probe():
    state = make_state()
    slot = open_one(state)
    claim = taken(state)
    state.suspect(slot, 1.0)
    state.give_back(claim, 1.0)
    assert not state.take(Claim(), 1.0)
    state.answered(slot, 1.0)
    assert taken(state, 1.0)


def test_an_answer_does_not_make_a_full_or_leaving_connection_ready():
    state = make_state()
    full, leaving = open_several(state, 2)
    leases = [taken(state), taken(state)]
    state.retire(leaving, "drain")
    state.answered(full, 1.0)
    state.answered(leaving, 1.0)
    assert not state.take(Claim(), 1.0)
    for claim in leases:
        state.give_back(claim, 1.0)
    assert state.to_close == [leaving]
    assert taken(state, 1.0).slot is full


def test_a_leaving_connection_stops_being_a_suspect():
    state = make_state()
    slot = open_one(state)
    taken(state)
    state.retire(slot, "drain")
    for accuse in (state.suspect, state.broke, state.timed_out, state.unanswered):
        accuse(slot, 1.0)
    assert probes(state) == []
    assert slot.retired == "drain"


def test_a_call_that_ends_after_its_connection_closed_accuses_nothing():
    state = make_state()
    slot = open_one(state)
    state.retire(slot, "idle")
    state.closed(slot)
    for accuse in (state.suspect, state.broke, state.timed_out, state.unanswered):
        accuse(slot, 1.0)
    state.answered(slot, 2.0)
    assert not slot.suspect
    assert state.to_close == [slot]
    assert not state.take(Claim(), 2.0)


# -- probes -------------------------------------------------------------------------


def test_the_first_failed_probe_makes_a_suspect_with_a_second_probe():
    state = make_state()
    slot, other = open_several(state, 2)
    state.unanswered(slot, 1.0)
    assert suspects(slot, other) == [True, False]
    assert slot.retired is None
    assert probes(state) == [slot]


def test_the_second_failed_probe_retires_the_connection():
    state = make_state()
    slot = open_one(state)
    state.unanswered(slot, 1.0)
    state.unanswered(slot, 2.0)
    assert slot.retired == "unhealthy"
    assert state.to_close == [slot]


def test_an_answer_between_two_failed_probes_resets_the_first():
    state = make_state()
    slot = open_one(state)
    state.unanswered(slot, 1.0)
    state.answered(slot, 2.0)
    state.unanswered(slot, 30.0)
    assert slot.retired is None


def test_one_failed_probe_retires_a_connection_suspected_by_a_call():
    state = make_state()
    slot = open_one(state)
    state.suspect(slot, 1.0)
    state.unanswered(slot, 2.0)
    assert slot.retired == "unhealthy"


def test_an_unhealthy_connection_closes_with_its_last_released_lease():
    state = make_state()
    slot = open_one(state)
    claim = taken(state)
    state.unanswered(slot, 1.0)
    state.unanswered(slot, 2.0)
    assert state.to_close == []
    assert state.status().leaving == 1
    state.give_back(claim, 3.0)
    assert state.to_close == [slot]


def test_an_unhealthy_connection_makes_silent_siblings_suspect():
    state = make_state()
    slot, silent, answering = open_several(state, 3)
    state.unanswered(slot, 1.0)
    answering.proven_at = 1.5
    probes(state)
    state.unanswered(slot, 2.0)
    assert suspects(silent, answering) == [True, False]
    assert probes(state) == [silent]


# -- calls --------------------------------------------------------------------------


def test_an_unavailable_call_makes_only_its_own_connection_suspect():
    state = make_state()
    slot, other = open_several(state, 2)
    state.suspect(slot, 1.0)
    assert suspects(slot, other) == [True, False]


def test_a_broken_call_makes_all_siblings_suspect():
    state = make_state()
    slots = open_several(state, 3)
    state.broke(slots[0], 1.0)
    assert suspects(*slots) == [True] * 3
    assert set(probes(state)) == set(slots)


def test_a_broken_connection_makes_its_siblings_suspect_only_once():
    state = make_state()
    broken, *siblings = open_several(state, 3)
    state.broke(broken, 1.0)
    for sibling in siblings:
        state.answered(sibling, 1.5)
    probes(state)
    for now in (1.6, 1.7, 1.8):
        state.broke(broken, now)
    assert suspects(*siblings) == [False, False]
    assert probes(state) == []


def test_a_connection_that_answers_and_breaks_again_accuses_again():
    state = make_state()
    broken, sibling = open_several(state, 2)
    state.broke(broken, 1.0)
    state.answered(broken, 1.5)
    state.answered(sibling, 1.5)
    state.broke(broken, 2.0)
    assert suspects(broken, sibling) == [True, True]


def test_a_sibling_that_answers_exactly_at_the_break_is_not_suspected():
    state = make_state()
    broken, sibling = open_several(state, 2)
    sibling.proven_at = 1.0
    state.broke(broken, 1.0)
    assert suspects(broken, sibling) == [True, False]


def test_two_calls_without_an_answer_cause_suspicion_and_one_does_not():
    state = make_state()
    slot, other = open_several(state, 2)
    state.timed_out(slot, 1.0)
    assert suspects(slot, other) == [False, False]
    state.timed_out(slot, 2.0)
    assert suspects(slot, other) == [True, False]
    assert probes(state) == [slot]


def test_an_answer_between_two_unanswered_calls_resets_the_count():
    state = make_state()
    slot = open_one(state)
    state.timed_out(slot, 1.0)
    slot.proven_at = 1.5
    state.timed_out(slot, 2.0)
    assert not slot.suspect
    state.timed_out(slot, 3.0)
    assert slot.suspect


def test_a_slow_server_is_cleared_by_its_probe():
    state = make_state()
    slot = open_one(state)
    state.timed_out(slot, 1.0)
    state.timed_out(slot, 2.0)
    state.answered(slot, 2.5)
    state.timed_out(slot, 3.0)
    assert not slot.suspect


# -- proofs that are too old --------------------------------------------------------


def test_after_a_clock_jump_connections_are_suspected_and_not_leased():
    state = make_state(health_check_interval=30, health_check_timeout=5)
    slots = open_several(state, 2)
    assert not state.take(Claim(), 70.1)
    waiter = Claim()
    state.enqueue(waiter)
    assert state.serve(tokens=1, now=70.1) == []
    assert set(probes(state)) == set(slots)
    state.answered(slots[0], 70.2)
    assert state.serve(tokens=1, now=70.2) == [waiter]


def test_a_connection_is_leased_while_its_next_probe_can_be_running():
    state = make_state(health_check_interval=30, health_check_timeout=5)
    open_one(state)
    assert taken(state, 70.0)


def test_waiting_callers_get_the_recently_proven_connection():
    state = make_state(health_check_interval=30, health_check_timeout=5)
    stale, proven = open_several(state, 2)
    proven.proven_at = 60.0
    state.enqueue(Claim())
    (served,) = state.serve(tokens=1, now=80.0)
    assert served.slot is proven
    assert probes(state) == [stale]


def test_a_lost_connection_is_passed_over_for_one_with_the_oldest_valid_proof():
    state = make_state(health_check_interval=30, health_check_timeout=5)
    lost, well = open_several(state, 2)
    lost.connection.lost = True
    assert taken(state, 70.0).slot is well


def test_without_health_checks_no_proof_expires():
    state = make_state(health_check_interval=0)
    open_one(state)
    assert taken(state, 1e9)


# -- lost connections ---------------------------------------------------------------


def test_a_lost_connection_is_not_leased_but_closed():
    state = make_state()
    lost, well = open_several(state, 2)
    lost.connection.lost = True
    claim = Claim()
    assert state.take(claim, 1.0)
    assert claim.slot is well
    assert lost.retired == "lost"
    assert state.to_close == [lost]
    assert probes(state) == []


def test_a_lost_connection_is_noticed_at_the_next_look():
    state = make_state()
    well, lost = open_several(state, 2)
    lost.connection.lost = True
    assert [state.retire_if_lost(slot, 1.0) for slot in (well, lost)] == [False, True]
    assert state.to_close == [lost]


def test_a_connection_without_is_lost_is_not_lost():
    state = make_state()
    slot = state.attempts.begin(0.0)
    state.connected(slot, object(), 0.0)
    assert not state.retire_if_lost(slot, 1.0)
    assert taken(state, 1.0)


def test_a_lost_suspect_needs_no_probe():
    state = make_state()
    slot, sibling = open_several(state, 2)
    slot.connection.lost = sibling.connection.lost = True
    state.broke(slot, 1.0)
    assert probes(state) == []
    assert set(state.to_close) == {slot, sibling}


def test_a_lost_connection_closes_with_its_last_released_lease():
    state = make_state()
    slot = open_one(state)
    claim = taken(state)
    state.lost(slot, "lost", 1.0)
    state.lost(slot, "unhealthy", 1.0)
    assert state.to_close == []
    state.give_back(claim, 2.0)
    assert state.to_close == [slot]
    assert slot.retired == "lost"


@pytest.mark.parametrize("lived, wanted", [(BRIEF - 0.1, 0), (BRIEF, 1)])
def test_only_a_long_lived_connection_is_replaced_at_once(lived, wanted):
    state = make_state()
    slot = open_one(state, 10.0)
    state.enqueue(Claim())
    state.lost(slot, "lost", 10.0 + lived)
    assert state.shortfall(tokens=1, now=10.0 + lived) == wanted


# -- edge cases ---------------------------------------------------------------------


def test_a_connection_with_a_raising_is_lost_is_asked_once():
    asked = []

    class Odd:
        def is_lost(self):
            asked.append(self)
            raise OSError("no idea")

    state = make_state()
    slot = state.attempts.begin(0.0)
    state.connected(slot, Odd(), 0.0)
    for _ in range(3):
        assert slot.is_gone() is False
    assert len(asked) == 1
    assert slot.is_lost is None
    assert slot.last_error == "is_lost() raised OSError"


def test_a_timeout_at_the_moment_of_another_answer_counts():
    state = make_state()
    slot = open_one(state)
    slot.proven_at = 5.0
    state.timed_out(slot, 5.0)
    assert suspects(slot) == [False]
    state.timed_out(slot, 6.0)
    assert suspects(slot) == [True]


def test_an_answer_exactly_at_the_suspicion_does_not_clear_it():
    state = make_state()
    slot = open_one(state)
    state.suspect(slot, 0.0)
    state.unanswered(slot, 1.0)
    assert slot.retired == "unhealthy"


# -- start of a suspicion, and its consequences -------------------------------------


def test_the_suspicion_begins_at_the_second_timeout():
    state = make_state()
    slot = open_one(state)
    state.timed_out(slot, 1.0)
    state.timed_out(slot, 2.0)
    assert slot.suspected_at == 2.0


def test_a_suspect_that_answered_a_call_meanwhile_is_suspected_again():
    state = make_state()
    slot = open_one(state)
    state.suspect(slot, 1.0)
    state.to_probe.clear()
    slot.proven_at = 2.0
    state.unanswered(slot, 5.0)
    assert slot.retired is None
    assert state.to_probe == [slot]
    state.unanswered(slot, 9.0)
    assert slot.retired == "unhealthy"


def test_siblings_of_an_unhealthy_connection_are_suspected_from_then_on():
    state = make_state(max_connections=2)
    slot, other = open_one(state), open_one(state)
    state.suspect(slot, 1.0)
    state.unanswered(slot, 6.0)
    assert (other.suspect, other.suspected_at) == (True, 6.0)


# -- simultaneous events ------------------------------------------------------------


def test_an_answer_exactly_at_a_timeout_does_not_count_as_later():
    state = make_state()
    slot = open_one(state)
    slot.proven_at = 1.0
    state.timed_out(slot, 1.0)
    assert not slot.suspect
    state.timed_out(slot, 2.0)
    assert slot.suspect


def test_a_suspicion_exactly_at_the_last_answer_is_not_answered():
    state = make_state()
    slot = open_one(state)
    state.suspect(slot, 0.0)
    state.unanswered(slot, 5.0)
    assert slot.retired == "unhealthy"
