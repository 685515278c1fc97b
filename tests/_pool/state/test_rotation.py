"""Test which connections are replaced, when, and that it happens one at a time."""

from __future__ import annotations

import attrs
import pytest

from fastapi_topaz._pool.state.rotation import RESPREAD, Rotation
from fastapi_topaz._pool.state.slot import Claim, Slot
from fastapi_topaz.exceptions import ConnectFailed
from kit.states import make_state, open_one, taken


def make_rotation(random=0.5, *, spreads=True):
    return Rotation(lambda: random, spreads=spreads)


def reasons(rotation, slots, now):
    """Return the reason of each of *slots* that expired by *now*."""
    rotation.expire(slots, now)
    return [rotation.reason(e) for e in slots if e in rotation._expired]


def make_rotating(*, keeps_minimum=True, **options):
    state = make_state(random=lambda: 0.5, **options)
    state.keeps_minimum = keeps_minimum
    return state


def wanted(state, now=0.0):
    return state.shortfall(len(state.waiting) + state.in_use, now)


def drain(state):
    state.rotation.drain(state.open)
    state.retire_expired()


# -- lifetimes ----------------------------------------------------------------------


@pytest.mark.parametrize("random, lifetime", [(0.0, 100.0), (0.5, 95.0), (1.0, 90.0)])
def test_lifetimes_are_shortened_by_up_to_a_tenth(random, lifetime):
    rotation, slot = make_rotation(random), Slot()
    rotation.begin(slot, 100.0, 7.0)
    assert slot.expires_at == pytest.approx(7.0 + lifetime)
    assert rotation.next_at([slot]) == slot.expires_at
    assert reasons(rotation, [slot], 7.0 + lifetime - 0.1) == []
    assert reasons(rotation, [slot], 7.0 + lifetime) == ["lifetime"]


def test_max_lifetime_0_means_no_limit():
    rotation, slot = make_rotation(), Slot()
    rotation.begin(slot, 0.0, 7.0)
    assert rotation.next_at([slot]) == float("inf")
    assert reasons(rotation, [slot], 1e9) == []


def test_an_expired_connection_no_longer_sets_the_next_wake_up():
    rotation, first, second = make_rotation(), Slot(), Slot()
    first.expires_at, second.expires_at = 10.0, 20.0
    assert rotation.next_at([first, second]) == 10.0
    rotation.expire([first, second], 10.0)
    assert rotation.next_at([first, second]) == 20.0
    assert rotation.next() is first


def test_the_first_reason_for_a_replacement_counts():
    rotation, slot = make_rotation(), Slot(expires_at=10.0)
    rotation.drain([slot])
    assert reasons(rotation, [slot], 10.0) == ["drain"]


def test_a_retired_connection_needs_no_replacement():
    rotation, first, second = make_rotation(), Slot(), Slot()
    rotation.drain([first, second])
    assert rotation.is_idle()
    first.retired = "drain"
    assert rotation.next() is second
    assert not rotation.is_idle(), "the connection waits for its last lease"
    rotation.forget(first)
    rotation.forget(second)
    assert rotation.is_idle()
    assert rotation.next() is None


# -- spreading after a loss ---------------------------------------------------------


@pytest.mark.parametrize("random, share", [(0.0, 0.75), (0.5, 1.0), (1.0, 1.25)])
def test_after_a_loss_connections_are_spread_five_times_with_jitter(random, share):
    rotation, slot = make_rotation(random), Slot()
    rotation.lost(100.0)
    for delay in (2.0, 8.0, 16.0, 32.0, 64.0):
        then = 100.0 + delay * share
        assert rotation.next_at([slot]) == pytest.approx(then)
        assert reasons(rotation, [slot], then - 0.01) == []
        assert reasons(rotation, [slot], then) == ["spread"]
        rotation.forget(slot)
    assert rotation.next_at([slot]) == float("inf")


def test_connections_to_one_server_are_not_spread():
    rotation, slot = make_rotation(spreads=False), Slot()
    rotation.lost(100.0)
    assert rotation.next_at([slot]) == float("inf")
    assert reasons(rotation, [slot], 1e9) == []


def test_another_loss_restarts_the_spreading():
    rotation, slot = make_rotation(), Slot()
    rotation.lost(100.0)
    rotation.expire([slot], 102.0)
    rotation.lost(103.0)
    assert rotation.next_at([slot]) == 105.0


def test_missed_spreading_rounds_are_made_up_for_once():
    rotation, slot = make_rotation(), Slot()
    rotation.lost(100.0)
    assert reasons(rotation, [slot], 1e9) == ["spread"]
    assert rotation.next_at([slot]) == float("inf")


def test_newer_connections_are_spread_only_in_the_next_round():
    rotation, old, new = make_rotation(), Slot(), Slot()
    rotation.lost(100.0)
    rotation.expire([old], 102.0)
    assert reasons(rotation, [old, new], 103.0) == ["spread"]
    assert reasons(rotation, [old, new], 108.0) == ["spread", "spread"]


def test_a_lost_connection_spreads_the_others():
    state = make_rotating(spreads=True)
    lost, _other = open_one(state, 50.0), open_one(state, 50.0)
    state.lost(lost, "lost", 100.0)
    assert state.rotation.next_at(state.open) == 100.0 + RESPREAD[0]
    assert reasons(state.rotation, state.open, 102.0) == ["spread"]


def test_the_end_of_an_outage_spreads_connections():
    state = make_rotating(spreads=True, max_lifetime=0)
    state.connect_failed(state.attempts.begin(60.0), ConnectFailed("no"), 60.0)
    open_one(state, 100.0)
    assert state.rotation.next_at(state.open) == 100.0 + RESPREAD[0]


def test_a_failed_attempt_spreads_nothing_while_connections_serve():
    state = make_rotating(spreads=True, max_lifetime=0)
    open_one(state, 50.0)
    state.connect_failed(state.attempts.begin(60.0), ConnectFailed("no"), 60.0)
    open_one(state, 100.0)
    assert state.rotation.next_at(state.open) == float("inf")


def test_a_connection_closed_by_the_pool_spreads_nothing():
    state = make_rotating(spreads=True, max_lifetime=0)
    state.retire(open_one(state), "idle")
    assert state.rotation.next_at(state.open) == float("inf")


# -- spreading for new servers ------------------------------------------------------


@pytest.mark.parametrize("random", [0.0, 0.5, 1.0])
def test_a_new_server_replaces_all_connections_once(random):
    rotation, slot = Rotation(lambda: random, spreads=True), Slot()
    rotation.grown(100.0)
    assert rotation.next_at([slot]) == 100.0 + 30.0 * random
    rotation.expire([slot], 130.0)
    assert rotation.reason(slot) == "spread"
    rotation.forget(slot)
    assert rotation.next_at([slot]) == float("inf")


def test_a_new_server_adds_nothing_to_the_spread_after_a_loss():
    rotation = Rotation(lambda: 0.5, spreads=True)
    rotation.lost(100.0)
    rotation.grown(100.0)
    times = []
    while (at := rotation.next_at([])) < float("inf"):
        times.append(at)
        rotation.expire([], at)
    assert times == [102.0, 108.0, 116.0, 132.0, 164.0]


def test_a_new_server_does_not_wait_for_a_late_spread_after_a_loss():
    rotation = Rotation(lambda: 0.5, spreads=True)
    rotation.lost(100.0)
    rotation.expire([], 140.0)
    rotation.grown(140.0)
    assert rotation.next_at([]) == 155.0
    rotation.expire([], 155.0)
    assert rotation.next_at([]) == 164.0


def spreads(random, times):
    """Return when connections are replaced if a server is new at each of *times*."""
    rotation, found = Rotation(lambda: random, spreads=True), []
    for now in times:
        while (at := rotation.next_at([])) <= now:
            rotation.expire([], at)
            found.append(at)
        rotation.grown(float(now))
    return found


def test_if_servers_are_new_all_the_time_connections_are_replaced_ever_more_rarely():
    # Some name servers return a few of many addresses, and some leave out addresses.
    assert spreads(0.0, range(0, 4000, 30)) == [
        *(0, 60, 180, 420, 900, 1500, 2100, 2700, 3300, 3900)
    ]
    assert spreads(1.0, range(0, 800, 10)) == [30, 120, 270, 540]


def test_a_new_server_after_a_long_time_is_reached_at_once():
    assert spreads(0.0, [0, 100, 101, 1420, 1421]) == [0, 100, 220, 1420]
    # The pause is as at first only after 1,200 s without a new server.
    assert spreads(0.0, [0, 1200, 1201, 1320]) == [0, 1200, 1320]
    assert spreads(0.0, [0, 1201, 1202, 1262]) == [0, 1201, 1261]


def test_a_new_server_is_reached_although_a_loss_has_replaced_the_schedule():
    rotation = Rotation(lambda: 0.0, spreads=True)
    for now in (0.0, 1.0, 61.0):
        rotation.expire([], now)
        rotation.grown(now)
    assert rotation.next_at([]) == 180.0
    rotation.lost(70.0)
    rotation.expire([], 150.0)
    rotation.grown(151.0)
    assert rotation.next_at([]) == 310.0


# -- replacing, one at a time -------------------------------------------------------


def test_an_expired_connection_serves_until_its_replacement_is_ready():
    state = make_rotating(min_connections=1, max_lifetime=10.0)
    old = open_one(state)
    state.rotation.expire(state.open, 10.0)
    state.retire_expired()
    assert state.to_close == []
    assert wanted(state, 10.0) == 1
    claim = taken(state, 10.0)
    assert claim.slot is old
    new = open_one(state, 10.0)
    assert old.retired == "lifetime"
    assert list(state.open) == [old, new]
    state.give_back(claim, 11.0)
    assert state.to_close == [old]


def test_connections_are_replaced_one_at_a_time():
    state = make_rotating(min_connections=3)
    slots = [open_one(state) for _ in range(3)]
    drain(state)
    for gone in slots:
        assert wanted(state) == 1
        attempt = state.attempts.begin(0.0)
        assert wanted(state) == 0, "one replacement is in progress"
        state.connected(attempt, object(), 0.0)
        assert state.to_close.pop() is gone
        assert state.to_close == []
        state.closed(gone)
        state.retire_expired()
    assert wanted(state) == 0
    assert len(state.open) == 3


def test_an_expired_connection_stays_while_connecting_fails():
    state = make_rotating(min_connections=1)
    slot = open_one(state)
    drain(state)
    for now in (1.0, 2.0, 3.0):
        state.connect_failed(state.attempts.begin(now), ConnectFailed("no"), now)
        state.retire_expired()
    assert taken(state).slot is slot


def test_a_full_pool_makes_room_before_it_replaces():
    state = make_rotating(min_connections=2, max_connections=2)
    first, second = open_one(state), open_one(state)
    drain(state)
    assert state.to_close == [first]
    state.retire_expired()
    assert second.retired is None, "one at a time"
    state.closed(first)
    assert wanted(state) == 1
    open_one(state)
    assert second.retired == "drain"


def test_a_full_pool_drains_one_leased_connection_at_a_time():
    state = make_rotating(max_connections=3, streams_per_connection=2)
    slots = [open_one(state) for _ in range(3)]
    leases = [taken(state) for _ in range(6)]
    drain(state)
    state.retire_expired()
    first = next(slot for slot in slots if slot.retired)
    assert [slot.retired for slot in slots].count("drain") == 1
    for claim in [claim for claim in leases if claim.slot is first]:
        state.give_back(claim, 1.0)
    assert state.to_close == [first]
    state.retire_expired()
    assert len(state.open) == 2, "not before there is a replacement"
    state.closed(first)
    state.retire_expired()
    assert wanted(state) == 1
    open_one(state)
    assert sum(slot.retired is not None for slot in state.open) == 1


def test_an_idle_connection_makes_room_while_a_leased_one_drains():
    state = make_rotating(min_connections=2, max_connections=2)
    open_one(state)
    open_one(state)
    leased = taken(state).slot
    idle = next(slot for slot in state.open if slot is not leased)
    state.rotation.drain([leased, idle])
    state.retire_expired()
    assert state.to_close == [idle], "the connection closes at once"
    state.retire_expired()
    assert leased.retired is None, "one at a time"


def test_a_surplus_idle_connection_is_drained_without_a_replacement():
    state = make_rotating(min_connections=1)
    first, second = open_one(state), open_one(state)
    drain(state)
    assert state.to_close == [first]
    state.closed(first)
    state.retire_expired()
    assert second.retired is None, "the last connection is the minimum"
    assert wanted(state) == 1


def make_needed():
    """Return a state with two idle connections, which both were needed until 95."""
    state = make_rotating(max_idle_time=10.0, health_check_interval=0)
    slots = [open_one(state), open_one(state)]
    for claim in [taken(state, 95.0) for _ in slots]:
        state.give_back(claim, 95.0)
    return state, slots


def test_an_idle_connection_that_was_needed_is_drained_after_its_replacement():
    state, (first, second) = make_needed()
    state.reap(104.9)
    drain(state)
    assert state.to_close == []
    assert wanted(state, 104.9) == 1
    open_one(state, 104.9)
    assert state.to_close == [first]
    assert second.retired is None


def test_an_idle_connection_that_was_not_needed_lately_needs_no_replacement():
    state, (_, second) = make_needed()
    taken(state, 104.0)
    # So the search itself closes none.
    state.keeps_minimum = False
    state.resize(attrs.evolve(state.options, min_connections=2))
    state.reap(104.9)
    state.rotation.drain([second])
    state.retire_expired()
    assert second.retired is None
    state.reap(105.0)
    state.retire_expired()
    assert state.to_close == [second]


def test_no_idle_connection_is_surplus_while_callers_wait():
    state = make_rotating(max_connections=2)
    slot = open_one(state)
    state.enqueue(Claim())
    drain(state)
    assert slot.retired is None
    assert wanted(state) == 1


def test_an_unused_pool_drains_without_replacements():
    state = make_rotating(min_connections=1, keeps_minimum=False)
    slot = open_one(state)
    drain(state)
    assert state.to_close == [slot]
    assert wanted(state) == 0
