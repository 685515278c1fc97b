"""
The states of a circuit breaker, without I/O, without timers and without a clock.

    closed ──too many failures──▶ open ──pause over, or reconnected──▶ half-open
       ▲                            ▲                                   │    │
       │                            └───────────a trial failed──────────┘    │
       └──────────────────────enough trials succeeded────────────────────────┘

Each change begins a new epoch. A check holds a permit of its epoch, and the end of a
check of an earlier epoch changes nothing.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import TYPE_CHECKING, Literal

import attrs


if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["Circuit", "CircuitState", "Outcome", "Permit", "Rules"]


CircuitState = Literal["closed", "open", "half_open"]

FIRST_PAUSE = 1.0
"""Seconds that a circuit is open for the first time. Each further pause is twice as
long, up to `recovery_timeout`."""

JITTER = 0.1
"""The part of a pause by which it may be shorter, so that processes do not agree."""

GRACE = 1.0
"""Seconds by which a check may end late."""

BUCKETS = 10
"""The parts of a window."""


class Outcome(enum.Enum):
    """What the end of a check says about the server."""

    SUCCESS = enum.auto()
    FAILURE = enum.auto()
    SLOW = enum.auto()
    """An answer, but too late. It counts in the ratio, and not as one of a series."""
    NOTHING = enum.auto()
    """Such as a cancellation."""


@attrs.frozen
class Rules:
    """When a circuit changes its state. Durations are in seconds."""

    failure_threshold: int = 5
    success_threshold: int = 2
    recovery_timeout: float = 5.0
    half_open_max_requests: int = 1
    window: float = 10.0
    minimum_calls: int = 10
    failure_ratio: float = 0.5


@attrs.frozen(eq=False)
class Permit:
    """The right of one check to ask the server."""

    epoch: int
    # A trial that has not ended by then no longer counts: its task may never run again.
    expires_at: float


@attrs.define
class Bucket:
    """The calls of one part of the window."""

    began_at: float
    calls: int = 0
    failures: int = 0


class Circuit:
    """
    The state of one circuit.

    Args:
        rules: When it changes.
        random: Returns a random number from 0 to 1.
        changed: Called after each change with the old state, the new one, the reason
            and the time.
    """

    def __init__(
        self,
        rules: Rules,
        random: Callable[[], float],
        changed: Callable[[CircuitState, CircuitState, str, float], None],
    ) -> None:
        self.rules = rules
        self.state: CircuitState = "closed"
        self.epoch = 0
        self.failures = 0
        self.opened_at: float | None = None
        self.last_failure_at: float | None = None
        self._random = random
        self._changed = changed
        self._buckets: deque[Bucket] = deque()
        self._successes = 0
        self._trials: set[Permit] = set()
        self._pause = 0.0
        self._opens_until = 0.0
        self._connects = 0

    def enter(self, now: float, connects: int, longest: float) -> Permit | None:
        """
        Return the permit for one check, or None if it is refused.

        Args:
            now: The time.
            connects: How often the pool has connected. A new connection is a reason to
                try at once: the pool has recovered from an outage.
            longest: Seconds that the check may take.
        """
        if self.state == "open":
            if now < self._opens_until and connects <= self._connects:
                return None
            over = now >= self._opens_until
            self._change(
                "half_open", "the pause is over" if over else "reconnected", now
            )
        permit = Permit(self.epoch, now + longest + GRACE)
        if self.state == "closed":
            return permit
        self._trials = {each for each in self._trials if now < each.expires_at}
        if len(self._trials) >= self.rules.half_open_max_requests:
            return None
        self._trials.add(permit)
        return permit

    def leave(
        self, permit: Permit, outcome: Outcome, now: float, connects: int
    ) -> None:
        """Take *permit* back. Each permit must come back, however its check ended."""
        if permit.epoch != self.epoch:
            return
        if self.state == "half_open":
            self._trials.discard(permit)
            if now >= permit.expires_at:
                return  # another one took its place
        if outcome is Outcome.NOTHING:
            return
        if outcome is Outcome.FAILURE:
            self.last_failure_at = now
            self.failures += 1
        elif outcome is Outcome.SUCCESS:
            self.failures = 0
        if self.state == "half_open":
            self._tried(outcome, now, connects)
        else:
            self._count(outcome, now, connects)

    def retry_after(self, now: float) -> float:
        """Return the seconds until a refused check may be let through."""
        if self.state == "open":
            return max(0.0, self._opens_until - now)
        return FIRST_PAUSE

    def reset(self, now: float) -> None:
        """Close, and forget all that was counted."""
        self.failures = 0
        self.last_failure_at = None
        self._close("reset", now)

    def _tried(self, outcome: Outcome, now: float, connects: int) -> None:
        if outcome is not Outcome.SUCCESS:
            self._open("a trial failed", now, connects)
            return
        self._successes += 1
        if self._successes >= self.rules.success_threshold:
            self._close("trials succeeded", now)

    def _count(self, outcome: Outcome, now: float, connects: int) -> None:
        rules = self.rules
        while self._buckets and now - self._buckets[0].began_at >= rules.window:
            self._buckets.popleft()
        width = rules.window / BUCKETS
        if not self._buckets or now - self._buckets[-1].began_at >= width:
            self._buckets.append(Bucket(now))
        bucket = self._buckets[-1]
        bucket.calls += 1
        if outcome is Outcome.SUCCESS:
            return
        bucket.failures += 1
        if outcome is Outcome.FAILURE and self.failures >= rules.failure_threshold:
            self._open(f"{self.failures} checks in a row failed", now, connects)
            return
        calls = sum(each.calls for each in self._buckets)
        failures = sum(each.failures for each in self._buckets)
        if calls >= rules.minimum_calls and failures >= rules.failure_ratio * calls:
            self._open(
                f"{failures} of {calls} checks within {rules.window:g} s failed or "
                "were slow",
                *(now, connects),
            )

    def _open(self, reason: str, now: float, connects: int) -> None:
        longest = self.rules.recovery_timeout
        self._pause = min(longest, 2 * self._pause or FIRST_PAUSE)
        self._opens_until = now + self._pause * (1 - JITTER * self._random())
        self._connects = connects
        if self.opened_at is None:
            self.opened_at = now
        self._change("open", reason, now)

    def _close(self, reason: str, now: float) -> None:
        self.failures = 0
        self.opened_at = None
        self._pause = 0.0
        self._change("closed", reason, now)

    def _change(self, state: CircuitState, reason: str, now: float) -> None:
        before, self.state = self.state, state
        self.epoch += 1
        self._successes = 0
        self._trials.clear()
        self._buckets.clear()
        if before != state:
            self._changed(before, state, reason, now)
