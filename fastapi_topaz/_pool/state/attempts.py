"""The attempts to connect: which are under way, and when the next one may begin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi_topaz._pool.state.backoff import DEMAND_CAP, full_jitter
from fastapi_topaz._pool.state.slot import Slot
from fastapi_topaz.exceptions import ConnectFailed


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._pool.state.options import PoolOptions


__all__ = ["Attempts", "is_failed_attempt", "unanswered_end"]


BRIEF = 2.0
"""
Seconds. If an idle connection ends within this time after its opening, and never
answered, it counts as a failed attempt. If it ends later, that is not a failure: a
proxy closes connections that are idle for too long.
"""

FORGIVEN = 60.0
"""
Seconds without a connection that ended unanswered. After them the pauses are short
again.
"""

FORGOTTEN = 1.0
"""
Seconds. If no attempt was needed for this long after the pause, the outage is
forgotten.
"""

PATIENCE = 2.0
"""Seconds. If an attempt takes longer, it may hang: others may begin in its place."""


def is_failed_attempt(slot: Slot, now: float, *, was_lost: bool) -> bool:
    """Return whether the end of the connection of *slot* is a failed attempt."""
    if slot.answered or slot.refusals:
        return False
    was_young = now - slot.opened_at < BRIEF
    was_in_use = slot.broken or (was_lost and bool(slot.leases))
    # Otherwise it may be a proxy that closed an idle connection.
    return was_young or was_in_use


def unanswered_end(slot: Slot, target: str) -> ConnectFailed:
    """Return the failure that this end of the connection of *slot* counts as."""
    why = f": {slot.last_error}" if slot.last_error else ""
    return ConnectFailed(
        f"cannot connect to {target}: the server accepted the connection, and closed "
        f"it before or together with its first answer{why}",
        reason="unanswered",
    )


class Attempts:
    """
    The attempts to connect, and the pauses between them after failures.

    Strictly private. All times are seconds on the pool's clock.

    Attributes:
        under_way: The slots whose connections are being established.
        failures: The failed rounds since the last success. All attempts that began
            before the first of them failed are one round. If a connection ends before
            it answered anything, that is also a failure.
        error: The error of the last failure.
        unanswered: The connections in a row that ended before they answered anything.
        expected_streams: The streams of the newest connection. The next connection
            probably has as many.
    """

    def __init__(self, random: Callable[[], float], streams: int) -> None:
        self._random = random
        self.expected_streams = streams
        self.under_way: set[Slot] = set()
        self.failures = 0
        self.error: Exception | None = None
        self._round = 0
        self._since = 0.0
        self._retry_at = self._demand_at = self._failed_at = float("-inf")
        self.unanswered = 0
        self._unanswered_until = self._paced_until = float("-inf")

    def begin(self, now: float) -> Slot:
        """Begin an attempt: return a new slot whose connection is being established."""
        if now < self._unanswered_until + BRIEF:
            # An attempt that succeeds sets no pause. So if the server hangs up each
            # time, new attempts would follow as fast as the connections are lost.
            share = self._random()
            self._paced_until = now + full_jitter(self.unanswered, share, DEMAND_CAP)
        slot = Slot(started_at=now, round=self._round)
        self.under_way.add(slot)
        return slot

    def forget(self, now: float) -> bool:
        """
        Forget an old outage, and return whether there was one.

        Call this when an attempt is needed. If none was needed for `FORGOTTEN` seconds
        after the pause, the old failures say nothing about the server now.
        """
        quiet_since = max(self._retry_at, self._failed_at)
        if not self.failures or self.under_way or now <= quiet_since + FORGOTTEN:
            return False
        self.failures = 0
        self.error = None
        return True

    def succeeded(self, slot: Slot) -> None:
        """Remove *slot*, and forget all failures: one success ends the outage."""
        self.under_way.remove(slot)
        self.expected_streams = slot.streams
        self.failures = 0
        self.error = None
        self._retry_at = self._demand_at = float("-inf")

    def failed(self, slot: Slot, error: Exception, now: float) -> None:
        """Remove *slot*, whose attempt failed, and set the pause before a new round."""
        self.under_way.remove(slot)
        self._failed_at = now
        # Only the first failure of a round counts and sets a pause. If every failure
        # did, an attempt that began meanwhile would always be under way. Then the next
        # attempt would follow each failure without a pause.
        if slot.round == self._round:
            self._round += 1
            if not self.failures:
                self._since = slot.started_at
            self.failures += 1
            share = self._random()
            self._retry_at = now + full_jitter(self.failures, share)
            self._demand_at = now + full_jitter(self.failures, share, DEMAND_CAP)
        # Without failures, another attempt has succeeded since this one began. Then
        # the outage is over, and this error is of no interest.
        if self.failures:
            self.error = error

    def cancelled(self, slot: Slot) -> None:
        """Remove *slot*. If its attempt has ended already, do nothing."""
        self.under_way.discard(slot)

    def ended(self, slot: Slot, error: Exception | None, now: float) -> None:
        """
        Record that the connection of *slot* was lost.

        If *error* is given, the connection never answered, and counts as a failed
        attempt with a pause after it. Otherwise, if a server accepts connections and
        hangs up, the pool would connect without a pause: each attempt is a success.
        """
        if slot.answered or now > self._unanswered_until + FORGIVEN:
            self.unanswered = 0
        if error is None:
            return
        if now >= self._unanswered_until:  # connections that end together count once
            self.unanswered += 1
            share = self._random()
            pause = full_jitter(self.unanswered, share, DEMAND_CAP)
            self._unanswered_until = now + pause
        if not self.failures:
            self.failures = 1
            self._since = slot.started_at
            self._round += 1  # the attempts under way belong to the failed round
        self._failed_at = now
        self.error = error

    def is_newer(self, slot: Slot) -> bool:
        """Return whether the attempt of *slot* began after the last failure."""
        return slot.started_at >= self._failed_at

    def is_cautious(self, now: float) -> bool:
        """Return whether to make only one attempt at a time, after failures."""
        return self.failures > 0 or now < self._unanswered_until + BRIEF

    def next_attempt(self, *, waiting: bool) -> float:
        """Return when the next attempt may begin; earlier if callers are *waiting*."""
        retry_at = self._demand_at if waiting else self._retry_at
        return max(retry_at, self._unanswered_until, self._paced_until)

    def coming(self, *, waiting: bool) -> int:
        """Return how many connections to expect from the attempts under way."""
        # If an attempt hangs, another one may reach another server for the callers that
        # wait. So an overdue attempt does not count.
        if waiting:
            return sum(not slot.overdue for slot in self.under_way)
        return len(self.under_way)

    def overdue(self, now: float) -> bool:
        """Mark attempts that take longer than `PATIENCE`; return whether any is new."""
        late = [
            slot
            for slot in self.under_way
            if not slot.overdue and slot.started_at + PATIENCE <= now
        ]
        for slot in late:
            slot.overdue = True
        return bool(late)

    def next_overdue(self) -> float:
        """Return when the next attempt under way becomes overdue."""
        return min(
            (e.started_at + PATIENCE for e in self.under_way if not e.overdue),
            default=float("inf"),
        )

    def hopeless(self, options: PoolOptions, now: float) -> bool:
        """
        Return whether the waiting callers should fail now, instead of waiting longer.

        They fail if attempts have failed, all attempts still under way are overdue, and
        one of these is true:

        - `options.attempts` rounds have failed.
        - `acquire_timeout` seconds have passed since the first failed attempt began.
          This matters if one attempt takes longer than any caller waits.
        - The last error is permanent.
        """
        if not self.failures or self.coming(waiting=True):
            return False
        return (
            self.failures >= options.attempts
            or 0 < options.acquire_timeout <= now - self._since
            or bool(getattr(self.error, "permanent", False))
        )
