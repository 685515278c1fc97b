"""What the state makes of calls and probes that fail, and of servers that hang up."""

from __future__ import annotations

import pytest

from fastapi_topaz._pool.state.attempts import BRIEF
from fastapi_topaz._pool.state.slot import Claim
from kit.states import make_state, open_one, taken


def open_several(state, count):
    return [open_one(state) for _ in range(count)]


def probes(state):
    """Return the entries that are to be probed now, and forget them."""
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


def test_a_suspect_is_probed_at_once_and_once():
    state = make_state()
    slot = open_one(state)
    state.suspect(slot, 1.0)
    state.suspect(slot, 2.0)
    assert probes(state) == [slot]
    assert slot.suspected_at == 1.0


def test_a_suspect_whose_lease_comes_back_still_waits_for_its_probe():
    state = make_state()
    slot = open_one(state)
    claim = taken(state)
    state.suspect(slot, 1.0)
    state.give_back(claim, 1.0)
    assert not state.take(Claim(), 1.0)
    state.answered(slot, 1.0)
    assert taken(state, 1.0)


def test_an_answer_makes_nothing_ready_that_is_full_or_about_to_go():
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


def test_what_is_about_to_go_is_not_suspected_any_more():
    state = make_state()
    slot = open_one(state)
    taken(state)
    state.retire(slot, "drain")
    for accuse in (state.suspect, state.broke, state.timed_out, state.unanswered):
        accuse(slot, 1.0)
    assert probes(state) == []
    assert slot.retired == "drain"


def test_a_call_that_ends_after_its_connection_was_closed_accuses_nothing():
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


def test_a_first_failed_probe_makes_suspect_and_asks_for_a_second_one_at_once():
    state = make_state()
    slot, other = open_several(state, 2)
    state.unanswered(slot, 1.0)
    assert suspects(slot, other) == [True, False]
    assert slot.retired is None
    assert probes(state) == [slot]


def test_the_second_failed_probe_retires():
    state = make_state()
    slot = open_one(state)
    state.unanswered(slot, 1.0)
    state.unanswered(slot, 2.0)
    assert slot.retired == "unhealthy"
    assert state.to_close == [slot]


def test_an_answer_between_two_failed_probes_makes_up_for_the_first():
    state = make_state()
    slot = open_one(state)
    state.unanswered(slot, 1.0)
    state.answered(slot, 2.0)
    state.unanswered(slot, 30.0)
    assert slot.retired is None


def test_one_failed_probe_is_the_end_of_what_a_call_had_made_suspect():
    state = make_state()
    slot = open_one(state)
    state.suspect(slot, 1.0)
    state.unanswered(slot, 2.0)
    assert slot.retired == "unhealthy"


def test_an_unhealthy_connection_closes_when_its_last_lease_is_back():
    state = make_state()
    slot = open_one(state)
    claim = taken(state)
    state.unanswered(slot, 1.0)
    state.unanswered(slot, 2.0)
    assert state.to_close == []
    assert state.status().leaving == 1
    state.give_back(claim, 3.0)
    assert state.to_close == [slot]


def test_an_unhealthy_connection_makes_those_suspect_that_have_not_answered_since():
    state = make_state()
    slot, silent, answering = open_several(state, 3)
    state.unanswered(slot, 1.0)
    answering.proven_at = 1.5
    probes(state)
    state.unanswered(slot, 2.0)
    assert suspects(silent, answering) == [True, False]
    assert probes(state) == [silent]


# -- calls --------------------------------------------------------------------------


def test_a_server_that_cannot_be_had_makes_its_own_connection_suspect_only():
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


def test_a_broken_connection_makes_its_siblings_suspect_once_and_not_once_per_call():
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


def test_a_connection_that_has_answered_and_breaks_again_accuses_again():
    state = make_state()
    broken, sibling = open_several(state, 2)
    state.broke(broken, 1.0)
    state.answered(broken, 1.5)
    state.answered(sibling, 1.5)
    state.broke(broken, 2.0)
    assert suspects(broken, sibling) == [True, True]


def test_what_answered_in_the_moment_of_the_break_is_not_suspected():
    state = make_state()
    broken, sibling = open_several(state, 2)
    sibling.proven_at = 1.0
    state.broke(broken, 1.0)
    assert suspects(broken, sibling) == [True, False]


def test_one_call_without_an_answer_is_no_reason_for_suspicion_but_two_are():
    state = make_state()
    slot, other = open_several(state, 2)
    state.timed_out(slot, 1.0)
    assert suspects(slot, other) == [False, False]
    state.timed_out(slot, 2.0)
    assert suspects(slot, other) == [True, False]
    assert probes(state) == [slot]


def test_an_answer_between_two_calls_without_one_starts_the_count_anew():
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


# -- proven too long ago ------------------------------------------------------------


def test_after_a_jump_of_the_clock_connections_are_suspected_instead_of_leased():
    state = make_state(health_check_interval=30, health_check_timeout=5)
    slots = open_several(state, 2)
    assert not state.take(Claim(), 70.1)
    waiter = Claim()
    state.enqueue(waiter)
    assert state.serve(tokens=1, now=70.1) == []
    assert set(probes(state)) == set(slots)
    state.answered(slots[0], 70.2)
    assert state.serve(tokens=1, now=70.2) == [waiter]


def test_a_connection_is_leased_as_long_as_its_next_probe_may_be_under_way():
    state = make_state(health_check_interval=30, health_check_timeout=5)
    open_one(state)
    assert taken(state, 70.0)


def test_those_who_wait_get_what_was_proven_since():
    state = make_state(health_check_interval=30, health_check_timeout=5)
    proven, stale = open_several(state, 2)
    proven.proven_at = 60.0
    state.enqueue(Claim())
    (served,) = state.serve(tokens=1, now=80.0)
    assert served.slot is proven
    assert probes(state) == [stale]


def test_without_health_checks_nothing_is_ever_proven_too_long_ago():
    state = make_state(health_check_interval=0)
    open_one(state)
    assert taken(state, 1e9)


# -- lost ---------------------------------------------------------------------------


def test_a_lost_connection_is_not_leased_but_closed():
    state = make_state()
    well, lost = open_several(state, 2)
    lost.connection.lost = True
    claim = Claim()
    assert state.take(claim, 1.0)
    assert claim.slot is well
    assert lost.retired == "lost"
    assert state.to_close == [lost]
    assert probes(state) == []


def test_a_lost_connection_is_noticed_when_it_is_looked_at():
    state = make_state()
    well, lost = open_several(state, 2)
    lost.connection.lost = True
    assert [state.retire_if_lost(slot, 1.0) for slot in (well, lost)] == [False, True]
    assert state.to_close == [lost]


def test_a_connection_that_cannot_tell_is_not_lost():
    state = make_state()
    slot = state.attempts.begin(0.0)
    state.connected(slot, object(), 0.0)
    assert not state.retire_if_lost(slot, 1.0)
    assert taken(state, 1.0)


def test_a_suspect_that_is_lost_needs_no_probe():
    state = make_state()
    slot, sibling = open_several(state, 2)
    slot.connection.lost = sibling.connection.lost = True
    state.broke(slot, 1.0)
    assert probes(state) == []
    assert set(state.to_close) == {slot, sibling}


def test_a_lost_connection_closes_when_its_last_lease_is_back():
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
def test_only_a_connection_that_lived_long_is_replaced_at_once(lived, wanted):
    state = make_state()
    slot = open_one(state, 10.0)
    state.enqueue(Claim())
    state.lost(slot, "lost", 10.0 + lived)
    assert state.shortfall(tokens=1, now=10.0 + lived) == wanted


# -- edges --------------------------------------------------------------------------


def test_a_connection_that_cannot_tell_whether_it_is_lost_is_asked_once():
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


def test_a_call_that_timed_out_as_another_was_answered_counts():
    state = make_state()
    slot = open_one(state)
    slot.proven_at = 5.0
    state.timed_out(slot, 5.0)
    assert suspects(slot) == [False]
    state.timed_out(slot, 6.0)
    assert suspects(slot) == [True]


def test_an_answer_of_the_moment_of_the_suspicion_does_not_excuse():
    state = make_state()
    slot = open_one(state)
    state.suspect(slot, 0.0)
    state.unanswered(slot, 1.0)
    assert slot.retired == "unhealthy"


# -- since when, and what next ------------------------------------------------------


def test_the_second_timeout_is_when_the_suspicion_begins():
    state = make_state()
    slot = open_one(state)
    state.timed_out(slot, 1.0)
    state.timed_out(slot, 2.0)
    assert slot.suspected_at == 2.0


def test_a_suspect_that_answered_a_call_meanwhile_is_suspected_anew():
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


def test_those_that_are_suspected_with_an_unhealthy_one_are_so_from_then_on():
    state = make_state(max_connections=2)
    slot, other = open_one(state), open_one(state)
    state.suspect(slot, 1.0)
    state.unanswered(slot, 6.0)
    assert (other.suspect, other.suspected_at) == (True, 6.0)


# -- two things at the same time ----------------------------------------------------


def test_an_answer_in_the_moment_of_a_timeout_is_none_since_it():
    state = make_state()
    slot = open_one(state)
    slot.proven_at = 1.0
    state.timed_out(slot, 1.0)
    assert not slot.suspect
    state.timed_out(slot, 2.0)
    assert slot.suspect


def test_who_is_suspected_in_the_moment_of_its_last_answer_has_not_answered_since():
    state = make_state()
    slot = open_one(state)
    state.suspect(slot, 0.0)
    state.unanswered(slot, 5.0)
    assert slot.retired == "unhealthy"
