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

from fastapi_topaz._errors import kind_of, logged, told, words
from fastapi_topaz._pool.conformity import defect_of
from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz._pool.interrupts import protected
from fastapi_topaz._pool.state.snapshot import peer_of
from fastapi_topaz.exceptions import ConnectFailed, PoolError, PoolMisuse


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastapi_topaz._pool.clock import Clock
    from fastapi_topaz._pool.connector import Connection
    from fastapi_topaz._pool.open_pool import Runtime
    from fastapi_topaz._pool.state.entry import PoolEntry


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
async def connect(runtime: Runtime, entry: PoolEntry) -> None:
    """Make one attempt to establish the connection of *entry*."""
    scope = anyio.CancelScope()
    runtime.attempts.add(scope)
    try:
        with scope, runtime.busy_task():
            await _attempt(runtime, entry)
    finally:
        runtime.attempts.discard(scope)
        # By close(), or with the loop.
        runtime.state.attempts.cancelled(entry)
        runtime.connections_changed()


def place(runtime: Runtime, entry: PoolEntry) -> str:
    """Return where *entry* leads, as exactly as that is known."""
    peer = peer_of(entry)
    return f"{runtime.target} ({peer})" if peer else runtime.target


async def _attempt(runtime: Runtime, entry: PoolEntry) -> None:
    timeout = runtime.options.connection_timeout
    began = runtime.perf_counter()
    deadline = runtime.now() + timeout
    try:
        connection = await _within(
            runtime.clock, timeout, runtime.connector.connect, timeout
        )
    except Exception as error:  # noqa: BLE001  (a connector may raise anything)
        _failed(runtime, entry, _as_connect_failed(runtime, error))
        return
    defect = defect_of(connection)
    if defect is not None:
        await _refuse(runtime, entry, connection, defect)
        return
    probed = bool(getattr(runtime.connector, "probes", False))
    probed_at = runtime.now()
    refusal = None
    if probed:
        try:
            refusal = await _first_answer(runtime, connection, deadline)
        except ConnectFailed as error:
            _failed(runtime, entry, error)
            return
    attempts = runtime.state.attempts
    rounds = attempts.failures
    entry.alive_since = runtime.perf_counter()
    took = entry.alive_since - began
    runtime.state.connected(entry, connection, runtime.now())
    runtime.counters.connects += 1
    runtime.observer.connected(took)
    if refusal is not None:
        _refused(runtime, entry, refusal, probed_at)
        return
    # Not if the server has ended it together with that answer (GOAWAY). No call can use
    # such a connection, and as an orderly end it would be replaced without a pause.
    if probed and not entry.is_gone():
        _answered(runtime, entry)
    runtime.log_limit.report(
        # While none of them answers, that one was made is not the end of an outage.
        logging.INFO if rounds and not attempts.unanswered else logging.DEBUG,
        "connected",
        "%s: connected to %s in %.3f s%s (%s)",
        runtime.label,
        place(runtime, entry),
        took,
        f", the outage is over (failed rounds: {rounds})" if rounds else "",
        runtime.state.status(),
        all_counts=True,
    )


async def _refuse(
    runtime: Runtime, entry: PoolEntry, connection: Any, defect: str
) -> None:
    """Fail the attempt of *entry*, because its *connection* cannot be used."""
    connector, made = type(runtime.connector).__name__, type(connection).__name__
    error = ConnectFailed(
        f"cannot connect to {runtime.target}: its connector returned "
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
        await _within(runtime.clock, CLOSE_LIMIT, close, 0.0)
    except Exception as failure:  # noqa: BLE001  (a connection may raise anything)
        runtime.log_limit.report(
            logging.DEBUG,
            "closing failed",
            "%s: it cannot be closed: %s",
            *(runtime.label, told(failure)),
        )
    _failed(runtime, entry, error)


async def _first_answer(
    runtime: Runtime, connection: Connection, deadline: float
) -> Exception | None:
    """
    Probe a new *connection*, and close it if nothing is answered until *deadline*.

    Returns:
        The error if it was refused, None if it was answered.

    Raises:
        ConnectFailed: Nothing was answered, or the other side is no authorizer.
    """
    left = max(0.0, deadline - runtime.now())
    greet = getattr(connection, "greet", connection.probe)
    try:
        await _within(runtime.clock, left, greet, left)
    except Exception as error:
        verdict = runtime.verdict(connection, error)
        if verdict is Verdict.REFUSED:
            return error
        await _discard(runtime, connection)
        if isinstance(error, ConnectFailed):
            raise
        silent = verdict is Verdict.SILENT or isinstance(error, TimeoutError)
        raise ConnectFailed(
            f"cannot connect to {runtime.target}: a connection was made, but "
            + (
                "nothing was answered on it within connection_timeout="
                f"{runtime.options.connection_timeout:g} s"
                if silent
                else f"it ended before anything was answered on it: {words(error)}"
            ),
            reason="timeout" if silent else "unanswered",
        ) from error.with_traceback(None)
    except BaseException:
        await _discard(runtime, connection)
        raise
    return None


async def _discard(runtime: Runtime, connection: Connection) -> None:
    """Close a new *connection* that never became one of the pool."""
    if runtime.home.is_gone():  # then nothing can be awaited
        _abandon(runtime, connection)
        return
    try:
        with anyio.CancelScope(shield=True):
            await _within(runtime.clock, CLOSE_LIMIT, connection.close, 0.0)
    except Exception as error:  # noqa: BLE001  (a connection may raise anything)
        runtime.log_limit.report(
            logging.WARNING,
            f"closing failed: {type(error).__name__}",
            "%s: closing a new connection to %s failed: %s",
            *(runtime.label, runtime.target, told(error)),
        )


def _as_connect_failed(runtime: Runtime, error: Exception) -> ConnectFailed:
    if isinstance(error, ConnectFailed) and _is_complete(error):
        return error
    if isinstance(error, TimeoutError):
        # Not one that the connector or the system raised, such as ETIMEDOUT, whose time
        # was another one.
        limit = f"connection_timeout={runtime.options.connection_timeout:g} s"
        failed = ConnectFailed(
            f"cannot connect to {runtime.target}: "
            f"{str(error) or f'not established within {limit}'}",
            reason="timeout",
        )
    else:
        failed = ConnectFailed(
            f"cannot connect to {runtime.target}: {told(error)}",
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


def _failed(runtime: Runtime, entry: PoolEntry, error: ConnectFailed) -> None:
    if runtime.home.is_gone():
        return  # the attempt ended with its event loop
    first = not runtime.state.attempts.failures
    runtime.state.connect_failed(entry, error, runtime.now())
    runtime.counters.count(runtime.counters.connect_failures, error.reason)
    # An outage is one event to whoever reads the log, not one a second.
    level = logging.WARNING if first else logging.DEBUG
    runtime.log_limit.report(
        level,
        f"cannot connect: {error.reason}",
        "%s: %s (%s)",
        *(runtime.label, error, runtime.state.status()),
    )


@protected
async def probe(runtime: Runtime, entry: PoolEntry) -> None:
    """Ask *entry* for an answer, unless that is being done."""
    if not entry.probing:
        entry.probing = True
        await probe_claimed(runtime, entry)


@protected
async def probe_claimed(runtime: Runtime, entry: PoolEntry) -> None:
    """Ask *entry* for an answer within `health_check_timeout`; ends its `probing`."""
    try:
        if entry.connection is None or entry.retired is not None:
            return
        if not runtime.state.look_at(entry, runtime.now()):
            await _ask(runtime, entry)
    finally:
        entry.probing = False
    runtime.connections_changed()


async def _ask(runtime: Runtime, entry: PoolEntry) -> None:
    timeout = runtime.options.health_check_timeout
    began = runtime.now()
    if entry.suspect:
        _tell_suspicion(runtime, entry)
    try:
        with runtime.busy_task():
            await _within(runtime.clock, timeout, entry.connection.probe, timeout)
    except Exception as error:  # noqa: BLE001  (a connection may raise anything)
        if entry.retired is not None:
            return  # closed meanwhile, and no answer is no news
        verdict = runtime.verdict(entry.connection, error)
        if verdict is Verdict.REFUSED:
            _refused(runtime, entry, error, began)
        elif verdict is Verdict.ANSWERED:
            # Only the stream was reset, as by a server that has too many.
            _answered(runtime, entry, reset=True)
        else:
            late = runtime.now() - began - timeout
            _unanswered(runtime, entry, error, late=late)
    else:
        _answered(runtime, entry)


def _tell_suspicion(runtime: Runtime, entry: PoolEntry) -> None:
    silent = entry.suspected_at == entry.timed_out_at
    reason = entry.last_error or "it proved nothing for too long"
    runtime.log_limit.report(
        # Callers got no answer: that is worth a line at the default level.
        logging.WARNING if silent else logging.INFO,
        "suspect: silent" if silent else "suspect",
        "%s: a connection to %s is suspect and gets no calls until it answers a "
        "probe: %s (%s)",
        *(runtime.label, place(runtime, entry)),
        "two calls in a row got no answer in time" if silent else reason,
        runtime.state.status(),
    )


def _answered(runtime: Runtime, entry: PoolEntry, *, reset: bool = False) -> None:
    was_out, was_suspect = runtime.state.outage.declared, entry.suspect
    runtime.state.answered(entry, runtime.now())
    if reset:
        runtime.state.failed()  # the connection is well, but there was no status
    else:
        runtime.answered_probes += 1
    if was_out:
        runtime.log_limit.report(
            logging.INFO,
            "outage over",
            "%s: %s answers again, the outage is over (%s)",
            *(runtime.label, place(runtime, entry), runtime.state.status()),
            all_counts=True,
        )
    elif was_suspect:
        runtime.log_limit.report(
            logging.INFO,
            "recovered",
            "%s: a connection to %s answered its probe and is used again (%s)",
            *(runtime.label, place(runtime, entry), runtime.state.status()),
        )


def _refused(
    runtime: Runtime, entry: PoolEntry, error: Exception, began: float
) -> None:
    """Draw the consequences of a probe that was refused with *error*."""
    entry.last_error = told(error)
    runtime.counters.probe_failures += 1
    failure = ConnectFailed(
        f"{runtime.target} answers that its server is not available: {words(error)}",
        reason="unavailable",
    )
    failure.__cause__ = error.with_traceback(None)
    begins = runtime.state.probe_refused(entry, failure, began, runtime.now())
    runtime.dismiss_refused()
    if begins:
        runtime.log_limit.report(
            logging.WARNING,
            "refused",
            "%s: %s; callers fail until a probe is answered (%s)",
            *(runtime.label, logged(failure), runtime.state.status()),
        )
    else:
        runtime.log_limit.report(
            logging.DEBUG,
            "probe refused",
            "%s: a probe was refused by %s: %s (%s)",
            *(runtime.label, place(runtime, entry), told(error)),
            runtime.state.status(),
        )


def _unanswered(
    runtime: Runtime, entry: PoolEntry, error: Exception, late: float
) -> None:
    if isinstance(error, TimeoutError) or kind_of(error) == "DEADLINE_EXCEEDED":
        limit = runtime.options.health_check_timeout
        entry.last_error = f"no answer within health_check_timeout={limit:g} s"
    else:
        entry.last_error = told(error)
    if late > LATE and not entry.excused:
        # This loop was blocked, or the machine asleep: the answer may be there.
        entry.excused = True
        entry.suspect = False
        runtime.state.suspect(entry, runtime.now())
        return
    runtime.counters.probe_failures += 1
    second = entry.suspect
    runtime.state.unanswered(entry, runtime.now())
    runtime.log_limit.report(
        logging.WARNING if second else logging.DEBUG,
        f"health check failed: {kind_of(error)}",
        "%s: a connection to %s failed its health check%s: %s (%s)",
        runtime.label,
        place(runtime, entry),
        " and is closed" if second else ", and gets a second one",
        entry.last_error,
        runtime.state.status(),
    )


@protected
async def close(runtime: Runtime, entry: PoolEntry) -> None:
    """Close the connection of *entry*, whose leases are back or out of time."""
    where, reason = place(runtime, entry), entry.retired or "close"
    connection, entry.connection = entry.connection, None
    try:
        runtime.counters.count(runtime.counters.closes, reason)
        lost = reason in _LOSSES
        error = f", its last error: {entry.last_error}" if entry.last_error else ""
        runtime.log_limit.report(
            # What nobody here has decided is news.
            logging.INFO if lost else logging.DEBUG,
            f"closing: {reason}",
            "%s: closing a connection to %s after %.1f s: %s%s (left: %s)",
            *(runtime.label, where, runtime.perf_counter() - entry.alive_since, reason),
            *(error if lost else "", runtime.state.status()),
        )
        with anyio.CancelScope(shield=True), runtime.busy_task():
            await _within(runtime.clock, CLOSE_LIMIT, connection.close, 0.0)
    except TimeoutError:
        runtime.log_limit.report(
            logging.WARNING,
            "closing took too long",
            "%s: closing %r took more than %g s and was given up",
            runtime.label,
            connection,
            CLOSE_LIMIT,
        )
    except Exception as failure:  # noqa: BLE001  (a connection may raise anything)
        runtime.log_limit.report(
            logging.WARNING,
            f"closing failed: {type(failure).__name__}",
            "%s: closing a connection to %s failed",
            *(runtime.label, where),
            exc_info=True,
        )
    finally:
        runtime.state.closed(entry)
        runtime.connections_changed()


def drop(runtime: Runtime, entry: PoolEntry) -> None:
    """Close the connection of *entry* at once, or at least keep it no longer."""
    connection, entry.connection = entry.connection, None
    entry.is_lost = None
    if connection is None:
        return
    runtime.counters.count(runtime.counters.closes, entry.retired or "close")
    _abandon(runtime, connection)


def _abandon(runtime: Runtime, connection: Connection) -> None:
    """Have *connection* free what it holds, because its event loop was closed."""
    try:
        abandon = getattr(connection, "abandon", None)
        if abandon is not None:
            abandon()
    except Exception as failure:  # noqa: BLE001  (a connection may raise anything)
        runtime.log_limit.report(
            logging.WARNING,
            f"abandon() failed: {type(failure).__name__}",
            "%s: abandon() of a connection failed",
            runtime.label,
            exc_info=True,
        )
