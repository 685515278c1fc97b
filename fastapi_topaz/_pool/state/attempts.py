"""The attempts to connect: those under way, and what the failed ones tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi_topaz._pool.state.backoff import DEMAND_CAP, full_jitter
from fastapi_topaz._pool.state.slot import Slot


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._pool.state.options import PoolOptions


__all__ = ["Attempts"]


BRIEF = 2.0
"""Seconds. An idle connection that ends within this time of its opening is a failure,
unless it answered something. One that ends later was idle for too long for a proxy."""

FORGIVEN = 60.0
"""Seconds without such a failure, after which the pauses are short again."""

FORGOTTEN = 1.0
"""Seconds without any attempt since one might have been made again."""

PATIENCE = 2.0
"""Seconds. An attempt that takes longer may hang: others are begun in its stead."""


class Attempts:
    """
    The attempts to connect, and an outage if the last of them failed.

    Strictly private.

    Attributes:
        under_way: The entries whose connections are being established.
        failures: Rounds that failed since the last success. All attempts begun
            before the first of them failed are one round. A connection that ended
            before it answered anything is a failure, too.
        error: Why the last one failed.
        unanswered: Connections in a row that ended before they answered anything.
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self.under_way: set[Slot] = set()
        self.failures = 0
        self.error: Exception | None = None
        self._round = 0
        self._since = 0.0
        self._retry_at = self._demand_at = self._failed_at = float("-inf")
        self.unanswered = 0
        self._unanswered_until = self._paced_until = float("-inf")

    def begin(self, now: float) -> Slot:
        """Add an entry whose connection is being established."""
        if now < self._unanswered_until + BRIEF:
            # Else attempts that succeed follow each other as fast as they are lost.
            share = self._random()
            self._paced_until = now + full_jitter(self.unanswered, share, DEMAND_CAP)
        slot = Slot(started_at=now, round=self._round)
        self.under_way.add(slot)
        return slot

    def forget(self, now: float) -> bool:
        """
        Forget an outage that nobody followed up, and say whether there was one.

        To be called when an attempt is needed. Nobody needed one for a while since one
        might have been made again, so what failed then says nothing of now.
        """
        quiet_since = max(self._retry_at, self._failed_at)
        if not self.failures or self.under_way or now <= quiet_since + FORGOTTEN:
            return False
        self.failures = 0
        self.error = None
        return True

    def succeeded(self, slot: Slot) -> None:
        """Drop *slot*, and the outage: one success makes up for all failures."""
        self.under_way.remove(slot)
        self.failures = 0
        self.error = None
        self._retry_at = self._demand_at = float("-inf")

    def failed(self, slot: Slot, error: Exception, now: float) -> None:
        """Drop *slot*, and wait before the next round."""
        self.under_way.remove(slot)
        self._failed_at = now
        # Not after each failure: an attempt begun meanwhile would always be under
        # way, and the next would follow each failure without any pause.
        if slot.round == self._round:
            self._round += 1
            if not self.failures:
                self._since = slot.started_at
            self.failures += 1
            share = self._random()
            self._retry_at = now + full_jitter(self.failures, share)
            self._demand_at = now + full_jitter(self.failures, share, DEMAND_CAP)
        # Not one begun before a success that came since: the outage is over.
        if self.failures:
            self.error = error

    def cancelled(self, slot: Slot) -> None:
        """Drop *slot*, unless its attempt has ended already."""
        self.under_way.discard(slot)

    def ended(self, slot: Slot, error: Exception | None, now: float) -> None:
        """
        Note that the connection of *slot* was lost.

        With an *error* it is a failed attempt, because it never answered. Without a
        pause, a server that accepts and hangs up would see connections made as fast as
        they can be, each of them a success.
        """
        if slot.answered or now > self._unanswered_until + FORGIVEN:
            self.unanswered = 0
        if error is None:
            return
        if now >= self._unanswered_until:  # those that end together count once
            self.unanswered += 1
            share = self._random()
            pause = full_jitter(self.unanswered, share, DEMAND_CAP)
            self._unanswered_until = now + pause
        if not self.failures:
            self.failures = 1
            self._since = slot.started_at
            self._round += 1  # those that are under way are of the same round
        self._failed_at = now
        self.error = error

    def is_newer(self, slot: Slot) -> bool:
        """Say whether *slot* was begun after the last failure."""
        return slot.started_at >= self._failed_at

    def is_cautious(self, now: float) -> bool:
        """Say whether the server's state calls for one attempt at a time."""
        return self.failures > 0 or now < self._unanswered_until + BRIEF

    def next_attempt(self, *, waiting: bool) -> float:
        """Return when the next attempt may be made; sooner if somebody is *waiting*."""
        retry_at = self._demand_at if waiting else self._retry_at
        return max(retry_at, self._unanswered_until, self._paced_until)

    def coming(self, *, waiting: bool) -> int:
        """Return how many connections may be expected from the attempts under way."""
        # One that hangs must not keep those who wait from another server.
        if waiting:
            return sum(not slot.overdue for slot in self.under_way)
        return len(self.under_way)

    def overdue(self, now: float) -> bool:
        """Give up hope in attempts that take too long; True if that is news."""
        late = [
            slot
            for slot in self.under_way
            if not slot.overdue and slot.started_at + PATIENCE <= now
        ]
        for slot in late:
            slot.overdue = True
        return bool(late)

    def next_overdue(self) -> float:
        """Return when the next attempt takes too long."""
        return min(
            (e.started_at + PATIENCE for e in self.under_way if not e.overdue),
            default=float("inf"),
        )

    def hopeless(self, options: PoolOptions, now: float) -> bool:
        """
        Say whether those who wait have had what one demand is worth.

        That is a number of attempts, or, where an attempt takes longer than any caller
        waits, that time.
        """
        if not self.failures or self.coming(waiting=True):
            return False
        return (
            self.failures >= options.attempts
            or 0 < options.acquire_timeout <= now - self._since
            or bool(getattr(self.error, "permanent", False))
        )
