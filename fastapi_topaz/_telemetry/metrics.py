"""The metrics of a pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from fastapi_topaz._telemetry.instruments import TOPAZ, Convention
from fastapi_topaz._telemetry.reports import Report, Source
from fastapi_topaz._telemetry.semconv import DB_CLIENT


if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.metrics import MeterProvider

    from fastapi_topaz._pool.state.status import PoolCounters, PoolObserver, PoolStatus

    PoolConvention: TypeAlias = Convention[PoolStatus, PoolCounters]


__all__ = ["PoolMetrics", "Source"]


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


class _Report(Report):
    """The metrics of one pool under one convention."""

    def __init__(
        self,
        provider: MeterProvider | None,
        convention: PoolConvention,
        name: str | None,
        source: Source,
    ) -> None:
        super().__init__(provider, convention, source)
        self._convention = convention
        self._name = name
        self.attributes = {} if name is None else {convention.pool: name}
        self._wait = self.instruments.durations["wait"]
        self._hold = self.instruments.durations["hold"]
        self._connect = self.instruments.durations["connect"]

    def labels(self) -> Mapping[str, str]:
        return self.attributes

    def attach(self, target: str) -> None:
        if self._name is None and self._convention.names_all:
            self.attributes = {self._convention.pool: target}
        self.instruments.attach(self)

    def detach(self) -> None:
        self.instruments.detach(self)

    def acquired(self, waited: float, /) -> None:
        """Record how long a caller waited for a lease, in seconds."""
        try:
            self._wait.record(waited, self.attributes)
        except Exception as error:  # noqa: BLE001  (code of the metrics SDK)
            self.failed(error)

    def released(self, held: float, /) -> None:
        """Record how long a lease was held, in seconds."""
        try:
            self._hold.record(held, self.attributes)
        except Exception as error:  # noqa: BLE001
            self.failed(error)

    def connected(self, took: float, /) -> None:
        """Record how long it took to connect, in seconds."""
        try:
            self._connect.record(took, self.attributes)
        except Exception as error:  # noqa: BLE001
            self.failed(error)


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
