"""
The metrics of the checks of one configuration, under the names of `DECISIONS`.

Labels have a few values each. None of them is an identity or a policy path.
"""

from __future__ import annotations

from collections import Counter as Count
from itertools import product
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, get_args

import attrs

from fastapi_topaz._error_text import error_kind
from fastapi_topaz._telemetry.instruments import (
    Convention,
    Counter,
    Gauge,
    Histogram,
    at_least_zero,
)
from fastapi_topaz._telemetry.reports import Report, Source


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opentelemetry.metrics import MeterProvider


__all__ = [
    "DECISIONS",
    "ERROR_TYPES",
    "OUTCOMES",
    "CheckSource",
    "DecisionCounts",
    "DecisionMetrics",
]


CheckSource: TypeAlias = Literal["dependency", "manual"]
"""What asked: a guard of a route, or `is_allowed()` or `decide()`."""

SOURCES: tuple[str, ...] = get_args(CheckSource)

OUTCOMES = ("allowed", "denied", "error", "cancelled")
"""The ends of a check."""

CHECK_TYPE = "policy"
"""The only type of a check so far."""

ERROR_TYPES = (
    *("CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND"),
    *("ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "ABORTED"),
    *("FAILED_PRECONDITION", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL"),
    *("UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"),
    *("CircuitOpen", "ConnectFailed", "ConnectionLost", "CredentialsFailed"),
    *("PoolClosed", "PoolMisuse", "PoolSaturated", "PoolTimeout", "other"),
)
"""The errors of a check: gRPC statuses, and classes of `fastapi_topaz.exceptions`."""

STATES = {"closed": 0, "open": 1, "half_open": 2}
"""The states of a circuit breaker, and their numbers as a metric."""

FORKED = object()
"""Replaces the name of the pool in a forked child."""

CHANGES = (
    *(("closed", "open"), ("open", "half_open"), ("half_open", "open")),
    *(("half_open", "closed"), ("open", "closed")),
)
"""The changes of a circuit breaker's state, as (from, to)."""

# Those that the strategies can have: (strategy, whether there was an older answer, and
# the decision).
FALLBACKS = (
    ("deny", False, "denied"),
    ("allow", False, "allowed"),
    *product(("cache_then_error", "cache_then_deny"), (True,), ("allowed", "denied")),
    ("cache_then_deny", False, "denied"),
    *product(("cache_then_allow",), (True,), ("allowed", "denied")),
    ("cache_then_allow", False, "allowed"),
    *product(("custom",), (True, False), ("allowed", "denied")),
)


def error_type(error: BaseException) -> str:
    """Return the one of `ERROR_TYPES` that *error* has."""
    kind = error_kind(error)
    return kind if kind in ERROR_TYPES else "other"


class SourceCounts:
    """
    How the checks of one source ended.

    Attributes:
        allowed, denied, error, cancelled: By outcome.
        hits, misses: The checks that used an answer again, and those that found none.
        fresh, cached: The labels of a duration, for those that found none and others.
    """

    # Plain numbers: to increase one takes a quarter of the time that an entry of a
    # Counter takes.
    __slots__ = (*OUTCOMES, "cached", "fresh", "hits", "misses")

    def __init__(self) -> None:
        self.reset()
        self.label("", {})

    def reset(self) -> None:
        """Count from 0 again."""
        self.allowed = self.denied = self.error = self.cancelled = 0
        self.hits = self.misses = 0

    def label(self, source: str, labels: Mapping[str, str]) -> None:
        """Make the labels of durations. Once, because each check needs them."""
        labels = {**labels, "source": source}
        self.fresh = {**labels, "cached": "false"}
        self.cached = {**labels, "cached": "true"}


class DecisionCounts:
    """
    How the checks of one configuration ended, in this process.

    Attributes:
        sources: By source.
        shared, stale: The answers of equal checks, and older ones.
        errors: By type.
        fallbacks: How often which fallback decided, as (strategy, whether an older
            answer was there, decision).
    """

    def __init__(self) -> None:
        self.sources = {source: SourceCounts() for source in SOURCES}
        self.shared = self.stale = 0
        self.errors: Count[str] = Count()
        self.fallbacks: Count[tuple[str, bool, str]] = Count()

    def reset(self) -> None:
        """Count from 0 again: this process was forked, and its parent counts on."""
        for source in self.sources.values():
            source.reset()
        self.shared = self.stale = 0
        self.errors.clear()
        self.fallbacks.clear()

    def of(self, name: str) -> Mapping[str, int]:
        """Return the number *name* of `SourceCounts` by source."""
        return {
            source: getattr(counts, name) for source, counts in self.sources.items()
        }

    def requests(self) -> Mapping[tuple[str, str, str], int]:
        """Return the ended checks by source, outcome and type."""
        return {
            (source, outcome, CHECK_TYPE): count
            for outcome in OUTCOMES
            for source, count in self.of(outcome).items()
        }

    def fell_back(
        self, strategy: str, is_stale: bool, decision: str, error: Exception
    ) -> None:
        """Count a decision of the fallback *strategy*, because of *error*."""
        self.fallbacks[strategy, is_stale, decision] += 1
        self.errors[error_type(error)] += 1


class Answer(Protocol):
    """A decision."""

    @property
    def allowed(self) -> bool:
        """Whether the check is allowed."""
        ...

    @property
    def origin(self) -> str:
        """Where the decision comes from."""
        ...


class CacheStatus(Protocol):
    """The numbers of a cache."""

    @property
    def size(self) -> int:
        """The number of answers."""
        ...

    @property
    def evictions(self) -> int:
        """The number of answers that made room for others."""
        ...


class Cache(Protocol):
    """A cache of decisions."""

    def status(self) -> CacheStatus:
        """Return its numbers."""
        ...


class CircuitStatus(Protocol):
    """The state of a circuit breaker."""

    @property
    def state(self) -> str:
        """One of `STATES`."""
        ...


class Breaker(Protocol):
    """A circuit breaker."""

    def status(self) -> CircuitStatus:
        """Return its state."""
        ...

    def _changes(self) -> Mapping[tuple[str, str], int]: ...


@attrs.define(eq=False)
class Numbers:
    """The numbers of one configuration."""

    counts: DecisionCounts
    cache: Cache | None
    breaker: Breaker | None
    evictions_before: int = 0

    def restart(self) -> None:
        """Count from 0 in this process. A cache and a breaker see a fork themselves."""
        if self.cache is not None:
            self.evictions_before = self.cache.status().evictions

    def owner_of_state(self) -> object:
        """Return the breaker, which other configurations may share."""
        return self if self.breaker is None else self.breaker

    def owner_of_answers(self) -> object:
        """Return the cache, which other configurations may share."""
        return self if self.cache is None else self.cache

    def state(self) -> int:
        """Return the number of the state of the breaker."""
        return 0 if self.breaker is None else STATES[self.breaker.status().state]

    def size(self) -> int:
        """Return the number of answers in the cache."""
        return 0 if self.cache is None else self.cache.status().size

    def evictions(self) -> int:
        """Return the evictions of the cache in this process."""
        if self.cache is None:
            return 0
        return self.cache.status().evictions - self.evictions_before

    def changes(self) -> Mapping[tuple[str, str], int]:
        """Return how often the state of the breaker changed, by both states."""
        changes = {} if self.breaker is None else self.breaker._changes()  # noqa: SLF001
        return at_least_zero(CHANGES, changes)

    def fallbacks(self) -> Mapping[tuple[str, str, str], int]:
        """Return the decisions of fallbacks by their labels."""
        return {
            (strategy, str(is_stale).lower(), decision): count
            for (strategy, is_stale, decision), count in at_least_zero(
                FALLBACKS, self.counts.fallbacks
            ).items()
        }


DECISIONS: Convention[Numbers, Numbers] = Convention(
    pool="pool",
    durations=(
        Histogram(
            "topaz_auth_latency",
            "check",
            "Time a check took to end with a decision or an error",
            label=("source", "cached"),
        ),
        Histogram(
            "topaz_topaz_latency",
            "call",
            "Time one call of the authorizer took to end with an answer or an error",
        ),
    ),
    levels=(
        Gauge(
            "topaz_circuit_state",
            "{state}",
            "State of the circuit breaker: 0 closed, 1 open, 2 half-open",
            Numbers.state,
            additive=False,
            owner=Numbers.owner_of_state,
        ),
        Gauge(
            "topaz_cache_size",
            "{decision}",
            "Answers in the cache",
            Numbers.size,
            owner=Numbers.owner_of_answers,
        ),
    ),
    events=(
        Counter(
            "topaz_auth_requests",
            "{check}",
            "Checks that have ended",
            lambda n: n.counts.requests(),
            ("source", "decision", "check_type"),
        ),
        Counter(
            "topaz_cache_hits",
            "{check}",
            "Checks that used an answer again, of the cache or of their request",
            lambda n: n.counts.of("hits"),
            "source",
        ),
        Counter(
            "topaz_cache_misses",
            "{check}",
            "Checks that found no answer to use",
            lambda n: n.counts.of("misses"),
            "source",
        ),
        Counter(
            "topaz_cache_shared",
            "{check}",
            "Checks that used the answer of an equal check at the same time",
            lambda n: n.counts.shared,
        ),
        Counter(
            "topaz_cache_stale",
            "{check}",
            "Checks that used an older answer, because there was no other",
            lambda n: n.counts.stale,
        ),
        Counter(
            "topaz_cache_evictions",
            "{decision}",
            "Answers that the cache removed",
            lambda n: {"size": n.evictions()},
            "reason",
            owner=Numbers.owner_of_answers,
        ),
        Counter(
            "topaz_fallback",
            "{check}",
            "Checks that a fallback decided",
            Numbers.fallbacks,
            ("strategy", "cache_hit", "decision"),
        ),
        Counter(
            "topaz_errors",
            "{check}",
            "Checks for which there was no decision, also if a fallback decided then",
            lambda n: at_least_zero(ERROR_TYPES, n.counts.errors),
            "error_type",
        ),
        Counter(
            "topaz_circuit_transitions",
            "{change}",
            "Changes of the state of the circuit breaker",
            Numbers.changes,
            ("from_state", "to_state"),
            owner=Numbers.owner_of_state,
        ),
    ),
)


class DecisionMetrics(Report):
    """
    Counts and reports the checks of one configuration.

    It reports as long as it exists. A forked child counts from 0, and reports from its
    first check, or from the start of the application in that process.

    Strictly private.

    Args:
        provider: The provider of the instruments. None means the global one.
        pool: Returns the name of the pool, or None.
        cache: The cache of the configuration, if it has one.
        breaker: The circuit breaker of the configuration, if it has one.

    Attributes:
        counts: The numbers so far.
        pool: The name of the pool for which `begin()` was called last, or None. No
            name after a fork, so that the next check calls it.
    """

    def __init__(
        self,
        provider: MeterProvider | None,
        pool: Callable[[], str | None],
        cache: Cache | None = None,
        breaker: Breaker | None = None,
    ) -> None:
        self.counts = DecisionCounts()
        self._sources = self.counts.sources
        self._numbers = Numbers(self.counts, cache, breaker)
        super().__init__(
            provider, DECISIONS, Source(lambda: self._numbers, self._numbers)
        )
        self._pool = pool
        self._record_check = self.instruments.durations["check"].record
        self._record_call = self.instruments.durations["call"].record
        self.pool: object = FORKED
        self.begin(pool())

    def labels(self) -> Mapping[str, str]:
        """Return the name of the pool, if it has one."""
        name = self._pool()
        return {} if name is None else {DECISIONS.pool: name}

    def forked(self) -> None:
        """Count from 0 in this process, from its first check."""
        self.counts.reset()
        self._numbers.restart()
        self.pool = FORKED

    def begin(self, pool: str | None) -> None:
        """Prepare for checks in this process, with the *pool* of this name."""
        self.pool = pool
        self._labels = self.labels()
        for source, counts in self._sources.items():
            counts.label(source, self._labels)
        self.instruments.attach(self)

    def decided(self, source: CheckSource, answer: Answer, took: float) -> None:
        """Record an *answer* that came after *took* seconds."""
        counts, origin = self._sources[source], answer.origin
        if answer.allowed is True:
            counts.allowed += 1
        else:
            counts.denied += 1
        attributes = counts.fresh
        if origin == "cache":
            counts.hits += 1
            attributes = counts.cached
        elif origin == "shared":
            self.counts.shared += 1
        else:
            counts.misses += 1
            if origin == "stale":
                self.counts.stale += 1
        try:
            self._record_check(took, attributes)
        except Exception as error:  # noqa: BLE001  (code of the metrics SDK)
            self.failed(error)

    def undecided(self, source: CheckSource, error: BaseException, took: float) -> None:
        """Record a check that ended with *error*, or was cancelled."""
        counts = self._sources[source]
        if not isinstance(error, Exception):
            counts.cancelled += 1
            return
        counts.error += 1
        counts.misses += 1
        self.counts.errors[error_type(error)] += 1
        try:
            self._record_check(took, counts.fresh)
        except Exception as broken:  # noqa: BLE001
            self.failed(broken)

    def called(self, took: float) -> None:
        """Record one call of the authorizer, which took *took* seconds."""
        try:
            self._record_call(took, self._labels)
        except Exception as error:  # noqa: BLE001
            self.failed(error)
