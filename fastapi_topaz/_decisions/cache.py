"""`DecisionCache`, and the layer that answers from it."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi_topaz._checks import check_count, check_seconds, safe_repr

# FastAPI evaluates the annotations of a status that a route returns.
from fastapi_topaz._decisions.bus import BusLink, BusStatus, checked_bus
from fastapi_topaz._decisions.clock import boot_time
from fastapi_topaz._decisions.invalidation import Invalidations
from fastapi_topaz._decisions.memo import LONGEST
from fastapi_topaz._decisions.question import Decision
from fastapi_topaz._decisions.sharing import Freshness, Sharing
from fastapi_topaz._decisions.store import Entry, Limits, Store
from fastapi_topaz._decisions.tags import Tagger
from fastapi_topaz._decisions.tokens import expiry
from fastapi_topaz._fork import current as process
from fastapi_topaz._redaction import boundary
from fastapi_topaz._slips import NotCopied


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from fastapi_topaz._authorizer.options import IdentityLike
    from fastapi_topaz._decisions.bus import InvalidationBus
    from fastapi_topaz._decisions.flights import Flight
    from fastapi_topaz._decisions.openings import Opening, Openings
    from fastapi_topaz._decisions.question import Ask, Question


__all__ = ["CacheStatus", "Cached", "DecisionCache", "freshness_of"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CacheStatus:
    """
    A snapshot of a cache, as `DecisionCache.status()` returns it.

    A FastAPI route may return it. A check that passes through the cache counts as one
    of *hits*, *misses* and *shared*. These checks count nowhere: one of an excluded
    policy, one that its own request has answered before, and one that waits for an
    equal check and gets no answer.

    Attributes:
        size: The answers kept, also those too old to be used.
        hits: The checks answered from the cache.
        misses: The checks for which the authorizer was asked.
        shared: The checks that got the answer of an equal check at the same time.
        stale: How often an older answer was used, because there was no other.
        evictions: The answers that made room for others.
        bus: The numbers of the invalidation bus. None without one.
    """

    size: int
    hits: int
    misses: int
    shared: int
    stale: int
    evictions: int
    bus: BusStatus | None = None


class DecisionCache(NotCopied):
    """
    Keeps answers of the authorizer in this process, for a short time.

    Pass it to `TopazConfig(decision_cache=...)`. It keeps only answers, and never an
    error. Equal checks at the same time share one call.

    Args:
        ttl_seconds: How long an allowed decision is used, in seconds since the
            authorizer was asked. Default 30.
        denied_ttl_seconds: The same for a denied decision. Default 5: Topaz also denies
            if its directory is down, so denials must end soon.
        max_size: The most answers. One more replaces the one that was not used longest.
            Default 10,000, which take at most 4 MB.
        jitter: The part of the time by which an answer may end earlier, from 0 to 1, so
            that not all end together. Default 0.1.
        stale_ttl_seconds: How long an answer may be used if the authorizer cannot be
            asked, in seconds since it was asked. Only with a *fallback* whose name
            begins with `cache_then`, or a callable. Default 0: never.
        exclude: Patterns of policy paths whose answers are neither kept nor shared,
            such as `("*.DELETE.*",)`. `*` is any text. Default none.
        max_request_bytes: Checks whose encoded request is larger are neither kept nor
            shared. Default 16,384.
        invalidation_bus: Carries invalidations to and from other processes. While it is
            unreachable, answers live at most *denied_ttl_seconds*. Default None: they
            stay in this process.
        invalidation_key: The secret that all processes on the bus share, at least 16
            bytes. Identities, policies and resources leave the process only as hashes
            with this key. Required with *invalidation_bus*.

    Raises:
        TypeError, ValueError: An argument is wrong. The message names it.
    """

    _copy_form = "its entries belong to one process; share it, or build another one"

    @boundary
    def __init__(
        self,
        *,
        ttl_seconds: float = 30.0,
        denied_ttl_seconds: float = 5.0,
        max_size: int = 10_000,
        jitter: float = 0.1,
        stale_ttl_seconds: float = 0.0,
        exclude: Sequence[str] = (),
        max_request_bytes: int = 16_384,
        invalidation_bus: InvalidationBus | None = None,
        invalidation_key: bytes | None = None,
    ) -> None:
        limits = Limits(
            _finite("ttl_seconds", ttl_seconds),
            _finite("denied_ttl_seconds", denied_ttl_seconds),
            _finite("stale_ttl_seconds", stale_ttl_seconds),
            _share("jitter", jitter),
        )
        check_count("max_size", max_size, 1)
        check_count("max_request_bytes", max_request_bytes, 0)
        checked_bus(invalidation_bus, invalidation_key)
        self._max_request_bytes = max_request_bytes
        self._excluded = _pattern(exclude)
        self._link: BusLink | None = None
        if invalidation_bus is not None and invalidation_key is not None:
            self._link = BusLink(
                invalidation_bus, invalidation_key, limits, self._clear_here
            )
        self._freshness = freshness_of(limits, self._link)
        self._store = Store(self._freshness.limits, max_size)
        self._hits = self._misses = self._shared = self._stale = 0
        self._pid = process.pid

    def __repr__(self) -> str:
        return f"<DecisionCache {self.status()}>"

    @boundary
    def invalidate(
        self,
        *,
        identity: IdentityLike | None = None,
        policy_path: str | None = None,
        resource: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Use no answer again that was asked for before this call. Thread-safe.

        Each argument counts by itself: answers that concern one of them are
        invalidated. Without arguments, all are. A check under way still returns its
        answer to the callers that wait for it. No later caller gets that answer.

        With an *invalidation_bus*, the other processes get it soon. If it cannot be
        sent, it is sent again later, a WARNING is logged, and `status().bus.waiting`
        counts it.

        Args:
            identity: All answers about this identity, as `identity_provider` returns
                it. A token counts as itself: its subject is unknown here.
            policy_path: All answers of this policy.
            resource: All answers whose resource context has all of these fields with
                these values, such as `{"id": 42}`. It may have others, too. Values are
                compared by their text, so 42, "42" and `Decimal("42.0")` are one value,
                and so are True, "true" and 1. A UUID equals each of its texts. So does
                a datetime, which counts as UTC if it has no zone. An Enum member stands
                for its value and its name. Another class stands for its `str()`.
                Mappings and lists are compared as a whole. A field that no answer has
                concerns none.

        Raises:
            TypeError: An argument has a wrong type, or a value of *resource* has no
                text, such as bytes, a set, or an object without `__str__`.
            ValueError: *policy_path* is not a Rego reference, or a value has a lone
                surrogate or nests too deep.
        """
        self._freshness.invalidate(identity, policy_path, resource)

    async def clear(self) -> None:
        """
        Forget all answers. No answer under way is kept or used by later callers.

        With an *invalidation_bus*, the other processes do the same soon.
        """
        self._freshness.invalidate(None, None, None)
        self._store.drop()

    def _clear_here(self) -> None:
        self._freshness.invalidations.invalidate_all()
        self._store.drop()

    @property
    def _companion(self) -> Callable[[], Awaitable[None]] | None:
        """What must run while a pool of this cache is open."""
        return None if self._link is None else self._link.run

    def status(self) -> CacheStatus:
        """Return a snapshot of the numbers of this cache. Never raises."""
        return CacheStatus(
            # After a fork, the entries of the parent are never used.
            size=len(self._store) if self._pid == process.pid else 0,
            hits=self._hits,
            misses=self._misses,
            shared=self._shared,
            stale=self._stale,
            evictions=self._store.evictions,
            bus=None if self._link is None else self._link.status(),
        )

    def _begin(self) -> None:
        """Begin in a new opening of a pool: no earlier answer is used."""
        self._pid = process.pid
        self._store.drop()

    def _excludes(self, question: Question) -> bool:
        return len(question.request) > self._max_request_bytes or (
            self._excluded is not None
            and self._excluded.fullmatch(question.policy_path) is not None
        )


class Cached(Sharing):
    """
    Answers from a cache.

    Args:
        ask: The next layer.
        cache: The cache.
        openings: Finds the opening of the pool.
    """

    def __init__(self, ask: Ask, cache: DecisionCache, openings: Openings) -> None:
        super().__init__(ask, cache._freshness)  # noqa: SLF001
        self._cache = cache
        self._openings = openings
        self._opening: Opening | None = None

    async def __call__(self, question: Question, /) -> Decision:
        opening = None if self._cache._excludes(question) else self._current()  # noqa: SLF001
        if opening is None:
            return await self.ask(question)
        return await self.share(question, opening, opening.keys.key_of(question))

    def hit(self, question: Question, opening: Opening) -> Decision | None:
        """Return the decision that the cache keeps, if it may be used now."""
        if question.max_age == 0 or opening is not self._opening:
            return None
        freshness, key = self.freshness, opening.keys.key_of(question)
        now = freshness.clock()
        valid_from = freshness.valid_from(question, now)
        return self.found(question, opening, key, valid_from, now)

    def stale(self, question: Question) -> Decision | None:
        """Return an older answer to *question*, for use if there is no other."""
        cache, now = self._cache, self.freshness.clock()
        opening = None if cache._excludes(question) else self._current()  # noqa: SLF001
        if opening is None or question.max_age == 0:
            return None
        key = opening.keys.key_of(question)
        valid_from = self.freshness.valid_from(question, now)
        entry = cache._store.stale(key, valid_from, now, self.freshness.wall())  # noqa: SLF001
        if entry is None or _is_too_old(question, entry, now):
            return None
        cache._stale += 1  # noqa: SLF001
        return _decision("stale", entry, now)

    def found(
        self,
        question: Question,
        place: Opening,  # noqa: ARG002
        key: bytes,
        valid_from: int,
        now: float,
    ) -> Decision | None:
        """Return the decision that the cache keeps."""
        cache = self._cache
        entry = cache._store.fresh(key, valid_from, now, self.freshness.wall())  # noqa: SLF001
        if entry is None or _is_too_old(question, entry, now):
            return None
        cache._hits += 1  # noqa: SLF001
        return _decision("cache", entry, now)

    def shared(
        self, question: Question, flight: Flight, came: float
    ) -> Decision | None:
        """Return the decision of *flight* for a follower, and count it."""
        decision = super().shared(question, flight, came)
        if decision is not None:
            self._cache._shared += 1  # noqa: SLF001
        return decision

    def leads(self) -> None:
        """Count that the authorizer is asked."""
        self._cache._misses += 1  # noqa: SLF001

    def keep(
        self, question: Question, place: Opening, key: bytes, flight: Flight
    ) -> None:
        """Keep the answer, if it is one of the authorizer and may be used later."""
        decision, expires_at = flight.decision, math.inf
        if decision is None or type(decision.allowed) is not bool:
            return
        if question.token is not None:
            found = expiry(question.token)
            if found is None:
                return
            expires_at = found
        if place is not self._opening:
            return
        id_ = bytes.fromhex(decision.id)
        entry = Entry(decision.allowed, flight.asked_at, flight.number, expires_at, id_)
        self._cache._store.put(key, entry)  # noqa: SLF001

    def _current(self) -> Opening | None:
        opening = self._openings.current()
        if opening is not None and opening is not self._opening:
            self._opening = opening
            self._cache._begin()  # noqa: SLF001
        return opening


def freshness_of(
    limits: Limits | None = None, link: BusLink | None = None
) -> Freshness:
    """Return a `Freshness`. Without *limits*, that of requests without a cache."""
    if limits is None:
        limits = Limits(LONGEST, LONGEST, 0.0, 0.0)
    invalidations = Invalidations(max(limits.longest, LONGEST))
    if link is None:
        return Freshness(limits, invalidations, Tagger(), boot_time)
    link.freshness = Freshness(
        link.limits, invalidations, link.tagger, boot_time, link.announce
    )
    return link.freshness


def _is_too_old(question: Question, entry: Entry, now: float) -> bool:
    return question.max_age is not None and now - entry.asked_at > question.max_age


def _decision(origin: Any, entry: Entry, now: float) -> Decision:
    age = now - entry.asked_at
    return Decision(entry.allowed is True, origin, age, entry.id.hex())


def _finite(name: str, value: object) -> float:
    return check_seconds(name, value, infinite=False)


def _share(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number from 0 to 1, got {safe_repr(value)}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value!r}")
    return float(value)


def _pattern(exclude: object) -> re.Pattern[str] | None:
    """
    Return one pattern for all of *exclude*.

    Raises:
        TypeError: *exclude* is not a sequence of str.
        ValueError: A pattern is empty.
    """
    if isinstance(exclude, str) or not isinstance(exclude, Sequence):
        raise TypeError(
            "exclude must be a sequence of patterns, such as ('*.DELETE.*',), got "
            f"{safe_repr(exclude)}"
        )
    for pattern in exclude:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude must hold only str, got {safe_repr(pattern)}")
        if not pattern:
            raise ValueError("exclude must not hold an empty pattern")
    # In a path, [" begins a quoted name. As a set of characters it would match none,
    # and the policy would not be excluded.
    literal = [pattern.replace('["', '[[]"') for pattern in exclude]
    return re.compile("|".join(map(fnmatch.translate, literal))) if literal else None
