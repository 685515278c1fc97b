"""What a pool tells about itself: a snapshot, counters, and an observer."""

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
    "PoolCounters",
    "PoolObserver",
    "PoolReport",
    "PoolStatus",
]


# Status objects are dataclasses of the standard library, and not attrs classes like the
# rest: FastAPI and pydantic know how to serialise a dataclass, wherever it stands in
# what a route returns.


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PoolStatus:
    """
    A snapshot of a pool, as `ConnectionPool.status()` returns it.

    A FastAPI route may return it.

    Attributes:
        total: Open connections, `idle + busy`. Those still being established are
            not among them.
        idle: Open connections without a lease.
        busy: Open connections with at least one lease.
        healthy_connections: Open connections that may be leased: not suspected of
            being dead, not about to be closed.
        max_connections: The limit.
        min_connections: The number that is kept once the pool is in use.
        waiting: Callers waiting in `acquire()`.
        connecting: Connections being established.
        streams_in_use: Leases given out.
        streams_max: Leases that could be given out, at `max_connections`.
        suspect: Open connections that are leased to nobody until they have answered
            a probe, which is under way.
        leaving: Open connections that close when their last lease is back.
        failing: True if no attempt to connect succeeded since the last one failed.
        ready: True if the pool is open, and its last answer is newer than its last
            failure. Answers are those of calls and of probes, and errors of the
            authorizer's own. Failures are attempts to connect, refusals, missing
            answers and lost calls. False before the first answer. To ask the
            authorizer, see `TopazConfig.is_ready`.
        healthy: Whether a check would have a connection to go to. True with at least
            one healthy connection. Without any, True as long as no attempt to connect
            failed since the last success. So a pool that is not in use yet is
            healthy, and so is one whose connections are only suspected or replaced.
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
    # Derived, but a field: so every serialiser includes it.
    healthy: bool = dataclasses.field(init=False, default=False)

    def __post_init__(self) -> None:
        healthy = self.healthy_connections > 0 or (
            not self.failing and self.total <= self.suspect + self.leaving
        )
        object.__setattr__(self, "healthy", healthy)

    def as_dict(self) -> dict[str, Any]:
        """Return all attributes as a dict that JSON can represent."""
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
        peer: The address of the other side, such as `ipv4:10.0.0.7:8282`; None if
            the connection does not tell.
        condition: `idle`, `busy` (it has leases), `suspect` (a probe decides about
            it), or `leaving` (it closes when its last lease is back).
        streams: Leases it serves.
        age: Seconds since it was established.
        idle_for: Seconds since its last lease came back, or it was made; 0 while it
            has a lease.
        last_error: What the last call or probe on it that failed said of it, also if
            others were answered since.
    """

    peer: str | None
    condition: ConnectionCondition
    streams: int
    age: float
    idle_for: float
    last_error: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return all attributes as a dict that JSON can represent."""
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
    What happened so far; the numbers never fall, also not when a pool is reopened.

    Each call of `acquire()` on a pool that is configured, and used where it is open,
    ends in exactly one of the first six.
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
    # Checks that were lost and asked again, as often as that was.
    retries: int = 0
    # Leases held for longer than `leak_threshold`, and those nobody gave back.
    leaked: int = 0
    reclaimed: int = 0

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
        """Add one to *reason* in one of the counters that are kept by reason."""
        which[reason] = which.get(reason, 0) + 1


class PoolReport(Protocol):
    """Reports the numbers of a pool while it is attached."""

    observer: PoolObserver

    def attach(self, target: str) -> None:
        """Begin, for a pool that leads to *target*."""

    def detach(self) -> None:
        """End; the numbers stay."""


class PoolObserver(Protocol):
    """Told about durations; everything else is read from status and counters."""

    def acquired(self, waited: float, /) -> None:
        """Tell that a lease was given out after *waited* seconds."""

    def released(self, held: float, /) -> None:
        """Tell that a lease came back after *held* seconds."""

    def connected(self, took: float, /) -> None:
        """Tell that a connection was established in *took* seconds."""
