"""Which connections are to be replaced, and when the next ones are."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fastapi_topaz._pool.state.entry import PoolEntry


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
        self._expired: dict[PoolEntry, str] = {}
        self._respread: deque[float] = deque()

    def begin(self, entry: PoolEntry, max_lifetime: float, now: float) -> None:
        """Say when *entry*, which opens now, is to be replaced."""
        if max_lifetime:
            share = 1 - LIFETIME_JITTER * self._random()
            entry.expires_at = now + max_lifetime * share

    def lost(self, now: float) -> None:
        """Have the connections spread anew, now that one of them was lost."""
        if self._spreads:
            self._respread = deque(
                now + delay * (0.75 + 0.5 * self._random()) for delay in RESPREAD
            )

    def expire(self, entries: Iterable[PoolEntry], now: float) -> None:
        """Mark those whose time is over."""
        spread = False
        while self._respread and self._respread[0] <= now:
            self._respread.popleft()
            spread = True
        for entry in entries:
            if entry.expires_at <= now:
                self._expired.setdefault(entry, "lifetime")
            elif spread:
                self._expired.setdefault(entry, "spread")

    def drain(self, entries: Iterable[PoolEntry]) -> None:
        """Mark all *entries*."""
        for entry in entries:
            self._expired.setdefault(entry, "drain")

    def next(self) -> PoolEntry | None:
        """
        Return the next entry to be replaced, None if there is none.

        An idle one if there is any: it closes at once, and nobody waits for leases.
        """
        left = [entry for entry in self._expired if not entry.retired]
        return min(left, key=lambda entry: entry.leases > 0, default=None)

    def is_idle(self) -> bool:
        """Say whether no expired entry waits for its last lease to come back."""
        return all(entry.retired is None for entry in self._expired)

    def reason(self, entry: PoolEntry) -> str:
        """Return why *entry* has expired."""
        return self._expired[entry]

    def forget(self, entry: PoolEntry) -> None:
        """*entry* is gone."""
        self._expired.pop(entry, None)

    def next_at(self, entries: Iterable[PoolEntry]) -> float:
        """Return when the next of *entries* expires."""
        times = [e.expires_at for e in entries if e not in self._expired]
        return min(times + list(self._respread), default=float("inf"))
