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
from fastapi_topaz._rpc.statuses import is_unprocessed, is_worth_a_retry
from fastapi_topaz._telemetry.tracing import current_check
from fastapi_topaz.exceptions import TopazError


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._app.question import Ask, Question
    from fastapi_topaz._authorizer.pool import ConnectionPool
    from fastapi_topaz._telemetry.tracing import Tracing


__all__ = ["chain"]


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

    def count_retry() -> None:
        pool()._counters.retries += 1  # noqa: SLF001

    asking: Ask = AskPool(pool)
    asking = Retry(asking, count_retry)
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
    """

    ask: Ask
    count_retry: Callable[[], None]

    async def __call__(self, question: Question, /) -> Decision:
        lost: Exception | None = None
        retried, unprocessed = False, 0
        while True:
            try:
                return await self.ask(question)
            except (TopazError, grpc.aio.AioRpcError) as error:
                pause = 0.0
                if is_unprocessed(error):
                    pause = _pause_after(unprocessed)
                    unprocessed += 1
                elif retried or not is_worth_a_retry(error):
                    if isinstance(error, TopazError) and lost is not None:
                        raise error from lost
                    raise
                else:
                    retried = True
                if pause >= question.budget.left():
                    raise
                lost = error
            self.count_retry()
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
        wait = min(budget.left(), pool.options.acquire_timeout)
        async with pool.acquire(timeout=wait) as conn:
            if conn.waited:
                current_check().waited(conn.waited)
            decisions = await conn._decide(  # noqa: SLF001
                question.request,
                (question.decision,),
                budget.left(),
                question.metadata,
            )
        return Decision(allowed=decisions[question.decision] is True)
