"""
Checks whether the server answers a pool now, for `TopazConfig.is_ready()`.

The check makes no call itself. It asks the pool to probe a connection or to make one,
and waits for the result. So many callers at once share one probe. If the caller is
cancelled, the probe continues. Its result has the same effects as any other probe's.
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
"""Seconds. If the last answer is younger than this, no new probe is made."""


async def is_ready(pool: Pool[Any], timeout: float) -> bool:
    """
    Return whether the server answers within *timeout* seconds.

    Raises:
        PoolError: No connection is available; see `ConnectionPool.acquire`.
    """
    open_pool = pool._first_use()  # noqa: SLF001
    open_pool.adopted = True
    # Any answered probe since now counts, even if another connection fails right after
    # it. So the number of answered probes is compared, not only the newest result.
    answered = partial(_is_answered, open_pool, open_pool.answered_probes)
    if answered():
        return True
    with open_pool.clock.deadline(open_pool.now() + timeout):
        failures = open_pool.state.failures
        # One caller at a time asks. Without the lock, many callers at once would make
        # the pool open many connections.
        async with open_pool.readiness:
            # If a failure was counted meanwhile, the caller who held the lock before
            # has asked and got no answer.
            if open_pool.state.failures == failures:
                await _ask(pool, open_pool, timeout, answered)
    if answered():
        return True
    state = open_pool.state
    if state.connecting or any(slot.probing for slot in state.open):
        state.failed()  # a probe or attempt is under way, and no answer came in time
    return False


async def _ask(
    pool: Pool[Any],
    open_pool: OpenPool,
    timeout: float,
    answered: Callable[[], bool],
) -> None:
    """
    Probe connections until one answers, or until none is left to probe.

    Raises:
        PoolError: No connection can be leased.
    """
    state = open_pool.state
    asked: set[Slot] = set()
    while not (state.shut or answered()):
        slot = state.newest_proof(asked, open_pool.now())
        open_pool.after_change()  # newest_proof() may have retired lost connections
        if slot is not None:
            asked.add(slot)
            await _probe(open_pool, slot, answered)
        else:
            try:
                # The lease makes no call. But while a caller waits, the pool connects
                # after shorter pauses, and in an outage it raises the cause here.
                async with pool.acquire(timeout=timeout) as conn:
                    slot = conn._held().slot  # noqa: SLF001
            except PoolTimeout:
                return  # the caller looks for an answer that came meanwhile
            if slot in asked:
                return  # the pool leases it, but it did not answer its probe


async def _probe(open_pool: OpenPool, slot: Slot, answered: Callable[[], bool]) -> None:
    """Have the pool probe *slot*; return after the probe or after any other answer."""
    queue = open_pool.state.to_probe
    if not slot.probing and slot not in queue:
        queue.append(slot)
        open_pool.after_change()
    while (slot.probing or slot in queue) and not answered():
        await open_pool.progress.wait()


def _is_answered(open_pool: OpenPool, probes: int) -> bool:
    """
    Return whether more than *probes* probes were answered, or an answer is recent.

    A recent answer is newer than any failure, and younger than `RECENT` seconds.
    """
    state, now = open_pool.state, open_pool.now()
    if state.shut or open_pool.answered_probes > probes:
        return not state.shut
    return any(
        slot.answered is True and now - slot.proven_at < RECENT and not slot.is_gone()
        for slot in state.open
    )
