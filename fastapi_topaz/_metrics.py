"""
The metrics of all pools, as OpenTelemetry instruments.

What is counted is counted in plain integers by the pool, and read when somebody
collects: an SDK counter costs microseconds per add. Only the histograms record as
things happen.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING, ClassVar

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from opentelemetry.metrics import Meter, MeterProvider

    from fastapi_topaz._status import PoolCounters, PoolStatus


__all__ = ["PoolMetrics"]


logger = logging.getLogger("fastapi_topaz.metrics")

SCOPE = "fastapi_topaz"

# Seconds. The SDK's own boundaries start at 5, which is a timeout here.
BOUNDARIES = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025),
    *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)


GAUGES: tuple[tuple[str, str, Callable[[PoolStatus], int]], ...] = (
    ("topaz_pool_waiting", "Callers waiting in acquire()", lambda s: s.waiting),
    (
        "topaz_pool_connections_max",
        "The limit of open connections",
        lambda s: s.max_connections,
    ),
    ("topaz_pool_streams_in_use", "Leases out now", lambda s: s.streams_in_use),
)

COUNTERS: tuple[tuple[str, str, Callable[[PoolCounters], int]], ...] = (
    ("topaz_pool_acquisitions", "Leases given out", lambda c: c.acquisitions),
    ("topaz_pool_timeouts", "Calls of acquire() that timed out", lambda c: c.timeouts),
    ("topaz_pool_rejected", "Refused because saturated", lambda c: c.rejected),
    ("topaz_pool_connects", "Connections established", lambda c: c.connects),
    ("topaz_pool_probe_failures", "Failed probes", lambda c: c.probe_failures),
)

COUNTERS_BY_REASON: tuple[
    tuple[str, str, Callable[[PoolCounters], Mapping[str, int]]], ...
] = (
    (
        "topaz_pool_connect_failures",
        "Failed attempts to connect, by reason",
        lambda c: c.connect_failures,
    ),
    ("topaz_pool_closes", "Connections closed, by reason", lambda c: c.closes),
)


class PoolMetrics:
    """
    The observer of one pool.

    Strictly private. While it is attached, collecting reads the pool's numbers; it
    holds them through callables, and nothing global holds it but weakly.
    """

    def __init__(
        self,
        provider: MeterProvider | None,
        name: str | None,
        status: Callable[[], PoolStatus],
        counters: PoolCounters,
    ) -> None:
        self.attributes: Mapping[str, str] = {} if name is None else {"pool": name}
        self.status = status
        self.counters = counters
        self._broken = False
        self._instruments = _Instruments.of(provider)
        self._wait = self._instruments.wait
        self._hold = self._instruments.hold
        self._connect = self._instruments.connect

    def attach(self) -> None:
        """Let the pool be seen."""
        self._instruments.attach(self)

    def detach(self) -> None:
        """Let the pool be seen no more."""
        self._instruments.detach(self)

    # Twice for each lease, so each records by itself: another call costs as much as
    # all of it does without an SDK.

    def acquired(self, waited: float, /) -> None:
        """Record how long a lease was waited for."""
        try:
            self._wait.record(waited, self.attributes)
        except Exception as error:  # noqa: BLE001  (somebody else's code)
            self._failed(error)

    def released(self, held: float, /) -> None:
        """Record how long a lease was held."""
        try:
            self._hold.record(held, self.attributes)
        except Exception as error:  # noqa: BLE001
            self._failed(error)

    def connected(self, took: float, /) -> None:
        """Record how long it took to connect."""
        try:
            self._connect.record(took, self.attributes)
        except Exception as error:  # noqa: BLE001
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        # What breaks the recording must not break the pool.
        if not self._broken:
            self._broken = True
            logger.warning("recording a metric failed", exc_info=error)


class _Instruments:
    """
    One set of instruments, shared by all pools that report to one provider.

    Instruments cannot be taken back, and two of one name disturb each other.
    """

    _making: ClassVar = threading.Lock()
    _known: ClassVar[weakref.WeakKeyDictionary[object, _Instruments]] = (
        weakref.WeakKeyDictionary()
    )
    # Until a global provider is set, OpenTelemetry hands out proxies that find it
    # later; they are as good as the provider itself.
    _global: ClassVar[_Instruments | None] = None

    @classmethod
    def of(cls, provider: MeterProvider | None) -> _Instruments:
        with cls._making:
            if provider is None:
                if cls._global is None:
                    cls._global = cls(metrics.get_meter(SCOPE))
                return cls._global
            if provider not in cls._known:
                cls._known[provider] = cls(provider.get_meter(SCOPE))
            return cls._known[provider]

    def __init__(self, meter: Meter) -> None:
        self._pools: weakref.WeakSet[PoolMetrics] = weakref.WeakSet()
        # Metrics are collected in threads of their own.
        self._lock = threading.Lock()
        self.wait = meter.create_histogram(
            "topaz_pool_acquire_latency",
            unit="s",
            description="Time acquire() took to give out a lease",
            explicit_bucket_boundaries_advisory=BOUNDARIES,
        )
        self.hold = meter.create_histogram(
            "topaz_pool_hold_time",
            unit="s",
            description="Time a lease was held",
            explicit_bucket_boundaries_advisory=BOUNDARIES,
        )
        self.connect = meter.create_histogram(
            "topaz_pool_connect_time",
            unit="s",
            description="Time it took to establish a connection",
            explicit_bucket_boundaries_advisory=BOUNDARIES,
        )
        # The name ends in _total, which is the exporter's suffix for counters, and
        # stays: it is what dashboards of this pool have always asked for.
        meter.create_observable_up_down_counter(
            "topaz_pool_connections_total",
            [self._connections],
            description="Open connections by state",
        )
        for name, description, gauge in GAUGES:
            meter.create_observable_up_down_counter(
                name, [self._gauge(gauge)], description=description
            )
        for name, description, counter in COUNTERS:
            meter.create_observable_counter(
                name, [self._counter(counter)], description=description
            )
        for name, description, by_reason in COUNTERS_BY_REASON:
            meter.create_observable_counter(
                name, [self._by_reason(by_reason)], description=description
            )

    def attach(self, pool: PoolMetrics) -> None:
        with self._lock:
            self._pools.add(pool)

    def detach(self, pool: PoolMetrics) -> None:
        with self._lock:
            self._pools.discard(pool)

    def _attached(self) -> list[PoolMetrics]:
        with self._lock:
            return list(self._pools)

    def _connections(self, _options: CallbackOptions) -> Iterable[Observation]:
        for pool in self._attached():
            status = pool.status()
            yield Observation(status.idle, {**pool.attributes, "state": "idle"})
            yield Observation(status.busy, {**pool.attributes, "state": "busy"})

    def _gauge(
        self, read: Callable[[PoolStatus], int]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            for pool in self._attached():
                yield Observation(read(pool.status()), pool.attributes)

        return observe

    def _counter(
        self, read: Callable[[PoolCounters], int]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            for pool in self._attached():
                yield Observation(read(pool.counters), pool.attributes)

        return observe

    def _by_reason(
        self, read: Callable[[PoolCounters], Mapping[str, int]]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_options: CallbackOptions) -> Iterable[Observation]:
            for pool in self._attached():
                for reason, count in list(read(pool.counters).items()):
                    yield Observation(count, {**pool.attributes, "reason": reason})

        return observe
