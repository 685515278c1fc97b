"""Makes the public snapshots of a pool and of its connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi_topaz._pool.state.status import ConnectionStatus


if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastapi_topaz._pool.state.slot import Slot
    from fastapi_topaz._pool.state.status import ConnectionCondition


__all__ = ["connection_statuses", "counts", "peer_of"]


def counts(slots: Iterable[Slot]) -> dict[str, int]:
    """Return the counts of `PoolStatus` that come from the open *slots*."""
    slots = tuple(slots)  # metrics are collected in other threads
    busy = sum(slot.leases > 0 for slot in slots)
    leaving = sum(slot.retired is not None for slot in slots)
    suspect = sum(slot.suspect and slot.retired is None for slot in slots)
    return {
        "total": len(slots),
        "idle": len(slots) - busy,
        "busy": busy,
        "healthy_connections": len(slots) - leaving - suspect,
        "suspect": suspect,
        "leaving": leaving,
    }


def connection_statuses(
    slots: Iterable[Slot], now: float
) -> tuple[ConnectionStatus, ...]:
    """Return a snapshot of each slot, in the order of *slots*; *now* is in seconds."""
    return tuple(
        ConnectionStatus(
            peer=peer_of(slot),
            condition=_condition(slot),
            streams=slot.leases,
            age=now - slot.opened_at,
            idle_for=0.0 if slot.leases else now - slot.last_used_at,
            last_error=slot.last_error,
        )
        for slot in tuple(slots)
    )


def peer_of(slot: Slot) -> str | None:
    """Return the address of the server, or None if the connection does not give it."""
    try:
        peer = getattr(slot.connection, "peer", None)
        return None if peer is None else str(peer)
    except Exception:  # noqa: BLE001  (a connection may raise anything)
        return None


def _condition(slot: Slot) -> ConnectionCondition:
    if slot.retired is not None:
        return "leaving"
    if slot.suspect:
        return "suspect"
    return "busy" if slot.leases else "idle"
