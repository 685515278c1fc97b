"""The transitions of the pure state: no event loop, no clock, no I/O."""

from __future__ import annotations

import attrs
import pytest

from fastapi_topaz import ConnectionPool
from fastapi_topaz._entry import Lease
from fastapi_topaz._state import PoolState
from fastapi_topaz.exceptions import ConnectFailed


def make(*, random=lambda: 0.0, **options):
    return PoolState(
        ConnectionPool(**{"min_connections": 0, **options}).options, random
    )


def open_one(state, now=0.0):
    entry = state.begin_connect(now)
    state.connected(entry, object(), now)
    return entry


def taken(state):
    lease = Lease()
    assert state.take(lease)
    return lease


def waiting(state, count=1):
    leases = [Lease() for _ in range(count)]
    for lease in leases:
        state.waiting[lease] = None
    return leases


# -- leases ---------------------------------------------------------------------


def test_nothing_is_taken_from_an_empty_pool():
    state = make()
    assert not state.take(Lease())
    assert state.in_use == 0


def test_the_most_recently_used_connection_is_taken_first():
    state = make(max_connections=3)
    first, second, _third = (open_one(state) for _ in range(3))
    leases = [taken(state) for _ in range(3)]
    by_entry = {lease.entry: lease for lease in leases}
    state.give_back(by_entry[second], 1.0)
    state.give_back(by_entry[first], 2.0)
    assert taken(state).entry is first
    assert taken(state).entry is second


def test_a_connection_takes_leases_up_to_its_streams_before_the_next_one_is_used():
    state = make(max_connections=2, streams_per_connection=3)
    open_one(state)
    open_one(state)
    entries = [taken(state).entry for _ in range(6)]
    assert entries[:3] == [entries[0]] * 3
    assert entries[3:] == [entries[3]] * 3
    assert entries[0] is not entries[3]
    assert not state.take(Lease())


def test_a_newcomer_does_not_pass_those_who_wait():
    state = make()
    open_one(state)
    (waiter,) = waiting(state)
    assert not state.take(Lease())
    assert state.serve(tokens=1) == [waiter]


def test_waiters_are_served_in_order_and_only_if_they_hold_a_token():
    state = make(max_connections=3)
    first, second, third = waiting(state, 3)
    open_one(state)
    open_one(state)
    open_one(state)
    assert state.serve(tokens=2) == [first, second]
    assert state.serve(tokens=2) == []
    assert state.serve(tokens=3) == [third]


def test_a_returned_stream_can_be_taken_again():
    state = make()
    open_one(state)
    lease = taken(state)
    assert not state.take(Lease())
    state.give_back(lease, 1.0)
    assert state.in_use == 0
    assert taken(state)


# -- connecting -------------------------------------------------------------------


def test_no_connection_is_wanted_while_nobody_asks():
    state = make(min_connections=2)
    assert state.shortfall(tokens=0, now=0.0) == 0


def test_a_pool_in_use_is_filled_to_its_minimum():
    state = make(min_connections=2)
    state.warm = True
    assert state.shortfall(tokens=0, now=0.0) == 2
    state.begin_connect(0.0)
    assert state.shortfall(tokens=0, now=0.0) == 1


@pytest.mark.parametrize(
    "streams, waiters, wanted", [(1, 4, 4), (4, 4, 1), (4, 5, 2), (50, 51, 2)]
)
def test_as_many_connections_are_wanted_as_the_waiting_streams_need(
    streams, waiters, wanted
):
    state = make(streams_per_connection=streams)
    waiting(state, waiters)
    assert state.shortfall(tokens=waiters, now=0.0) == wanted


def test_those_without_a_token_want_no_connection():
    state = make()
    waiting(state, 5)
    assert state.shortfall(tokens=2, now=0.0) == 2


def test_open_connecting_and_closing_never_exceed_the_maximum():
    state = make(max_connections=3)
    open_one(state)
    state.begin_connect(0.0)
    closing = open_one(state)
    state.retire(closing, "idle")
    assert len(state.closing) == 1
    waiting(state, 9)
    assert state.shortfall(tokens=9, now=0.0) == 0
    state.closed(closing)
    assert state.shortfall(tokens=9, now=0.0) == 1


def test_after_a_failure_attempts_are_made_one_at_a_time_after_their_backoff():
    state = make(random=lambda: 0.5)
    waiting(state, 5)
    entries = [state.begin_connect(0.0) for _ in range(5)]
    for entry in entries:
        state.connect_failed(entry, ConnectFailed("no"), 1.0)
    assert state.failures == 1, "five attempts at once are one round"
    assert state.retry_at == pytest.approx(1.0 + 0.5 * 0.1)
    assert state.shortfall(tokens=5, now=1.04) == 0
    assert state.shortfall(tokens=5, now=1.05) == 1
    state.begin_connect(1.05)
    assert state.shortfall(tokens=5, now=9.0) == 0


def test_attempts_that_fail_one_after_the_other_do_not_keep_each_other_going():
    state = make(random=lambda: 0.5)
    waiting(state, 2)
    first, second = state.begin_connect(0.0), state.begin_connect(0.0)
    state.connect_failed(first, ConnectFailed("no"), 1.0)
    assert state.shortfall(tokens=2, now=1.01) == 0, "backing off"
    assert not state.hopeless(), "the second one may still come"
    state.connect_failed(second, ConnectFailed("no"), 1.01)
    assert state.failures == 1
    assert state.shortfall(tokens=2, now=1.02) == 0, "still backing off"
    assert state.shortfall(tokens=2, now=1.05) == 1


def test_the_backoff_doubles_up_to_its_cap_and_one_success_resets_it():
    state = make(random=lambda: 1.0)
    delays = []
    for _ in range(8):
        state.connect_failed(state.begin_connect(0.0), ConnectFailed("no"), 0.0)
        delays.append(state.retry_at)
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    open_one(state)
    assert state.failures == 0
    assert state.last_error is None
    waiting(state, 3)
    assert state.shortfall(tokens=3, now=0.0) == 3


def test_waiting_is_hopeless_once_the_retries_are_used_up_and_nothing_is_open():
    state = make(max_retries=2)
    for round_ in range(3):
        assert not state.hopeless(), round_
        state.connect_failed(state.begin_connect(0.0), ConnectFailed("no"), 0.0)
    assert state.hopeless()


def test_waiting_is_not_hopeless_while_a_connection_is_open_or_under_way():
    state = make(max_retries=0)
    open_one(state)
    state.connect_failed(state.begin_connect(0.0), ConnectFailed("no"), 0.0)
    assert not state.hopeless()
    state.retire(next(iter(state.open)), "unhealthy")
    assert state.hopeless()
    state.begin_connect(0.0)
    assert not state.hopeless()


def test_a_permanent_failure_is_hopeless_at_once():
    state = make(max_retries=5)
    error = ConnectFailed("wrong CA", reason="tls", permanent=True)
    state.connect_failed(state.begin_connect(0.0), error, 0.0)
    assert state.hopeless()


def test_without_retries_the_first_failed_round_is_hopeless():
    state = make(max_retries=5, retry_on_failure=False)
    state.connect_failed(state.begin_connect(0.0), ConnectFailed("no"), 0.0)
    assert state.hopeless()


# -- going --------------------------------------------------------------------------


def test_a_retired_connection_closes_when_its_last_lease_is_back():
    state = make(streams_per_connection=2)
    entry = open_one(state)
    leases = [taken(state), taken(state)]
    state.retire(entry, "drain")
    assert state.to_close == []
    state.give_back(leases[0], 1.0)
    assert state.to_close == []
    assert not state.take(Lease()), "no new lease on a retired connection"
    state.give_back(leases[1], 2.0)
    assert state.to_close == [entry]


def test_the_first_reason_to_go_is_the_one_that_counts():
    state = make()
    entry = open_one(state)
    taken(state)
    state.retire(entry, "unhealthy")
    state.retire(entry, "close")
    assert entry.retired == "unhealthy"


def test_a_suspect_is_not_leased_until_it_is_cleared():
    state = make()
    entry = open_one(state)
    assert state.suspect(entry)
    assert not state.suspect(entry), "once is enough"
    assert not state.take(Lease())
    assert state.status().healthy_connections == 0
    state.cleared(entry)
    assert taken(state).entry is entry


def test_a_suspect_whose_lease_comes_back_still_waits_for_its_probe():
    state = make()
    entry = open_one(state)
    lease = taken(state)
    state.suspect(entry)
    state.give_back(lease, 1.0)
    assert not state.take(Lease())
    state.cleared(entry)
    assert taken(state)


def test_the_reaper_closes_what_was_idle_too_long_down_to_the_minimum():
    state = make(min_connections=1, max_idle_time=10.0)
    old, older, fresh = (open_one(state, now) for now in (1.0, 0.0, 5.0))
    state.reap(9.9)
    assert state.to_close == []
    state.reap(11.0)
    assert state.to_close == [older, old]
    state.reap(1000.0)
    assert list(state.open) == [fresh], "the last one is the minimum"


def test_the_reaper_leaves_leased_connections_alone():
    state = make(max_idle_time=1.0)
    open_one(state)
    lease = taken(state)
    state.reap(100.0)
    assert state.to_close == []
    state.give_back(lease, 100.0)
    state.reap(100.5)
    assert state.to_close == [], "it was just used"


def test_max_idle_time_0_reaps_nothing():
    state = make(max_idle_time=0.0)
    open_one(state)
    state.reap(1e9)
    assert state.to_close == []


def test_lifetimes_are_shortened_by_up_to_a_tenth():
    for random, expected in ((0.0, 100.0), (0.5, 95.0), (1.0, 90.0)):
        state = make(max_lifetime=100.0, random=lambda value=random: value)
        assert open_one(state).expires_at == pytest.approx(expected)


def test_an_expired_connection_serves_until_its_replacement_is_there():
    state = make(min_connections=1, max_lifetime=10.0)
    state.warm = True
    old = open_one(state)
    state.expire(10.0)
    state.rotate()
    assert state.to_close == []
    assert state.shortfall(tokens=0, now=10.0) == 1
    lease = taken(state)
    assert lease.entry is old
    new = open_one(state, 10.0)
    assert old.retired == "lifetime"
    assert list(state.open) == [old, new]
    state.give_back(lease, 11.0)
    assert state.to_close == [old]


def test_a_full_pool_makes_room_before_it_replaces():
    state = make(min_connections=2, max_connections=2)
    state.warm = True
    first, second = open_one(state), open_one(state)
    state.drain()
    state.rotate()
    assert state.to_close == [first]
    state.rotate()
    assert second.retired is None, "one at a time"
    state.closed(first)
    assert state.shortfall(tokens=0, now=0.0) == 1
    open_one(state)
    assert second.retired == "drain"


def test_a_surplus_idle_connection_is_drained_without_a_replacement():
    state = make(min_connections=0)
    state.warm = True
    entry = open_one(state)
    state.drain()
    state.rotate()
    assert state.to_close == [entry]
    assert state.shortfall(tokens=0, now=0.0) == 0


def test_lowering_the_maximum_retires_idle_connections_first():
    state = make(max_connections=3)
    entries = [open_one(state, float(n)) for n in range(3)]
    busy = taken(state).entry
    state.resize(attrs.evolve(state.options, max_connections=1))
    idle = [entry for entry in entries if entry is not busy]
    assert state.to_close == idle
    assert busy.retired is None


def test_lowering_the_maximum_below_the_leases_closes_on_release_only():
    state = make(max_connections=2)
    open_one(state)
    open_one(state)
    leases = [taken(state), taken(state)]
    state.resize(attrs.evolve(state.options, max_connections=1))
    assert state.to_close == []
    retired = [lease for lease in leases if lease.entry.retired == "resize"]
    assert len(retired) == 1
    state.give_back(retired[0], 1.0)
    assert len(state.to_close) == 1


def test_shutting_down_closes_idle_connections_and_waits_for_leases():
    state = make(max_connections=2)
    open_one(state)
    open_one(state)
    lease = taken(state)
    busy = lease.entry
    state.shut_down()
    assert len(state.to_close) == 1
    assert state.shortfall(tokens=9, now=0.0) == 0
    state.abandon()
    assert busy in state.to_close
    state.give_back(lease, 1.0)
    assert state.in_use == 0
    assert len(state.to_close) == 2, "closed once"


def test_a_connection_that_comes_after_the_shutdown_is_closed():
    state = make()
    entry = state.begin_connect(0.0)
    state.shut_down()
    state.connected(entry, object(), 1.0)
    assert state.to_close == [entry]
    assert not state.take(Lease())


# -- telling ----------------------------------------------------------------------


def test_the_status_adds_up():
    state = make(max_connections=5, streams_per_connection=2, min_connections=1)
    for _ in range(3):
        open_one(state)
    for _ in range(3):
        taken(state)
    state.begin_connect(0.0)
    waiting(state, 4)
    status = state.status()
    assert (status.total, status.idle, status.busy) == (3, 1, 2)
    assert (status.connecting, status.waiting) == (1, 4)
    assert (status.streams_in_use, status.streams_max) == (3, 10)
    assert (status.min_connections, status.max_connections) == (1, 5)
    assert str(status) == "total=3 busy=2 waiting=4 connecting=1"
    assert repr(state) == (
        "<PoolState open=3 connecting=1 closing=0 in_use=3 waiting=4>"
    )


def test_a_pool_without_connections_is_healthy_until_an_attempt_fails():
    state = make()
    assert state.status().healthy
    state.connect_failed(state.begin_connect(0.0), ConnectFailed("no"), 0.0)
    assert not state.status().healthy
    entry = open_one(state)
    assert state.status().healthy
    state.suspect(entry)
    assert not state.status().healthy
