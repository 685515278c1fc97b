"""The answers that a cache keeps, by key: their ages and their number. No I/O."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Protocol

import attrs


__all__ = ["Ages", "Entry", "Limits", "Store"]


class Ages(Protocol):
    """How old answers may be now, in seconds. See `Limits`."""

    @property
    def allowed(self) -> float: ...

    @property
    def denied(self) -> float: ...

    @property
    def stale(self) -> float: ...

    @property
    def jitter(self) -> float: ...

    @property
    def longest(self) -> float: ...

    def ttl(self, allowed: bool) -> float: ...


@attrs.frozen
class Limits:
    """How old answers may be, in seconds since the authorizer was asked."""

    allowed: float
    denied: float
    stale: float
    jitter: float

    def ttl(self, allowed: bool) -> float:
        return self.allowed if allowed is True else self.denied

    @property
    def longest(self) -> float:
        """The age at which no answer is used any more."""
        return max(self.allowed, self.denied, self.stale)


class Entry:
    """
    One answer of the authorizer.

    No identity, no context and no token: see `key_of`. There are many entries, so a
    subclass of attrs with more fields would cost memory.

    Attributes:
        allowed: The answer.
        asked_at: When the authorizer was asked.
        number: The number of the question; see `Invalidations`.
        expires_at: When the token in the question expires, in seconds since the epoch.
        id: The id of the decision.
    """

    __slots__ = ("allowed", "asked_at", "expires_at", "id", "number")

    def __init__(
        self,
        allowed: bool,
        asked_at: float,
        number: int,
        expires_at: float = math.inf,
        id_: bytes = b"",
    ) -> None:
        self.allowed = allowed
        self.asked_at = asked_at
        self.number = number
        self.expires_at = expires_at
        self.id = id_


class Store:
    """
    Keeps at most *max_size* entries, and forgets the one that was not used longest.

    Thread-safe: two configurations on two event loops may share a cache.

    Args:
        limits: How old answers may be.
        max_size: The most entries.

    Attributes:
        evictions: The number of entries that made room for others.
    """

    def __init__(self, limits: Ages, max_size: int) -> None:
        self.limits = limits
        self.max_size = max_size
        self.evictions = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: bytes, entry: Entry) -> None:
        """Keep *entry*, unless a later question has been answered already."""
        entries = self._entries
        known = entries.get(key)
        if known is not None and known.number > entry.number:
            return
        entries[key] = entry
        try:
            entries.move_to_end(key)
            if len(entries) > self.max_size:
                entries.popitem(last=False)
                self.evictions += 1
        except KeyError:
            pass  # another thread has removed it

    def fresh(
        self, key: bytes, valid_from: int, now: float, wall: float
    ) -> Entry | None:
        """
        Return the answer for *key*, if it may still be used.

        Args:
            key: See `key_of`.
            valid_from: Questions with this number, or a lower one, are invalidated.
            now: The time, by the clock of *asked_at*.
            wall: The time in seconds since the epoch.
        """
        entries = self._entries
        entry = entries.get(key)
        if entry is None:
            return None
        limits = self.limits
        limit = limits.allowed if entry.allowed is True else limits.denied
        # Each key has a jitter of its own, so that equal ages do not end together. It
        # only shortens: no answer outlives its limit.
        limit *= 1.0 - limits.jitter * key[0] / 255
        # The code of _is_usable(), inlined: this runs for each hit.
        if (
            entry.number <= valid_from
            or not 0.0 <= now - entry.asked_at < limit
            or wall >= entry.expires_at
        ):
            return None
        # Not in suppress(), which would take longer than all of this.
        try:
            entries.move_to_end(key)
        except KeyError:  # another thread has removed it
            return entry
        return entry

    def stale(
        self, key: bytes, valid_from: int, now: float, wall: float
    ) -> Entry | None:
        """Return the answer for *key* if it may be used while none can be got."""
        entry = self._entries.get(key)
        if entry is None or not _is_usable(
            entry, valid_from, self.limits.stale, now, wall
        ):
            return None
        return entry

    def drop(self) -> None:
        """Forget all entries."""
        # A new object, because another thread may use the old one.
        self._entries = OrderedDict()


def _is_usable(
    entry: Entry, valid_from: int, limit: float, now: float, wall: float
) -> bool:
    # An age below 0 means that the clock went back, so the age is unknown.
    return (
        entry.number > valid_from
        and 0.0 <= now - entry.asked_at < limit
        and wall < entry.expires_at
    )
