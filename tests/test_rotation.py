"""Which connections are replaced, when, and that it is one after the other."""

from __future__ import annotations

import pytest

from fastapi_topaz import ConnectionPool
from fastapi_topaz._pool.state.entry import Lease, PoolEntry
from fastapi_topaz._pool.state.pool_state import PoolState
from fastapi_topaz._pool.state.rotation import RESPREAD, Rotation
from fastapi_topaz.exceptions import ConnectFailed


def make(random=0.5, *, spreads=True):
    return Rotation(lambda: random, spreads=spreads)


def reasons(rotation, entries, now):
    """Return why each of the *entries* that has expired by *now* did."""
    rotation.expire(entries, now)
    return [rotation.reason(e) for e in entries if e in rotation._expired]


def make_state(*, spreads=False, warm=True, **options):
    options = ConnectionPool(**{"min_connections": 0, **options}).options
    state = PoolState(options, lambda: 0.5, spreads=spreads)
    state.warm = warm
    return state


def open_one(state, now=0.0):
    entry = state.attempts.begin(now)
    state.connected(entry, object(), now)
    return entry


def taken(state, now=0.0):
    lease = Lease()
    assert state.take(lease, now)
    return lease


def wanted(state, now=0.0):
    return state.shortfall(len(state.waiting) + state.in_use, now)


def drain(state):
    state.rotation.drain(state.open)
    state.rotate()


# -- lifetimes ----------------------------------------------------------------------


@pytest.mark.parametrize("random, lifetime", [(0.0, 100.0), (0.5, 95.0), (1.0, 90.0)])
def test_lifetimes_are_shortened_by_up_to_a_tenth(random, lifetime):
    rotation, entry = make(random), PoolEntry()
    rotation.begin(entry, 100.0, 7.0)
    assert entry.expires_at == pytest.approx(7.0 + lifetime)
    assert rotation.next_at([entry]) == entry.expires_at
    assert reasons(rotation, [entry], 7.0 + lifetime - 0.1) == []
    assert reasons(rotation, [entry], 7.0 + lifetime) == ["lifetime"]


def test_max_lifetime_0_is_for_ever():
    rotation, entry = make(), PoolEntry()
    rotation.begin(entry, 0.0, 7.0)
    assert rotation.next_at([entry]) == float("inf")
    assert reasons(rotation, [entry], 1e9) == []


def test_what_has_expired_already_is_not_waited_for():
    rotation, first, second = make(), PoolEntry(), PoolEntry()
    first.expires_at, second.expires_at = 10.0, 20.0
    assert rotation.next_at([first, second]) == 10.0
    rotation.expire([first, second], 10.0)
    assert rotation.next_at([first, second]) == 20.0
    assert rotation.next() is first


def test_the_first_reason_to_be_replaced_is_the_one_that_counts():
    rotation, entry = make(), PoolEntry(expires_at=10.0)
    rotation.drain([entry])
    assert reasons(rotation, [entry], 10.0) == ["drain"]


def test_a_retired_connection_needs_no_replacement():
    rotation, first, second = make(), PoolEntry(), PoolEntry()
    rotation.drain([first, second])
    assert rotation.is_idle()
    first.retired = "drain"
    assert rotation.next() is second
    assert not rotation.is_idle(), "it waits for its last lease"
    rotation.forget(first)
    rotation.forget(second)
    assert rotation.is_idle()
    assert rotation.next() is None


# -- spreading after a loss ---------------------------------------------------------


@pytest.mark.parametrize("random, share", [(0.0, 0.75), (0.5, 1.0), (1.0, 1.25)])
def test_after_a_loss_connections_spread_anew_three_times_each_jittered(random, share):
    rotation, entry = make(random), PoolEntry()
    rotation.lost(100.0)
    for delay in (2.0, 8.0, 32.0):
        then = 100.0 + delay * share
        assert rotation.next_at([entry]) == pytest.approx(then)
        assert reasons(rotation, [entry], then - 0.01) == []
        assert reasons(rotation, [entry], then) == ["spread"]
        rotation.forget(entry)
    assert rotation.next_at([entry]) == float("inf")


def test_connections_to_one_server_are_not_spread():
    rotation, entry = make(spreads=False), PoolEntry()
    rotation.lost(100.0)
    assert rotation.next_at([entry]) == float("inf")
    assert reasons(rotation, [entry], 1e9) == []


def test_one_more_loss_begins_the_spreading_anew():
    rotation, entry = make(), PoolEntry()
    rotation.lost(100.0)
    rotation.expire([entry], 102.0)
    rotation.lost(103.0)
    assert rotation.next_at([entry]) == 105.0


def test_spreading_that_was_slept_through_is_made_up_for_once():
    rotation, entry = make(), PoolEntry()
    rotation.lost(100.0)
    assert reasons(rotation, [entry], 1e9) == ["spread"]
    assert rotation.next_at([entry]) == float("inf")


def test_connections_made_since_are_spread_the_next_time_only():
    rotation, old, new = make(), PoolEntry(), PoolEntry()
    rotation.lost(100.0)
    rotation.expire([old], 102.0)
    assert reasons(rotation, [old, new], 103.0) == ["spread"]
    assert reasons(rotation, [old, new], 108.0) == ["spread", "spread"]


def test_a_lost_connection_spreads_the_others():
    state = make_state(spreads=True)
    lost, _other = open_one(state, 50.0), open_one(state, 50.0)
    state.lost(lost, "lost", 100.0)
    assert state.rotation.next_at(state.open) == 100.0 + RESPREAD[0]
    assert reasons(state.rotation, state.open, 102.0) == ["spread"]


def test_the_end_of_an_outage_spreads_because_servers_come_back_one_by_one():
    state = make_state(spreads=True, max_lifetime=0)
    state.connect_failed(state.attempts.begin(60.0), ConnectFailed("no"), 60.0)
    open_one(state, 100.0)
    assert state.rotation.next_at(state.open) == 100.0 + RESPREAD[0]


def test_an_attempt_that_fails_while_others_serve_spreads_nothing():
    state = make_state(spreads=True, max_lifetime=0)
    open_one(state, 50.0)
    state.connect_failed(state.attempts.begin(60.0), ConnectFailed("no"), 60.0)
    open_one(state, 100.0)
    assert state.rotation.next_at(state.open) == float("inf")


def test_a_connection_that_was_only_closed_spreads_nothing():
    state = make_state(spreads=True, max_lifetime=0)
    state.retire(open_one(state), "idle")
    assert state.rotation.next_at(state.open) == float("inf")


# -- replacing, one at a time -------------------------------------------------------


def test_an_expired_connection_serves_until_its_replacement_is_there():
    state = make_state(min_connections=1, max_lifetime=10.0)
    old = open_one(state)
    state.rotation.expire(state.open, 10.0)
    state.rotate()
    assert state.to_close == []
    assert wanted(state, 10.0) == 1
    lease = taken(state, 10.0)
    assert lease.entry is old
    new = open_one(state, 10.0)
    assert old.retired == "lifetime"
    assert list(state.open) == [old, new]
    state.give_back(lease, 11.0)
    assert state.to_close == [old]


def test_connections_are_replaced_one_at_a_time():
    state = make_state(min_connections=3)
    entries = [open_one(state) for _ in range(3)]
    drain(state)
    for gone in entries:
        assert wanted(state) == 1
        attempt = state.attempts.begin(0.0)
        assert wanted(state) == 0, "one is under way"
        state.connected(attempt, object(), 0.0)
        assert state.to_close.pop() is gone
        assert state.to_close == []
        state.closed(gone)
        state.rotate()
    assert wanted(state) == 0
    assert len(state.open) == 3


def test_an_expired_connection_stays_while_no_other_can_be_made():
    state = make_state(min_connections=1)
    entry = open_one(state)
    drain(state)
    for now in (1.0, 2.0, 3.0):
        state.connect_failed(state.attempts.begin(now), ConnectFailed("no"), now)
        state.rotate()
    assert taken(state).entry is entry


def test_a_full_pool_makes_room_before_it_replaces():
    state = make_state(min_connections=2, max_connections=2)
    first, second = open_one(state), open_one(state)
    drain(state)
    assert state.to_close == [first]
    state.rotate()
    assert second.retired is None, "one at a time"
    state.closed(first)
    assert wanted(state) == 1
    open_one(state)
    assert second.retired == "drain"


def test_in_a_full_pool_one_leased_connection_at_a_time_takes_no_more_leases():
    state = make_state(max_connections=3, streams_per_connection=2)
    entries = [open_one(state) for _ in range(3)]
    leases = [taken(state) for _ in range(6)]
    drain(state)
    state.rotate()
    first = next(entry for entry in entries if entry.retired)
    assert [entry.retired for entry in entries].count("drain") == 1
    for lease in [lease for lease in leases if lease.entry is first]:
        state.give_back(lease, 1.0)
    assert state.to_close == [first]
    state.rotate()
    assert len(state.open) == 2, "not while there is no replacement"
    state.closed(first)
    state.rotate()
    assert wanted(state) == 1
    open_one(state)
    assert sum(entry.retired is not None for entry in state.open) == 1


def test_an_idle_connection_makes_room_while_a_leased_one_waits_for_its_last_lease():
    state = make_state(min_connections=2, max_connections=2)
    open_one(state)
    open_one(state)
    leased = taken(state).entry
    idle = next(entry for entry in state.open if entry is not leased)
    state.rotation.drain([leased, idle])
    state.rotate()
    assert state.to_close == [idle], "it closes at once"
    state.rotate()
    assert leased.retired is None, "one at a time"


def test_a_surplus_idle_connection_is_drained_without_a_replacement():
    state = make_state(min_connections=1)
    first, second = open_one(state), open_one(state)
    drain(state)
    assert state.to_close == [first]
    state.closed(first)
    state.rotate()
    assert second.retired is None, "the last one is the minimum"
    assert wanted(state) == 1


def test_no_idle_connection_is_surplus_while_somebody_waits():
    state = make_state(max_connections=2)
    entry = open_one(state)
    state.enqueue(Lease())
    drain(state)
    assert entry.retired is None
    assert wanted(state) == 1


def test_a_pool_that_is_not_used_yet_drains_without_replacements():
    state = make_state(min_connections=1, warm=False)
    entry = open_one(state)
    drain(state)
    assert state.to_close == [entry]
    assert wanted(state) == 0
