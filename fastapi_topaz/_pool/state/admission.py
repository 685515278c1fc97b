"""
Whether a caller may join the queue: an estimate of its wait, and two bounds for it.

Without bounds, the queue of an overloaded pool is always as long as the budget of its
callers. Then the caller at its head has no time left, so its call is useless: the pool
is busy, and no caller gets an answer. So the pool refuses at once the callers whose
answer would be late. Those that it accepts are served in the order of their arrival.

The estimate needs no model of the server. A full pool takes streams back at intervals
of `held / limit` seconds, where `held` is the usual time of a lease. So a caller behind
n others waits for about n + 1 intervals.

No clock and no I/O: times are arguments, in seconds.
"""

from __future__ import annotations

from collections import deque
from statistics import median_low
from typing import NamedTuple


__all__ = ["Admission", "Load"]


SAMPLES = 64
"""The most answered calls whose median is the usual time of a call."""

RECENT = 2.0
"""
Seconds before the last answer within which an answered call counts. A pool with few
checks would otherwise need half a minute to notice that the server became slower.
"""

FEWEST = 8
"""The answered calls that count in any case."""

WEIGHTS = (0.05, 0.01)
"""
The weight of the newest lease in two averages of the time of a lease. The larger
average counts. So a slower server is noticed soon, and a faster one later.
"""

FRESH_FOR = 1.0
"""Seconds without a returned lease after which the averages lose half, each second."""

STALLED_AFTER = 2.0
"""
Seconds without a returned lease after which a full pool counts as stalled. The native
transport ends a silent connection within this time, and then leases come back.
"""

STANDING_FOR = 1.0
"""Seconds for which the short bound holds after each refusal by it."""

LEAST_FOR = 10.0
"""Seconds for which the smallest budget is remembered, at least."""


class Load(NamedTuple):
    """How busy the pool is when a caller comes."""

    waiting: int
    """The callers in the queue."""
    in_use: int
    """The leases that are out."""
    limit: int
    """The leases that may be out at once."""


class Admission:
    """
    The averages of one open pool, and the decisions that follow from them.

    Strictly private. `release` of the pool writes the public attributes itself, because
    it runs for each lease. They are folded into averages only when a caller waits.

    Attributes:
        held: The sum of the times of the leases that came back.
        ended: Their number.
        last_end: When the last one came back.
        calls: When the last answered calls of checks ended, and the time of each.
        stands_since: When the queue began, or when it was last short.
    """

    __slots__ = (
        *("_averages", "_least", "_least_until", "_standing_until"),
        *("calls", "ended", "held", "last_end", "stands_since"),
    )

    def __init__(self) -> None:
        self.held = 0.0
        self.ended = 0
        self.last_end = float("-inf")
        self.calls: deque[tuple[float, float]] = deque(maxlen=SAMPLES)
        self._averages = [0.0 for _ in WEIGHTS]
        self.stands_since = 0.0
        self._standing_until = float("-inf")
        # The smallest budget of this period, and of the one before.
        self._least = [float("inf"), float("inf")]
        self._least_until = float("-inf")

    @property
    def least_budget(self) -> float:
        """The smallest budget of the last seconds."""
        return min(self._least)

    @property
    def call(self) -> float:
        """The usual time of a call; 0 if none was answered yet."""
        if not self.calls:
            return 0.0
        since = self.calls[-1][0] - RECENT
        count = max(FEWEST, sum(at >= since for at, _ in self.calls))
        return median_low([held for _, held in self.calls][-count:])

    def wait(self, load: Load, now: float) -> float:
        """Return the seconds that one more caller would wait."""
        average = max(self._folded())
        age = now - self.last_end
        if age > FRESH_FOR:
            average *= 0.5 ** (age - FRESH_FOR)
        if load.waiting and load.in_use >= load.limit:
            idle_since = max(self.last_end, self.stands_since)
            stalled = now - idle_since - STALLED_AFTER
            average = max(average, stalled)
        return (load.waiting + 1) * average / load.limit

    def refuses(
        self, load: Load, left: float, budget: float, now: float
    ) -> float | None:
        """
        Decide on a caller that would have to wait.

        Args:
            load: How busy the pool is.
            left: The seconds within which it needs its answer.
            budget: The seconds that it had at first.
            now: The time.

        Returns:
            None if it may wait. Otherwise the estimate of its wait, in seconds.
        """
        least = self._smallest(budget, now)
        # An estimate may be wrong. With no call under way, only a call can show that.
        if not load.in_use:
            return None
        self._averages, self.held, self.ended = self._folded(), 0.0, 0
        wait, call = self.wait(load, now), self.call
        if wait + call > left:
            return wait
        # Callers wait for connections that are being opened, and not for capacity.
        if load.in_use < load.limit:
            return None
        # While the queue stands, it is kept short: a caller that waits for most of its
        # budget gains nothing, because the queue is as long for all others.
        interval = wait / (load.waiting + 1)
        quarter = least / 4
        short = quarter - call if quarter > 2 * call else least / 8
        stood = now - self.stands_since if load.waiting else 0.0
        if wait > max(short, 2 * interval) and (
            now < self._standing_until or stood > max(0.2, least / 2)
        ):
            self._standing_until = now + STANDING_FOR
            return wait
        return None

    def forget(self) -> None:
        """Forget the times of leases: the server may be another one now."""
        self.held, self.ended = 0.0, 0
        self._averages = [0.0 for _ in WEIGHTS]
        self._standing_until = float("-inf")

    def queue_begins(self, now: float) -> None:
        """Record that a caller joins the empty queue."""
        self.stands_since = now

    def served(self, waited: float, now: float) -> None:
        """Record that a caller got its lease after *waited* seconds in the queue."""
        if waited < self.least_budget / 8:
            self.stands_since = now

    def _smallest(self, budget: float, now: float) -> float:
        """Return the smallest budget of the last time; it decides for all callers."""
        # With its own bound, callers with a large budget would fill the queue, and all
        # with a small one would be refused.
        if now >= self._least_until:
            self._least = [budget, self._least[0]]
            self._least_until = now + LEAST_FOR
        elif budget < self._least[0]:
            self._least[0] = budget
        return self.least_budget

    def _folded(self) -> list[float]:
        """Return the averages with the leases that have come back since."""
        ended = self.ended
        if not ended:
            return self._averages
        mean = self.held / ended
        return [
            mean + (average - mean) * ((1 - weight) ** ended if average else 0.0)
            for average, weight in zip(self._averages, WEIGHTS, strict=True)
        ]
