"""`CircuitBreaker`, and the layer that refuses checks while it is open."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import threading
import time
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from fastapi_topaz._checks import check_count, check_seconds, safe_repr
from fastapi_topaz._decisions.circuit import (
    Circuit,
    CircuitState,
    Outcome,
    Permit,
    Rules,
)
from fastapi_topaz._decisions.clock import boot_time
from fastapi_topaz._error_text import error_kind, without_context
from fastapi_topaz._fork import current as process
from fastapi_topaz._log_limit import LogLimit
from fastapi_topaz._redaction import boundary
from fastapi_topaz._rpc.statuses import blames_server, is_out_of_time
from fastapi_topaz._slips import NotCopied
from fastapi_topaz.exceptions import CircuitOpen


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from fastapi_topaz._authorizer.pool import ConnectionPool
    from fastapi_topaz._decisions.question import Ask, Decision, Question

    OnStateChange: TypeAlias = Callable[[str, str, str], object]


__all__ = ["Breaking", "CircuitBreaker", "CircuitStatus"]


logger = logging.getLogger("fastapi_topaz.decisions")

MOST_POLICIES = 1024
"""Circuits kept with `scope="policy"`. The one used longest ago makes room."""

MOVED = {
    "fallback": "TopazConfig(fallback=...)",
    "on_fallback": "TopazConfig(on_fallback=...)",
    "serve_stale_cache": "DecisionCache(stale_ttl_seconds=...) and TopazConfig("
    "fallback='cache_then_error')",
    "stale_cache_ttl": "DecisionCache(stale_ttl_seconds=...)",
    "no_stale_for": "DecisionCache(exclude=...)",
    "cache_priority": "DecisionCache(exclude=...)",
    "timeout_ms": "TopazConfig(check_timeout=...), in seconds",
    "failure_exceptions": "nothing: gRPC statuses and lost connections count",
}
"""Arguments of other circuit breakers for Topaz, and what replaces them here."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CircuitStatus:
    """
    A snapshot of a circuit breaker, as `CircuitBreaker.status()` returns it.

    A FastAPI route may return it. With `scope="policy"`, it is that of the circuit that
    has been open for longest, if one is.

    Attributes:
        state: `closed`: checks pass. `open`: they are refused. `half_open`: a few pass
            as trials.
        failure_count: The checks in a row that failed.
        last_failure_time: When the last one failed, in seconds since the epoch, or
            None.
        open_since: When the breaker opened, in seconds since the epoch. None if it is
            closed.
        refused: The checks refused so far.
    """

    state: CircuitState
    failure_count: int
    last_failure_time: float | None
    open_since: float | None
    refused: int

    @property
    def is_open(self) -> bool:
        """Whether checks are refused: the state is `open`."""
        return self.state == "open"


class CircuitBreaker(NotCopied):
    """
    Refuses checks while the authorizer answers connections, but not checks.

    Pass it to `TopazConfig(circuit_breaker=...)`. A pool needs none for a dead server:
    see `docs/circuit-breaker.md`. Failures are UNAVAILABLE, DEADLINE_EXCEEDED, UNKNOWN,
    INTERNAL, a CANCELLED from the server, and a lost connection. Denials, other errors
    of the authorizer and cancelled checks are none, and neither is a pool that is full.

    Args:
        failure_threshold: The failures in a row that open it. Default 5.
        success_threshold: The successful trials that close it. Default 2.
        recovery_timeout: The longest pause in seconds before a trial. The first one
            takes 1 second, and each further one twice as long. If the pool makes a new
            connection, a trial follows at once. Default 5.
        half_open_max_requests: The trials at the same time. Default 1.
        window: The seconds that *failure_ratio* looks back. Default 10.
        minimum_calls: The checks in the window before *failure_ratio* counts. Default
            10.
        failure_ratio: The part of checks in the window, failed or slow, that opens it.
            Default 0.5.
        slow_call_threshold: Seconds from which an answer is slow, without the wait for
            a connection. None, the default: no answer is.
        scope: "config", the default: one circuit for all checks. "policy": one for each
            policy path.
        on_state_change: Called with the old state, the new one and the reason.
        moved: Other arguments are refused, with a hint where they belong.

    Raises:
        TypeError, ValueError: An argument is wrong. The message names it.
    """

    _copy_form = "its state belongs to one process; share it, or build another one"

    @boundary
    def __init__(
        self,
        *,
        failure_threshold: int = 5,
        success_threshold: int = 2,
        recovery_timeout: float = 5.0,
        half_open_max_requests: int = 1,
        window: float = 10.0,
        minimum_calls: int = 10,
        failure_ratio: float = 0.5,
        slow_call_threshold: float | None = None,
        scope: Literal["config", "policy"] = "config",
        on_state_change: OnStateChange | None = None,
        **moved: object,
    ) -> None:
        _check_moved(moved)
        check_count("failure_threshold", failure_threshold, 1)
        check_count("success_threshold", success_threshold, 1)
        check_count("half_open_max_requests", half_open_max_requests, 1)
        check_count("minimum_calls", minimum_calls, 1)
        if isinstance(failure_ratio, bool) or not isinstance(
            failure_ratio, int | float
        ):
            raise TypeError(
                f"failure_ratio must be a number, got {safe_repr(failure_ratio)}"
            )
        if not 0 < failure_ratio <= 1:
            raise ValueError(
                f"failure_ratio must be above 0 and at most 1, got {failure_ratio!r}"
            )
        if slow_call_threshold is not None:
            slow_call_threshold = _seconds("slow_call_threshold", slow_call_threshold)
        if scope not in ("config", "policy"):
            raise ValueError(
                f"scope must be 'config' or 'policy', got {safe_repr(scope)}"
            )
        if on_state_change is not None and not callable(on_state_change):
            raise TypeError(
                f"on_state_change must be callable, got {safe_repr(on_state_change)}"
            )
        self._rules = Rules(
            failure_threshold=failure_threshold,
            success_threshold=success_threshold,
            recovery_timeout=_seconds("recovery_timeout", recovery_timeout),
            half_open_max_requests=half_open_max_requests,
            window=_seconds("window", window),
            minimum_calls=minimum_calls,
            failure_ratio=failure_ratio,
        )
        self._slow = slow_call_threshold
        self._by_policy = scope == "policy"
        self._on_state_change = on_state_change
        self._limit = LogLimit(logger, "circuit breaker")
        # Tests replace both.
        self._clock = boot_time
        self._random = random.random
        self._refused = 0
        self._begin()

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self.status()}>"

    def status(self) -> CircuitStatus:
        """Return a snapshot of the breaker. Never raises."""
        if self._pid != process.pid:
            self._begin()
        circuits = list(self._circuits.values()) or [self._make("")]
        now, wall = self._clock(), time.time()

        def moment(at: float | None) -> float | None:
            return None if at is None else wall - (now - at)

        def opened(circuit: Circuit) -> float:
            return math.inf if circuit.opened_at is None else circuit.opened_at

        worst = min(circuits, key=opened)
        failed = [c.last_failure_at for c in circuits if c.last_failure_at is not None]
        return CircuitStatus(
            state=worst.state,
            failure_count=max(c.failures for c in circuits),
            last_failure_time=moment(max(failed, default=None)),
            open_since=moment(worst.opened_at),
            refused=self._refused,
        )

    def reset(self) -> None:
        """Close the breaker, and forget all failures. Thread-safe."""
        with self._alone():
            for circuit in list(self._circuits.values()):
                circuit.reset(self._clock())

    def _begin(self) -> None:
        """Begin in this process: permits of the parent never come back."""
        self._pid = process.pid
        # Reentrant, because `on_state_change` may call a method of the breaker. A new
        # one, because another thread may have held the lock of the parent.
        self._lock = threading.RLock()
        self._circuits: OrderedDict[str, Circuit] = OrderedDict()
        self._changed_so_far: Counter[tuple[str, str]] = Counter()

    def _alone(self) -> AbstractContextManager[object]:
        """Return the lock of this process. Two event loops may share a breaker."""
        if self._pid != process.pid:
            self._begin()
        return self._lock

    def _changes(self) -> Mapping[tuple[str, str], int]:
        """Return how often the state changed in this process, as (old, new)."""
        if self._pid != process.pid:
            self._begin()
        return self._changed_so_far

    def _circuit(self, policy_path: str) -> Circuit:
        if self._pid != process.pid:
            self._begin()
        name = policy_path if self._by_policy else ""
        circuit = self._circuits.get(name)
        if circuit is None:
            circuit = self._circuits[name] = self._make(name)
            if len(self._circuits) > MOST_POLICIES:
                self._circuits.popitem(last=False)
        elif self._by_policy:
            self._circuits.move_to_end(name)
        return circuit

    def _make(self, name: str) -> Circuit:
        def changed(before: str, after: str, reason: str, _now: float) -> None:
            self._changed(name, before, after, reason)

        return Circuit(self._rules, self._random, changed)

    def _changed(self, name: str, before: str, after: str, reason: str) -> None:
        self._changed_so_far[before, after] += 1
        self._limit.report(
            logging.WARNING if after == "open" else logging.INFO,
            f"{before} to {after}",
            "the circuit breaker%s changed from %s to %s: %s",
            *(f" of {name}" if name else "", before, after, reason),
        )
        if self._on_state_change is not None:
            try:
                self._on_state_change(before, after, reason)
            except Exception as error:  # noqa: BLE001  (code of the application)
                self._limit.report(
                    logging.ERROR,
                    f"on_state_change: {type(error).__name__}",
                    "%s failed",
                    "on_state_change",
                    exc_info=without_context(error),
                )


class Breaking:
    """
    Asks only if a circuit breaker permits it.

    Args:
        ask: The next layer.
        breaker: The breaker.
        pool: Returns the pool.
    """

    def __init__(
        self, ask: Ask, breaker: CircuitBreaker, pool: Callable[[], ConnectionPool]
    ) -> None:
        self._ask = ask
        self._breaker = breaker
        self._pool = pool
        self._last = ""

    async def __call__(self, question: Question, /) -> Decision:
        breaker = self._breaker
        connects = self._connects()
        with breaker._alone():  # noqa: SLF001
            circuit = breaker._circuit(question.policy_path)  # noqa: SLF001
            permit = circuit.enter(
                *(breaker._clock(), connects, question.budget.seconds)  # noqa: SLF001
            )
        if permit is None:
            raise self._refusal(circuit)
        outcome = Outcome.NOTHING
        try:
            decision = await self._ask(question)
            outcome = self._pace(question)
        except Exception as error:
            outcome = _outcome(error, question)
            if outcome is Outcome.FAILURE:
                self._last = error_kind(error)
            raise
        finally:
            self._leave(circuit, permit, outcome)
        return decision

    def _leave(self, circuit: Circuit, permit: Permit, outcome: Outcome) -> None:
        breaker, connects = self._breaker, self._connects()
        with breaker._alone():  # noqa: SLF001
            circuit.leave(permit, outcome, breaker._clock(), connects)  # noqa: SLF001

    def _connects(self) -> int:
        return self._pool()._counters.connects  # noqa: SLF001

    def _refusal(self, circuit: Circuit) -> CircuitOpen:
        breaker = self._breaker
        breaker._refused += 1  # noqa: SLF001
        wait = circuit.retry_after(breaker._clock())  # noqa: SLF001
        options = self._pool().authorizer_options
        target = "the authorizer" if options is None else options.url
        state = circuit.state.replace("_", "-")
        return CircuitOpen(
            f"the circuit breaker is {state} and refuses this check of {target}: "
            f"earlier checks failed (the last one with {self._last or 'no answer'}); "
            f"the next trial follows in at most {wait:.1f} s",
            retry_after=wait,
        )

    def _pace(self, question: Question) -> Outcome:
        slow, sent = self._breaker._slow, question.budget.sent  # noqa: SLF001
        if slow is None or sent is None or sent - question.budget.left() < slow:
            return Outcome.SUCCESS
        return Outcome.SLOW


def _outcome(error: Exception, question: Question) -> Outcome:
    blames = blames_server(error)
    if blames is None:
        return Outcome.NOTHING
    if not blames:
        return Outcome.SUCCESS
    budget = question.budget
    if is_out_of_time(error) and (budget.sent or 0.0) < budget.seconds / 2:
        # Most of the time went by before the call was sent: the pool was full.
        return Outcome.NOTHING
    return Outcome.FAILURE


def _seconds(name: str, value: object) -> float:
    return check_seconds(name, value, zero=False, infinite=False)


def _check_moved(moved: dict[str, Any]) -> None:
    for name in moved:
        if name in MOVED:
            raise TypeError(
                f"CircuitBreaker has no argument {name!r}; use {MOVED[name]}"
            )
        raise TypeError(f"CircuitBreaker has no argument {name!r}")
