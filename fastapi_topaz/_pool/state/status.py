"""The public status of a pool and its connections, and its counters and observer."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol, TypeAlias

import attrs

from fastapi_topaz.exceptions import (
    PoolClosed,
    PoolError,
    PoolMisuse,
    PoolSaturated,
    PoolTimeout,
)


__all__ = [
    "CloseReason",
    "ConnectionCondition",
    "ConnectionStatus",
    "LimitReason",
    "PoolCounters",
    "PoolObserver",
    "PoolReport",
    "PoolStatus",
]


LimitReason: TypeAlias = Literal[
    "capacity", "start", "quick", "trial", "slow", "lost", "undone"
]
"""
Why the limit is what it is:

- `capacity`: it is the capacity of the pool, which is the highest limit.
- `start`: the pool is new, and has not raised it yet.
- `quick`: raised, because the calls are quick.
- `trial`: doubled on trial, although the calls are not quick.
- `slow`: lowered, because the calls took too much of their budget.
- `lost`: lowered, because too many calls got no answer within their budget.
- `undone`: set back, because the last change did not help.
"""

# Status objects are dataclasses of the standard library. The other records are attrs
# classes, but FastAPI and pydantic serialise only a dataclass at any place in the
# result of a route.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PoolStatus:
    """
    A snapshot of a pool, as `ConnectionPool.status()` returns it.

    A FastAPI route may return it.

    Attributes:
        total: The open connections, `idle + busy`. Connections that are still being
            established do not count.
        idle: The open connections without a lease.
        busy: The open connections with at least one lease.
        healthy_connections: The open connections that the pool may lease. They are
            neither suspect nor leaving.
        max_connections: The most connections that the pool opens.
        min_connections: The connections that the pool keeps once it is in use.
        waiting: The callers that wait in `acquire()`.
        connecting: The connections that are being established.
        streams_in_use: The leases given out.
        streams_max: The most leases at once, with `max_connections` connections.
        suspect: The open connections that get no new lease until they answer a probe.
        leaving: The open connections that close when their last lease is back.
        failing: True after a failed attempt to connect, until one succeeds. Also True
            in an outage.
        limit: The most leases at once now: see `adaptive_limit` of `ConnectionPool`. 0
            if the pool is not open.
        limit_reason: Why the limit is what it is: see `LimitReason`.
        estimated_wait: The seconds that a check would wait for its lease if it came
            now. 0 if a lease is free.
        ready: True if the pool is open, and its last answer is newer than its last
            failure. False before the first answer. Answers to calls and to probes
            count, also errors of the authorizer's own. Failures are failed attempts to
            connect, refusals, missing answers and lost calls. To ask the authorizer
            now, see `TopazConfig.is_ready`.
        healthy: True if a check would get a connection: at least one is healthy. If
            none is, True as long as no attempt to connect has failed since the last
            success. So a pool that is not in use yet is healthy. If all connections are
            suspect or leaving, the pool is healthy as long as `failing` is False.
    """

    total: int
    idle: int
    busy: int
    healthy_connections: int
    max_connections: int
    min_connections: int = 0
    waiting: int = 0
    connecting: int = 0
    streams_in_use: int = 0
    streams_max: int = 0
    suspect: int = 0
    leaving: int = 0
    failing: bool = False
    ready: bool = False
    limit: int = 0
    limit_reason: LimitReason = "capacity"
    estimated_wait: float = 0.0
    # A derived value, but a field, so that every serialiser includes it.
    healthy: bool = dataclasses.field(init=False, default=False)

    def __post_init__(self) -> None:
        healthy = self.healthy_connections > 0 or (
            not self.failing and self.total <= self.suspect + self.leaving
        )
        object.__setattr__(self, "healthy", healthy)

    def as_dict(self) -> dict[str, Any]:
        """Return all attributes as a dict, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"total={self.total} busy={self.busy} waiting={self.waiting} "
            f"connecting={self.connecting}"
        )


ConnectionCondition: TypeAlias = Literal["idle", "busy", "suspect", "leaving"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionStatus:
    """
    A snapshot of one open connection, as `ConnectionPool.connections()` returns it.

    A FastAPI route may return it.

    Attributes:
        peer: The address of the server, such as `ipv4:10.0.0.7:8282`. None if the
            connection does not give it.
        condition: `idle`, `busy` (it has leases), `suspect` (it gets no new lease until
            it answers a probe), or `leaving` (it closes when its last lease is back).
        streams: The leases that it serves.
        age: Seconds since it was established.
        idle_for: Seconds since its last lease came back. Without any lease so far,
            seconds since it was established. 0 while it has a lease.
        last_error: The error of the last failed call or probe on it, or None. Later
            successful calls do not reset it.
    """

    peer: str | None
    condition: ConnectionCondition
    streams: int
    age: float
    idle_for: float
    last_error: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return all attributes as a dict, ready for JSON."""
        return dataclasses.asdict(self)


CloseReason: TypeAlias = Literal[
    "idle",
    "lifetime",
    "lost",
    "unhealthy",
    "spread",
    "drain",
    "resize",
    "discarded",
    "close",
]


@attrs.define
class PoolCounters:
    """
    The counters of a pool. They never decrease, even if the pool is reopened.

    Each `acquire()` counts in exactly one of the first six, by its outcome. This holds
    for a configured pool that is used on its own event loop.
    """

    acquisitions: int = 0
    timeouts: int = 0
    rejected: int = 0
    failed: int = 0
    closed: int = 0
    cancelled: int = 0

    connects: int = 0
    connect_retries: int = 0
    connect_failures: dict[str, int] = attrs.Factory(dict)
    closes: dict[str, int] = attrs.Factory(dict)
    probe_failures: int = 0
    # How often a lost check was repeated, and how often it was not, because too many
    # were.
    retries: int = 0
    retries_suppressed: int = 0
    # The changes of the limit of leases, by reason.
    limit_changes: dict[str, int] = attrs.Factory(dict)
    # The leases held for longer than `leak_threshold`, and the leases that were taken
    # back after they were garbage-collected.
    leaked: int = 0
    reclaimed: int = 0

    def reset(self) -> None:
        """Count from 0 again: this process was forked, and its parent counts on."""
        for name, value in attrs.asdict(PoolCounters()).items():
            setattr(self, name, value)

    def count_refused(self, error: BaseException) -> None:
        """Count an `acquire()` that ended with *error*, by the class of the error."""
        match error:
            case PoolTimeout():
                self.timeouts += 1
            case PoolSaturated():
                self.rejected += 1
            case PoolClosed():
                self.closed += 1
            case PoolMisuse() if error.__cause__ is None:
                pass  # The caller used the pool where it is not open.
            case PoolError():
                self.failed += 1
            case _:
                self.cancelled += 1

    def count(self, which: dict[str, int], reason: str) -> None:
        """Add one to *reason* in *which*, one of the two dicts of counts by reason."""
        which[reason] = which.get(reason, 0) + 1


class PoolReport(Protocol):
    """Reports the numbers of a pool, for example as metrics, while it is attached."""

    observer: PoolObserver

    def attach(self, target: str) -> None:
        """Start the report of a pool that connects to *target*."""

    def detach(self) -> None:
        """Stop the report, and keep the numbers."""


class PoolObserver(Protocol):
    """Receives durations in seconds. Other numbers come from status and counters."""

    def acquired(self, waited: float, /) -> None:
        """Record that a lease was given out after *waited* seconds."""

    def released(self, held: float, /) -> None:
        """Record that a lease came back after *held* seconds."""

    def connected(self, took: float, /) -> None:
        """Record that a connection was established in *took* seconds."""
