"""
The metric instruments: name, unit and description. `TOPAZ` are those of a pool.

The names are OpenTelemetry names. A Prometheus exporter appends the unit to a duration
(`_seconds`), and `_total` to a counter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar, get_args

import attrs

from fastapi_topaz._pool.state.status import CloseReason, LimitReason
from fastapi_topaz.exceptions import FailureReason


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from fastapi_topaz._pool.state.status import PoolCounters, PoolStatus


__all__ = [
    "BOUNDARIES",
    "TOPAZ",
    "Convention",
    "Counter",
    "Gauge",
    "Histogram",
    "Label",
    "Phase",
    "Value",
    "at_least_zero",
]

S = TypeVar("S")
C = TypeVar("C")


# Seconds. The SDK's default boundaries start at 5, which is already a timeout here.
BOUNDARIES = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025),
    *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)

Phase: TypeAlias = Literal["wait", "hold", "connect", "check", "call"]
"""
The phases whose duration is measured: of a pool, wait for a lease, hold it, connect; of
decisions, a whole check, and one call of the authorizer.
"""

Label: TypeAlias = str | tuple[str, ...]
"""The label that splits the values of an instrument, or several. Empty: it has none."""

Value: TypeAlias = "float | Mapping[Any, int]"
"""
The value of an instrument. If it has labels: numbers by the value of the label, or by
the tuple of them.
"""


@attrs.frozen
class Gauge(Generic[S]):
    """
    A gauge: a current count, split by *label* if given.

    The values of sources with equal attributes are added up. Of a gauge that is not
    *additive*, the largest one is reported.

    Attributes:
        owner: Returns the object that the value belongs to. Several sources may share
            it, and then it is reported once. Default: the source itself.
    """

    name: str
    unit: str
    description: str
    read: Callable[[S], Value]
    label: Label = ""
    additive: bool = True
    owner: Callable[[S], object] = lambda source: source


@attrs.frozen
class Counter(Generic[C]):
    """
    A counter: the number of events so far, split by *label* if given.

    For *owner* see `Gauge`.
    """

    name: str
    unit: str
    description: str
    read: Callable[[C], Value]
    label: Label = ""
    owner: Callable[[C], object] = lambda source: source


@attrs.frozen
class Histogram:
    """A histogram: the duration of a phase, in seconds, split by *label* if given."""

    name: str
    phase: Phase
    description: str
    unit: str = "s"
    label: Label = ""


# Compared by identity: it is a key.
@attrs.frozen(eq=False)
class Convention(Generic[S, C]):
    """
    A naming convention: a set of instruments, and the attribute for the pool's name.

    Attributes:
        pool: The metric attribute that holds the name of the pool.
        names_all: Whether a pool without a name uses its target as the name.
        durations, levels, events: The instruments.
    """

    pool: str
    durations: tuple[Histogram, ...]
    levels: tuple[Gauge[S], ...]
    events: tuple[Counter[C], ...]
    names_all: bool = False


K = TypeVar("K")


def at_least_zero(kinds: Iterable[K], counted: Mapping[K, int]) -> Mapping[K, int]:
    """
    Return *counted*, and 0 for each other of *kinds*.

    Each series is reported from the start, with 0. Otherwise Prometheus misses the
    first increase, because the series does not exist before it.
    """
    return {**dict.fromkeys(kinds, 0), **counted}


def _all(reasons: object, counted: Mapping[str, int]) -> Mapping[str, int]:
    return at_least_zero(get_args(reasons), counted)


TOPAZ: Convention[PoolStatus, PoolCounters] = Convention(
    pool="pool",
    durations=(
        Histogram(
            "topaz_pool_acquire_latency",
            "wait",
            "Time from acquire() to the hand-over of a connection",
        ),
        Histogram(
            "topaz_pool_hold_time",
            "hold",
            "Time from the hand-over to the release. A busy event loop lengthens it",
        ),
        Histogram(
            "topaz_pool_connect_time", "connect", "Time it took to connect, if it did"
        ),
    ),
    levels=(
        # A gauge should not end in _total, the exporter's suffix for counters. But
        # existing dashboards use this name.
        Gauge(
            "topaz_pool_connections_total",
            "{connection}",
            "Open connections: with a lease, or without",
            lambda s: {"idle": s.idle, "busy": s.busy},
            "state",
        ),
        Gauge(
            "topaz_pool_connections_healthy",
            "{connection}",
            "Open connections that may be leased",
            lambda s: s.healthy_connections,
        ),
        Gauge(
            "topaz_pool_connections_min",
            "{connection}",
            "Connections that are kept once the pool is in use",
            lambda s: s.min_connections,
        ),
        Gauge(
            "topaz_pool_connections_max",
            "{connection}",
            "Connections there may be, open and connecting",
            lambda s: s.max_connections,
        ),
        Gauge(
            "topaz_pool_connecting",
            "{connection}",
            "Connections being established",
            lambda s: s.connecting,
        ),
        Gauge(
            "topaz_pool_healthy",
            "{pool}",
            "0 if no connection is healthy and attempts to connect fail, else 1. It is "
            "1 before the first use",
            lambda s: int(s.healthy),
        ),
        Gauge(
            "topaz_pool_streams_in_use",
            "{lease}",
            "Leases out now",
            lambda s: s.streams_in_use,
        ),
        Gauge(
            "topaz_pool_streams_max",
            "{lease}",
            "Leases there may be: connections_max x streams_per_connection",
            lambda s: s.streams_max,
        ),
        Gauge(
            "topaz_pool_limit",
            "{lease}",
            "Leases there may be now: the adaptive limit, at most streams_max",
            lambda s: s.limit,
        ),
        Gauge(
            "topaz_pool_estimated_wait",
            "s",
            "Time that a check would wait for its lease if it came now",
            lambda s: s.estimated_wait,
            additive=False,
        ),
        Gauge(
            "topaz_pool_waiting",
            "{request}",
            "Callers waiting in acquire()",
            lambda s: s.waiting,
        ),
    ),
    events=(
        Counter(
            "topaz_pool_acquisitions",
            "{request}",
            "Calls of acquire() that got a lease",
            lambda c: c.acquisitions,
        ),
        Counter(
            "topaz_pool_timeouts",
            "{request}",
            "Calls of acquire() that got none in time",
            lambda c: c.timeouts,
        ),
        Counter(
            "topaz_pool_rejected",
            "{request}",
            "Calls of acquire() refused at once: overload, or max_waiting",
            lambda c: c.rejected,
        ),
        Counter(
            "topaz_pool_cancelled",
            "{request}",
            "Calls of acquire() whose caller was cancelled while waiting",
            lambda c: c.cancelled,
        ),
        Counter(
            "topaz_pool_failed",
            "{request}",
            "Calls of acquire() that failed: no connection, or the pool closed",
            lambda c: {"connect": c.failed, "closed": c.closed},
            "reason",
        ),
        Counter(
            "topaz_pool_connects",
            "{connection}",
            "Connections established",
            lambda c: c.connects,
        ),
        Counter(
            "topaz_pool_connect_failures",
            "{attempt}",
            "Attempts to connect that failed",
            lambda c: _all(FailureReason, c.connect_failures),
            "reason",
        ),
        Counter(
            "topaz_pool_connect_retries",
            "{attempt}",
            "Attempts to connect made after one that failed",
            lambda c: c.connect_retries,
        ),
        Counter(
            "topaz_pool_closes",
            "{connection}",
            "Connections closed",
            lambda c: _all(CloseReason, c.closes),
            "reason",
        ),
        Counter(
            "topaz_pool_probe_failures",
            "{probe}",
            "Health checks that failed, or were refused",
            lambda c: c.probe_failures,
        ),
        Counter(
            "topaz_pool_retries",
            "{check}",
            "Checks that got no answer and were asked again",
            lambda c: c.retries,
        ),
        Counter(
            "topaz_pool_retries_suppressed",
            "{check}",
            "Checks that were not asked again, because too many failed",
            lambda c: c.retries_suppressed,
        ),
        Counter(
            "topaz_pool_limit_changes",
            "{change}",
            "Changes of the adaptive limit",
            lambda c: _all(LimitReason, c.limit_changes),
            "reason",
        ),
        Counter(
            "topaz_pool_leaked",
            "{lease}",
            "Leases held longer than leak_threshold",
            lambda c: c.leaked,
        ),
        Counter(
            "topaz_pool_reclaimed",
            "{lease}",
            "Leases garbage-collected without release()",
            lambda c: c.reclaimed,
        ),
    ),
)
