"""
The life of one connection: the attempt to make it, its probes, its closing.

Each runs in a task of the host's group, never in a request's: a connection that
outlives the request which wanted it serves the next one.
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
"""Seconds. A probe that ends this long after its time is up proves nothing."""

_LOSSES = frozenset({"lost", "unhealthy"})

CLOSE_LIMIT = 5.0
"""Seconds that closing one connection may take."""


class NotAwaitable(TypeError):  # noqa: N818  (as the public errors)
    """A method that has to be a coroutine function returned no awaitable."""


async def _within(
    clock: Clock,
    timeout: float,
    function: Callable[[float], Awaitable[T]],
    argument: float,
) -> T:
    """
    Return what *function* returns within *timeout* seconds.

    A connection may be of anybody's making, and some libraries answer a deadline with
    a cancellation of their own, which no scope knows (grpc.aio does). Let through, it
    would end the tasks of the pool as if the pool was closed.
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
            raise  # it is ours: close() has begun, or the loop ends
        if scope.cancel_called:
            raise TimeoutError from error
        raise ConnectionAbortedError("it cancelled itself") from error
    except asyncio.CancelledError as error:  # on trio
        raise ConnectionAbortedError("it was cancelled on asyncio") from error


@protected
async def connect(open_pool: OpenPool, slot: Slot) -> None:
    """Make one attempt to establish the connection of *slot*."""
    scope = anyio.CancelScope()
    open_pool.attempts.add(scope)
    try:
        with scope, open_pool.busy_task():
            await _attempt(open_pool, slot)
    finally:
        open_pool.attempts.discard(scope)
        # By close(), or with the loop.
        open_pool.state.attempts.cancelled(slot)
        open_pool.connections_changed()


def place(open_pool: OpenPool, slot: Slot) -> str:
    """Return where *slot* leads, as exactly as that is known."""
    peer = peer_of(slot)
    return f"{open_pool.target} ({peer})" if peer else open_pool.target


async def _attempt(open_pool: OpenPool, slot: Slot) -> None:
    timeout = open_pool.options.connection_timeout
    began = open_pool.perf_counter()
    deadline = open_pool.now() + timeout
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
    probed = bool(getattr(open_pool.connector, "probes", False))
    probed_at = open_pool.now()
    refusal = None
    if probed:
        try:
            refusal = await _first_answer(open_pool, connection, deadline)
        except ConnectFailed as error:
            _failed(open_pool, slot, error)
            return
    attempts = open_pool.state.attempts
    rounds = attempts.failures
    slot.alive_since = open_pool.perf_counter()
    took = slot.alive_since - began
    open_pool.state.connected(slot, connection, open_pool.now())
    open_pool.counters.connects += 1
    open_pool.observer.connected(took)
    if refusal is not None:
        _refused(open_pool, slot, refusal, probed_at)
        return
    # Not if the server has ended it together with that answer (GOAWAY). No call can use
    # such a connection, and as an orderly end it would be replaced without a pause.
    if probed and not slot.is_gone():
        _answered(open_pool, slot)
    open_pool.log_limit.report(
        # While none of them answers, that one was made is not the end of an outage.
        logging.INFO if rounds and not attempts.unanswered else logging.DEBUG,
        "connected",
        "%s: connected to %s in %.3f s%s (%s)",
        open_pool.label,
        place(open_pool, slot),
        took,
        f", the outage is over (failed rounds: {rounds})" if rounds else "",
        open_pool.state.status(),
        all_counts=True,
    )


async def _refuse(
    open_pool: OpenPool, slot: Slot, connection: Any, defect: str
) -> None:
    """Fail the attempt of *slot*, because its *connection* cannot be used."""
    connector, made = type(open_pool.connector).__name__, type(connection).__name__
    error = ConnectFailed(
        f"cannot connect to {open_pool.target}: its connector returned "
        + (
            f"None; {connector}.connect() has to return a connection"
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
            "%s: it cannot be closed: %s",
            *(open_pool.label, safe_text(failure)),
        )
    _failed(open_pool, slot, error)


async def _first_answer(
    open_pool: OpenPool, connection: Connection, deadline: float
) -> Exception | None:
    """
    Probe a new *connection*, and close it if nothing is answered until *deadline*.

    Returns:
        The error if it was refused, None if it was answered.

    Raises:
        ConnectFailed: Nothing was answered, or the other side is no authorizer.
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
            f"cannot connect to {open_pool.target}: a connection was made, but "
            + (
                "nothing was answered on it within connection_timeout="
                f"{open_pool.options.connection_timeout:g} s"
                if silent
                else f"it ended before anything was answered on it: {full_text(error)}"
            ),
            reason="timeout" if silent else "unanswered",
        ) from error.with_traceback(None)
    except BaseException:
        await _discard(open_pool, connection)
        raise
    return None


async def _discard(open_pool: OpenPool, connection: Connection) -> None:
    """Close a new *connection* that never became one of the pool."""
    if open_pool.owner.is_closed():  # then nothing can be awaited
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
        # Not one that the connector or the system raised, such as ETIMEDOUT, whose time
        # was another one.
        limit = f"connection_timeout={open_pool.options.connection_timeout:g} s"
        failed = ConnectFailed(
            f"cannot connect to {open_pool.target}: "
            f"{str(error) or f'not established within {limit}'}",
            reason="timeout",
        )
    else:
        failed = ConnectFailed(
            f"cannot connect to {open_pool.target}: {safe_text(error)}",
            # Such as a fork, which cannot be undone.
            permanent=type(error) in {PoolError, PoolMisuse, NotAwaitable},
        )
    failed.__cause__ = error
    return failed


def _is_complete(error: ConnectFailed) -> bool:
    # A class derived from it may not have called its constructor.
    try:
        return isinstance(error.reason, str) and isinstance(error.permanent, bool)
    except Exception:  # noqa: BLE001  (a connector may raise anything)
        return False


def _failed(open_pool: OpenPool, slot: Slot, error: ConnectFailed) -> None:
    if open_pool.owner.is_closed():
        return  # the attempt ended with its event loop
    first = not open_pool.state.attempts.failures
    open_pool.state.connect_failed(slot, error, open_pool.now())
    open_pool.counters.count(open_pool.counters.connect_failures, error.reason)
    # An outage is one event to whoever reads the log, not one a second.
    level = logging.WARNING if first else logging.DEBUG
    open_pool.log_limit.report(
        level,
        f"cannot connect: {error.reason}",
        "%s: %s (%s)",
        *(open_pool.label, error, open_pool.state.status()),
    )


@protected
async def probe(open_pool: OpenPool, slot: Slot) -> None:
    """Ask *slot* for an answer, unless that is being done."""
    if not slot.probing:
        slot.probing = True
        await probe_claimed(open_pool, slot)


@protected
async def probe_claimed(open_pool: OpenPool, slot: Slot) -> None:
    """Ask *slot* for an answer within `health_check_timeout`; ends its `probing`."""
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
            return  # closed meanwhile, and no answer is no news
        verdict = open_pool.verdict(slot.connection, error)
        if verdict is Verdict.REFUSED:
            _refused(open_pool, slot, error, began)
        elif verdict is Verdict.ANSWERED:
            # Only the stream was reset, as by a server that has too many.
            _answered(open_pool, slot, reset=True)
        else:
            late = open_pool.now() - began - timeout
            _unanswered(open_pool, slot, error, late=late)
    else:
        _answered(open_pool, slot)


def _tell_suspicion(open_pool: OpenPool, slot: Slot) -> None:
    silent = slot.suspected_at == slot.timed_out_at
    reason = slot.last_error or "it proved nothing for too long"
    open_pool.log_limit.report(
        # Callers got no answer: that is worth a line at the default level.
        logging.WARNING if silent else logging.INFO,
        "suspect: silent" if silent else "suspect",
        "%s: a connection to %s is suspect and gets no calls until it answers a "
        "probe: %s (%s)",
        *(open_pool.label, place(open_pool, slot)),
        "two calls in a row got no answer in time" if silent else reason,
        open_pool.state.status(),
    )


def _answered(open_pool: OpenPool, slot: Slot, *, reset: bool = False) -> None:
    was_out, was_suspect = open_pool.state.outage.declared, slot.suspect
    open_pool.state.answered(slot, open_pool.now())
    if reset:
        open_pool.state.failed()  # the connection is well, but there was no status
    else:
        open_pool.answered_probes += 1
    if was_out:
        open_pool.log_limit.report(
            logging.INFO,
            "outage over",
            "%s: %s answers again, the outage is over (%s)",
            *(open_pool.label, place(open_pool, slot), open_pool.state.status()),
            all_counts=True,
        )
    elif was_suspect:
        open_pool.log_limit.report(
            logging.INFO,
            "recovered",
            "%s: a connection to %s answered its probe and is used again (%s)",
            *(open_pool.label, place(open_pool, slot), open_pool.state.status()),
        )


def _refused(open_pool: OpenPool, slot: Slot, error: Exception, began: float) -> None:
    """Draw the consequences of a probe that was refused with *error*."""
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
    if begins:
        open_pool.log_limit.report(
            logging.WARNING,
            "refused",
            "%s: %s; callers fail until a probe is answered (%s)",
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
        # This loop was blocked, or the machine asleep: the answer may be there.
        slot.excused = True
        slot.suspect = False
        open_pool.state.suspect(slot, open_pool.now())
        return
    open_pool.counters.probe_failures += 1
    second = slot.suspect
    open_pool.state.unanswered(slot, open_pool.now())
    open_pool.log_limit.report(
        logging.WARNING if second else logging.DEBUG,
        f"health check failed: {error_kind(error)}",
        "%s: a connection to %s failed its health check%s: %s (%s)",
        open_pool.label,
        place(open_pool, slot),
        " and is closed" if second else ", and gets a second one",
        slot.last_error,
        open_pool.state.status(),
    )


@protected
async def close(open_pool: OpenPool, slot: Slot) -> None:
    """Close the connection of *slot*, whose leases are back or out of time."""
    where, reason = place(open_pool, slot), slot.retired or "close"
    connection, slot.connection = slot.connection, None
    try:
        open_pool.counters.count(open_pool.counters.closes, reason)
        lost = reason in _LOSSES
        error = f", its last error: {slot.last_error}" if slot.last_error else ""
        open_pool.log_limit.report(
            # What nobody here has decided is news.
            logging.INFO if lost else logging.DEBUG,
            f"closing: {reason}",
            "%s: closing a connection to %s after %.1f s: %s%s (left: %s)",
            *(
                open_pool.label,
                where,
                open_pool.perf_counter() - slot.alive_since,
                reason,
            ),
            *(error if lost else "", open_pool.state.status()),
        )
        with anyio.CancelScope(shield=True), open_pool.busy_task():
            await _within(open_pool.clock, CLOSE_LIMIT, connection.close, 0.0)
    except TimeoutError:
        open_pool.log_limit.report(
            logging.WARNING,
            "closing took too long",
            "%s: closing %r took more than %g s and was given up",
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
    """Close the connection of *slot* at once, or at least keep it no longer."""
    connection, slot.connection = slot.connection, None
    slot.is_lost = None
    if connection is None:
        return
    open_pool.counters.count(open_pool.counters.closes, slot.retired or "close")
    _abandon(open_pool, connection)


def _abandon(open_pool: OpenPool, connection: Connection) -> None:
    """Have *connection* free what it holds, because its event loop was closed."""
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
