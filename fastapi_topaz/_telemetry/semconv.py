"""
The metrics under OpenTelemetry's standard names for connection pools.

See "Semantic conventions for database client metrics". They cover less than `TOPAZ`,
but existing dashboards support them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi_topaz._telemetry.instruments import Convention, Counter, Gauge, Histogram


if TYPE_CHECKING:
    from fastapi_topaz._pool.state.status import PoolCounters, PoolStatus


__all__ = ["DB_CLIENT"]


DB_CLIENT: Convention[PoolStatus, PoolCounters] = Convention(
    pool="db.client.connection.pool.name",
    names_all=True,
    durations=(
        Histogram(
            "db.client.connection.wait_time",
            "wait",
            "Time acquire() took to give a lease",
        ),
        Histogram(
            "db.client.connection.use_time",
            "hold",
            "Time a lease was held",
        ),
        Histogram(
            "db.client.connection.create_time",
            "connect",
            "Time it took to connect, if it did",
        ),
    ),
    levels=(
        Gauge(
            "db.client.connection.count",
            "{connection}",
            "Open connections: with a lease, or without",
            lambda s: {"idle": s.idle, "used": s.busy},
            "db.client.connection.state",
        ),
        Gauge(
            "db.client.connection.idle.min",
            "{connection}",
            "Connections that are kept once the pool is in use",
            lambda s: s.min_connections,
        ),
        Gauge(
            "db.client.connection.idle.max",
            "{connection}",
            "Connections that may be idle",
            lambda s: s.max_connections,
        ),
        Gauge(
            "db.client.connection.max",
            "{connection}",
            "Connections there may be, open and connecting",
            lambda s: s.max_connections,
        ),
        Gauge(
            "db.client.connection.pending_requests",
            "{request}",
            "Callers waiting in acquire()",
            lambda s: s.waiting,
        ),
    ),
    events=(
        Counter(
            "db.client.connection.timeouts",
            "{timeout}",
            "Calls of acquire() that got none in time",
            lambda c: c.timeouts,
        ),
    ),
)
