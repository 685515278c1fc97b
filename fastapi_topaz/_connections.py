"""
The life of one connection: the attempt to make it, its probes, its closing.

Each runs in a task of the host's group, never in a request's: a connection that
outlives the request which wanted it serves the next one.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, TypeVar

import anyio

from fastapi_topaz.exceptions import ConnectFailed, PoolError


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastapi_topaz._entry import PoolEntry
    from fastapi_topaz._runtime import Runtime


__all__ = ["CLOSE_LIMIT", "close", "connect", "probe"]


logger = logging.getLogger("fastapi_topaz.pool")

T = TypeVar("T")

CLOSE_LIMIT = 5.0
"""Seconds that closing one connection may take."""


async def _within(
    timeout: float, function: Callable[[float], Awaitable[T]], argument: float
) -> T:
    """
    Return what *function* returns within *timeout* seconds.

    A connection may be of anybody's making, and some libraries answer a deadline with
    a cancellation of their own, which no scope knows (grpc.aio does). Let through, it
    would end the tasks of the pool as if the pool was closed.
    """
    scope = anyio.CancelScope()
    try:
        with anyio.fail_after(timeout) as scope:
            return await function(argument)
    except anyio.get_cancelled_exc_class() as error:
        if anyio.current_effective_deadline() == -math.inf:
            raise  # it is ours: close() has begun, or the loop ends
        if scope.cancel_called:
            raise TimeoutError from error
        raise ConnectionAbortedError("it cancelled itself") from error


async def connect(runtime: Runtime, entry: PoolEntry) -> None:
    """Make one attempt to establish the connection of *entry*."""
    scope = anyio.CancelScope()
    runtime.attempts.add(scope)
    try:
        with scope:
            await _attempt(runtime, entry)
    finally:
        runtime.attempts.discard(scope)
        # By close(), or with the loop.
        runtime.state.connect_cancelled(entry)
        runtime.connections_changed()


async def _attempt(runtime: Runtime, entry: PoolEntry) -> None:
    timeout = runtime.options.connection_timeout
    began = runtime.now()
    try:
        connection = await _within(timeout, runtime.connector.connect, timeout)
    except Exception as error:  # noqa: BLE001  (a connector may raise anything)
        _failed(runtime, entry, _as_connect_failed(runtime, error))
        return
    if connection is None:
        nothing = ConnectFailed(
            f"cannot connect to {runtime.target}: {runtime.connector!r} returned None",
            permanent=True,
        )
        _failed(runtime, entry, nothing)
        return
    runtime.state.connected(entry, connection, runtime.now())
    runtime.counters.connects += 1
    runtime.observer.connected(runtime.now() - began)
    logger.debug("%s: connected to %s", runtime.label, runtime.target)


def _as_connect_failed(runtime: Runtime, error: Exception) -> ConnectFailed:
    if isinstance(error, ConnectFailed):
        return error
    if isinstance(error, TimeoutError):
        failed = ConnectFailed(
            f"cannot connect to {runtime.target}: not established within "
            f"connection_timeout={runtime.options.connection_timeout:g} s",
            reason="timeout",
        )
    else:
        failed = ConnectFailed(
            f"cannot connect to {runtime.target}: {str(error) or repr(error)}",
            # The process was forked, which stays as it is.
            permanent=type(error) is PoolError,
        )
    failed.__cause__ = error
    return failed


def _failed(runtime: Runtime, entry: PoolEntry, error: ConnectFailed) -> None:
    first = not runtime.state.failures
    runtime.state.connect_failed(entry, error, runtime.now())
    runtime.counters.count(runtime.counters.connect_failures, error.reason)
    # An outage is one event to whoever reads the log, not one a second.
    level = logging.WARNING if first else logging.DEBUG
    logger.log(level, "%s: %s (%s)", runtime.label, error, runtime.state.status())


async def probe(runtime: Runtime, entry: PoolEntry) -> None:
    """Clear *entry* if it answers within `health_check_timeout`, else retire it."""
    timeout = runtime.options.health_check_timeout
    if entry.connection is None or entry.retired is not None or entry.probing:
        return
    entry.probing = True
    try:
        await _within(timeout, entry.connection.probe, timeout)
    except Exception as error:  # noqa: BLE001  (a connection may raise anything)
        if entry.retired is not None:
            return  # closed meanwhile; that it does not answer is no news
        runtime.counters.probe_failures += 1
        runtime.state.retire(entry, "unhealthy")
        logger.warning(
            "%s: a connection to %s failed its health check and is closed: %s (%s)",
            runtime.label,
            runtime.target,
            str(error) or repr(error),
            runtime.state.status(),
        )
    else:
        entry.proven_at = runtime.now()
        runtime.state.cleared(entry)
    finally:
        entry.probing = False
    runtime.connections_changed()


async def close(runtime: Runtime, entry: PoolEntry) -> None:
    """Close the connection of *entry*, whose leases are back or out of time."""
    connection, entry.connection = entry.connection, None
    reason = entry.retired or "close"
    try:
        if connection is None:
            return
        runtime.counters.count(runtime.counters.closes, reason)
        logger.debug("%s: closing a connection (%s)", runtime.label, reason)
        with anyio.CancelScope(shield=True):
            await _within(CLOSE_LIMIT, connection.close, 0.0)
    except TimeoutError:
        logger.warning(
            "%s: closing %r took more than %g s and was given up",
            runtime.label,
            connection,
            CLOSE_LIMIT,
        )
    except Exception:
        logger.warning("%s: closing failed", runtime.label, exc_info=True)
    finally:
        runtime.state.closed(entry)
        runtime.settle()
