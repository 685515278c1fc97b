"""
The host task of a pool, and the loops that maintain the pool in it.

The host task runs from the opening of the pool to the end of `close()`. It owns the
task group in which all loops, attempts to connect and closings run. Each loop is a
plain function over an open pool. It waits for a time or an event, changes the state,
and calls `after_change` or a similar method to act on the change.
"""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from typing import TYPE_CHECKING

import anyio

from fastapi_topaz._error_text import without_context
from fastapi_topaz._pool import connections
from fastapi_topaz._pool.interrupts import protected
from fastapi_topaz._pool.servers import watch_servers
from fastapi_topaz._redaction import clear_frames


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from anyio.abc import TaskGroup

    from fastapi_topaz._pool.leaks import Leaks
    from fastapi_topaz._pool.open_pool import OpenPool
    from fastapi_topaz._pool.state.pool_state import PoolState
    from fastapi_topaz._pool.state.slot import Slot


__all__ = ["close_now", "run_pool"]


logger = logging.getLogger("fastapi_topaz.pool")

LOOKOUT = 1.0
"""
Seconds between two searches for lost connections. So even an idle pool notices within
this time that its server is gone.
"""

OVERLOAD_EVERY = 0.1
"""Seconds between two looks at the calls while checks wait."""

PROBES_AT_ONCE = 4
"""The most probes of one health check that run at the same time."""


async def run_pool(
    open_pool: OpenPool, companions: Sequence[Callable[[], Awaitable[None]]] = ()
) -> None:
    """
    Run the host task of *open_pool* until it is closed, and close everything.

    The *companions* run in it, too. If one is added later, set `open_pool.work`.
    """
    try:
        async with anyio.create_task_group() as tasks:
            open_pool.tasks = tasks
            tasks.start_soon(_opener, open_pool, tasks, companions)
            tasks.start_soon(_timekeeper, open_pool)
            tasks.start_soon(_reaper, open_pool)
            tasks.start_soon(_rotator, open_pool)
            tasks.start_soon(_loss_watcher, open_pool)
            tasks.start_soon(_health_checker, open_pool, tasks)
            tasks.start_soon(_prober, open_pool, tasks)
            if open_pool.overload.adaptive is not None:
                tasks.start_soon(_overload_watcher, open_pool)
            if open_pool.state.rotation.spreads and hasattr(
                open_pool.connector, "servers"
            ):
                tasks.start_soon(watch_servers, open_pool)
            if open_pool.leaks is not None:
                tasks.start_soon(_leak_watcher, open_pool, open_pool.leaks)
            await open_pool.until_closed()
            open_pool.state.abandon()
            for slot in _outbox(open_pool.state.to_close):
                tasks.start_soon(connections.close, open_pool, slot)
            # The closings shield themselves, so this ends only the other tasks.
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        _, failures = group.split(anyio.get_cancelled_exc_class())
        # This is a bug in the pool. The pool closes, and the next use opens it again.
        # The error must not leave this task: on trio it would end the whole run.
        if failures is not None:
            clear_frames(failures)
        open_pool.log_limit.report(
            logging.CRITICAL,
            "its host task failed",
            "%s: its host task failed",
            open_pool.label,
            exc_info=failures,
        )
        open_pool.begin_close(0)
    finally:
        await _leave_nothing(open_pool)


@protected
async def _accompany(
    open_pool: OpenPool, companion: Callable[[], Awaitable[None]]
) -> None:
    try:
        await companion()
    except Exception as error:  # noqa: BLE001  (it must not end the pool)
        open_pool.log_limit.report(
            logging.ERROR,
            f"a companion failed: {type(error).__name__}",
            "%s: a companion of the pool failed",
            open_pool.label,
            exc_info=without_context(error),
        )


async def _leave_nothing(open_pool: OpenPool) -> None:
    state = open_pool.state
    if not state.shut:
        # The event loop ends while the pool is open. It has cancelled the tasks that
        # would have closed these connections.
        _warn_unclosed(open_pool)
    open_pool.begin_close(0)
    state.abandon()
    with anyio.CancelScope(shield=True):
        async with anyio.create_task_group() as closings:
            for slot in state.closing:
                closings.start_soon(connections.close, open_pool, slot)
    if state.in_use:
        logger.warning(
            "%s: closed before %s came back", open_pool.label, _leases_out(open_pool)
        )
    open_pool.owner.stop_watching()
    open_pool.done.set()


def close_now(open_pool: OpenPool) -> None:
    """
    Close the connections without waiting, because the event loop was closed.

    The tasks of the pool never run again. The sockets that they hold would stay open
    until the process ends.
    """
    state = open_pool.state
    if open_pool.done.is_set():
        return
    _warn_unclosed(open_pool)
    state.shut_down()
    state.abandon()
    for coroutine in list(open_pool.coroutines):
        try:
            coroutine.close()
        except BaseException as error:  # noqa: BLE001
            # Cancel scopes raise if they end outside of their task, and so does a
            # coroutine that awaits while it is closed.
            logger.debug("%s: a task ended with %r", open_pool.label, error)
    for slot in list(state.closing):
        connections.drop(open_pool, slot)


def _leases_out(open_pool: OpenPool) -> str:
    count = open_pool.state.in_use
    return "a lease" if count == 1 else f"{count} leases"


def _warn_unclosed(open_pool: OpenPool) -> None:
    message = (
        f"{open_pool.label} was not closed before its event loop ended, with "
        f"{_leases_out(open_pool)} out ({open_pool.state.status()}): "
        "use `async with pool`, the lifespan of the application, or close()"
    )
    try:
        warnings.warn(message, ResourceWarning, stacklevel=2)
    except ResourceWarning:
        # A filter has made the warning an error. It must not leave the host task; see
        # `run_pool`.
        logger.error(message)  # noqa: TRY400  (its traceback shows only this module)


def _outbox(slots: list[Slot]) -> Iterator[Slot]:
    """Yield the *slots*, and remove each from the list."""
    while slots:
        yield slots.pop()


async def _pause(open_pool: OpenPool, interval: float) -> None:
    """Sleep for *interval* seconds. If it is 0 or infinite, sleep until cancelled."""
    await open_pool.clock.sleep(interval or math.inf)


@protected
async def _opener(
    open_pool: OpenPool,
    tasks: TaskGroup,
    companions: Sequence[Callable[[], Awaitable[None]]],
) -> None:
    """Start the *companions*, and what the state asks for: attempts and closings."""
    state, accompanied = open_pool.state, 0
    while True:
        # Replaced before the state is read: a later change sets the new event.
        open_pool.work = anyio.Event()
        for companion in companions[accompanied:]:
            accompanied += 1
            tasks.start_soon(_accompany, open_pool, companion)
        for slot in _outbox(state.to_close):
            tasks.start_soon(connections.close, open_pool, slot)
        now = open_pool.now()
        if state.attempts.overdue(now) or state.room() <= 0:
            open_pool.dismiss_hopeless()
        wanted = state.shortfall(open_pool.tokens(), now)
        # If no attempt was needed for a while, an old outage says nothing about the
        # server now. Once it is forgotten, more attempts may run in parallel.
        if wanted and state.attempts.forget(now):
            wanted = state.shortfall(open_pool.tokens(), now)
        for _ in range(wanted):
            if state.attempts.failures:
                open_pool.counters.connect_retries += 1
            slot = state.begin(now)
            tasks.start_soon(connections.connect, open_pool, slot)
        with open_pool.clock.deadline(_next_look(state, now)):
            await open_pool.work.wait()


def _next_look(state: PoolState, now: float) -> float:
    """Return the time at which the opener wakes even if `work` is not set."""
    attempt = state.next_attempt()
    return min(state.attempts.next_overdue(), attempt if attempt > now else math.inf)


@protected
async def _timekeeper(open_pool: OpenPool) -> None:
    """Dismiss the waiting callers whose deadline has passed."""
    while True:
        open_pool.earlier = anyio.Event()
        with open_pool.clock.deadline(open_pool.alarm):
            await open_pool.earlier.wait()
        open_pool.expire()


@protected
async def _reaper(open_pool: OpenPool) -> None:
    """Retire connections idle for `max_idle_time`, every `idle_check_interval`."""
    while True:
        await _pause(open_pool, open_pool.options.idle_check_interval)
        before = open_pool.state.status()
        open_pool.state.reap(open_pool.now())
        after = open_pool.state.status()
        if after.total < before.total:
            logger.debug(
                "%s: closing connections that were idle for max_idle_time=%g s "
                "(%s -> %s)",
                *(open_pool.label, open_pool.options.max_idle_time, before, after),
            )
        open_pool.after_change()


@protected
async def _rotator(open_pool: OpenPool) -> None:
    """Mark connections for replacement: at their `max_lifetime`, and after a loss."""
    while True:
        state = open_pool.state
        with open_pool.clock.deadline(state.rotation.next_at(state.open)):
            await open_pool.progress.wait()
        state.rotation.expire(state.open, open_pool.now())
        open_pool.after_change()


@protected
async def _loss_watcher(open_pool: OpenPool) -> None:
    """Retire lost connections every second, and refresh the liveness of one other."""
    state = open_pool.state
    turn = itertools.count()
    while True:
        if any(slot.is_lost is not None for slot in state.open):
            await open_pool.clock.sleep(LOOKOUT)
            now = open_pool.now()
            slots = list(state.open)
            if slots:
                # One connection a second, because with many connections the event loop
                # would be blocked for a noticeable time.
                slot = slots[next(turn) % len(slots)]
                _refresh_liveness(open_pool, slot)
            if [slot for slot in slots if state.retire_if_lost(slot, now)]:
                open_pool.connections_changed()
        else:
            await open_pool.progress.wait()


def _refresh_liveness(open_pool: OpenPool, slot: Slot) -> None:
    try:
        look = getattr(slot.connection, "refresh_liveness", None)
        if look is not None:
            look()
    except Exception:
        logger.debug("%s: refresh_liveness() failed", open_pool.label, exc_info=True)


@protected
async def _health_checker(open_pool: OpenPool, tasks: TaskGroup) -> None:
    """Probe connections without a recent answer, every `health_check_interval`."""
    places = anyio.Semaphore(PROBES_AT_ONCE)
    state = open_pool.state
    last_round = open_pool.now()
    while True:
        await _pause(open_pool, open_pool.options.health_check_interval)
        open_pool.log_limit.flush()
        this_round = open_pool.now()
        for slot in list(state.open):
            # This also delays the next round until probes of this one have ended.
            # Otherwise slow probes would accumulate.
            await places.acquire()
            if slot.proven_at <= last_round and not slot.suspect:
                tasks.start_soon(_probe_in_round, open_pool, slot, places)
            else:
                places.release()
        last_round = this_round


@protected
async def _probe_in_round(
    open_pool: OpenPool, slot: Slot, places: anyio.Semaphore
) -> None:
    try:
        await connections.probe(open_pool, slot)
    finally:
        places.release()


@protected
async def _prober(open_pool: OpenPool, tasks: TaskGroup) -> None:
    """
    Probe suspect connections at once, and refused ones when they are due.

    Each probe has its own task, because one may hang while another connection is
    needed.
    """
    outage = open_pool.state.outage
    while True:
        with open_pool.clock.deadline(outage.next_at(open_pool.now())):
            await open_pool.suspicion.wait()
        open_pool.suspicion = anyio.Event()
        for slot in _outbox(open_pool.state.to_probe):
            if not slot.probing:
                slot.probing = True
                tasks.start_soon(connections.probe_claimed, open_pool, slot)
        if outage.is_overdue(open_pool.now()):
            open_pool.dismiss_refused()
        while (due := outage.due(open_pool.now())) is not None:
            tasks.start_soon(connections.probe_claimed, open_pool, due)


@protected
async def _overload_watcher(open_pool: OpenPool) -> None:
    """While checks wait, look for calls that do not end, and for a late event loop."""
    overload = open_pool.overload
    while True:
        await overload.queued.wait()
        overload.queued = anyio.Event()
        while open_pool.state.waiting:
            due = open_pool.now() + OVERLOAD_EVERY
            await open_pool.clock.sleep(OVERLOAD_EVERY)
            now = open_pool.now()
            if overload.look(now - due, now):
                open_pool.apply_limit()


@protected
async def _leak_watcher(open_pool: OpenPool, leaks: Leaks) -> None:
    """Warn of each lease that is held for longer than `leak_threshold`."""
    while True:
        now = open_pool.now()
        await open_pool.clock.sleep(leaks.look(now) - now)
