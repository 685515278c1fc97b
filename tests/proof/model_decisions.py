"""
The books of a machine that asks questions: what was asked, answered and invalidated.

The books know each answer by the id of its decision. So they know for which question
and when it was given, whatever the layers say. Each decision that a caller gets is
checked against them, and each check is an invariant with a number.
"""

from __future__ import annotations

import math
from functools import partial

import anyio
import attrs
from hypothesis.stateful import RuleBasedStateMachine

from fastapi_topaz import CircuitBreaker, CircuitOpen, DecisionCache, TopazError
from fastapi_topaz._decisions.breaker import Breaking
from fastapi_topaz._decisions.cache import Cached, freshness_of
from fastapi_topaz._decisions.fallback import Fallback, Fallbacks
from fastapi_topaz._decisions.invalidation import MOST_MARKS
from fastapi_topaz._decisions.memo import LONGEST, Memo
from kit.bus import KEY
from kit.decisions import HeldAuthorizer, OpenHere, Subject, http_request, jwt
from kit.invariants import Broken
from proof.model_bus import BusBooks


EPOCH = 1_700_000_000.0
EXPIRY = EPOCH + 12
SUBJECTS = [
    Subject("app.a", "alice", {"id": "1"}),
    Subject("app.a", "bob", {"id": "1"}),
    Subject("app.b", "alice", {"id": "2", "kind": "x"}),
    Subject("app.a", resource={"id": "2"}, token=jwt(exp=EXPIRY)),
    Subject("app.DELETE", "alice", {"id": "1"}),
    Subject("app.b", "alice", {"id": "2", "kind": "x"}, metadata=(("tenant", "b"),)),
]
EXCLUDED = "app.DELETE"
ABOUT = [
    {},
    {"identity": SUBJECTS[0].identity},
    {"policy_path": "app.a"},
    {"resource": {"id": "1"}},
    {"resource": {"kind": "x", "id": "2"}},
    {"identity": SUBJECTS[1].identity, "resource": {"kind": "y"}},
    {"identity": SUBJECTS[3].identity},
]


def concerns(about, subject):
    """Return whether an invalidation concerns *subject*: the books' own opinion."""
    resource = about.get("resource")
    return (
        not about
        or about.get("identity") == subject.identity
        or about.get("policy_path") == subject.path
        or (resource is not None and resource.items() <= subject.resource.items())
    )


@attrs.define(eq=False)
class Caller:
    """One caller, and how it ended."""

    subject: Subject
    came: int
    question: object = None
    max_age: float | None = None
    http: object = None
    scope: anyio.CancelScope = attrs.Factory(anyio.CancelScope)
    cancel_task: object = None
    cancelled: bool = False
    ended: bool = False
    # The opening in which it came, and that in which it asks.
    opened: int = 0
    asks_in: int = 0
    # When it asks, and how often the cache had been cleared for the bus.
    asked: int = 0
    clears: int = 0
    deadline: float = math.inf


@attrs.frozen
class Held:
    """An invariant by its name."""

    name: str

    def __str__(self):
        return self.name.replace("_", " ")


class _Pool:
    """Replaces a pool: it counts its connections."""

    def __init__(self):
        self._counters = self
        self.connects = 0
        self.authorizer_options = None


class DecisionBooks(RuleBasedStateMachine):
    """The layers over a held authorizer, and the books about them."""

    make_world = None
    make_cached = Cached
    make_memo = Memo
    make_fallback = Fallback
    make_breaking = Breaking
    steps = 0

    def __init__(self):
        super().__init__()
        self.world = type(self).make_world()
        # One sequence for everything that the books order: arrivals, calls, marks.
        self.sequence = 0
        self.callers, self.ends = [], []
        self.invalidations = []
        self.openings = OpenHere()
        self.opened = 0
        self.answers, self.errors = {}, []
        self.pool = _Pool()
        self.wall_shift = 0.0
        self.found = []

    def now(self):
        return self.world.now()

    def wall(self):
        return EPOCH + self.now() + self.wall_shift

    def tick(self):
        self.sequence += 1
        return self.sequence

    # -- the layers -------------------------------------------------------------------

    def build(self, setup):
        cached, strategy, breaker, bus = setup
        self.strategy, self.cache, self.breaker = strategy, None, None
        self.bus = BusBooks(self) if bus else None
        self.server = HeldAuthorizer(self.now)
        asking = self.ask_server
        if breaker:
            self.breaker = CircuitBreaker(
                failure_threshold=2, minimum_calls=4, recovery_timeout=3
            )
            self.breaker._clock = self.now
            asking = self.make_breaking(asking, self.breaker, lambda: self.pool)
        stale = lambda _question: None  # noqa: E731
        if cached:
            self.cache = DecisionCache(
                ttl_seconds=10,
                denied_ttl_seconds=4,
                stale_ttl_seconds=20,
                max_size=3,
                exclude=("*.DELETE",),
                **({"invalidation_bus": self.bus.bus} if bus else {}),
                **({"invalidation_key": KEY} if bus else {}),
            )
            layer = self.make_cached(asking, self.cache, self.openings)
            self.freshness, stale = layer.freshness, layer.stale
            asking = self.make_memo(
                layer, self.freshness, self.openings, self.cache._excludes, layer.hit
            )
            self.limits = {True: 10.0, False: 4.0}
        else:
            self.freshness = freshness_of()
            asking = self.make_memo(asking, self.freshness, self.openings)
            self.limits = {True: LONGEST, False: LONGEST}
        self.freshness.clock, self.freshness.wall = self.now, self.wall
        self.fallbacks = Fallbacks(
            stale, allow_unsafe=strategy == "allow", on_fallback=None
        )
        if strategy != "error":
            asking = self.make_fallback(asking, strategy, self.fallbacks)
        self.layers = asking
        self.https = [http_request(), http_request()]
        if bus:
            self.do(lambda: self.world.spawn(self.cache._companion))
            self.pass_time(1)

    async def ask_server(self, question):
        """Ask, and note under which id the answer will be known."""
        began, opened = self.tick(), self.opened
        caller = next(c for c in self.callers if c.question is question)
        caller.asks_in, caller.asked, asked_at = opened, began, self.now()
        caller.clears = self.clears()
        decision = await self.server(question)
        wall = self.wall_shift + EPOCH + asked_at
        facts = caller, began, asked_at, decision.allowed, opened, wall < EXPIRY
        self.answers[decision.id] = facts
        return decision

    def clears(self):
        """Return how often the cache was cleared because of the bus."""
        return 0 if self.bus is None else self.cache.status().bus.clears

    # -- callers ----------------------------------------------------------------------

    def start(self, subject, http, max_age):
        caller = Caller(subject, self.tick(), max_age=max_age, http=http)
        self.callers.append(caller)
        caller.opened = self.opened
        caller.cancel_task = self.world.spawn(partial(self.live, caller))

    async def live(self, caller):
        caller.question = caller.subject.question(
            http=caller.http, max_age=caller.max_age
        )
        caller.deadline = self.now() + 5.0
        try:
            with caller.scope:
                try:
                    decision = await self.layers(caller.question)
                except Exception as error:  # noqa: BLE001
                    self.ends.append((caller, self.now(), self.wall(), error))
                else:
                    self.check_decision(caller, decision)
                    self.ends.append((caller, self.now(), self.wall(), decision))
        finally:
            caller.ended = True

    def waiting(self):
        return [caller for caller in self.callers if not caller.ended]

    def do(self, *actions):
        type(self).steps += 1
        self.world.step(*actions)
        self.all_hold()

    def pass_time(self, seconds):
        type(self).steps += 1
        self.world.advance(seconds, lambda: None)
        self.all_hold()

    # -- the invariants ---------------------------------------------------------------

    def breaks(self, name, detail):
        self.found.append((Held(name), detail))

    def check_decision(self, caller, decision):
        """Check what *caller* gets, at the moment when it gets it."""
        if type(decision.allowed) is not bool:
            self.breaks("a_decision_is_a_bool", decision)
        if decision.origin == "fallback":
            if decision.allowed and self.strategy != "allow":
                self.breaks("no_allow_without_permission", self.strategy)
            return
        known = self.answers.get(decision.id)
        if known is None:
            self.breaks("each_decision_was_given", decision)
            return
        self.check_reuse(caller, decision, *known)

    def check_reuse(
        self, caller, decision, asker, began, asked_at, allowed, opened, in_time
    ):
        age = self.now() - asked_at
        if asker.subject != caller.subject:
            self.breaks("each_answers_its_own_question", (asker, caller))
        if allowed is not decision.allowed:
            self.breaks("no_decision_turns", decision)
        if asker is caller:
            if decision.origin != "authorizer":
                self.breaks("the_origin_is_true", decision)
            return
        if decision.origin == "authorizer":
            self.breaks("the_origin_is_true", decision)
        # It may be told older: a request counts from when it first asked.
        if decision.age < age - 1e-3:
            self.breaks("no_answer_is_told_younger", (age, decision))
        # What was asked for after the caller came is as good as an answer of its own.
        if began < caller.came:
            limit = 20.0 if decision.origin == "stale" else self.limits[allowed]
            if self.bus is not None and self.bus.is_bad:
                limit = min(limit, self.limits[False])
            self.check_age(caller, decision, age, limit, in_time)
        if opened < caller.opened:
            self.breaks("no_answer_outlives_its_opening", decision)
        self.check_bypass(caller, decision, asker)
        self.check_invalidation(caller, decision, began)

    def check_bypass(self, caller, decision, asker):
        if caller.max_age == 0:
            self.breaks("max_age_is_kept", decision)
        if self.cache is None and asker.http is not caller.http:
            self.breaks("a_memo_is_of_one_request", decision)
        if caller.subject.path == EXCLUDED and self.cache is not None:
            self.breaks("the_excluded_is_always_asked", decision)

    def check_invalidation(self, caller, decision, began):
        # An older answer is looked up when the check has failed.
        until = math.inf if decision.origin == "stale" else caller.came
        for moment, about in self.invalidations:
            if began < moment < until and concerns(about, caller.subject):
                self.breaks("invalidation_wins", (about, decision))

    def check_age(self, caller, decision, age, limit, in_time):
        if not 0 <= age <= limit:
            self.breaks("no_answer_is_too_old", (age, decision))
        if caller.max_age is not None and age > caller.max_age:
            self.breaks("max_age_is_kept", (age, caller.max_age))
        # If the token had expired before, the authorizer knew that.
        if caller.subject.token is not None and in_time and self.wall() >= EXPIRY:
            self.breaks("no_answer_outlives_its_token", decision)

    def all_hold(self):
        self.check_flights()
        self.check_errors()
        self.check_sizes()
        if self.bus is not None:
            self.bus.look()
        if self.found:
            found, self.found = self.found, []
            raise Broken(found)

    def check_flights(self):
        """Each caller waits for a call, and equal callers for the same one."""
        asking = {id(call.question) for call in self.server.open}
        waiting = self.waiting()
        leaders = [caller for caller in waiting if id(caller.question) in asking]
        if len(asking) != len(leaders):
            self.breaks("each_call_has_a_living_caller", len(asking))
        for caller in waiting:
            if caller.cancelled:
                self.breaks("the_cancelled_do_not_wait", caller)
            if not any(
                each.subject == caller.subject and each.asks_in >= caller.opened
                for each in leaders
            ):
                self.breaks("nobody_waits_in_vain", caller)
            if self.now() > caller.deadline + 1e-3 and caller not in leaders:
                self.breaks("nobody_waits_beyond_the_deadline", caller)
        if self.cache is not None:
            self.check_calls(leaders)
        flights = len(self.openings.current().flights)
        if flights > len(leaders):
            self.breaks("no_flight_without_a_leader", flights)

    def check_calls(self, leaders):
        """A caller that can share a call under way makes no call of its own."""
        plain = [
            caller
            for caller in leaders
            if caller.max_age is None and caller.subject.path != EXCLUDED
        ]
        for first in plain:
            for second in plain:
                if first.subject == second.subject and first.asked < second.asked:
                    separated = any(
                        first.asked < moment < second.asked
                        and concerns(about, first.subject)
                        for moment, about in self.invalidations
                    )
                    # A caller of an earlier opening that took over asks apart.
                    same = (
                        first.opened == first.asks_in == second.opened == second.asks_in
                    )
                    same = same and first.clears == second.clears
                    if same and not separated:
                        self.breaks("equal_questions_are_one_call", (first, second))

    def check_errors(self):
        """Each caller has an exception of its own, of a kind that the server raised."""
        seen = [end for *_, end in self.ends if isinstance(end, Exception)]
        if len({id(error) for error in seen}) != len(seen):
            self.breaks("errors_are_not_shared", len(seen))
        for error in seen:
            if isinstance(error, CircuitOpen) and self.breaker is None:
                self.breaks("errors_come_from_the_server", error)
            if not isinstance(error, TopazError) and not hasattr(error, "code"):
                self.breaks("errors_come_from_the_server", error)

    def check_sizes(self):
        if self.cache is not None and len(self.cache._store) > 3:
            self.breaks("the_size_is_bounded", len(self.cache._store))
        if self.freshness.invalidations.marks.count > MOST_MARKS:
            self.breaks("the_marks_are_bounded", self.freshness.invalidations.marks)
        fell = [
            end
            for *_, end in self.ends
            if getattr(end, "origin", None) in {"fallback", "stale"}
        ]
        if sum(self.fallbacks.uses.values()) != len(fell):
            self.breaks("each_fallback_is_counted", self.fallbacks.uses)
        if self.cache is not None:
            self.check_counts(fell)

    def check_counts(self, fell):
        """Hits and shared answers are what callers got; memos add hits of their own."""
        status, got = self.cache.status(), [end for *_, end in self.ends]
        stale = sum(getattr(end, "origin", None) == "stale" for end in fell)
        if status.stale != stale:
            self.breaks("each_stale_answer_is_counted", (status, stale))
        hits = sum(getattr(end, "origin", None) == "cache" for end in got)
        if status.hits > hits:
            self.breaks("each_hit_is_counted", (status, hits))
