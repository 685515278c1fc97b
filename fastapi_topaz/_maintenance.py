"""
The loops that keep a pool in shape, one task each in the host's task group.

Plain functions over a runtime: each waits for its time or its event, makes one
change of the state, and settles what follows.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import anyio

from fastapi_topaz import _connections


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from anyio.abc import TaskGroup

    from fastapi_topaz._entry import PoolEntry
    from fastapi_topaz._runtime import Runtime
    from fastapi_topaz._state import PoolState


__all__ = [
    "drain_outbox",
    "health_checker",
    "leak_watcher",
    "opener",
    "prober",
    "reaper",
    "rotator",
]


logger = logging.getLogger("fastapi_topaz.pool")

PROBES_AT_ONCE = 4
"""A round of health checks must not be a burst."""


def drain_outbox(state: PoolState) -> Iterator[PoolEntry]:
    """Yield the entries to close, and forget them."""
    while state.to_close:
        yield state.to_close.pop()


async def _pause(interval: float) -> None:
    """Sleep for *interval* seconds; 0 and infinity mean never to wake."""
    # Not sleep(inf): uvloop cannot set such a timer.
    if 0 < interval < math.inf:
        await anyio.sleep(interval)
    else:
        await anyio.sleep_forever()


async def opener(runtime: Runtime, tasks: TaskGroup) -> None:
    """Start what the state asks for: attempts to connect, and closings."""
    state = runtime.state
    while True:
        runtime.work = anyio.Event()
        for entry in drain_outbox(state):
            tasks.start_soon(_connections.close, runtime, entry)
        now = runtime.now()
        for _ in range(state.shortfall(runtime.limiter.borrowed_tokens, now)):
            tasks.start_soon(_connections.connect, runtime, state.begin_connect(now))
        backing_off = state.failures and state.retry_at > now
        with anyio.CancelScope(deadline=state.retry_at if backing_off else math.inf):
            await runtime.work.wait()


async def reaper(runtime: Runtime) -> None:
    """Every `idle_check_interval` close what was idle for `max_idle_time`."""
    while True:
        await _pause(runtime.options.idle_check_interval)
        runtime.state.reap(runtime.now())
        runtime.settle()


async def rotator(runtime: Runtime) -> None:
    """Have connections replaced that have outlived `max_lifetime`."""
    while True:
        with anyio.CancelScope(deadline=runtime.state.next_expiry()):
            await runtime.progress.wait()
        runtime.state.expire(runtime.now())
        runtime.settle()


async def health_checker(runtime: Runtime) -> None:
    """Every `health_check_interval` probe what has proved nothing since."""
    last_round = runtime.now()
    while True:
        await _pause(runtime.options.health_check_interval)
        unproven = [
            entry
            for entry in runtime.state.open
            if entry.proven_at <= last_round and not entry.suspect
        ]
        last_round = runtime.now()
        await _probe_all(runtime, unproven)


async def prober(runtime: Runtime) -> None:
    """Probe suspects at once."""
    while True:
        await runtime.suspicion.wait()
        runtime.suspicion = anyio.Event()
        await _probe_all(
            runtime, [entry for entry in runtime.state.open if entry.suspect]
        )


async def _probe_all(runtime: Runtime, entries: Iterable[PoolEntry]) -> None:
    places = anyio.Semaphore(PROBES_AT_ONCE)

    async def probe_one(entry: PoolEntry) -> None:
        async with places:
            await _connections.probe(runtime, entry)

    async with anyio.create_task_group() as probes:
        for entry in entries:
            probes.start_soon(probe_one, entry)


async def leak_watcher(runtime: Runtime) -> None:
    """Warn of each lease that is held for longer than `leak_threshold`."""
    threshold = runtime.options.leak_threshold
    while True:
        now = runtime.now()
        for lease in runtime.leases:
            held = now - lease.acquired_at
            if held >= threshold and not lease.warned:
                lease.warned = True
                logger.warning(
                    "%s: a lease is out for %.1f s (leak_threshold=%g s), held by %s",
                    runtime.label,
                    held,
                    threshold,
                    lease.holder,
                )
        fresh = (x.acquired_at for x in runtime.leases if not x.warned)
        # No lease taken from now on can be due any earlier.
        await _pause(next(fresh, now) + threshold - now)
