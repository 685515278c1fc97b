"""The replacement of connections: which ones to replace, why and when."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fastapi_topaz._pool.state.slot import Slot
    from fastapi_topaz._pool.state.status import CloseReason


__all__ = ["Rotation"]


LIFETIME_JITTER = 0.1
"""
A share of `max_lifetime`. A random part of it is subtracted, so connections that were
opened together do not all expire together.
"""

RESPREAD = (2.0, 8.0, 16.0, 32.0, 64.0)
"""
Seconds after a loss at which all connections are marked for replacement.

After a server was lost, its share of connections goes to the other servers. When it is
back, it gets none until the pool connects again. The pool does not learn when the
server is back, so it replaces the connections several times. The times double: a server
that was away for a longer time waits longer for its share.
"""

GROWN = 30.0
"""
Seconds within which all connections are replaced if there is a new server. The moment
is random, so that not all workers of a fleet connect at once.
"""

GROWN_PAUSES = (60.0, 600.0)
"""
The first and the longest pause in seconds between two replacements for new servers. It
doubles each time. A name server may return a few of many addresses, or other ones each
time. Without a pause, connections would be replaced all the time.
"""


class Rotation:
    """
    The expired connections: each one serves until a new one replaces it.

    Strictly private. All times are seconds on the pool's clock.
    """

    def __init__(self, random: Callable[[], float], *, spreads: bool) -> None:
        self._random = random
        self.spreads = spreads
        self._expired: dict[Slot, CloseReason] = {}
        self._respread: deque[float] = deque()
        # When connections were or will be replaced for new servers, and the pause after
        # that.
        self._grown_at = float("-inf")
        self._pause = GROWN_PAUSES[0]

    def begin(self, slot: Slot, max_lifetime: float, now: float) -> None:
        """Set when *slot*, which opens now, expires; a *max_lifetime* of 0 is never."""
        if max_lifetime:
            share = 1 - LIFETIME_JITTER * self._random()
            slot.expires_at = now + max_lifetime * share

    def lost(self, now: float) -> None:
        """Schedule replacements after a loss, if connections go to several servers."""
        if self.spreads:
            self._respread = deque(
                now + delay * (0.75 + 0.5 * self._random()) for delay in RESPREAD
            )
            self._grown_at = min(self._grown_at, now)

    def grown(self, now: float) -> None:
        """Schedule one replacement of all connections, to reach a new server."""
        at = max(now, self._grown_at + self._pause) + GROWN * self._random()
        # After a loss, replacements are scheduled already. The next one may be soon.
        if self.spreads and (not self._respread or at < self._respread[0]):
            self._respread.appendleft(at)
            first, longest = GROWN_PAUSES
            is_first = now > self._grown_at + 2 * longest
            self._pause = first if is_first else min(2 * self._pause, longest)
            self._grown_at = at

    def expire(self, slots: Iterable[Slot], now: float) -> None:
        """Mark the *slots* that have expired by *now*."""
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
        Return the next slot to replace, or None.

        Idle slots come first: they close at once, without a wait for leases.
        """
        left = [slot for slot in self._expired if not slot.retired]
        return min(left, key=lambda slot: slot.leases > 0, default=None)

    def is_idle(self) -> bool:
        """Return whether no expired slot is waiting for its last lease to come back."""
        return all(slot.retired is None for slot in self._expired)

    def reason(self, slot: Slot) -> CloseReason:
        """Return why *slot* has expired: `lifetime`, `spread` or `drain`."""
        return self._expired[slot]

    def forget(self, slot: Slot) -> None:
        """Forget *slot*, which closes."""
        self._expired.pop(slot, None)

    def next_at(self, slots: Iterable[Slot]) -> float:
        """Return when the next of *slots* expires, or the next spread is due."""
        times = [e.expires_at for e in slots if e not in self._expired]
        return min(times + list(self._respread), default=float("inf"))
