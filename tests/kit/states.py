"""The state of a pool without the pool, and steps that tests apply to it."""

from __future__ import annotations

from fastapi_topaz import ConnectFailed, ConnectionPool
from fastapi_topaz._pool.state.pool_state import PoolState
from fastapi_topaz._pool.state.slot import Claim


class Link:
    """A connection that is lost when a test says so, to a server with a limit."""

    lost = False

    def __init__(self, max_streams=None):
        self.max_streams = max_streams

    def is_lost(self):
        return self.lost


def make_state(*, random=lambda: 1.0, spreads=False, target="topaz:8282", **options):
    """Return a state that opens no connections by itself, unless *options* say so."""
    options = ConnectionPool(**{"min_connections": 0, **options}).options
    return PoolState(options, random, spreads=spreads, target=target)


def open_one(state, now=0.0, connection=None):
    """Open a connection, and return its slot."""
    slot = state.attempts.begin(now)
    state.connected(slot, connection or Link(), now)
    return slot


def fail_one(state, now=0.0, error=None, **options):
    """Let an attempt to connect fail."""
    slot = state.attempts.begin(now)
    state.connect_failed(slot, error or ConnectFailed("no", **options), now)


def taken(state, now=0.0):
    """Return a claim that got a stream at once."""
    claim = Claim()
    assert state.take(claim, now)
    return claim


ERROR = ConnectFailed("refused", reason="unavailable")


def open_some(state, count, now=0.0):
    """Open connections that have answered since they were made."""
    slots = []
    for _ in range(count):
        slot = state.begin(now)
        state.connected(slot, Link(), now)
        slot.answered = True
        slots.append(slot)
    return slots


def due(state, now):
    """Return all connections that are due for a probe now."""
    slots = []
    while (slot := state.outage.due(now)) is not None:
        slots.append(slot)
    return slots


def refuse(state, slot, now, began=None):
    """End the probe of *slot* with a refusal."""
    slot.probing = False
    return state.probe_refused(slot, ERROR, now if began is None else began, now)


def answer(state, slot, now):
    slot.probing = False
    state.answered(slot, now)
