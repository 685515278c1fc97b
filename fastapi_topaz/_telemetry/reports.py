"""
Reports numbers to OpenTelemetry: those of pools, and those of decisions.

Events are counted in plain integers, because each add() of an SDK counter takes
microseconds. The integers are read when the metrics are collected. Only histograms
record each event at once.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import attrs
from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from fastapi_topaz._error_text import without_context
from fastapi_topaz._telemetry.instruments import BOUNDARIES
from fastapi_topaz._version import VERSION


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from opentelemetry.metrics import Histogram, Meter, MeterProvider

    from fastapi_topaz._telemetry.instruments import Convention, Counter, Gauge

    Callback = Callable[[CallbackOptions], Iterable[Observation]]
    Known: TypeAlias = dict[Convention[Any, Any], "Instruments"]


__all__ = ["Instruments", "Report", "Source"]


logger = logging.getLogger("fastapi_topaz.metrics")

SCOPE = "fastapi_topaz"


@attrs.frozen
class Source:
    """The source of one report's numbers."""

    status: Callable[[], Any]
    counters: Any


class Report:
    """
    The metrics of one source under one convention.

    While it is attached, each collection reads the numbers of the source. All global
    references to it are weak.

    Args:
        provider: The provider of the instruments. None means the global one.
        convention: The instruments.
        source: The source of the numbers.
    """

    def __init__(
        self,
        provider: MeterProvider | None,
        convention: Convention[Any, Any],
        source: Source,
    ) -> None:
        self.source = source
        self.instruments = Instruments.of(provider, convention)
        self._broken = False

    def labels(self) -> Mapping[str, str]:
        """Return the attributes of all values of this source."""
        raise NotImplementedError

    def forked(self) -> None:
        """Prepare for the use in this process, which was forked."""

    def failed(self, error: Exception) -> None:
        """Log the first *error* of the metrics SDK, which must not break the rest."""
        if not self._broken:
            self._broken = True
            logger.warning("recording a metric failed", exc_info=without_context(error))


class Instruments:
    """
    The instruments of one convention, shared by all reports to the same provider.

    Instruments cannot be removed, and two with the same name disturb each other.
    """

    _making: ClassVar[threading.Lock] = threading.Lock()
    _known: ClassVar[weakref.WeakKeyDictionary[object, Known]] = (
        weakref.WeakKeyDictionary()
    )
    # Until a global provider is set, OpenTelemetry returns proxies. They find the
    # provider later, so they can be used like the provider itself.
    _global: ClassVar[Known] = {}

    @classmethod
    def of(
        cls, provider: MeterProvider | None, convention: Convention[Any, Any]
    ) -> Instruments:
        with cls._making:
            current = metrics.get_meter_provider()
            if provider is None or provider is current:
                # The global provider has one set, found later or passed explicitly. The
                # SDK drops the callbacks of a second set with the same names.
                known = cls._known.get(current, cls._global)
            else:
                known = cls._known.setdefault(provider, {})
            if convention not in known:
                source: Any = metrics if provider is None else provider
                meter = source.get_meter(SCOPE, VERSION)
                try:
                    known[convention] = cls(meter, convention)
                except AttributeError as error:
                    raise TypeError(
                        "meter_provider must be a MeterProvider; the object that "
                        f"its get_meter() returned has no instruments: {error}"
                    ) from error
            return known[convention]

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
                reports = instruments.attached()
                instruments.reports.clear()
                for report in reports:
                    report.forked()

    def __init__(self, meter: Meter, convention: Convention[Any, Any]) -> None:
        # Metrics are collected in other threads. There is no lock, because a fork could
        # inherit it locked. Each operation on the dict is atomic.
        self.reports: dict[weakref.ref[Report], None] = {}
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

    def attach(self, report: Report) -> None:
        reports = self.reports
        reports[weakref.ref(report, lambda gone: reports.pop(gone, None))] = None

    def detach(self, report: Report) -> None:
        self.reports.pop(weakref.ref(report), None)

    def attached(self) -> list[Report]:
        """Return the reports that are attached and still exist."""
        reports = [reference() for reference in list(self.reports)]
        return [report for report in reports if report is not None]

    def _level(self, level: Gauge[Any]) -> Callback:
        def observe(_options: CallbackOptions) -> Iterator[Observation]:
            sources = [(each, each.source.status) for each in self.attached()]
            found = list(_observations(level, sources))
            return iter(found if level.additive else _largest(found))

        return observe

    def _event(self, event: Counter[Any]) -> Callback:
        def observe(_options: CallbackOptions) -> Iterator[Observation]:
            sources = [
                (each, partial(getattr, each.source, "counters"))
                for each in self.attached()
            ]
            return _observations(event, sources)

        return observe


def _observations(
    instrument: Gauge[Any] | Counter[Any],
    sources: Iterable[tuple[Report, Callable[[], Any]]],
) -> Iterator[Observation]:
    label, owners = instrument.label, set()
    names = (label,) if isinstance(label, str) else label
    for report, numbers_of in sources:
        numbers = numbers_of()
        owner = instrument.owner(numbers)
        if id(owner) in owners:
            continue
        owners.add(id(owner))
        value, attributes = instrument.read(numbers), report.labels()
        if isinstance(value, int | float):
            yield Observation(value, attributes)
            continue
        for kind, count in value.items():
            kinds = (kind,) if isinstance(kind, str) else kind
            labels = dict(zip(names, kinds, strict=True))
            yield Observation(count, {**attributes, **labels})


def _largest(found: Iterable[Observation]) -> list[Observation]:
    """Return the largest observation of those with equal attributes."""
    largest: dict[Any, Observation] = {}
    for each in found:
        key = frozenset((each.attributes or {}).items())
        if key not in largest or each.value > largest[key].value:
            largest[key] = each
    return list(largest.values())


if hasattr(os, "register_at_fork"):  # pragma: no branch  (not on Windows)
    os.register_at_fork(after_in_child=Instruments.after_fork_in_child)
