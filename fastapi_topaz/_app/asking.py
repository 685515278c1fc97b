"""
The layers of a check, each an `Ask` that wraps the next; `chain` gives their order.

    Trace ──▶ Retry ──▶ AskPool ──▶ the authorizer
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import attrs
import grpc

from fastapi_topaz._app.question import Decision
from fastapi_topaz._rpc.statuses import is_unprocessed, is_worth_a_retry, lacks_answer
from fastapi_topaz._telemetry.tracing import current_check
from fastapi_topaz.exceptions import TopazError


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._app.question import Ask, Question
    from fastapi_topaz._authorizer.pool import ConnectionPool
    from fastapi_topaz._pool.state.status import PoolCounters
    from fastapi_topaz._telemetry.tracing import Tracing


__all__ = ["chain"]


LEAST_TOKENS = 20
"""The least number of retry tokens. The number in use is twice the capacity."""

TOKENS_PER_ANSWER = 0.1
"""The tokens that an answered call gives back."""

FIRST_PAUSE = 0.01
LONGEST_PAUSE = 0.5
"""Seconds between attempts at a call that the server did not process."""


def chain(pool: Callable[[], ConnectionPool], tracing: Tracing) -> Ask:
    """
    Return the outermost layer, which holds the others.

    Args:
        pool: Returns the pool. An application may replace that of its configuration.
        tracing: Begins the spans.
    """

    def counters() -> PoolCounters:
        return pool()._counters  # noqa: SLF001

    asking: Ask = AskPool(pool)
    asking = Retry(asking, counters, RetryTokens(lambda: pool().options.capacity))
    return Trace(asking, tracing, pool)


@attrs.frozen
class Trace:
    """Asks within a span, which shows the outcome."""

    ask: Ask
    tracing: Tracing
    pool: Callable[[], ConnectionPool]

    async def __call__(self, question: Question, /) -> Decision:
        path, decision = question.policy_path, question.decision
        with self.tracing.check(path, decision, self.pool().options.name) as span:
            answer = await self.ask(question)
            span.decided(answer.allowed)
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
    """Asks the authorizer once, on a connection of the pool."""

    pool: Callable[[], ConnectionPool]

    async def __call__(self, question: Question, /) -> Decision:
        budget, pool = question.budget, self.pool()
        acquire = pool.acquire(timeout=min(budget.left(), pool.options.acquire_timeout))
        acquire.budget = budget
        async with acquire as conn:
            if conn.waited:
                current_check().waited(conn.waited)
            decisions = await conn._decide(  # noqa: SLF001
                question.request,
                (question.decision,),
                budget.left(),
                question.metadata,
            )
        return Decision(allowed=decisions[question.decision] is True)
