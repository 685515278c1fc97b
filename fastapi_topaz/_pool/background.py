"""
The host task of a pool, and the loops in it that keep the pool in shape.

The host runs from the first use of the pool to the end of `close()`, and opens and
closes the only task group there is. In it live the loops, every attempt to connect
and every closing of a connection. The loops are plain functions over a runtime: each
waits for its time or its event, makes one change of the state, and settles what
follows.
"""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from typing import TYPE_CHECKING

import anyio

from fastapi_topaz._pool import connections
from fastapi_topaz._pool.interrupts import protected
from fastapi_topaz._redaction import clear_frames


if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyio.abc import TaskGroup

    from fastapi_topaz._pool.leaks import Leaks
    from fastapi_topaz._pool.open_pool import Runtime
    from fastapi_topaz._pool.state.entry import PoolEntry
    from fastapi_topaz._pool.state.pool_state import PoolState


__all__ = ["close_now", "host"]


logger = logging.getLogger("fastapi_topaz.pool")

LOOKOUT = 1.0
"""Seconds. A pool that nobody uses shows within this time that its server is gone."""

PROBES_AT_ONCE = 4
"""A round of health checks must not be a burst."""


async def host(runtime: Runtime) -> None:
    """Do the work of a pool until it is closed, and leave nothing behind."""
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_opener, runtime, tasks)
            tasks.start_soon(_timekeeper, runtime)
            tasks.start_soon(_reaper, runtime)
            tasks.start_soon(_rotator, runtime)
            tasks.start_soon(_lookout, runtime)
            tasks.start_soon(_health_checker, runtime, tasks)
            tasks.start_soon(_prober, runtime, tasks)
            if runtime.leaks is not None:
                tasks.start_soon(_leak_watcher, runtime, runtime.leaks)
            await runtime.until_closed()
            runtime.state.abandon()
            for entry in _outbox(runtime.state.to_close):
                tasks.start_soon(connections.close, runtime, entry)
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        _, failures = group.split(anyio.get_cancelled_exc_class())
        # A bug, and the pool is as good as closed; the next use opens it anew. It may
        # not leave this task: on trio that would end the whole run.
        if failures is not None:
            clear_frames(failures)
        runtime.log_limit.report(
            logging.CRITICAL,
            "its host task failed",
            "%s: its host task failed",
            runtime.label,
            exc_info=failures,
        )
        runtime.begin_close(0)
    finally:
        await _leave_nothing(runtime)


async def _leave_nothing(runtime: Runtime) -> None:
    state = runtime.state
    if not state.shut:
        # The loop ends under an open pool: the tasks that would have closed these
        # connections were cancelled with it.
        _warn_unclosed(runtime)
    runtime.begin_close(0)
    state.abandon()
    with anyio.CancelScope(shield=True):
        async with anyio.create_task_group() as closings:
            for entry in state.closing:
                closings.start_soon(connections.close, runtime, entry)
    if state.in_use:
        logger.warning(
            "%s: closed with %s still out", runtime.label, _leases_out(runtime)
        )
    runtime.home.stop_watching()
    runtime.done.set()


def close_now(runtime: Runtime) -> None:
    """
    Close the connections without waiting, because the event loop was closed.

    The tasks of the pool are left as they were, and never go on. What they hold would
    stay open for the rest of the process.
    """
    state = runtime.state
    if runtime.done.is_set():
        return
    _warn_unclosed(runtime)
    state.shut_down()
    state.abandon()
    for coroutine in list(runtime.coroutines):
        try:
            coroutine.close()
        except BaseException as error:  # noqa: BLE001
            # Cancel scopes refuse to end outside of their task, and so does an `await`.
            logger.debug("%s: a task ended with %r", runtime.label, error)
    for entry in list(state.closing):
        connections.drop(runtime, entry)


def _leases_out(runtime: Runtime) -> str:
    count = runtime.state.in_use
    return "a lease" if count == 1 else f"{count} leases"


def _warn_unclosed(runtime: Runtime) -> None:
    message = (
        f"{runtime.label} was not closed before its event loop ended, with "
        f"{_leases_out(runtime)} out ({runtime.state.status()}): "
        "use `async with pool`, the lifespan of the application, or close()"
    )
    try:
        warnings.warn(message, ResourceWarning, stacklevel=2)
    except ResourceWarning:
        # Made an error by a filter. It may not leave the host: see there.
        logger.error(message)  # noqa: TRY400  (the traceback would be of this)


def _outbox(entries: list[PoolEntry]) -> Iterator[PoolEntry]:
    """Yield the *entries* to act on, and forget them."""
    while entries:
        yield entries.pop()


async def _pause(runtime: Runtime, interval: float) -> None:
    """Sleep for *interval* seconds; 0 and infinity mean never to wake."""
    await runtime.clock.sleep(interval or math.inf)


@protected
async def _opener(runtime: Runtime, tasks: TaskGroup) -> None:
    """Start what the state asks for: attempts to connect, and closings."""
    state = runtime.state
    while True:
        runtime.work = anyio.Event()
        for entry in _outbox(state.to_close):
            tasks.start_soon(connections.close, runtime, entry)
        now = runtime.now()
        if state.attempts.overdue(now) or state.room() <= 0:
            runtime.dismiss_hopeless()
        wanted = state.shortfall(runtime.tokens(), now)
        if wanted and state.attempts.forget(now):
            wanted = state.shortfall(runtime.tokens(), now)
        for _ in range(wanted):
            if state.attempts.failures:
                runtime.counters.connect_retries += 1
            entry = state.begin(now)
            tasks.start_soon(connections.connect, runtime, entry)
        with runtime.clock.deadline(_next_look(state, now)):
            await runtime.work.wait()


def _next_look(state: PoolState, now: float) -> float:
    """Return when the opener may have something to do that nobody tells it."""
    attempt = state.next_attempt()
    return min(state.attempts.next_overdue(), attempt if attempt > now else math.inf)


@protected
async def _timekeeper(runtime: Runtime) -> None:
    """Send those away who have waited for too long."""
    while True:
        runtime.earlier = anyio.Event()
        with runtime.clock.deadline(runtime.alarm):
            await runtime.earlier.wait()
        runtime.expire()


@protected
async def _reaper(runtime: Runtime) -> None:
    """Every `idle_check_interval` close what was idle for `max_idle_time`."""
    while True:
        await _pause(runtime, runtime.options.idle_check_interval)
        before = runtime.state.status()
        runtime.state.reap(runtime.now())
        after = runtime.state.status()
        if after.total < before.total:
            logger.debug(
                "%s: reaping what was idle for max_idle_time=%g s (%s -> %s)",
                *(runtime.label, runtime.options.max_idle_time, before, after),
            )
        runtime.settle()


@protected
async def _rotator(runtime: Runtime) -> None:
    """Have connections replaced whose time is over."""
    while True:
        state = runtime.state
        with runtime.clock.deadline(state.rotation.next_at(state.open)):
            await runtime.progress.wait()
        state.rotation.expire(state.open, runtime.now())
        runtime.settle()


@protected
async def _lookout(runtime: Runtime) -> None:
    """Every second retire what was lost, and look closely at one of the others."""
    state = runtime.state
    turn = itertools.count()
    while True:
        if any(entry.is_lost is not None for entry in state.open):
            await runtime.clock.sleep(LOOKOUT)
            now = runtime.now()
            entries = list(state.open)
            if entries:
                # In turn, because it takes long enough to be noticed if many are.
                entry = entries[next(turn) % len(entries)]
                _look_closely(runtime, entry)
            if [entry for entry in entries if state.look_at(entry, now)]:
                runtime.connections_changed()
        else:
            await runtime.progress.wait()


def _look_closely(runtime: Runtime, entry: PoolEntry) -> None:
    try:
        look = getattr(entry.connection, "look_closely", None)
        if look is not None:
            look()
    except Exception:
        logger.debug("%s: look_closely() failed", runtime.label, exc_info=True)


@protected
async def _health_checker(runtime: Runtime, tasks: TaskGroup) -> None:
    """Every `health_check_interval` probe what has proved nothing since."""
    places = anyio.Semaphore(PROBES_AT_ONCE)
    state = runtime.state
    last_round = runtime.now()
    while True:
        await _pause(runtime, runtime.options.health_check_interval)
        runtime.log_limit.flush()
        this_round = runtime.now()
        for entry in list(state.open):
            # The next round waits for this one, or slow probes would pile up.
            await places.acquire()
            if entry.proven_at <= last_round and not entry.suspect:
                tasks.start_soon(_probe_in_round, runtime, entry, places)
            else:
                places.release()
        last_round = this_round


@protected
async def _probe_in_round(
    runtime: Runtime, entry: PoolEntry, places: anyio.Semaphore
) -> None:
    try:
        await connections.probe(runtime, entry)
    finally:
        places.release()


@protected
async def _prober(runtime: Runtime, tasks: TaskGroup) -> None:
    """Probe suspects at once, each for itself: one may hang, another one be needed."""
    outage = runtime.state.outage
    while True:
        with runtime.clock.deadline(outage.next_at(runtime.now())):
            await runtime.suspicion.wait()
        runtime.suspicion = anyio.Event()
        for entry in _outbox(runtime.state.to_probe):
            if not entry.probing:
                entry.probing = True
                tasks.start_soon(connections.probe_claimed, runtime, entry)
        if outage.is_overdue(runtime.now()):
            runtime.dismiss_refused()
        while (due := outage.due(runtime.now())) is not None:
            tasks.start_soon(connections.probe_claimed, runtime, due)


@protected
async def _leak_watcher(runtime: Runtime, leaks: Leaks) -> None:
    """Warn of each lease that is held for longer than `leak_threshold`."""
    while True:
        now = runtime.now()
        await runtime.clock.sleep(leaks.look(now) - now)
