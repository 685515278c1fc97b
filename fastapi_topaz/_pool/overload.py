"""
What an open pool does about overload: it refuses early, and limits what is in flight.

`Admission` decides which checks may wait, `AdaptiveLimit` how many may be in flight.
This module connects both to the pool. Explicit leases have no budget. They count in the
averages, but they are neither refused nor limited, and take no room from the checks: up
to the capacity of the pool, each explicit lease raises the limit by one. The limit is
raised when a caller finds no room.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import anyio

from fastapi_topaz._pool.state.admission import Admission, Load
from fastapi_topaz._pool.state.limit import AdaptiveLimit
from fastapi_topaz._pool.state.slot import Check


if TYPE_CHECKING:
    from fastapi_topaz._pool.state.pool_state import PoolState
    from fastapi_topaz._pool.state.slot import Claim
    from fastapi_topaz._pool.state.status import PoolCounters


__all__ = ["Overload"]


logger = logging.getLogger("fastapi_topaz.pool")

LATE = 0.1
"""The share of a budget by which the event loop may be late."""


class Overload:
    """
    The overload control of one open pool.

    Strictly private.

    Args:
        label: The name of the pool in messages.
        state: Its state. This class sets the limit there.
        counters: Its counters.

    Attributes:
        capacity: The most leases at once.
        checks: The checks that have a lease or wait. The pool counts them here.
        counted: The explicit leases for which the limit makes room.
    """

    __slots__ = (
        *("_counters", "_ended_at", "_label", "_state"),
        *("adaptive", "admission", "capacity", "checks", "counted", "queued"),
    )

    def __init__(self, label: str, state: PoolState, counters: PoolCounters) -> None:
        options = state.options
        self._label = label
        self._state = state
        self._counters = counters
        # When the last check ended.
        self._ended_at = float("-inf")
        self.capacity = options.capacity
        self.checks = self.counted = 0
        self.admission = Admission()
        self.adaptive: AdaptiveLimit | None = None
        if options.adaptive_limit:
            self.adaptive = AdaptiveLimit(options.max_connections, options.capacity)
            self._publish(0)
        # Set if a check waits. The watcher of the event loop replaces it.
        self.queued = anyio.Event()

    @property
    def explicit(self) -> int:
        """The explicit leases that are out or wait: all claims that are no checks."""
        # Not counted, because each explicit lease would cost more. While a claim joins
        # or leaves, the number is one too low or too high, and nothing reads it.
        state = self._state
        return state.in_use + len(state.waiting) + state.dismissed - self.checks

    def admit(self, claim: Check, now: float) -> float | None:
        """Return None if the check of *claim* may wait, or the estimated wait."""
        left = claim.due - now
        wait = self.admission.refuses(self._load(), left, claim.budget, now)
        if wait is not None and self.adaptive is not None:
            self.adaptive.refused()
        self.queued.set()
        return wait

    def latest_start(self, claim: Check, latest: float) -> float:
        """
        Return the time from which the answer would be late: *claim* leaves the queue.

        The usual time of a call varies. So the result is not before *latest*, the
        deadline of the callers before it. Otherwise many callers would need a timer of
        their own.
        """
        return max(claim.due - self.admission.call, min(latest, claim.due))

    def begin(self, claim: Check) -> None:
        """Record that the check of *claim* has its lease."""
        if self.adaptive is not None:
            self.adaptive.begin(claim, self._state.in_use - self.explicit)

    def joined(self, claim: Claim) -> bool:
        """Count *claim*, which found nothing free; return whether the limit changed."""
        if isinstance(claim, Check):
            self.checks += 1
        # One more, because *claim* is not in the queue yet.
        return self._state.limit < self.capacity and self._make_room(self.explicit + 1)

    def left(self, claim: Claim) -> None:
        """Forget *claim*, which was not served."""
        if isinstance(claim, Check):
            self.checks -= 1
        else:
            self._make_room(self.explicit)

    def _make_room(self, explicit: int) -> bool:
        if self.counted == explicit:
            return False
        before = self._state.limit
        self._publish(explicit)
        return self._state.limit != before

    def shrink(self) -> bool:
        """
        Take back the room of explicit leases that have ended.

        Returns:
            Whether the limit changed.
        """
        explicit = self.explicit
        return self.counted > explicit and self._make_room(explicit)

    def end(self, claim: Check, held: float, now: float) -> bool:
        """Record the end of a check; return whether the limit was changed."""
        self.checks -= 1
        if claim.answered and now <= claim.due:
            self.admission.calls.append((now, held))
        self._ended_at = now
        adaptive = self.adaptive
        if adaptive is None:
            return False
        before = adaptive.limit
        return adaptive.end(claim, held, now) and self._changed(adaptive, before)

    def look(self, late: float, now: float) -> bool:
        """
        Look at the calls while checks wait; return whether the limit was changed.

        *late* is the number of seconds by which this comes too late: the event loop was
        busy.
        """
        state, adaptive = self._state, self.adaptive
        admission = self.admission
        if adaptive is None or state.in_use < state.limit:
            return False
        if late > LATE * admission.least_budget:
            adaptive.stalled()
            return False
        before = adaptive.limit
        # Explicit leases that come back say nothing about the checks.
        idle_since = max(self._ended_at, admission.stands_since)
        changed = adaptive.wait(idle_since, admission.call, admission.least_budget, now)
        return changed and self._changed(adaptive, before)

    def _changed(self, adaptive: AdaptiveLimit, before: int) -> bool:
        self._counters.count(self._counters.limit_changes, adaptive.reason)
        logger.debug(
            "%s: its limit of leases is %d now, and was %d: %s (%s)",
            *(self._label, adaptive.limit, before, adaptive.reason),
            self._state.status(),
        )
        self._publish(self.explicit)
        return True

    def connected(self) -> None:
        """
        Record a new connection. If it is the only one, the past says nothing.

        The caller applies the new limit, if any.
        """
        state = self._state
        if sum(slot.retired is None for slot in state.open) == 1:
            self.admission.forget()
            if self.adaptive is not None:
                self.adaptive.restart()
                self._publish(self.explicit)

    def resize(self) -> None:
        """Take the changed options of the state."""
        options = self._state.options
        self.capacity = options.capacity
        if self.adaptive is not None:
            self.adaptive.resize(options.max_connections, options.capacity)
        self._publish(self.explicit)

    def estimated_wait(self, now: float) -> float:
        """Return the seconds that a check would wait now. Thread-safe."""
        state = self._state
        if not state.waiting and state.in_use < state.limit:
            return 0.0
        return self.admission.wait(self._load(), now)

    def _load(self) -> Load:
        state = self._state
        limit = state.limit
        if self.adaptive is not None and self.adaptive.grows:
            limit = min(2 * limit, self.capacity)  # as it will be after this cohort
        if state.attempts.failures or state.outage.declared:
            # The pool has fewer connections than it wants. While nothing fails, the
            # missing ones are being opened.
            limit = max(1, min(state.in_use, limit))
        return Load(len(state.waiting), state.in_use, limit)

    def _publish(self, explicit: int) -> None:
        state, adaptive = self._state, self.adaptive
        if adaptive is None:
            state.limit = self.capacity
        else:
            self.counted = explicit
            state.limit = min(self.capacity, adaptive.limit + self.counted)
            state.limit_reason = adaptive.reason
