"""Test the snapshot of the state: its sums, and when it reports healthy."""

from __future__ import annotations

from types import SimpleNamespace

from fastapi_topaz._pool.state.slot import Claim
from fastapi_topaz._pool.state.snapshot import connection_statuses
from fastapi_topaz.exceptions import ConnectFailed
from kit.states import make_state, open_one, taken


def open_telling(state, now=0.0, **connection):
    return open_one(state, now, SimpleNamespace(**connection))


def test_the_status_adds_up():
    state = make_state(max_connections=5, streams_per_connection=2, min_connections=1)
    for _ in range(3):
        open_telling(state)
    for _ in range(2):
        taken(state)
    state.attempts.begin(0.0)
    for _ in range(4):
        state.enqueue(Claim())
    status = state.status()
    assert (status.total, status.idle, status.busy) == (3, 1, 2)
    assert (status.connecting, status.waiting) == (1, 4)
    assert (status.streams_in_use, status.streams_max) == (2, 10)
    assert (status.min_connections, status.max_connections) == (1, 5)
    assert str(status) == "total=3 busy=2 waiting=4 connecting=1"


def test_the_status_has_the_limit_its_reason_and_the_wait():
    state = make_state(max_connections=5, streams_per_connection=2)
    status = state.status()
    assert (status.limit, status.limit_reason) == (10, "capacity")
    assert status.estimated_wait == 0
    state.limit, state.limit_reason = 3, "slow"
    status = state.status(0.5)
    assert (status.limit, status.limit_reason) == (3, "slow")
    assert status.estimated_wait == 0.5


def test_the_status_distinguishes_suspect_and_leaving_connections():
    state = make_state(streams_per_connection=1)
    for _ in range(4):
        open_telling(state)
    leaving, suspected = taken(state).slot, taken(state).slot
    state.suspect(suspected, 1.0)
    state.suspect(leaving, 1.0)
    state.retire(leaving, "unhealthy")
    taken(state, 1.0)
    status = state.status()
    assert (status.total, status.healthy_connections) == (4, 2)
    assert (status.suspect, status.leaving) == (1, 1)
    conditions = [one.condition for one in connection_statuses(state.open, 1.0)]
    assert conditions == ["leaving", "suspect", "busy", "idle"]


def test_a_pool_without_connections_is_healthy_until_an_attempt_fails():
    state = make_state()
    assert state.status().healthy
    state.connect_failed(state.attempts.begin(0.0), ConnectFailed("no"), 0.0)
    assert not state.status().healthy
    open_telling(state)
    assert state.status().healthy


def test_a_pool_stays_healthy_while_its_suspects_wait_for_their_probes():
    state = make_state()
    slots = [open_telling(state), open_telling(state)]
    for slot in slots:
        state.answered(slot, 0.5)
    state.broke(slots[0], 1.0)
    assert state.status().healthy_connections == 0
    assert state.status().healthy
    state.unanswered(slots[0], 2.0)
    assert state.status().healthy
    state.answered(slots[1], 2.0)
    assert state.status().healthy


def test_a_pool_stays_healthy_while_all_connections_are_replaced():
    state = make_state()
    slot = open_telling(state)
    taken(state)
    state.retire(slot, "drain")
    assert state.status().leaving == 1
    assert state.status().healthy


def test_a_pool_of_suspects_is_unhealthy_once_an_attempt_to_connect_fails():
    state = make_state()
    slot = open_telling(state)
    state.suspect(slot, 1.0)
    state.connect_failed(state.attempts.begin(1.0), ConnectFailed("no"), 1.0)
    assert not state.status().healthy
    state.answered(slot, 2.0)
    assert state.status().healthy


def test_each_connection_snapshot_has_its_peer_and_condition():
    state = make_state()
    slot = open_telling(state, 10.0, peer="ipv4:10.0.0.7:8282")
    (status,) = connection_statuses(state.open, 15.0)
    assert (status.peer, status.condition) == ("ipv4:10.0.0.7:8282", "idle")
    assert (status.streams, status.age, status.idle_for) == (0, 5.0, 5.0)
    assert status.last_error is None
    slot.last_error = "UNAVAILABLE"
    claim = taken(state, 15.0)
    (status,) = connection_statuses(state.open, 16.0)
    assert (status.streams, status.age, status.idle_for) == (1, 6.0, 0.0)
    assert (status.condition, status.last_error) == ("busy", "UNAVAILABLE")
    state.give_back(claim, 17.0)
    (status,) = connection_statuses(state.open, 20.0)
    assert (status.age, status.idle_for) == (10.0, 3.0)


def test_a_connection_snapshot_without_a_peer_omits_it():
    state = make_state()
    open_telling(state)
    assert connection_statuses(state.open, 0.0)[0].peer is None
