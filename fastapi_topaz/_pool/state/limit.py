"""
How many checks may be in flight at once: a limit that follows the server.

A queue can hide inside the server: if 500 calls may be in flight, and the server works
on four at a time, then 496 wait there, where the pool cannot refuse any. This limit
moves that queue into the pool. It lies between 1 and the capacity of the pool.

The calls are observed in cohorts: the next calls that begin after a change of the
limit. A cohort ends when 90 % of its calls have ended. Windows by time would see only
the quick calls of a slow server. What counts as slow is a share of the budget, so no
ideal time has to be measured.

No clock and no I/O: times are arguments, in seconds.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Literal


if TYPE_CHECKING:
    from fastapi_topaz._pool.state.slot import Check
    from fastapi_topaz._pool.state.status import LimitReason


__all__ = ["AdaptiveLimit"]


START = 16
"""
The limit at first, if the capacity is larger. It doubles with each quick cohort. A pool
that starts at its capacity under overload loses all calls for seconds.
"""

SMALLEST_COHORT, LARGEST_COHORT = 8, 100

ENDED = 0.9
"""The share of a cohort that must have ended. The last few calls may hang."""

SHARE = 0.2
"""The share of its budget that a call may take, before the limit is lowered."""

QUICK = 0.75
"""Below this share of the time that they may take, calls are quick."""

KAPPA = 4.0
"""A call may also take less than this many times the shortest usual time."""

FLOOR = 0.005
"""Seconds that a call may take in any case."""

MEMORY = 60.0
"""Seconds for which the shortest usual time is remembered."""

SMOOTHING = 0.25
"""The weight of the newest median in the usual time."""

HOLDS = (2.0, 60.0)
"""The first and the longest pause in seconds after a change that did not help."""

LONGEST_WAIT = 1.0
"""
Seconds that the pool waits at most for calls that do not end, before it raises the
limit. Otherwise a few long calls would keep out all others, although the pool has room.
"""

STUCK = 4.0
"""The pool waits at least this many times the usual time of a call."""

LOST = 0.3
"""The share of calls without an answer from which the limit is at least halved."""

UNDO = 0.6
"""
If the limit is cut to a share x and the answers fall to less than x ** 0.6, then the
calls were not slow because of the queue in the server. So the cut is undone.
"""

GAIN = 0.5
"""If the limit is doubled on trial, the answers must grow by at least 2 ** 0.5."""


class _Hold:
    """A pause after a change that did not help. It doubles each time."""

    __slots__ = ("_pause", "until")

    def __init__(self) -> None:
        self._pause = HOLDS[0]
        self.until = float("-inf")

    def begin(self, now: float) -> None:
        # A long time after the last pause, this is a new event.
        if now > self.until + HOLDS[1]:
            self._pause = HOLDS[0]
        self.until = now + self._pause
        self._pause = min(2 * self._pause, HOLDS[1])


class AdaptiveLimit:
    """
    The limit of one open pool.

    Strictly private.

    Args:
        connections: The maximum number of connections.
        capacity: The maximum number of leases.

    Attributes:
        limit: The leases that may be out at once.
        reason: Why it is what it is.
        grows: True until the first cohort that is not quick, or until the limit is the
            capacity. A pool that begins to be used is not overloaded because of this.
    """

    __slots__ = (
        *("_answered", "_base", "_before", "_capacity", "_complete_at", "_first"),
        *("_full", "_held", "_hold", "_kind", "_lost", "_raised_at", "_ratios"),
        *("_recovering", "_refused", "_running", "_size", "_strikes", "_tolerance"),
        *("_tolerated", "_usual", "grows", "limit", "reason"),
    )

    def __init__(self, connections: int, capacity: int) -> None:
        self._capacity = capacity
        self._first = min(capacity, max(connections, START))
        self.limit = self._first
        self.grows = self.limit < capacity
        self.reason: LimitReason = "start" if self.grows else "capacity"
        # The smoothed median of cohorts, and its recent values with their times.
        self._usual: float | None = None
        self._base: deque[tuple[float, float]] = deque()
        # The limit and the rate of answers before the last change, if it was a cut or a
        # trial that the next cohort judges.
        self._before: tuple[int, float] | None = None
        self._kind: Literal["cut", "trial"] = "cut"
        self._strikes = 0
        self._recovering = False
        # No trial before the end of this pause.
        self._hold = _Hold()
        # A time that the calls may take until the end of this pause: a cut did not
        # help.
        self._tolerance = _Hold()
        self._tolerated = 0.0
        # When the last call of the cohort began, and when calls that did not end raised
        # the limit.
        self._complete_at = self._raised_at = float("-inf")
        self._begin_cohort()

    # -- the calls --------------------------------------------------------------

    def begin(self, claim: Check, in_use: int) -> None:
        """Record that *claim* got its lease; *in_use* leases are out with it."""
        if claim.due - claim.acquired_at < claim.budget / 2:
            # Only a quick call would still be answered, so it shows nothing. But it has
            # waited for too long, so the pool is overloaded.
            self.grows = False
            return
        if self._is_complete():
            # Too many calls of the cohort never ended: frozen connections.
            if claim.acquired_at <= self._complete_at + 2 * claim.budget:
                return
            self._begin_cohort()
        is_full = in_use >= self.limit
        self._running[claim] = is_full
        self._full += is_full
        self._complete_at = claim.acquired_at

    def refused(self) -> None:
        """Record that the pool refused a caller for overload."""
        self._refused += 1

    def end(self, claim: Check, held: float, now: float) -> bool:
        """
        Record that *claim* gave its lease back after *held* seconds.

        Returns:
            Whether the limit has changed.
        """
        if claim not in self._running:
            return False
        was_full = self._running.pop(claim)
        if claim.answered and now <= claim.due:
            self._answered += 1
        elif claim.unanswered or claim.answered:
            self._lost += 1
        else:
            # Cancelled, or lost with its connection.
            self._full -= was_full
            return False
        self._held += held
        self._ratios.append(held / claim.budget)
        # The last few calls may hang.
        if not self._is_complete() or len(self._ratios) < ENDED * self._begun:
            return False
        return self._decide(claim.budget, now)

    def wait(self, last_end: float, call: float, budget: float, now: float) -> bool:
        """
        Act on calls that do not end while callers wait.

        Args:
            last_end: When the last lease came back, or when the queue began.
            call: The usual time of a call, in seconds.
            budget: The smallest budget of the callers, in seconds.
            now: The time.

        Returns:
            Whether the limit has changed.
        """
        if self.limit == self._capacity:
            return False
        patience = max(min(SHARE * budget, LONGEST_WAIT), STUCK * call)
        if now - max(last_end, self._raised_at) > patience:
            # No call ends, so the limit cannot make any quicker.
            self._raised_at = now
            self._before = None
            self._raise(2 * self.limit, "trial")
            return self._changed()
        if self.grows and self._is_complete() and now > self._complete_at + patience:
            return self._decide(budget, now)
        return False

    def stalled(self) -> None:
        """Forget the calls under way: the event loop was late, not the server."""
        self._begin_cohort()

    def restart(self) -> None:
        """Begin as at first, if the limit is lower: the server may be another one."""
        self.limit = max(self.limit, self._first)
        self._before = None
        self._recovering = False
        self._strikes = 0
        self._begin_again()

    def resize(self, connections: int, capacity: int) -> None:
        """Take the new limits of the pool."""
        self._capacity = capacity
        self._first = min(capacity, max(connections, START))
        self.limit = min(max(self.limit, self._first), capacity)
        self._before = None
        self._begin_again()

    def _begin_again(self) -> None:
        if self.limit == self._capacity:
            self.reason, self.grows = "capacity", False
        elif self.limit == self._first or self.reason == "capacity":
            self.reason, self.grows = "start", True
        self._begin_cohort()

    def _begin_cohort(self) -> None:
        self._size = min(max(2 * self.limit, SMALLEST_COHORT), LARGEST_COHORT)
        self._answered = self._lost = self._refused = self._full = 0
        self._held = 0.0
        self._ratios: list[float] = []
        # The calls that have not ended, and whether the pool was full when they began.
        self._running: dict[Check, bool] = {}

    @property
    def _begun(self) -> int:
        return len(self._running) + len(self._ratios)

    def _is_complete(self) -> bool:
        return self._begun >= self._size

    def _changed(self) -> bool:
        if self.limit == self._capacity:
            self.reason, self.grows = "capacity", False
        self._begin_cohort()
        return True

    # -- the decision -----------------------------------------------------------

    def _decide(self, budget: float, now: float) -> bool:
        before = self.limit
        self._judge(budget, now)
        if self.limit != before:
            return self._changed()
        self._begin_cohort()
        return False

    def _judge(self, budget: float, now: float) -> None:
        begun = self._begun
        # The calls that have not ended count with their time so far.
        running = [(now - claim.acquired_at) / budget for claim in self._running]
        ratios = sorted([*self._ratios, *running])
        median = ratios[begun // 2]
        lost = self._lost / begun
        full = 2 * self._full >= begun
        refused = self._refused / (self._refused + begun)
        rate = self.limit * self._answered / self._held if self._held else 0.0
        base = self._least(median, lost, now)
        target = min(SHARE, KAPPA * base + FLOOR / budget)
        if now < self._tolerance.until:
            target = max(target, self._tolerated)
        self.grows &= median < QUICK * target and lost < LOST
        before, self._before = self._before, None
        if before is not None and full and self._is_useless(before, rate):
            self._undo(before, median, now)
        elif lost > LOST:
            self._recovering = True
            half = self.limit / 2
            # Without any answer, the server may be frozen and not overloaded.
            fitting = rate * target * budget if self._answered else half
            self._cut(min(half, fitting), rate, "lost")
        elif self._recovering and median <= 1.5 * base:
            self._raise(2 * self.limit, "quick")
        elif median > target:
            self._recovering = False
            self._strikes += 1
            pressed = (
                refused >= 0.1 or lost > 0.05 or (median > 2 * base and median > 0.4)
            )
            if pressed and (self._strikes >= 2 or median > 2 * target):
                share = min(max(target / median, 0.5), 0.7)
                self._cut(self.limit * share, rate, "slow")
        elif full and median < QUICK * target:
            self._strikes = 0
            quick = median < 1.3 * base or median < target / 2
            self._raise(2 * self.limit if quick else 1.1 * self.limit + 1, "quick")
        else:
            self._strikes = 0
            if full and median <= 1.5 * base and now >= self._hold.until:
                self._before, self._kind = (self.limit, rate), "trial"
                self._raise(2 * self.limit, "trial")

    def _least(self, median: float, lost: float, now: float) -> float:
        """Return the shortest usual time of the last minute, as share of the budget."""
        # Smoothed, because the least of many noisy medians is half of the true one.
        if lost < 0.1:
            last = median if self._usual is None else self._usual
            self._usual = last + SMOOTHING * (median - last)
            self._base.append((now, self._usual))
        while len(self._base) > 1 and self._base[0][0] < now - MEMORY:
            self._base.popleft()
        return min((value for _, value in self._base), default=median)

    def _is_useless(self, before: tuple[int, float], rate: float) -> bool:
        limit, earlier = before
        ratio = self.limit / limit
        if self._kind == "cut":
            return rate < earlier * math.pow(ratio, UNDO)
        return rate <= earlier * math.pow(ratio, GAIN)

    def _undo(self, before: tuple[int, float], median: float, now: float) -> None:
        if self._kind == "cut":
            self._tolerance.begin(now)
            self._tolerated = 1.2 * median
            # Fewer calls at once were not quicker. So this is the time of the server
            # itself now, whatever it was before.
            self._usual = median
            self._base = deque([(now, median)])
        else:
            self._hold.begin(now)
        self._strikes = 0
        self.limit, self.reason = before[0], "undone"

    def _cut(self, limit: float, rate: float, reason: LimitReason) -> None:
        self._strikes = 0
        if self.limit == 1:
            return
        self._before, self._kind = (self.limit, rate), "cut"
        self.limit, self.reason = max(1, int(limit)), reason

    def _raise(self, limit: float, reason: LimitReason) -> None:
        raised = min(int(limit), self._capacity)
        if raised > self.limit:
            self.limit, self.reason = raised, reason
        else:
            self._before = None
