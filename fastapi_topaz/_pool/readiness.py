"""
Whether a pool gets answers now: what `TopazConfig.is_ready()` asks.

The question never makes a call of its own. It has the pool probe a connection, or make
one, and waits. So many callers at once cost one probe, a probe outlives the caller who
asked for it, and its consequences are those of every probe.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi_topaz.exceptions import PoolTimeout


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._pool.open_pool import Runtime
    from fastapi_topaz._pool.pool import Pool
    from fastapi_topaz._pool.state.entry import PoolEntry


__all__ = ["is_ready"]


RECENT = 1.0
"""Seconds. An answer that is younger is not asked for again."""


async def is_ready(pool: Pool[Any], timeout: float) -> bool:
    """
    Say whether the server answers within *timeout* seconds.

    Raises:
        PoolError: No connection can be had; see `ConnectionPool.acquire`.
    """
    runtime = pool._first_use()  # noqa: SLF001
    runtime.adopted = True
    # Also if another connection fails a moment after the answer.
    answered = partial(_is_answered, runtime, runtime.answered_probes)
    if answered():
        return True
    with runtime.clock.deadline(runtime.now() + timeout):
        failures = runtime.state.failures
        # Without it many callers at once would have many connections made.
        async with runtime.readiness:
            # Else the caller who held it before asked, and got no answer.
            if runtime.state.failures == failures:
                await _ask(pool, runtime, timeout, answered)
    if answered():
        return True
    state = runtime.state
    if state.connecting or any(entry.probing for entry in state.open):
        state.failed()  # the server was asked, and did not answer in time
    return False


async def _ask(
    pool: Pool[Any],
    runtime: Runtime,
    timeout: float,
    answered: Callable[[], bool],
) -> None:
    """
    Return after an answer, or if no connection is left to ask.

    Raises:
        PoolError: No connection can be leased.
    """
    state = runtime.state
    asked: set[PoolEntry] = set()
    while not (state.shut or answered()):
        entry = state.newest_proof(asked, runtime.now())
        runtime.settle()  # some may be lost
        if entry is not None:
            asked.add(entry)
            await _probe(runtime, entry, answered)
        else:
            try:
                # A lease makes no call. But the pool connects for a caller who waits
                # for one sooner than for others, and tells that caller of an outage.
                async with pool.acquire(timeout=timeout) as conn:
                    entry = conn._held().entry  # noqa: SLF001
            except PoolTimeout:
                return  # a call may have been answered meanwhile
            if entry in asked:
                return  # it may be leased, but its probe was not answered


async def _probe(
    runtime: Runtime, entry: PoolEntry, answered: Callable[[], bool]
) -> None:
    """Have the pool probe *entry*, and return after that or after any other answer."""
    queue = runtime.state.to_probe
    if not entry.probing and entry not in queue:
        queue.append(entry)
        runtime.settle()
    while (entry.probing or entry in queue) and not answered():
        await runtime.progress.wait()


def _is_answered(runtime: Runtime, probes: int) -> bool:
    """
    Say whether more than so many *probes* were answered, or an answer is new enough.

    That is newer than any failure, and less than a second old.
    """
    state, now = runtime.state, runtime.now()
    if state.shut or runtime.answered_probes > probes:
        return not state.shut
    return any(
        entry.answered is True
        and now - entry.proven_at < RECENT
        and not entry.is_gone()
        for entry in state.open
    )
