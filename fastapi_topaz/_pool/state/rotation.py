"""Which connections are to be replaced, and when the next ones are."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fastapi_topaz._pool.state.slot import Slot


__all__ = ["Rotation"]


LIFETIME_JITTER = 0.1
"""Connections that came together must not all expire together."""

RESPREAD = (2.0, 8.0, 32.0)
"""
Seconds after a loss. What was lost went to the servers that were left, and one that
restarts gets nothing before somebody connects again. Nobody tells when it is back,
hence more than once.
"""


class Rotation:
    """
    The expired connections: each serves until a new one replaces it.

    Strictly private.
    """

    def __init__(self, random: Callable[[], float], *, spreads: bool) -> None:
        self._random = random
        self._spreads = spreads
        self._expired: dict[Slot, str] = {}
        self._respread: deque[float] = deque()

    def begin(self, slot: Slot, max_lifetime: float, now: float) -> None:
        """Say when *slot*, which opens now, is to be replaced."""
        if max_lifetime:
            share = 1 - LIFETIME_JITTER * self._random()
            slot.expires_at = now + max_lifetime * share

    def lost(self, now: float) -> None:
        """Have the connections spread anew, now that one of them was lost."""
        if self._spreads:
            self._respread = deque(
                now + delay * (0.75 + 0.5 * self._random()) for delay in RESPREAD
            )

    def expire(self, slots: Iterable[Slot], now: float) -> None:
        """Mark those whose time is over."""
        spread = False
        while self._respread and self._respread[0] <= now:
            self._respread.popleft()
            spread = True
        for slot in slots:
            if slot.expires_at <= now:
                self._expired.setdefault(slot, "lifetime")
            elif spread:
                self._expired.setdefault(slot, "spread")

    def drain(self, slots: Iterable[Slot]) -> None:
        """Mark all *slots*."""
        for slot in slots:
            self._expired.setdefault(slot, "drain")

    def next(self) -> Slot | None:
        """
        Return the next entry to be replaced, None if there is none.

        An idle one if there is any: it closes at once, and nobody waits for leases.
        """
        left = [slot for slot in self._expired if not slot.retired]
        return min(left, key=lambda slot: slot.leases > 0, default=None)

    def is_idle(self) -> bool:
        """Say whether no expired entry waits for its last lease to come back."""
        return all(slot.retired is None for slot in self._expired)

    def reason(self, slot: Slot) -> str:
        """Return why *slot* has expired."""
        return self._expired[slot]

    def forget(self, slot: Slot) -> None:
        """*slot* is gone."""
        self._expired.pop(slot, None)

    def next_at(self, slots: Iterable[Slot]) -> float:
        """Return when the next of *slots* expires."""
        times = [e.expires_at for e in slots if e not in self._expired]
        return min(times + list(self._respread), default=float("inf"))
