"""
The host task of a pool, and the loops in it that keep the pool in shape.

The host runs from the first use of the pool to the end of `close()`, and opens and
closes the only task group there is. In it live the loops, every attempt to connect
and every closing of a connection. The loops are plain functions over a runtime: each
waits for its time or its event, makes one change of the state, and settles what
follows.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import anyio

from fastapi_topaz import _connections


if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyio.abc import TaskGroup

    from fastapi_topaz._entry import PoolEntry
    from fastapi_topaz._runtime import Runtime
    from fastapi_topaz._state import PoolState


__all__ = ["host"]


logger = logging.getLogger("fastapi_topaz.pool")

PROBES_AT_ONCE = 4
"""A round of health checks must not be a burst."""


async def host(runtime: Runtime) -> None:
    """Do the work of a pool until it is closed, and leave nothing behind."""
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_opener, runtime, tasks)
            tasks.start_soon(_reaper, runtime)
            tasks.start_soon(_rotator, runtime)
            tasks.start_soon(_health_checker, runtime, tasks)
            tasks.start_soon(_prober, runtime, tasks)
            if 0 < runtime.options.leak_threshold < math.inf:
                tasks.start_soon(_leak_watcher, runtime)
            await runtime.until_closed()
            runtime.state.abandon()
            for entry in _outbox(runtime.state):
                tasks.start_soon(_connections.close, runtime, entry)
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        _, failures = group.split(anyio.get_cancelled_exc_class())
        if failures is None:
            raise
        # A bug, and the pool is as good as closed; the next use opens it anew. It may
        # not leave this task: on trio that would end the whole run.
        logger.critical("%s: its host task failed", runtime.label, exc_info=failures)
    finally:
        await _leave_nothing(runtime)


async def _leave_nothing(runtime: Runtime) -> None:
    # Something is left only if the loop ends under an open pool: then the tasks that
    # would have closed these connections are cancelled with it.
    state = runtime.state
    runtime.begin_close(0)
    state.abandon()
    with anyio.CancelScope(shield=True):
        async with anyio.create_task_group() as closings:
            for entry in state.closing:
                closings.start_soon(_connections.close, runtime, entry)
    if state.in_use:
        leases = "a lease" if state.in_use == 1 else f"{state.in_use} leases"
        logger.warning("%s: closed with %s still out", runtime.label, leases)
    runtime.done.set()


def _outbox(state: PoolState) -> Iterator[PoolEntry]:
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


async def _opener(runtime: Runtime, tasks: TaskGroup) -> None:
    """Start what the state asks for: attempts to connect, and closings."""
    state = runtime.state
    while True:
        runtime.work = anyio.Event()
        for entry in _outbox(state):
            tasks.start_soon(_connections.close, runtime, entry)
        now = runtime.now()
        for _ in range(state.shortfall(runtime.limiter.borrowed_tokens, now)):
            tasks.start_soon(_connections.connect, runtime, state.begin_connect(now))
        backing_off = state.failures and state.retry_at > now
        with anyio.CancelScope(deadline=state.retry_at if backing_off else math.inf):
            await runtime.work.wait()


async def _reaper(runtime: Runtime) -> None:
    """Every `idle_check_interval` close what was idle for `max_idle_time`."""
    while True:
        await _pause(runtime.options.idle_check_interval)
        runtime.state.reap(runtime.now())
        runtime.settle()


async def _rotator(runtime: Runtime) -> None:
    """Have connections replaced that have outlived `max_lifetime`."""
    while True:
        with anyio.CancelScope(deadline=runtime.state.next_expiry()):
            await runtime.progress.wait()
        runtime.state.expire(runtime.now())
        runtime.settle()


async def _health_checker(runtime: Runtime, tasks: TaskGroup) -> None:
    """Every `health_check_interval` probe what has proved nothing since."""
    places = anyio.Semaphore(PROBES_AT_ONCE)

    async def probe(entry: PoolEntry) -> None:
        async with places:
            await _connections.probe(runtime, entry)

    last_round = runtime.now()
    while True:
        await _pause(runtime.options.health_check_interval)
        for entry in runtime.state.open:
            if entry.proven_at <= last_round:
                tasks.start_soon(probe, entry)
        last_round = runtime.now()


async def _prober(runtime: Runtime, tasks: TaskGroup) -> None:
    """Probe suspects at once, each for itself: one may hang, another one be needed."""
    while True:
        await runtime.suspicion.wait()
        runtime.suspicion = anyio.Event()
        for entry in runtime.state.open:
            if entry.suspect:
                tasks.start_soon(_connections.probe, runtime, entry)


async def _leak_watcher(runtime: Runtime) -> None:
    """Warn of each lease that is held for longer than `leak_threshold`."""
    threshold = runtime.options.leak_threshold
    while True:
        now = runtime.now()
        for lease in runtime.leases:
            if lease.acquired_at + threshold <= now and not lease.warned:
                lease.warned = True
                logger.warning(
                    "%s: a lease is out for %.1f s (leak_threshold=%g s), held by %s",
                    runtime.label,
                    now - lease.acquired_at,
                    threshold,
                    lease.holder,
                )
        fresh = (x.acquired_at for x in runtime.leases if not x.warned)
        # No lease taken from now on can be due any earlier.
        await anyio.sleep_until(next(fresh, now) + threshold)
