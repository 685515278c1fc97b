"""Computes the metadata of `credentials` before a question has its key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from fastapi_topaz._rpc.credentials import CallCredentials, Computed


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._authorizer.options import AuthorizerOptions
    from fastapi_topaz._authorizer.pool import ConnectionPool
    from fastapi_topaz._decisions.question import Ask, Decision, Question


__all__ = ["Credentialed"]


class Credentialed:
    """
    Asks with the metadata of `credentials` in the question, so that the key has them.

    They may depend on who asks. Without this layer, each connection computes them when
    it sends the call.

    Args:
        ask: The next layer.
        pool: Returns the pool.
    """

    def __init__(self, ask: Ask, pool: Callable[[], ConnectionPool]) -> None:
        self._ask = ask
        self._pool = pool
        self._known: tuple[AuthorizerOptions, CallCredentials] | None = None

    async def __call__(self, question: Question, /) -> Decision:
        # None if the application passed a connector of its own to the pool.
        options = self._pool().authorizer_options
        if options is None or options.credentials is None:
            return await self._ask(question)
        if self._known is None or self._known[0] is not options:
            self._known = options, CallCredentials(options.target)
        pairs, _ = await self._known[1].ask("a check", question.budget.left())
        metadata = Computed((*pairs, *question.metadata))
        return await self._ask(attrs.evolve(question, metadata=metadata))
