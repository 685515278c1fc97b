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

    from fastapi_topaz._pool.open_pool import OpenPool
    from fastapi_topaz._pool.pool import Pool
    from fastapi_topaz._pool.state.slot import Slot


__all__ = ["is_ready"]


RECENT = 1.0
"""Seconds. An answer that is younger is not asked for again."""


async def is_ready(pool: Pool[Any], timeout: float) -> bool:
    """
    Say whether the server answers within *timeout* seconds.

    Raises:
        PoolError: No connection can be had; see `ConnectionPool.acquire`.
    """
    open_pool = pool._first_use()  # noqa: SLF001
    open_pool.adopted = True
    # Also if another connection fails a moment after the answer.
    answered = partial(_is_answered, open_pool, open_pool.answered_probes)
    if answered():
        return True
    with open_pool.clock.deadline(open_pool.now() + timeout):
        failures = open_pool.state.failures
        # Without it many callers at once would have many connections made.
        async with open_pool.readiness:
            # Else the caller who held it before asked, and got no answer.
            if open_pool.state.failures == failures:
                await _ask(pool, open_pool, timeout, answered)
    if answered():
        return True
    state = open_pool.state
    if state.connecting or any(slot.probing for slot in state.open):
        state.failed()  # the server was asked, and did not answer in time
    return False


async def _ask(
    pool: Pool[Any],
    open_pool: OpenPool,
    timeout: float,
    answered: Callable[[], bool],
) -> None:
    """
    Return after an answer, or if no connection is left to ask.

    Raises:
        PoolError: No connection can be leased.
    """
    state = open_pool.state
    asked: set[Slot] = set()
    while not (state.shut or answered()):
        slot = state.newest_proof(asked, open_pool.now())
        open_pool.after_change()  # some may be lost
        if slot is not None:
            asked.add(slot)
            await _probe(open_pool, slot, answered)
        else:
            try:
                # A lease makes no call. But the pool connects for a caller who waits
                # for one sooner than for others, and tells that caller of an outage.
                async with pool.acquire(timeout=timeout) as conn:
                    slot = conn._held().slot  # noqa: SLF001
            except PoolTimeout:
                return  # a call may have been answered meanwhile
            if slot in asked:
                return  # it may be leased, but its probe was not answered


async def _probe(open_pool: OpenPool, slot: Slot, answered: Callable[[], bool]) -> None:
    """Have the pool probe *slot*, and return after that or after any other answer."""
    queue = open_pool.state.to_probe
    if not slot.probing and slot not in queue:
        queue.append(slot)
        open_pool.after_change()
    while (slot.probing or slot in queue) and not answered():
        await open_pool.progress.wait()


def _is_answered(open_pool: OpenPool, probes: int) -> bool:
    """
    Say whether more than so many *probes* were answered, or an answer is new enough.

    That is newer than any failure, and less than a second old.
    """
    state, now = open_pool.state, open_pool.now()
    if state.shut or open_pool.answered_probes > probes:
        return not state.shut
    return any(
        slot.answered is True and now - slot.proven_at < RECENT and not slot.is_gone()
        for slot in state.open
    )
