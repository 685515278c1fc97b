"""What a state tells of itself, in numbers and connection by connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi_topaz._pool.status import ConnectionStatus, PoolStatus


if TYPE_CHECKING:
    from fastapi_topaz._pool.state.entry import PoolEntry
    from fastapi_topaz._pool.state.pool_state import PoolState
    from fastapi_topaz._pool.status import ConnectionCondition


__all__ = ["connection_statuses", "peer_of", "pool_status"]


def pool_status(state: PoolState) -> PoolStatus:
    """Return a snapshot of *state*; callable from any thread."""
    # A copy: metrics are collected in threads of their own.
    entries = tuple(state.open)
    busy = sum(entry.leases > 0 for entry in entries)
    leaving = sum(entry.retired is not None for entry in entries)
    suspect = sum(entry.suspect and entry.retired is None for entry in entries)
    return PoolStatus(
        total=len(entries),
        idle=len(entries) - busy,
        busy=busy,
        healthy_connections=len(entries) - leaving - suspect,
        max_connections=state.options.max_connections,
        min_connections=state.options.min_connections,
        waiting=len(state.waiting),
        connecting=len(state.connecting),
        streams_in_use=state.in_use,
        streams_max=state.options.max_connections * state.streams,
        suspect=suspect,
        leaving=leaving,
        failing=state.attempts.failures > 0 or state.outage.declared,
        ready=state.is_ready,
    )


def connection_statuses(state: PoolState, now: float) -> tuple[ConnectionStatus, ...]:
    """Return a snapshot of each open connection, the oldest first."""
    return tuple(
        ConnectionStatus(
            peer=peer_of(entry),
            condition=_condition(entry),
            streams=entry.leases,
            age=now - entry.opened_at,
            idle_for=0.0 if entry.leases else now - entry.last_used_at,
            last_error=entry.last_error,
        )
        for entry in tuple(state.open)
    )


def peer_of(entry: PoolEntry) -> str | None:
    """Return the address of the other side, if the connection tells."""
    try:
        peer = getattr(entry.connection, "peer", None)
        return None if peer is None else str(peer)
    except Exception:  # noqa: BLE001  (a connection may raise anything)
        return None


def _condition(entry: PoolEntry) -> ConnectionCondition:
    if entry.retired is not None:
        return "leaving"
    if entry.suspect:
        return "suspect"
    return "busy" if entry.leases else "idle"
