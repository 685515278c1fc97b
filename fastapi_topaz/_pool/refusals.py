"""What those are told who get no lease: what happened, where, with which counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi_topaz.exceptions import (
    ConnectFailed,
    PoolClosed,
    PoolError,
    PoolMisuse,
    PoolSaturated,
    PoolTimeout,
)


if TYPE_CHECKING:
    from fastapi_topaz._pool.open_pool import Runtime


__all__ = ["check_saturation", "failed", "timed_out"]


def check_saturation(runtime: Runtime) -> None:
    """
    Return if one more may wait.

    Raises:
        PoolSaturated: `max_waiting` callers wait for capacity already.
    """
    allowed = runtime.options.max_waiting
    if allowed is None:
        return
    state = runtime.state
    # The first callers in the queue wait for a connection, not for capacity. Tokens do
    # not show how many: a dismissed caller holds one until its task has run.
    entitled = max(0, runtime.options.capacity - state.in_use)
    if len(state.waiting) - entitled >= allowed:
        runtime.counters.rejected += 1
        raise PoolSaturated(
            f"{runtime.label} is saturated: max_waiting={allowed} callers wait for "
            f"{runtime.target} already ({state.status()})"
        )


def timed_out(runtime: Runtime, timeout: float) -> PoolTimeout:
    """Return the error of a caller who has waited for *timeout* seconds."""
    runtime.counters.timeouts += 1
    state = runtime.state
    cause = state.error
    nested, leases = runtime.nested_leases()
    if cause is not None and cause is state.attempts.error:
        hint = f"; the last attempt to connect failed: {cause}"
    elif cause is not None:
        hint = f"; {cause}"
    elif nested:
        hint = (
            f"; all {leases} leases are out, and {nested} of them are held by tasks "
            "that wait for another one (nested leases): give a lease back before the "
            "next acquire() or is_allowed(), or make the calls on the lease itself"
        )
    elif state.in_use >= runtime.options.capacity:
        hint = (
            f"; all {state.in_use} leases are out: raise max_connections or "
            "streams_per_connection, acquire none while you hold one, or look for "
            "leaks with leak_threshold"
        )
    else:
        hint = ""
    error = PoolTimeout(
        f"{runtime.label}: no connection to {runtime.target} became available within "
        f"{timeout:g} s ({state.status()}){hint}"
    )
    error.__cause__ = cause
    return error


def failed(runtime: Runtime, failure: Exception) -> PoolError:
    """Return the error of a caller who waited until *failure*, which hit many."""
    counts = f"({runtime.state.status()})"
    if isinstance(failure.__cause__, PoolMisuse):
        runtime.counters.failed += 1
        misuse = PoolMisuse(f"{runtime.label}: {failure.__cause__}")
        misuse.__cause__ = failure
        return misuse
    if isinstance(failure, PoolClosed):
        runtime.counters.closed += 1
        return PoolClosed(f"{failure} {counts}")
    runtime.counters.failed += 1
    # A new exception for each caller: they would share one traceback.
    error = ConnectFailed(
        f"{runtime.label}: {failure} {counts}",
        reason=getattr(failure, "reason", "other"),
        permanent=getattr(failure, "permanent", False),
    )
    error.__cause__ = failure
    return error
