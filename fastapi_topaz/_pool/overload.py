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
        explicit: The explicit leases that are out or wait. The pool counts them here.
        counted: Those for which the limit makes room.
    """

    __slots__ = (
        *("_counters", "_ended_at", "_label", "_state"),
        *("adaptive", "admission", "counted", "explicit", "queued"),
    )

    def __init__(self, label: str, state: PoolState, counters: PoolCounters) -> None:
        options = state.options
        self._label = label
        self._state = state
        self._counters = counters
        # When the last check ended.
        self._ended_at = float("-inf")
        self.explicit = self.counted = 0
        self.admission = Admission()
        self.adaptive: AdaptiveLimit | None = None
        if options.adaptive_limit:
            self.adaptive = AdaptiveLimit(options.max_connections, options.capacity)
            self._publish()
        # Set if a check waits. The watcher of the event loop replaces it.
        self.queued = anyio.Event()

    def admit(self, claim: Claim, now: float) -> float | None:
        """Return None if the check of *claim* may wait, or the estimated wait."""
        left = claim.due - now
        wait = self.admission.refuses(self._load(), left, claim.budget, now)
        if wait is not None and self.adaptive is not None:
            self.adaptive.refused()
        self.queued.set()
        return wait

    def latest_start(self, claim: Claim, latest: float) -> float:
        """
        Return the time from which the answer would be late: *claim* leaves the queue.

        The usual time of a call varies. So the result is not before *latest*, the
        deadline of the callers before it. Otherwise many callers would need a timer of
        their own.
        """
        return max(claim.due - self.admission.call, min(latest, claim.due))

    def begin(self, claim: Claim) -> None:
        """Record that the check of *claim* has its lease."""
        if self.adaptive is not None:
            self.adaptive.begin(claim, self._state.in_use - self.explicit)

    def make_room(self) -> bool:
        """Make room for the explicit leases; return whether the limit changed."""
        if self.counted == self.explicit:
            return False
        before = self._state.limit
        self._publish()
        return self._state.limit != before

    def end(self, claim: Claim, held: float, now: float) -> bool:
        """Record the end of a check; return whether the limit was changed."""
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
        self._publish()
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
                self._publish()

    def resize(self) -> None:
        """Take the changed options of the state."""
        options = self._state.options
        if self.adaptive is not None:
            self.adaptive.resize(options.max_connections, options.capacity)
        self._publish()

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
            limit = min(2 * limit, self._capacity)  # as it will be after this cohort
        if state.attempts.failures or state.outage.declared:
            # The pool has fewer connections than it wants. While nothing fails, the
            # missing ones are being opened.
            limit = max(1, min(state.in_use, limit))
        return Load(len(state.waiting), state.in_use, limit)

    @property
    def _capacity(self) -> int:
        return self._state.options.capacity

    def _publish(self) -> None:
        state, adaptive = self._state, self.adaptive
        if adaptive is None:
            state.limit = self._capacity
        else:
            self.counted = self.explicit
            state.limit = min(self._capacity, adaptive.limit + self.counted)
            state.limit_reason = adaptive.reason
