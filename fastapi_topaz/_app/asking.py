"""
The layers of a check, each an `Ask` that wraps the next; `Layers` gives their order.

    Observe ─▶ Fallback ─▶ Memo ─▶ Cached ─▶ Breaking ─▶ Retry ─▶ AskPool

A layer that is not configured is left out, so it costs nothing.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import anyio
import attrs
import grpc

from fastapi_topaz._app.undecided import log_undecided
from fastapi_topaz._decisions.breaker import Breaking
from fastapi_topaz._decisions.cache import Cached, freshness_of
from fastapi_topaz._decisions.credentialed import Credentialed
from fastapi_topaz._decisions.fallback import Fallback
from fastapi_topaz._decisions.memo import Memo
from fastapi_topaz._decisions.openings import Openings
from fastapi_topaz._decisions.question import Decision
from fastapi_topaz._rpc.statuses import is_unprocessed, is_worth_a_retry, lacks_answer
from fastapi_topaz._telemetry.tracing import NO_SPAN, current_check
from fastapi_topaz.exceptions import TopazError


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._authorizer.pool import ConnectionPool
    from fastapi_topaz._decisions.breaker import CircuitBreaker
    from fastapi_topaz._decisions.cache import DecisionCache
    from fastapi_topaz._decisions.fallback import Custom, Fallbacks, Strategy
    from fastapi_topaz._decisions.question import Ask, Question
    from fastapi_topaz._decisions.sharing import Freshness
    from fastapi_topaz._log_limit import LogLimit
    from fastapi_topaz._pool.state.status import PoolCounters
    from fastapi_topaz._telemetry.decisions import DecisionMetrics
    from fastapi_topaz._telemetry.tracing import Tracing


__all__ = ["Layers"]


LEAST_TOKENS = 20
"""The least number of retry tokens. The number in use is twice the capacity."""

TOKENS_PER_ANSWER = 0.1
"""The tokens that an answered call gives back."""

FIRST_PAUSE = 0.01
LONGEST_PAUSE = 0.5
"""Seconds between attempts at a call that the server did not process."""


@attrs.frozen
class Layers:
    """
    The layers of the checks of one configuration.

    Args:
        pool: Returns the pool. An application may replace that of its configuration.
        tracing: Begins the spans.
        metrics: Counts the ends of checks, and measures them.
        limit: Gets a line for each check without a decision.
        cache: Keeps answers, if given.
        breaker: Refuses checks while the authorizer fails, if given.
        has_credentials: Whether calls have metadata that a callable computes.
    """

    pool: Callable[[], ConnectionPool]
    tracing: Tracing
    metrics: DecisionMetrics
    limit: LogLimit
    cache: DecisionCache | None = None
    breaker: CircuitBreaker | None = None
    has_credentials: bool = False

    def chain(self) -> tuple[Ask, Freshness, Callable[[Question], Decision | None]]:
        """
        Return the layers below the fallback.

        Returns:
            The first of them; what invalidates answers; and what finds an answer that
            is older than usual.
        """

        def counters() -> PoolCounters:
            return self.pool()._counters  # noqa: SLF001

        tokens = RetryTokens(lambda: self.pool().options.capacity)
        asking: Ask = Retry(AskPool(self.pool, self.metrics), counters, tokens)
        if self.breaker is not None:
            asking = Breaking(asking, self.breaker, self.pool)
        companion = None if self.cache is None else self.cache._companion  # noqa: SLF001
        openings = Openings(self.pool, companion)
        if self.cache is None:
            freshness = freshness_of()
            if not self.has_credentials:
                asking = Memo(asking, freshness, openings)
            return asking, freshness, lambda _question: None
        cached = Cached(asking, self.cache, openings)
        freshness = cached.freshness
        excludes = self.cache._excludes  # noqa: SLF001
        asking = Memo(cached, freshness, openings, excludes, cached.hit)
        if self.has_credentials:
            asking = Credentialed(asking, self.pool)
        return asking, freshness, cached.stale

    def observed(
        self, asking: Ask, fallback: Strategy | Custom, shared: Fallbacks
    ) -> Ask:
        """Return the outermost layers above *asking*, with this *fallback*."""
        if fallback != "error":
            asking = Fallback(asking, fallback, shared)
        return Observe(asking, self.tracing, self.pool, self.metrics, self.limit)


@attrs.frozen
class Observe:
    """
    Asks within a span, which shows the outcome, and counts and logs each outcome once.

    Spans, metrics and the log share this layer, because each layer costs half a
    microsecond. Guards and the application's own checks both pass it.

    Args:
        ask: The next layer.
        tracing: Begins the spans.
        pool: Returns the pool.
        metrics: Counts the ends of checks, and measures them.
        limit: Gets a line for each check without a decision.
    """

    ask: Ask
    tracing: Tracing
    pool: Callable[[], ConnectionPool]
    metrics: DecisionMetrics
    limit: LogLimit

    async def __call__(self, question: Question, /) -> Decision:
        path, decision, metrics = question.policy_path, question.decision, self.metrics
        name = self.pool().options.name
        if metrics.pool is not name:
            metrics.begin(name)
        # Not the clock of the loop: on uvloop it moves in steps of 1 ms.
        began = perf_counter()
        span = self.tracing.check(path, decision, name)
        try:
            if span is NO_SPAN:
                answer = await self.ask(question)
            else:
                with span:
                    answer = await self.ask(question)
                    span.decided(answer.allowed, answer.origin)
        except BaseException as error:
            metrics.undecided(question.source, error, perf_counter() - began)
            log_undecided(self.limit, question, error)
            raise
        metrics.decided(question.source, answer, perf_counter() - began)
        if self.limit.held:
            self.limit.flush()
        return answer


class RetryTokens:
    """
    Limits the retries after answers with UNAVAILABLE, so that they add little load.

    The rule is that of gRPC (gRFC A6, retry throttling), with more tokens: a failed
    call takes one, an answered call gives 0.1 back, and a retry needs more than half of
    them. A replica that stops may answer UNAVAILABLE to all calls on its connections at
    once, and all of them may be retried. So there are twice as many tokens as leases.

    Args:
        capacity: Returns the capacity of the pool.
    """

    def __init__(self, capacity: Callable[[], int]) -> None:
        self._capacity = capacity
        self._missing = 0.0

    def answered(self) -> None:
        """Record that a call was answered."""
        if self._missing:
            self._missing = max(0.0, self._missing - TOKENS_PER_ANSWER)

    def take(self) -> bool:
        """Record a call that ended with UNAVAILABLE; return if it may be retried."""
        most = max(LEAST_TOKENS, 2 * self._capacity())
        self._missing = min(most, self._missing + 1)
        return self._missing < most / 2


@attrs.frozen
class Retry:
    """
    Asks again if the answer was lost, within the budget of the question.

    A check is a read, so it may be asked twice. If the server may have processed the
    question, it is asked once more. By then the pool leases no connection that it
    suspects. The native transport ends the connection to a frozen server after two
    seconds, so the rest of the budget is left for another server. If the server
    certainly did not process the question, repeating is safe. So this repeats it until
    the budget is used up.

    If the server answered UNAVAILABLE or CANCELLED, the repetition is load that it may
    not be able to bear. So `RetryTokens` limits these. Repetitions of checks that were
    lost with their connection are free, and so are those of unprocessed ones.
    """

    ask: Ask
    counters: Callable[[], PoolCounters]
    tokens: RetryTokens

    async def __call__(self, question: Question, /) -> Decision:
        lost: Exception | None = None
        retried, unprocessed = False, 0
        while True:
            try:
                decision = await self.ask(question)
            except (TopazError, grpc.aio.AioRpcError) as error:
                pause = 0.0
                if is_unprocessed(error):
                    pause = _pause_after(unprocessed)
                    unprocessed += 1
                elif retried or not is_worth_a_retry(error):
                    if isinstance(error, TopazError) and lost is not None:
                        raise error from lost
                    raise
                elif lacks_answer(error) or self.tokens.take():
                    retried = True
                else:
                    self.counters().retries_suppressed += 1
                    raise
                if pause >= question.budget.left():
                    raise
                lost = error
            else:
                self.tokens.answered()
                return decision
            self.counters().retries += 1
            current_check().lost(lost)
            if pause:
                await anyio.sleep(pause)


def _pause_after(attempts: int) -> float:
    """Return the seconds to wait if *attempts* were not processed before this one."""
    # The first two repetitions need no pause: probably two connections were closing.
    if attempts < 2:
        return 0.0
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (attempts - 2))


@attrs.frozen
class AskPool:
    """
    Asks the authorizer once, on a connection of the pool.

    Args:
        pool: Returns the pool.
        metrics: Measures the call, if given.
    """

    pool: Callable[[], ConnectionPool]
    metrics: DecisionMetrics | None = None

    async def __call__(self, question: Question, /) -> Decision:
        budget, pool = question.budget, self.pool()
        acquire = pool.acquire(timeout=min(budget.left(), pool.options.acquire_timeout))
        acquire.budget = budget
        async with acquire as conn:
            if conn.waited:
                current_check().waited(conn.waited)
            budget.sent = budget.left()
            began = perf_counter()
            try:
                decisions = await conn._decide(  # noqa: SLF001
                    question.request,
                    (question.decision,),
                    budget.sent,
                    question.metadata,
                )
            except Exception:
                # Not if the caller was cancelled: that length means nothing.
                self._measure(began)
                raise
            self._measure(began)
        return Decision(allowed=decisions[question.decision] is True)

    def _measure(self, began: float) -> None:
        if self.metrics is not None:
            self.metrics.called(perf_counter() - began)
