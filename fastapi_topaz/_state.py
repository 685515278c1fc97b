"""
The state of a pool and every change of it, without I/O and without a clock.

An entry is one slot for a connection. Which of the three collections holds it is
its state, and it is always in exactly one until it is gone:

    connecting ──connected──▶ open ──retire, last lease back──▶ closing ──closed──▶ ∅
        └─────connect_failed─────────────────────────────────────────────────────▶ ∅

An open entry is *ready* while it may take another lease: it is below its number of
streams, not *suspect* (waiting for a probe) and not *retired* (waiting for its last
lease to come back). An *expired* entry still serves, until a new one replaces it.

What holds after every method:

- open + connecting + closing never exceeds `max_connections`, except after it was
  lowered below the number of connections that are leased.
- an entry has at most `streams` leases, and `in_use` is the sum of them.
- leases are served in the order they came; nobody is served past one who waits.
- nobody who may be served waits: see `serve`.
- an entry with leases is never closed, until `abandon` ends the grace of close().

Methods are synchronous: no other task can see them half done, so there is no lock.
They take the time as an argument and leave their effects to the caller: entries to
close pile up in `to_close`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from fastapi_topaz._backoff import full_jitter
from fastapi_topaz._entry import PoolEntry
from fastapi_topaz._status import PoolStatus


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._entry import Lease
    from fastapi_topaz._options import PoolOptions


__all__ = ["PoolState"]


LIFETIME_JITTER = 0.1
"""Connections that came together must not all expire together."""


class PoolState:
    """
    The entries of one open pool, and who waits for them.

    Strictly private.
    """

    def __init__(self, options: PoolOptions, random: Callable[[], float]) -> None:
        self.options = options
        self.streams = options.streams_per_connection
        self._random = random

        self.connecting: set[PoolEntry] = set()
        self.open: dict[PoolEntry, None] = {}
        self.closing: set[PoolEntry] = set()
        self.to_close: list[PoolEntry] = []

        # A stack: the last used is leased first, so that the others grow idle and
        # can be reaped. A dict, because any of them may have to leave.
        self._ready: dict[PoolEntry, None] = {}
        self._expired: dict[PoolEntry, str] = {}
        self.waiting: OrderedDict[Lease, None] = OrderedDict()
        self.in_use = 0

        # In use, and so kept at its minimum.
        self.warm = False
        # Connections wanted by callers who did not wait for them.
        self.wish = 0
        self.shut = False
        # Rounds of connecting that failed since the last success. All attempts
        # begun before the first of them failed are one round.
        self.failures = 0
        self._round = 0
        self.retry_at = 0.0
        self.last_error: Exception | None = None

    def __repr__(self) -> str:
        return (
            f"<PoolState open={len(self.open)} connecting={len(self.connecting)} "
            f"closing={len(self.closing)} in_use={self.in_use} "
            f"waiting={len(self.waiting)}>"
        )

    # -- leases -----------------------------------------------------------------

    def take(self, lease: Lease) -> bool:
        """Serve *lease* at once; False if nothing is ready or somebody waits."""
        if not self._ready or self.waiting:
            return False
        self._assign(lease)
        return True

    def enqueue(self, lease: Lease) -> None:
        """Let *lease* wait, behind all others."""
        self.warm = True
        self.waiting[lease] = None

    def withdraw(self, lease: Lease, now: float) -> None:
        """Forget *lease*, whether it still waits or was served meanwhile."""
        self.waiting.pop(lease, None)
        if lease.entry is not None:
            self.give_back(lease, now)

    def serve(self, tokens: int) -> list[Lease]:
        """
        Serve those who wait, first come first served, and return them.

        *tokens* is how many the limiter has lent. Its queue and `waiting` are in
        the same order, so whoever holds a token and no stream is at the head of
        `waiting`: there are `tokens - in_use` of them.
        """
        served = []
        while self.waiting and self._ready and self.in_use < tokens:
            lease, _ = self.waiting.popitem(last=False)
            self._assign(lease)
            served.append(lease)
        return served

    def _assign(self, lease: Lease) -> None:
        entry = next(reversed(self._ready))
        entry.leases += 1
        if entry.leases == self.streams:
            del self._ready[entry]
        self.in_use += 1
        lease.entry = entry

    def give_back(self, lease: Lease, now: float) -> None:
        """Take the stream of *lease* back."""
        entry = lease.entry
        assert entry is not None  # noqa: S101
        lease.entry = None
        entry.leases -= 1
        entry.last_used_at = now
        self.in_use -= 1
        if entry.retired is not None:
            self.retire(entry, entry.retired)
        elif not entry.suspect:
            self._ready.setdefault(entry)

    def fail_waiting(self, failure: Exception) -> list[Lease]:
        """Give *failure* to everybody who waits, and return them."""
        failed = list(self.waiting)
        self.waiting.clear()
        for lease in failed:
            lease.failure = failure
        return failed

    # -- connecting -------------------------------------------------------------

    def shortfall(self, tokens: int, now: float) -> int:
        """
        Return how many connections to begin to establish now.

        For those who hold a token and no stream, for `min_connections` once the
        pool is in use, and one to replace an expired connection. During an outage
        one at a time, each after its backoff, however many wait.
        """
        room = self._room()
        if room <= 0 or self.shut:
            return 0
        if self.failures:
            if self.connecting or now < self.retry_at:
                return 0
            room = 1
        coming = len(self.connecting)
        entitled = min(len(self.waiting), tokens - self.in_use)
        needed = -(-entitled // self.streams) - coming
        if self.warm:
            needed = max(needed, self.options.min_connections - self._usable() - coming)
        needed = max(needed, self.wish - self._usable() - coming)
        if not coming and self._next_expired() is not None:
            needed = max(needed, 1)
        return max(0, min(needed, room))

    def begin_connect(self, now: float) -> PoolEntry:
        """Add an entry whose connection is being established."""
        entry = PoolEntry(started_at=now, round=self._round)
        self.connecting.add(entry)
        return entry

    def connected(self, entry: PoolEntry, connection: Any, now: float) -> None:
        """Open *entry*; one success makes up for all failures."""
        self.connecting.remove(entry)
        self.wish = 0
        self.failures = 0
        self.last_error = None
        entry.connection = connection
        entry.started_at = entry.last_used_at = entry.proven_at = now
        if self.options.max_lifetime:
            entry.expires_at = now + self.options.max_lifetime * (
                1 - LIFETIME_JITTER * self._random()
            )
        self.open[entry] = None
        if self.shut:
            self.retire(entry, "close")
            return
        self._ready[entry] = None
        expired = self._next_expired()
        if expired is not None:
            self.retire(expired, self._expired[expired])
        self._trim()

    def connect_failed(self, entry: PoolEntry, error: Exception, now: float) -> None:
        """Drop *entry*; the first failure is that of its round, and backs off."""
        self.connecting.remove(entry)
        self.wish = 0
        self.last_error = error
        # Not the last one: an attempt begun meanwhile would always be under way,
        # and the next would follow each failure without any pause.
        if entry.round == self._round:
            self._round += 1
            self.failures += 1
            self.retry_at = now + full_jitter(self.failures, self._random)

    def connect_cancelled(self, entry: PoolEntry) -> None:
        """Drop *entry*, unless its attempt has ended already."""
        self.connecting.discard(entry)

    def want_one(self) -> None:
        """Have a connection made, if there is none, for whoever comes next."""
        self.warm = True
        self.wish = 1

    def hopeless(self) -> bool:
        """Say whether nothing can serve those who wait now."""
        if not self.failures or self.connecting or self._usable():
            return False
        return self.failures >= self.options.attempts or getattr(
            self.last_error, "permanent", False
        )

    # -- entries that go --------------------------------------------------------

    def retire(self, entry: PoolEntry, reason: str) -> None:
        """Lease *entry* to nobody any more; it closes when it is idle."""
        if entry.retired is None:
            entry.retired = reason
        self._ready.pop(entry, None)
        if not entry.leases and entry in self.open:
            self._close(entry)

    def suspect(self, entry: PoolEntry) -> bool:
        """Lease *entry* to nobody until `cleared`; True if that is news."""
        if entry.suspect or entry.retired is not None or entry not in self.open:
            return False
        entry.suspect = True
        self._ready.pop(entry, None)
        return True

    def cleared(self, entry: PoolEntry) -> None:
        """*entry* has answered a probe."""
        entry.suspect = False
        if entry in self.open and entry.retired is None and entry.leases < self.streams:
            self._ready.setdefault(entry)

    def reap(self, now: float) -> None:
        """Retire what was idle for `max_idle_time`, down to `min_connections`."""
        limit = self.options.max_idle_time
        if not limit:
            return
        idle = [entry for entry in self.open if not entry.leases]
        idle.sort(key=lambda entry: entry.last_used_at)
        spare = self._usable() - self.options.min_connections
        for entry in idle[: max(0, spare)]:
            if now - entry.last_used_at >= limit:
                self.retire(entry, "idle")

    def expire(self, now: float) -> None:
        """Mark what has outlived `max_lifetime` for replacement."""
        for entry in self.open:
            if entry.expires_at <= now:
                self._expired.setdefault(entry, "lifetime")

    def drain(self) -> None:
        """Mark every open connection for replacement."""
        for entry in self.open:
            self._expired.setdefault(entry, "drain")

    def rotate(self) -> None:
        """
        Retire the next expired entry, unless a new one can be made before.

        If there is room for one more connection, `shortfall` asks for it, and
        `connected` retires the old one. If not, an idle one makes room; of those that
        are leased only one at a time is kept from further leases.
        """
        entry = self._next_expired()
        if entry is None or self.closing:
            return
        floor = self.options.min_connections if self.warm else 0
        surplus = not entry.leases and not self.waiting and self._usable() > floor
        full = self._room() <= 0 and not self.connecting
        alone = all(other.retired is None for other in self._expired)
        if surplus or (full and (alone or not entry.leases)):
            self.retire(entry, self._expired[entry])

    def _next_expired(self) -> PoolEntry | None:
        return next((entry for entry in self._expired if not entry.retired), None)

    def next_expiry(self) -> float:
        """Return when the next entry expires."""
        return min(
            (entry.expires_at for entry in self.open if entry not in self._expired),
            default=float("inf"),
        )

    def resize(self, options: PoolOptions) -> None:
        """Work with other limits from now on."""
        self.options = options
        self._trim()

    def shut_down(self) -> None:
        """Connect no more, and retire everything."""
        self.shut = True
        for entry in list(self.open):
            self.retire(entry, "close")

    def abandon(self) -> None:
        """Close what is still leased: its time is up."""
        for entry in list(self.open):
            self._close(entry)

    def closed(self, entry: PoolEntry) -> None:
        """*entry* is gone, and its place free."""
        self.closing.discard(entry)

    def _close(self, entry: PoolEntry) -> None:
        del self.open[entry]
        self._ready.pop(entry, None)
        self._expired.pop(entry, None)
        self.closing.add(entry)
        self.to_close.append(entry)

    def _trim(self) -> None:
        surplus = self._usable() - self.options.max_connections
        # Idle ones first, and among them the longest unused.
        for entry in sorted(self.open, key=lambda e: (e.leases, e.last_used_at)):
            if surplus <= 0:
                break
            if entry.retired is None:
                self.retire(entry, "resize")
                surplus -= 1

    def _usable(self) -> int:
        return sum(entry.retired is None for entry in self.open)

    def _room(self) -> int:
        taken = len(self.open) + len(self.connecting) + len(self.closing)
        return self.options.max_connections - taken

    # -- telling ----------------------------------------------------------------

    def status(self) -> PoolStatus:
        """Return a snapshot."""
        # A copy: metrics are collected in threads of their own.
        entries = tuple(self.open)
        busy = sum(entry.leases > 0 for entry in entries)
        return PoolStatus(
            total=len(entries),
            idle=len(entries) - busy,
            busy=busy,
            healthy_connections=sum(
                not entry.suspect and entry.retired is None for entry in entries
            ),
            max_connections=self.options.max_connections,
            min_connections=self.options.min_connections,
            waiting=len(self.waiting),
            connecting=len(self.connecting),
            streams_in_use=self.in_use,
            streams_max=self.options.max_connections * self.streams,
            failing=self.failures > 0,
        )
