"""
The metrics of all pools, as OpenTelemetry instruments.

The pool counts events in plain integers, because each add() of an SDK counter takes
microseconds. The integers are read when the metrics are collected. Only histograms
record each event at once.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from fastapi_topaz._error_text import without_context
from fastapi_topaz._telemetry.instruments import BOUNDARIES, TOPAZ
from fastapi_topaz._telemetry.semconv import DB_CLIENT
from fastapi_topaz._version import VERSION


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from opentelemetry.metrics import Histogram, Meter, MeterProvider

    from fastapi_topaz._pool.state.status import PoolCounters, PoolObserver, PoolStatus
    from fastapi_topaz._telemetry.instruments import Convention, Counter, Gauge

    Callback = Callable[[CallbackOptions], Iterable[Observation]]


__all__ = ["PoolMetrics"]


logger = logging.getLogger("fastapi_topaz.metrics")

SCOPE = "fastapi_topaz"


@attrs.frozen
class Source:
    """The source of one pool's numbers."""

    status: Callable[[], PoolStatus]
    counters: PoolCounters


class PoolMetrics:
    """
    The metrics of one pool, under one or two conventions.

    Strictly private. While it is attached, each collection reads the pool's numbers
    through callables. All global references to it are weak.
    """

    def __init__(
        self,
        provider: MeterProvider | None,
        name: str | None,
        source: Source,
        *,
        semantic_conventions: bool,
    ) -> None:
        own = _Report(provider, TOPAZ, name, source)
        self._reports = [own]
        # Gets the durations. Each lease reports two. So a single observer is called
        # directly: one more call would double the cost without an SDK.
        self.observer: PoolObserver = own
        if semantic_conventions:
            other = _Report(provider, DB_CLIENT, name, source)
            self._reports.append(other)
            self.observer = _Both(own, other)

    def attach(self, target: str) -> None:
        """Start to report the pool, which connects to *target*."""
        for report in self._reports:
            report.attach(target)

    def detach(self) -> None:
        """Stop reporting the pool."""
        for report in self._reports:
            report.detach()


class _Report:
    """The metrics of one pool under one convention."""

    def __init__(
        self,
        provider: MeterProvider | None,
        convention: Convention,
        name: str | None,
        source: Source,
    ) -> None:
        self._convention = convention
        self._name = name
        self.attributes = {} if name is None else {convention.pool: name}
        self.source = source
        self._broken = False
        self._instruments = _Instruments.of(provider, convention)
        self._wait = self._instruments.durations["wait"]
        self._hold = self._instruments.durations["hold"]
        self._connect = self._instruments.durations["connect"]

    def attach(self, target: str) -> None:
        if self._name is None and self._convention.names_all:
            self.attributes = {self._convention.pool: target}
        self._instruments.attach(self)

    def detach(self) -> None:
        self._instruments.detach(self)

    def acquired(self, waited: float, /) -> None:
        """Record how long a caller waited for a lease, in seconds."""
        try:
            self._wait.record(waited, self.attributes)
        except Exception as error:  # noqa: BLE001  (code of the metrics SDK)
            self._failed(error)

    def released(self, held: float, /) -> None:
        """Record how long a lease was held, in seconds."""
        try:
            self._hold.record(held, self.attributes)
        except Exception as error:  # noqa: BLE001
            self._failed(error)

    def connected(self, took: float, /) -> None:
        """Record how long it took to connect, in seconds."""
        try:
            self._connect.record(took, self.attributes)
        except Exception as error:  # noqa: BLE001
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        # An error in the metrics SDK must not break the pool.
        if not self._broken:
            self._broken = True
            logger.warning("recording a metric failed", exc_info=without_context(error))


class _Both:
    """Passes each event to two observers."""

    def __init__(self, one: PoolObserver, other: PoolObserver) -> None:
        self._one, self._other = one, other

    def acquired(self, waited: float, /) -> None:
        self._one.acquired(waited)
        self._other.acquired(waited)

    def released(self, held: float, /) -> None:
        self._one.released(held)
        self._other.released(held)

    def connected(self, took: float, /) -> None:
        self._one.connected(took)
        self._other.connected(took)


class _Instruments:
    """
    The instruments of one convention, shared by all pools with the same provider.

    Instruments cannot be removed, and two with the same name disturb each other.
    """

    _making: ClassVar[threading.Lock] = threading.Lock()
    _known: ClassVar[weakref.WeakKeyDictionary[object, dict[str, _Instruments]]] = (
        weakref.WeakKeyDictionary()
    )
    # Until a global provider is set, OpenTelemetry returns proxies. They find the
    # provider later, so they can be used like the provider itself.
    _global: ClassVar[dict[str, _Instruments]] = {}

    @classmethod
    def of(cls, provider: MeterProvider | None, convention: Convention) -> _Instruments:
        with cls._making:
            current = metrics.get_meter_provider()
            if provider is None or provider is current:
                # The global provider has one set, found later or passed explicitly. The
                # SDK drops the callbacks of a second set with the same names.
                known = cls._known.get(current, cls._global)
            else:
                known = cls._known.setdefault(provider, {})
            if convention.pool not in known:
                source: Any = metrics if provider is None else provider
                meter = source.get_meter(SCOPE, VERSION)
                try:
                    known[convention.pool] = cls(meter, convention)
                except AttributeError as error:
                    raise TypeError(
                        "meter_provider must be a MeterProvider; the object that "
                        f"its get_meter() returned has no instruments: {error}"
                    ) from error
            return known[convention.pool]

    @classmethod
    def after_fork_in_child(cls) -> None:
        """
        Reset the state that a forked child inherits.

        The child must not report the parent's pools. It must not wait for a lock that
        the parent held at the fork.
        """
        cls._making = threading.Lock()
        for known in (cls._global, *cls._known.values()):
            for instruments in known.values():
                instruments.reports.clear()

    def __init__(self, meter: Meter, convention: Convention) -> None:
        # Metrics are collected in other threads. There is no lock, because a fork could
        # inherit it locked. Each operation on the dict is atomic.
        self.reports: dict[weakref.ref[_Report], None] = {}
        self.durations: dict[str, Histogram] = {
            duration.phase: meter.create_histogram(
                duration.name,
                unit=duration.unit,
                description=duration.description,
                explicit_bucket_boundaries_advisory=BOUNDARIES,
            )
            for duration in convention.durations
        }
        for level in convention.levels:
            create = (
                meter.create_observable_up_down_counter
                if level.additive
                else meter.create_observable_gauge
            )
            create(
                level.name,
                [self._level(level)],
                unit=level.unit,
                description=level.description,
            )
        for event in convention.events:
            meter.create_observable_counter(
                event.name,
                [self._event(event)],
                unit=event.unit,
                description=event.description,
            )

    def attach(self, report: _Report) -> None:
        reports = self.reports
        reports[weakref.ref(report, lambda gone: reports.pop(gone, None))] = None

    def detach(self, report: _Report) -> None:
        self.reports.pop(weakref.ref(report), None)

    def _attached(self) -> list[_Report]:
        reports = [reference() for reference in list(self.reports)]
        return [report for report in reports if report is not None]

    def _level(self, level: Gauge) -> Callback:
        def observe(_options: CallbackOptions) -> Iterator[Observation]:
            for report in self._attached():
                value = level.read(report.source.status())
                yield from _observations(value, level.label, report.attributes)

        return observe

    def _event(self, event: Counter) -> Callback:
        def observe(_options: CallbackOptions) -> Iterator[Observation]:
            for report in self._attached():
                value = event.read(report.source.counters)
                yield from _observations(value, event.label, report.attributes)

        return observe


def _observations(
    value: float | Mapping[str, int], label: str, attributes: Mapping[str, str]
) -> Iterator[Observation]:
    if isinstance(value, int | float):
        yield Observation(value, attributes)
        return
    for kind, count in value.items():
        yield Observation(count, {**attributes, label: kind})


if hasattr(os, "register_at_fork"):  # pragma: no branch  (not on Windows)
    os.register_at_fork(after_in_child=_Instruments.after_fork_in_child)
