"""
The work on one connection: the attempt to connect, the probes, the closing.

Each runs in a task of the host's task group, never in a request. So if a request ends
before its connection is ready, the connection serves the next request.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from fastapi_topaz._error_text import (
    error_kind,
    full_text,
    log_text,
    safe_text,
)
from fastapi_topaz._pool.conformity import defect_of
from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz._pool.interrupts import protected
from fastapi_topaz._pool.state.snapshot import peer_of
from fastapi_topaz.exceptions import ConnectFailed, PoolError, PoolMisuse


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastapi_topaz._pool.clock import Clock
    from fastapi_topaz._pool.connector import Connection
    from fastapi_topaz._pool.open_pool import OpenPool
    from fastapi_topaz._pool.state.slot import Slot


__all__ = ["CLOSE_LIMIT", "close", "connect", "probe", "probe_claimed"]


T = TypeVar("T")

LATE = 1.0
"""
Seconds. If a probe ends this long after its timeout, the process was blocked. Its
failure then says nothing about the server.
"""

_LOSSES = frozenset({"lost", "unhealthy"})

CLOSE_LIMIT = 5.0
"""Seconds. The longest time that closing one connection may take."""


class NotAwaitable(TypeError):  # noqa: N818  (as the public errors)
    """A method that must be a coroutine function did not return an awaitable."""


async def _within(
    clock: Clock,
    timeout: float,
    function: Callable[[float], Awaitable[T]],
    argument: float,
) -> T:
    """
    Call *function* with *argument*, and return its result within *timeout* seconds.

    Some libraries react to a deadline with a cancellation of their own, as grpc.aio
    does. It belongs to no cancel scope. If it passed, it would end the tasks of the
    pool as if the pool were closed. So it becomes a ConnectionAbortedError here.

    Raises:
        TimeoutError: The time is up.
        ConnectionAbortedError: *function* cancelled itself.
        NotAwaitable: *function* returned no awaitable.
    """
    scope = anyio.CancelScope()
    try:
        with clock.deadline(clock.now() + timeout) as scope:
            awaitable = function(argument)
            if not inspect.isawaitable(awaitable):
                name = getattr(function, "__qualname__", repr(function))
                raise NotAwaitable(f"{name} must be an `async def`")
            return await awaitable
        raise TimeoutError
    except anyio.get_cancelled_exc_class() as error:
        if anyio.current_effective_deadline() == -math.inf:
            raise  # the pool was cancelled: close() has begun, or the loop ends
        if scope.cancel_called:
            raise TimeoutError from error
        raise ConnectionAbortedError("the connection cancelled itself") from error
    except asyncio.CancelledError as error:  # on trio
        raise ConnectionAbortedError(
            "the connection was cancelled by code for asyncio"
        ) from error


@protected
async def connect(open_pool: OpenPool, slot: Slot) -> None:
    """Make one attempt to connect, for *slot*."""
    scope = anyio.CancelScope()
    open_pool.attempts.add(scope)
    try:
        with scope, open_pool.busy_task():
            await _attempt(open_pool, slot)
    finally:
        open_pool.attempts.discard(scope)
        # This changes something only if close() or the end of the loop cancelled the
        # attempt. Otherwise the slot has left the attempts already.
        open_pool.state.attempts.cancelled(slot)
        open_pool.connections_changed()


def place(open_pool: OpenPool, slot: Slot) -> str:
    """Return the target of *slot* for a message, with its peer's address if known."""
    peer = peer_of(slot)
    return f"{open_pool.target} ({peer})" if peer else open_pool.target


async def _attempt(open_pool: OpenPool, slot: Slot) -> None:
    timeout = open_pool.options.connection_timeout
    began = open_pool.now()
    try:
        connection = await _within(
            open_pool.clock, timeout, open_pool.connector.connect, timeout
        )
    except Exception as error:  # noqa: BLE001  (a connector may raise anything)
        _failed(open_pool, slot, _as_connect_failed(open_pool, error))
        return
    defect = defect_of(connection)
    if defect is not None:
        await _refuse(open_pool, slot, connection, defect)
        return
    if getattr(connection, "run", None) is not None:
        open_pool.tasks.start_soon(_run, open_pool, connection)
    probed = bool(getattr(open_pool.connector, "probes", False))
    probed_at = open_pool.now()
    refusal = None
    if probed:
        try:
            refusal = await _first_answer(open_pool, connection, began + timeout)
        except ConnectFailed as error:
            _failed(open_pool, slot, error)
            return
    attempts = open_pool.state.attempts
    rounds = attempts.failures
    open_pool.state.connected(slot, connection, open_pool.now())
    open_pool.overload.connected()
    open_pool.limiter.total_tokens = open_pool.state.limit
    open_pool.counters.connects += 1
    open_pool.observer.connected(slot.opened_at - began)
    open_pool.events.add("connected", peer_of(slot))
    if refusal is not None:
        _refused(open_pool, slot, refusal, probed_at)
        return
    # The server may end the connection (GOAWAY) together with its answer. No call can
    # use such a connection. If it counted as answered, its end would look orderly, and
    # the pool would replace it without a pause.
    if probed and not slot.is_gone():
        _answered(open_pool, slot)
    open_pool.log_limit.report(
        # If earlier connections ended without an answer, a new connection does not
        # prove that the outage is over.
        logging.INFO if rounds and not attempts.unanswered else logging.DEBUG,
        "connected",
        "%s: connected to %s in %.3f s%s (%s)",
        open_pool.label,
        place(open_pool, slot),
        slot.opened_at - began,
        f", the outage is over (failed rounds of attempts: {rounds})" if rounds else "",
        open_pool.state.status(),
        all_counts=True,
    )


@protected
async def _run(open_pool: OpenPool, connection: Any) -> None:
    """Run the task of *connection*; its failure does not end the pool."""
    try:
        await connection.run()
    except Exception as failure:  # noqa: BLE001  (a connection may raise anything)
        open_pool.log_limit.report(
            logging.WARNING,
            f"run() failed: {type(failure).__name__}",
            "%s: the task of a connection to %s failed",
            *(open_pool.label, open_pool.target),
            exc_info=True,
        )


async def _refuse(
    open_pool: OpenPool, slot: Slot, connection: Any, defect: str
) -> None:
    """Fail the attempt of *slot*: its *connection* has a *defect*, so close it."""
    connector, made = type(open_pool.connector).__name__, type(connection).__name__
    error = ConnectFailed(
        f"cannot connect to {open_pool.target}: its connector returned "
        + (
            f"None; {connector}.connect() must return a connection"
            if made == "NoneType"
            else f"a connection that the pool cannot use, of the class {made}, from "
            f"{connector}.connect(); {defect}"
        ),
        permanent=True,
    )

    async def close(grace: float) -> None:
        closed: Any = connection.close(grace)
        if inspect.isawaitable(closed):
            await closed

    try:
        await _within(open_pool.clock, CLOSE_LIMIT, close, 0.0)
    except Exception as failure:  # noqa: BLE001  (a connection may raise anything)
        open_pool.log_limit.report(
            logging.DEBUG,
            "closing failed",
            "%s: cannot close the unusable connection: %s",
            *(open_pool.label, safe_text(failure)),
        )
    _failed(open_pool, slot, error)


async def _first_answer(
    open_pool: OpenPool, connection: Connection, deadline: float
) -> Exception | None:
    """
    Probe a new *connection*, and close it if no answer comes before *deadline*.

    Returns:
        None after an answer. If the probe was refused, its error.

    Raises:
        ConnectFailed: No answer came, or `greet` found that the server is a wrong one.
    """
    left = max(0.0, deadline - open_pool.now())
    greet = getattr(connection, "greet", connection.probe)
    try:
        await _within(open_pool.clock, left, greet, left)
    except Exception as error:
        verdict = open_pool.verdict(connection, error)
        if verdict is Verdict.REFUSED:
            return error
        await _discard(open_pool, connection)
        if isinstance(error, ConnectFailed):
            raise
        silent = verdict is Verdict.SILENT or isinstance(error, TimeoutError)
        raise ConnectFailed(
            f"cannot connect to {open_pool.target}: the server accepted the "
            "connection, but "
            + (
                "did not answer within connection_timeout="
                f"{open_pool.options.connection_timeout:g} s"
                if silent
                else f"it ended before the first answer: {full_text(error)}"
            ),
            reason="timeout" if silent else "unanswered",
        ) from error.with_traceback(None)
    except BaseException:
        await _discard(open_pool, connection)
        raise
    return None


async def _discard(open_pool: OpenPool, connection: Connection) -> None:
    """Close a new *connection* that the pool never used."""
    if open_pool.owner.is_closed():  # a closed event loop cannot run close()
        _abandon(open_pool, connection)
        return
    try:
        with anyio.CancelScope(shield=True):
            await _within(open_pool.clock, CLOSE_LIMIT, connection.close, 0.0)
    except Exception as error:  # noqa: BLE001  (a connection may raise anything)
        open_pool.log_limit.report(
            logging.WARNING,
            f"closing failed: {type(error).__name__}",
            "%s: closing a new connection to %s failed: %s",
            *(open_pool.label, open_pool.target, safe_text(error)),
        )


def _as_connect_failed(open_pool: OpenPool, error: Exception) -> ConnectFailed:
    if isinstance(error, ConnectFailed) and _is_complete(error):
        return error
    if isinstance(error, TimeoutError):
        # The limit is named only if the error has no text: then `_within` raised it. A
        # connector, or the system (ETIMEDOUT), raises one with a text of its own, and
        # its time limit was another one.
        limit = f"connection_timeout={open_pool.options.connection_timeout:g} s"
        failed = ConnectFailed(
            f"cannot connect to {open_pool.target}: "
            f"{str(error) or f'not established within {limit}'}",
            reason="timeout",
        )
    else:
        failed = ConnectFailed(
            f"cannot connect to {open_pool.target}: {safe_text(error)}",
            # No retry can repair these. One example is the use after a fork.
            permanent=type(error) in {PoolError, PoolMisuse, NotAwaitable},
        )
    failed.__cause__ = error
    return failed


def _is_complete(error: ConnectFailed) -> bool:
    # A subclass may not have called the constructor of ConnectFailed.
    try:
        return isinstance(error.reason, str) and isinstance(error.permanent, bool)
    except Exception:  # noqa: BLE001  (a connector may raise anything)
        return False


def _failed(open_pool: OpenPool, slot: Slot, error: ConnectFailed) -> None:
    if open_pool.owner.is_closed():
        return  # the event loop was closed, and the attempt ended with it
    first = not open_pool.state.attempts.failures
    open_pool.state.connect_failed(slot, error, open_pool.now())
    open_pool.counters.count(open_pool.counters.connect_failures, error.reason)
    open_pool.events.add("connect failed", None, log_text(error))
    # An outage is one event: only its first failure is a WARNING. Otherwise the log
    # would get a line for each attempt.
    level = logging.WARNING if first else logging.DEBUG
    open_pool.log_limit.report(
        level,
        f"cannot connect: {error.reason}",
        "%s: %s (%s)",
        *(open_pool.label, error, open_pool.state.status()),
    )


@protected
async def probe(open_pool: OpenPool, slot: Slot) -> None:
    """Probe the connection of *slot*, unless a probe is under way."""
    if not slot.probing:
        slot.probing = True
        await probe_claimed(open_pool, slot)


@protected
async def probe_claimed(open_pool: OpenPool, slot: Slot) -> None:
    """
    Probe the connection of *slot*, within `health_check_timeout` seconds.

    The caller has set `slot.probing`, so that no second probe starts before this task
    runs. This function resets it.
    """
    try:
        if slot.connection is None or slot.retired is not None:
            return
        if not open_pool.state.retire_if_lost(slot, open_pool.now()):
            await _ask(open_pool, slot)
    finally:
        slot.probing = False
    open_pool.connections_changed()


async def _ask(open_pool: OpenPool, slot: Slot) -> None:
    timeout = open_pool.options.health_check_timeout
    began = open_pool.now()
    if slot.suspect:
        _tell_suspicion(open_pool, slot)
    try:
        with open_pool.busy_task():
            await _within(open_pool.clock, timeout, slot.connection.probe, timeout)
    except Exception as error:  # noqa: BLE001  (a connection may raise anything)
        if slot.retired is not None:
            return  # the slot was retired meanwhile, so a missing answer is expected
        verdict = open_pool.verdict(slot.connection, error)
        if verdict is Verdict.REFUSED:
            _refused(open_pool, slot, error, began)
        elif verdict is Verdict.ANSWERED:
            # The connection works: the server only reset the stream, for example
            # because it has too many streams.
            _answered(open_pool, slot, reset=True)
        else:
            late = open_pool.now() - began - timeout
            _unanswered(open_pool, slot, error, late=late)
    else:
        _answered(open_pool, slot)


def _tell_suspicion(open_pool: OpenPool, slot: Slot) -> None:
    silent = slot.suspected_at == slot.timed_out_at
    reason = slot.last_error or "it has answered nothing for too long"
    if silent:
        reason = "two calls in a row got no answer in time"
    open_pool.events.add("suspect", peer_of(slot), reason)
    open_pool.log_limit.report(
        # Calls got no answer, which callers notice: so it is a WARNING, which the
        # default level shows.
        logging.WARNING if silent else logging.INFO,
        "suspect: silent" if silent else "suspect",
        "%s: a connection to %s is suspect and gets no lease until it answers a "
        "probe: %s (%s)",
        *(open_pool.label, place(open_pool, slot)),
        *(reason, open_pool.state.status()),
    )


def _answered(open_pool: OpenPool, slot: Slot, *, reset: bool = False) -> None:
    was_out, was_suspect = open_pool.state.outage.declared, slot.suspect
    open_pool.state.answered(slot, open_pool.now())
    if reset:
        open_pool.state.failed()  # the connection works, but the server sent no status
    else:
        open_pool.answered_probes += 1
    if was_out:
        open_pool.events.add("outage over", peer_of(slot))
        open_pool.log_limit.report(
            logging.INFO,
            "outage over",
            "%s: %s answers again, the outage is over (%s)",
            *(open_pool.label, place(open_pool, slot), open_pool.state.status()),
            all_counts=True,
        )
    elif was_suspect:
        open_pool.events.add("recovered", peer_of(slot))
        open_pool.log_limit.report(
            logging.INFO,
            "recovered",
            "%s: a connection to %s answered its probe and is used again (%s)",
            *(open_pool.label, place(open_pool, slot), open_pool.state.status()),
        )


def _refused(open_pool: OpenPool, slot: Slot, error: Exception, began: float) -> None:
    """Change the state after a probe of *slot* was refused with *error*."""
    slot.last_error = safe_text(error)
    open_pool.counters.probe_failures += 1
    failure = ConnectFailed(
        f"{open_pool.target} answers that its server is not available: "
        f"{full_text(error)}",
        reason="unavailable",
    )
    failure.__cause__ = error.with_traceback(None)
    begins = open_pool.state.probe_refused(slot, failure, began, open_pool.now())
    open_pool.dismiss_refused()
    open_pool.events.add(
        "outage" if begins else "probe refused", peer_of(slot), log_text(failure)
    )
    if begins:
        open_pool.log_limit.report(
            logging.WARNING,
            "refused",
            "%s: %s; all callers fail until a probe is answered (%s)",
            *(open_pool.label, log_text(failure), open_pool.state.status()),
        )
    else:
        open_pool.log_limit.report(
            logging.DEBUG,
            "probe refused",
            "%s: a probe was refused by %s: %s (%s)",
            *(open_pool.label, place(open_pool, slot), safe_text(error)),
            open_pool.state.status(),
        )


def _unanswered(open_pool: OpenPool, slot: Slot, error: Exception, late: float) -> None:
    if isinstance(error, TimeoutError) or error_kind(error) == "DEADLINE_EXCEEDED":
        limit = open_pool.options.health_check_timeout
        slot.last_error = f"no answer within health_check_timeout={limit:g} s"
    else:
        slot.last_error = safe_text(error)
    if late > LATE and not slot.excused:
        # The event loop was blocked, or the machine was asleep. The answer may have
        # come in time, so the probe is repeated once.
        slot.excused = True
        slot.suspect = False
        open_pool.state.suspect(slot, open_pool.now())
        return
    open_pool.counters.probe_failures += 1
    second = slot.suspect
    open_pool.events.add("probe failed", peer_of(slot), slot.last_error)
    open_pool.state.unanswered(slot, open_pool.now())
    open_pool.log_limit.report(
        logging.WARNING if second else logging.DEBUG,
        f"health check failed: {error_kind(error)}",
        "%s: a connection to %s failed its health check%s: %s (%s)",
        open_pool.label,
        place(open_pool, slot),
        " and is closed" if second else ", and is probed once more",
        slot.last_error,
        open_pool.state.status(),
    )


@protected
async def close(open_pool: OpenPool, slot: Slot) -> None:
    """Close the connection of *slot*. Its leases are back, or the grace has ended."""
    where, reason = place(open_pool, slot), slot.retired or "close"
    peer = peer_of(slot)
    # Cleared before the first wait: from now on a lease of this slot raises
    # ConnectionLost, and `drop` does not close the connection a second time.
    connection, slot.connection = slot.connection, None
    try:
        open_pool.counters.count(open_pool.counters.closes, reason)
        lost = reason in _LOSSES
        error = f", its last error: {slot.last_error}" if slot.last_error else ""
        error = error if lost else ""
        open_pool.events.add("closed", peer, reason + error)
        open_pool.log_limit.report(
            # A loss is INFO. The other reasons are decisions of this process.
            logging.INFO if lost else logging.DEBUG,
            f"closing: {reason}",
            "%s: closing a connection to %s after %.1f s: %s%s (left: %s)",
            *(open_pool.label, where, open_pool.now() - slot.opened_at, reason),
            *(error, open_pool.state.status()),
        )
        with anyio.CancelScope(shield=True), open_pool.busy_task():
            await _within(open_pool.clock, CLOSE_LIMIT, connection.close, 0.0)
    except TimeoutError:
        open_pool.log_limit.report(
            logging.WARNING,
            "closing took too long",
            "%s: closing %r took more than %g s; the pool stops waiting for it",
            open_pool.label,
            connection,
            CLOSE_LIMIT,
        )
    except Exception as failure:  # noqa: BLE001  (a connection may raise anything)
        open_pool.log_limit.report(
            logging.WARNING,
            f"closing failed: {type(failure).__name__}",
            "%s: closing a connection to %s failed",
            *(open_pool.label, where),
            exc_info=True,
        )
    finally:
        open_pool.state.closed(slot)
        open_pool.connections_changed()


def drop(open_pool: OpenPool, slot: Slot) -> None:
    """Close the connection of *slot* without waiting, and drop the reference to it."""
    peer, reason = peer_of(slot), slot.retired or "close"
    connection, slot.connection = slot.connection, None
    slot.is_lost = None
    if connection is None:
        return
    open_pool.counters.count(open_pool.counters.closes, reason)
    open_pool.events.add("closed", peer, reason)
    _abandon(open_pool, connection)


def _abandon(open_pool: OpenPool, connection: Connection) -> None:
    """Call `abandon()` of *connection*, if it has one: its event loop was closed."""
    try:
        abandon = getattr(connection, "abandon", None)
        if abandon is not None:
            abandon()
    except Exception as failure:  # noqa: BLE001  (a connection may raise anything)
        open_pool.log_limit.report(
            logging.WARNING,
            f"abandon() failed: {type(failure).__name__}",
            "%s: abandon() of a connection failed",
            open_pool.label,
            exc_info=True,
        )
