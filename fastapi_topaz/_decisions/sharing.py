"""What the memo and the cache have in common: equal questions share an answer."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Protocol

from fastapi_topaz._decisions.flights import Flight
from fastapi_topaz._decisions.question import Decision
from fastapi_topaz._decisions.tokens import expiry


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._decisions.invalidation import Invalidations
    from fastapi_topaz._decisions.question import Ask, Question
    from fastapi_topaz._decisions.store import Ages
    from fastapi_topaz._decisions.tags import Tagger


__all__ = ["Freshness", "Sharing"]


class Place(Protocol):
    """Where answers are shared: one request, or one opening of the pool."""

    @property
    def flights(self) -> dict[Any, Flight]:
        """The questions under way, by key."""
        ...


class Freshness:
    """
    The clocks, limits and invalidations by which answers are used again.

    Args:
        limits: How old answers may be.
        invalidations: Which answers are invalidated.
        tagger: Makes the tags of questions.
        clock: Returns the time in seconds; never goes back.
        announce: Tells other processes which tags are invalidated. Default None.
    """

    def __init__(
        self,
        limits: Ages,
        invalidations: Invalidations,
        tagger: Tagger,
        clock: Callable[[], float],
        announce: Callable[[list[frozenset[bytes]]], None] | None = None,
    ) -> None:
        self.limits = limits
        self.invalidations = invalidations
        self.tagger = tagger
        self._announce = announce
        # Tests replace both.
        self.clock = clock
        self.wall: Callable[[], float] = time.time

    def valid_from(self, question: Question, now: float) -> int:
        """Return the number up to which *question* is invalidated."""
        invalidations = self.invalidations
        if not invalidations.marks.count:
            return invalidations.marks.everything
        return invalidations.valid_from(self.tagger.tags_of(question), now)

    def invalidate(
        self, identity: object, policy_path: object, resource: object
    ) -> None:
        """Invalidate what is asked about any of these; without any of them, all."""
        concerned = self.tagger.concerned(identity, policy_path, resource)
        self.invalidations.invalidate(concerned, self.clock())
        if self._announce is not None:
            self._announce(concerned)


class Sharing:
    """
    Asks each question once at a time; equal questions wait for its answer.

    A subclass keeps answers, and finds them again.

    Args:
        ask: The next layer.
        freshness: How long an answer is used.
    """

    def __init__(self, ask: Ask, freshness: Freshness) -> None:
        self.ask = ask
        self.freshness = freshness

    def found(
        self, question: Question, place: Any, key: Any, valid_from: int, now: float
    ) -> Decision | None:
        """Return the decision that is kept for *question*, if it may be used."""
        raise NotImplementedError

    def keep(self, question: Question, place: Any, key: Any, flight: Flight) -> None:
        """Keep the decision of *flight*."""
        raise NotImplementedError

    def leads(self) -> None:
        """Count that a caller asks the next layer."""

    async def share(self, question: Question, place: Place, key: Any) -> Decision:
        """Return a decision that is kept, that of an equal question, or a new one."""
        freshness, flights, took_over = self.freshness, place.flights, False
        came = now = freshness.clock()
        while question.max_age != 0:
            valid_from = freshness.valid_from(question, now)
            decision = self.found(question, place, key, valid_from, now)
            if decision is not None:
                return decision
            flight = flights.get(key)
            if flight is None or not self._may_join(question, flight, valid_from, now):
                break
            await flight.wait(question.budget)
            if flight.decision is None:
                # The caller that asked was cancelled.
                took_over = True
            else:
                decision = self.shared(question, flight, came)
                if decision is not None:
                    return decision
            now = freshness.clock()
        self.leads()
        # The number first: an invalidation in between must count.
        number = freshness.invalidations.next_number()
        flight = Flight(number, freshness.clock(), took_over)
        # A caller that accepts no older answer leaves the call of the others alone.
        if question.max_age is None or key not in flights:
            flights[key] = flight
        try:
            decision = await self.ask(question)
            if decision.age:
                # The next layer had the answer already.
                flight.asked_at = freshness.clock() - decision.age
            flight.decision = decision
            self.keep(question, place, key, flight)
        except Exception as error:
            flight.fail(error, question.budget)
            raise
        finally:
            if flights.get(key) is flight:
                del flights[key]
            flight.end()
            # It may hold the error, whose traceback leads to this frame.
            del flight
        return decision

    def _may_join(
        self, question: Question, flight: Flight, valid_from: int, now: float
    ) -> bool:
        age = now - flight.asked_at
        # Marks are kept for the retention, so nothing is known about older questions.
        return (
            flight.number > valid_from
            and 0.0 <= age < self.freshness.invalidations.retention
            and (question.max_age is None or age <= question.max_age)
        )

    def shared(
        self, question: Question, flight: Flight, came: float
    ) -> Decision | None:
        """
        Return the decision of *flight* for a follower, if it is not too old.

        If it was asked for after the follower *came*, it is as good as an answer of its
        own. Otherwise the followers of a slow authorizer would ask one after the other.
        """
        decision, freshness = flight.decision, self.freshness
        assert decision is not None  # noqa: S101
        age = freshness.clock() - flight.asked_at
        limit = freshness.limits.ttl(decision.allowed)
        if question.max_age is not None:
            limit = min(limit, question.max_age)
        is_old = not 0.0 <= age <= limit or freshness.wall() >= expires_at(question)
        if is_old and flight.asked_at <= came:
            return None
        return Decision(decision.allowed is True, "shared", age, decision.id)


def expires_at(question: Question) -> float:
    """
    Return when the token in *question* expires, in seconds since the epoch.

    Infinity without a token, and with one that names no time.
    """
    if question.token is None:
        return math.inf
    found = expiry(question.token)
    return math.inf if found is None else found
