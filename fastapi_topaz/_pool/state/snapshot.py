"""What a pool tells of each of its connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi_topaz._pool.state.status import ConnectionStatus


if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastapi_topaz._pool.state.entry import PoolEntry
    from fastapi_topaz._pool.state.status import ConnectionCondition


__all__ = ["connection_statuses", "peer_of"]


def connection_statuses(
    entries: Iterable[PoolEntry], now: float
) -> tuple[ConnectionStatus, ...]:
    """Return a snapshot of each of *entries*, in this order."""
    return tuple(
        ConnectionStatus(
            peer=peer_of(entry),
            condition=_condition(entry),
            streams=entry.leases,
            age=now - entry.opened_at,
            idle_for=0.0 if entry.leases else now - entry.last_used_at,
            last_error=entry.last_error,
        )
        for entry in tuple(entries)
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
