"""Test which connection is leased next, and which ones are not needed."""

from __future__ import annotations

import pytest

from fastapi_topaz._pool.state.slot import Claim
from kit.states import Link, make_state, open_one, taken


@pytest.mark.parametrize("streams", [1, 3])
def test_connections_take_turns(streams):
    state = make_state(max_connections=3, streams_per_connection=streams)
    slots = [open_one(state) for _ in range(3)]
    turns = []
    for _ in range(9):
        claim = taken(state)
        turns.append(claim.slot)
        state.give_back(claim, 1.0)
    assert turns == slots * 3


def test_waiting_callers_get_the_connections_in_turns():
    state = make_state(max_connections=3)
    first, second, third = (open_one(state) for _ in range(3))
    leases = {claim.slot: claim for claim in (taken(state) for _ in range(3))}
    waiters = [Claim(), Claim()]
    for waiter in waiters:
        state.enqueue(waiter)
    state.give_back(leases[second], 1.0)
    state.give_back(leases[first], 2.0)
    assert state.serve(tokens=3, now=2.0) == waiters
    assert [claim.slot for claim in waiters] == [second, first]
    assert third.leases == 1


def test_all_streams_of_all_connections_are_used():
    state = make_state(max_connections=2, streams_per_connection=3)
    slots = [open_one(state), open_one(state)]
    assert [taken(state).slot for _ in range(6)] == slots * 3
    assert not state.take(Claim(), 0.0)


def test_a_connection_that_keeps_its_leases_gets_fewer_new_ones():
    state = make_state(max_connections=3, streams_per_connection=10)
    slow, *quick = (open_one(state) for _ in range(3))
    held = []
    for _ in range(30):
        claim = taken(state)
        if claim.slot is slow:
            held.append(claim)
        else:
            state.give_back(claim, 1.0)
    assert len(held) == slow.leases == 1
    assert [slot.leases for slot in quick] == [0, 0]


def test_a_slow_connection_gets_fewer_leases_also_while_another_one_rests():
    state = make_state(max_connections=4, streams_per_connection=10)
    resting, slow, *quick = (open_one(state) for _ in range(4))
    resting.rests = True
    for _ in range(30):
        claim = taken(state)
        if claim.slot is not slow:
            state.give_back(claim, 1.0)
    assert slow.leases == 1
    assert resting.leases == 0
    assert [slot.leases for slot in quick] == [0, 0]


def test_connections_that_take_turns_are_reaped_if_fewer_were_enough():
    state = make_state(max_idle_time=10.0)
    slots = [open_one(state) for _ in range(4)]
    for claim in [taken(state, 1.0) for _ in range(4)]:
        state.give_back(claim, 2.0)
    for second in range(3, 20):
        for claim in [taken(state, float(second)) for _ in range(2)]:
            state.give_back(claim, second + 0.5)
        state.reap(second + 0.75)
        expected = 4 if second < 12 else 2
        assert len(state.open) == expected, second
    assert set(state.to_close) < set(slots)


def test_the_most_leases_at_once_decide_how_many_connections_stay():
    state = make_state(max_idle_time=10.0, streams_per_connection=2)
    for _ in range(4):
        open_one(state)
    for count, at in [(8, 1.0), (5, 3.0), (3, 6.0), (1, 9.0)]:
        for claim in [taken(state, at) for _ in range(count)]:
            state.give_back(claim, at)
    totals = []
    for now in (10.9, 11.0, 12.9, 13.0, 15.9, 16.0, 18.9, 19.0):
        state.reap(now)
        totals.append(len(state.open))
    # 8 need 4 connections, 5 need 3, 3 need 2, 1 needs 1.
    assert totals == [4, 3, 3, 2, 2, 1, 1, 0]


def test_a_small_connection_is_reaped_although_a_larger_one_is_needed():
    state = make_state(max_idle_time=10.0, streams_per_connection=5)
    large = open_one(state)
    small = [open_one(state, connection=Link(1)) for _ in range(2)]
    for claim in [taken(state) for _ in range(4)]:
        state.give_back(claim, 95.0)
    large.last_used_at = 90.0
    state.reap(100.0)
    assert list(state.open) == [large]
    assert set(state.to_close) == set(small)


def test_a_young_connection_is_not_reaped():
    state = make_state(max_idle_time=10.0)
    old, young = open_one(state, 0.0), open_one(state, 95.0)
    state.reap(100.0)
    assert list(state.open) == [young]
    assert state.to_close == [old]


def test_a_young_connection_does_not_keep_an_old_one_that_was_used_later():
    state = make_state(max_idle_time=10.0, health_check_interval=0)
    old = open_one(state)
    open_one(state, 95.0)
    claim = taken(state, 96.0)
    assert claim.slot is old
    state.give_back(claim, 96.0)
    state.reap(100.0)
    assert state.to_close == [old]


def test_connections_that_are_replaced_often_are_reaped_all_the_same():
    state = make_state(
        max_idle_time=10.0,
        max_lifetime=5.0,
        health_check_interval=0,
        streams_per_connection=10,
        random=lambda: 0.0,
    )
    for _ in range(4):
        open_one(state)
    for second in range(1, 100):
        now = float(second)
        claims = [taken(state, now) for _ in range(6)]
        state.rotation.expire(state.open, now)
        # All connections are leased, so a new one takes the place of each expired one.
        while state.rotation.next():
            open_one(state, now)
        state.reap(now)
        for claim in claims:
            state.give_back(claim, now)
    assert len(state.open) == 1


def test_a_surplus_connection_that_is_never_idle_rests_until_it_is():
    state = make_state(
        max_idle_time=10.0, health_check_interval=0, streams_per_connection=10
    )
    slots = [open_one(state) for _ in range(3)]
    leases = [taken(state) for _ in range(5)]
    state.reap(100.0)
    (resting,) = [slot for slot in slots if slot.rests]
    assert resting.leases == 1, "one at a time, and first the one with fewest leases"
    leases += [taken(state, 100.0) for _ in range(8)]
    assert resting.leases == 1
    (claim,) = [claim for claim in leases if claim.slot is resting]
    state.give_back(claim, 100.0)
    taken(state, 100.0)
    assert resting.leases == 0
    assert state.to_close == []
    state.reap(110.0)
    assert state.to_close == [resting]
    assert [slot.rests for slot in state.open] == [False, False], "13 leases need two"


def test_a_resting_connection_serves_if_the_others_are_full():
    state = make_state(
        max_idle_time=10.0, health_check_interval=0, streams_per_connection=2
    )
    for _ in range(2):
        open_one(state)
    for claim in [taken(state) for _ in range(2)]:
        assert claim.slot.leases == 1
    state.reap(100.0)
    assert [slot.rests for slot in state.open].count(True) == 1
    taken(state, 100.0)
    assert sorted(slot.leases for slot in state.open) == [1, 2]
    last = taken(state, 100.0)
    assert last.slot.rests
    state.reap(105.0)
    assert not any(slot.rests for slot in state.open), "it is needed"
