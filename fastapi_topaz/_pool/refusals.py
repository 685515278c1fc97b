"""The errors of callers who get no lease: what happened, where, with which counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from fastapi_topaz.exceptions import (
    ConnectFailed,
    PoolClosed,
    PoolError,
    PoolMisuse,
    PoolSaturated,
    PoolTimeout,
)


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._pool.state.pool_state import PoolState
    from fastapi_topaz._pool.state.slot import Claim


__all__ = ["Refusals"]


@attrs.frozen
class Refusals:
    """
    Makes the errors of callers who get no lease from one open pool.

    Args:
        label: What the pool is called in messages.
        target: Where it leads.
        state: Its state.
        nested_leases: Returns how many leases are held by callers who wait for
            another one, and how many are out.
    """

    label: str
    target: str
    state: PoolState
    nested_leases: Callable[[], tuple[int, int]]

    def check_saturation(self, allowed: int) -> None:
        """
        Return if one more may wait: fewer than *allowed* callers wait for capacity.

        Raises:
            PoolSaturated: `max_waiting` callers wait for capacity already.
        """
        state = self.state
        # The first callers in the queue wait for a connection, not for capacity. The
        # number of tokens does not show how many these are, because a dismissed caller
        # keeps its token until its task has run.
        entitled = max(0, state.limit - state.in_use)
        if len(state.waiting) - entitled >= allowed:
            raise PoolSaturated(
                f"{self.label} is saturated: {allowed} callers (max_waiting) already "
                f"wait for {self.target} ({state.status()})"
            )

    def overloaded(self, wait: float, left: float) -> PoolSaturated:
        """
        Return the error of a check that would not get its answer in time.

        Args:
            wait: The estimate of its wait, in seconds.
            left: The seconds within which it needs its answer.
        """
        state = self.state
        return PoolSaturated(
            f"{self.label} is overloaded: about {_seconds(wait)} s of queue for "
            f"{self.target}, {_seconds(left)} s of budget (limit={state.limit} "
            f"{state.status()})",
            retry_after=max(0.0, wait - left),
        )

    def timed_out(self, timeout: float) -> PoolTimeout:
        """Return the error of a caller who has waited for *timeout* seconds."""
        state = self.state
        cause = state.error
        nested, leases = self.nested_leases()
        if cause is not None and cause is state.attempts.error:
            hint = f"; the last attempt to connect failed: {cause}"
        elif cause is not None:
            hint = f"; {cause}"
        elif nested:
            hint = (
                f"; all {leases} leases are out, and {nested} of them are held by "
                "tasks that wait for another one (nested leases): release the "
                "lease before the next acquire() or is_allowed(), or make the call on "
                "the lease that you hold"
            )
        elif state.limit <= state.in_use < state.options.capacity:
            hint = (
                f"; all {state.limit} leases are out that the server can answer in "
                f"time (adaptive_limit, reason {state.limit_reason})"
            )
        elif state.in_use >= state.options.capacity:
            hint = (
                f"; all {state.in_use} leases are out: raise max_connections or "
                "streams_per_connection, do not acquire a lease while you hold one, or "
                "look for leaks with leak_threshold"
            )
        else:
            hint = ""
        error = PoolTimeout(
            f"{self.label}: no connection to {self.target} became available within "
            f"{timeout:g} s ({state.status()}){hint}"
        )
        error.__cause__ = cause
        return error

    def not_served(self, claim: Claim, began: float) -> PoolError:
        """Return the error of *claim*, whose wait began at *began* and has ended."""
        if claim.failure is not None:
            return self.failed(claim.failure)
        return self.timed_out(claim.deadline - began)

    def failed(self, failure: Exception) -> PoolError:
        """Return the error for one waiting caller. *failure* ended the wait of many."""
        counts = f"({self.state.status()})"
        if isinstance(failure.__cause__, PoolMisuse):
            misuse = PoolMisuse(f"{self.label}: {failure.__cause__}")
            misuse.__cause__ = failure
            return misuse
        if isinstance(failure, PoolClosed):
            return PoolClosed(f"{failure} {counts}")
        # A new exception for each caller. Otherwise they would share one traceback.
        error = ConnectFailed(
            f"{self.label}: {failure} {counts}",
            reason=getattr(failure, "reason", "other"),
            permanent=getattr(failure, "permanent", False),
        )
        error.__cause__ = failure
        return error


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 0.1 else f"{value:.2g}"
