"""
The turns of connections: which one is leased next, and which ones are not needed.

All connections of a pool take turns. So each server behind them gets an equal share of
the calls. The price is that no connection is idle for long while the pool is in use. So
the pool records how many leases were out at once, and closes what was not needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from fastapi_topaz._pool.state.slot import Slot


__all__ = ["emptier", "least_used", "surplus", "were_enough"]


def emptier(first: Slot, others: Iterator[Slot]) -> Slot:
    """
    Return *first* or the next one of *others*: the one that has fewer leases.

    A slot that rests is passed over, unless all rest.
    """
    # Two are enough: the power of two choices. A slow server keeps its leases for
    # longer, so it gets fewer new ones.
    for slot in others:
        if first.rests:
            first = slot
        elif not slot.rests:
            return slot if slot.leases < first.leases else first
    return first


def least_used(slots: Iterable[Slot]) -> list[Slot]:
    """Return *slots* by their leases, and those with equally many by their last use."""
    return sorted(slots, key=lambda slot: (slot.leases, slot.last_used_at))


def were_enough(
    streams: int, in_use: int, needed_at: Mapping[int, float], since: float
) -> bool:
    """Return whether at most *streams* leases were out at once since *since*."""
    return in_use <= streams and needed_at.get(streams + 1, since) <= since


def surplus(
    usable: Collection[Slot],
    spare: int,
    in_use: int,
    needed_at: Mapping[int, float],
    since: float,
) -> list[Slot]:
    """
    Return the idle slots that were not needed since the time *since*.

    A slot was not needed if the others were enough for the most leases that were out at
    once. With several streams, the slots of a busy pool are rarely idle. So if only
    leased slots are left, one of them rests until the next search: it gets new leases
    only if all others are full, and becomes idle.

    Args:
        usable: The slots that are not retired and not refused. Refused connections
            stay, because their probes show the end of an outage.
        spare: The most slots to return.
        in_use: The leases that are out.
        needed_at: By number of leases: when that many were last out at once.
        since: Slots by which the pool grew later were needed.
    """
    found: list[Slot] = []
    for slot in usable:
        slot.rests = False
    streams = sum(slot.streams for slot in usable)
    for slot in least_used(usable):
        if slot.grown_at > since:
            continue
        left = streams - slot.streams
        if not were_enough(left, in_use, needed_at, since):
            continue
        if len(found) >= spare:
            break
        if slot.leases:
            slot.rests = True
            break
        streams = left
        found.append(slot)
    return found
