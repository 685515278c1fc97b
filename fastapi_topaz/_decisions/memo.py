"""One request, one view: equal questions within one HTTP request share one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi_topaz._decisions.question import Decision
from fastapi_topaz._decisions.sharing import Freshness, Sharing, expires_at


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._decisions.flights import Flight
    from fastapi_topaz._decisions.openings import Opening, Openings
    from fastapi_topaz._decisions.question import Ask, Question


__all__ = ["LONGEST", "Memo"]


LONGEST = 5.0
"""Seconds that an answer is used again within its request."""

MOST = 256
"""Answers that one request keeps."""

NAME = "fastapi_topaz"
"""The key in the scope of a request."""


class Answers:
    """What one request has asked. It ends with the request, so its keys are plain."""

    __slots__ = ("flights", "kept")

    def __init__(self) -> None:
        self.kept: dict[Any, tuple[Decision, int, float]] = {}
        self.flights: dict[Any, Flight] = {}

    def knows(self, key: Any) -> bool:
        """Return whether this request has asked the question *key*."""
        return key in self.kept or key in self.flights


class Memo(Sharing):
    """
    Remembers the answers of one HTTP request, in its scope, for at most 5 seconds.

    A WebSocket may live for days, so this remembers nothing for it.

    Args:
        ask: The next layer.
        freshness: What is invalidated, and how long an answer is used, if shorter.
        openings: Finds the opening of the pool.
        is_excluded: Returns whether the answer to a question is never used again.
        hit: Returns the decision that the next layer has already, or None.
    """

    def __init__(
        self,
        ask: Ask,
        freshness: Freshness,
        openings: Openings,
        is_excluded: Callable[[Question], bool] | None = None,
        hit: Callable[[Question, Opening], Decision | None] | None = None,
    ) -> None:
        super().__init__(ask, freshness)
        self._openings = openings
        self._is_excluded = is_excluded
        self._hit = hit

    async def __call__(self, question: Question, /) -> Decision:
        scope = getattr(question.http, "scope", None)
        if type(scope) is not dict or scope.get("type") != "http":
            return await self.ask(question)
        if self._is_excluded is not None and self._is_excluded(question):
            return await self.ask(question)
        opening = self._openings.current()
        if opening is None:
            return await self.ask(question)
        # Not the question itself: it leads to the request, and so back to the scope.
        key = opening, question.request, question.metadata
        known: Any = scope.get(NAME)
        answers = known if type(known) is Answers else None
        if self._hit is not None and (answers is None or not answers.knows(key)):
            # Now, because a task switch and the bookkeeping below cost more.
            decision = self._hit(question, opening)
            if decision is not None:
                return decision
        if answers is None:
            answers = scope[NAME] = Answers()
        return await self.share(question, answers, key)

    def found(
        self, question: Question, place: Answers, key: Any, valid_from: int, now: float
    ) -> Decision | None:
        """Return the decision that this request has got already."""
        kept = place.kept.get(key)
        if kept is None:
            return None
        decision, number, asked_at = kept
        age = now - asked_at
        limit = min(LONGEST, self.freshness.limits.ttl(decision.allowed))
        if number <= valid_from or not 0.0 <= age < limit:
            return None
        if question.max_age is not None and age > question.max_age:
            return None
        if self.freshness.wall() >= expires_at(question):
            return None
        return Decision(decision.allowed is True, "cache", age, decision.id)

    def keep(
        self,
        question: Question,  # noqa: ARG002
        place: Answers,
        key: Any,
        flight: Flight,
    ) -> None:
        """Keep the decision of *flight*, unless the cache has it anyway."""
        decision, kept = flight.decision, place.kept
        if decision is None or decision.origin not in {"authorizer", "shared"}:
            return
        if key in kept:
            if kept[key][1] > flight.number:
                return
        elif len(kept) >= MOST:
            del kept[next(iter(kept))]
        kept[key] = decision, flight.number, flight.asked_at
