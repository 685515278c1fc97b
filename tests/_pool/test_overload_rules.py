"""Test each rule of the overload control alone: on a state, at given times."""

from __future__ import annotations

import logging

import attrs
import pytest

from fastapi_topaz._pool.overload import Overload
from fastapi_topaz._pool.state.slot import Check, Claim
from fastapi_topaz._pool.state.status import PoolCounters
from fastapi_topaz.exceptions import ConnectFailed
from kit.states import make_state, open_one


class Controlled:
    """A state and its overload control: 500 leases at most, 16 at first."""

    def __init__(self, connections=10, streams=50, **options):
        self.state = make_state(
            max_connections=connections, streams_per_connection=streams, **options
        )
        self.counters = PoolCounters()
        self.overload = Overload("the pool", self.state, self.counters)
        open_one(self.state)
        self.state.failures = 0

    def check(self, budget=1.0, due=1.0, *, served=True, now=0.0):
        claim = Check()
        claim.budget, claim.due = budget, due
        if served:
            assert self.state.take(claim, now)
            self.overload.checks += 1
            self.overload.begin(claim)
        return claim

    def lease(self):
        claim = Claim()
        assert self.state.take(claim, 0.0)
        return claim

    def end(self, claim, now, *, answered=True):
        claim.answered = answered
        self.state.give_back(claim, now)
        return self.overload.end(claim, now - claim.acquired_at, now)

    def leases_take(self, seconds):
        admission = self.overload.admission
        admission.held, admission.ended, admission.last_end = seconds, 1, 0.0


async def test_at_first_nothing_is_counted_and_the_limit_is_the_start():
    it = Controlled()
    overload = it.overload
    assert (it.state.limit, it.state.limit_reason) == (16, "start")
    assert (overload.checks, overload.counted, overload.explicit) == (0, 0, 0)
    assert overload.capacity == 500
    assert Controlled(connections=40).state.limit == 40
    assert Controlled(adaptive_limit=False).state.limit == 500


async def test_a_check_is_refused_with_the_wait_and_the_refusal_counts():
    it = Controlled(1, 1)
    it.lease()
    it.leases_take(1.0)
    assert it.overload.admit(it.check(2.0, 2.0, served=False), 0.0) is None
    assert it.overload.queued.is_set()
    assert it.overload.adaptive._refused == 0
    # The budget decides as long as it lasts, and then what is left of it.
    assert it.overload.admit(it.check(2.0, 0.9, served=False), 0.0) == 1.0
    assert it.overload.adaptive._refused == 1
    assert it.overload.admit(it.check(2.0, 2.0, served=False), 0.25) is None


async def test_without_an_adaptive_limit_a_check_is_refused_all_the_same():
    it = Controlled(1, 1, adaptive_limit=False)
    it.lease()
    it.leases_take(1.0)
    assert it.overload.admit(it.check(2.0, 0.9, served=False), 0.0) == 1.0


@pytest.mark.parametrize("latest, start", [(0.0, 8.0), (9.0, 9.0), (99.0, 10.0)])
async def test_a_check_starts_in_time_for_its_call_or_with_those_before(latest, start):
    it = Controlled()
    it.overload.admission.calls.append((1.0, 2.0))
    assert it.overload.latest_start(it.check(10.0, 10.0), latest) == start


async def test_only_checks_in_flight_fill_the_limit():
    it = Controlled()
    it.lease()
    for _ in range(15):
        it.check()
    assert it.overload.adaptive._full == 0
    it.check()
    assert it.overload.adaptive._full == 1


async def test_checks_are_counted_while_they_wait_or_have_a_lease():
    it = Controlled()
    first = it.check()
    it.check()
    waiting = it.check(served=False)
    assert it.overload.joined(waiting) is False
    assert it.overload.checks == 3
    it.overload.left(waiting)
    assert it.overload.checks == 2
    it.end(first, 0.1)
    assert it.overload.checks == 1


async def test_each_explicit_lease_that_waits_raises_the_limit():
    it = Controlled()
    overload, state = it.overload, it.state
    for _ in range(3):
        it.lease()
    claim = Claim()
    assert overload.joined(claim) is True
    assert (overload.counted, state.limit) == (4, 20)
    assert overload.joined(claim) is False
    overload.left(claim)
    assert (overload.counted, state.limit) == (3, 19)


async def test_a_check_that_finds_no_room_makes_it_for_the_explicit_leases():
    it = Controlled()
    it.lease()
    assert it.overload.joined(it.check(served=False)) is True
    assert it.state.limit == 17


async def test_the_room_of_ended_explicit_leases_is_taken_back():
    it = Controlled()
    leases = [it.lease() for _ in range(3)]
    overload, state = it.overload, it.state
    overload.joined(Claim())
    assert overload.shrink() is True
    assert state.limit == 19
    assert overload.shrink() is False
    # Only a caller that finds no room raises the limit.
    more = it.lease()
    assert overload.shrink() is False
    assert state.limit == 19
    for claim in (*leases, more):
        state.give_back(claim, 1.0)
    assert overload.shrink() is True
    assert (overload.counted, state.limit) == (0, 16)


async def test_the_limit_never_exceeds_the_capacity():
    it = Controlled(5, 4)
    overload, state = it.overload, it.state
    open_one(state)
    for _ in range(5):
        it.lease()
    assert overload.joined(Claim()) is True
    assert (overload.counted, state.limit) == (6, 20)
    # There is less room for explicit leases, but the limit is the same.
    assert overload.shrink() is False
    assert (overload.counted, state.limit) == (5, 20)


async def test_at_the_capacity_no_room_is_made():
    it = Controlled(10, 1)
    assert it.overload.joined(Claim()) is False
    assert (it.overload.counted, it.state.limit) == (0, 10)


@pytest.mark.parametrize(
    "answered, now, counts",
    [(True, 1.0, True), (True, 1.1, False), (False, 0.5, False)],
)
async def test_only_a_call_answered_in_time_shows_the_usual_time(answered, now, counts):
    it = Controlled()
    it.end(it.check(due=1.0, now=0.25), now, answered=answered)
    calls = [(now, now - 0.25)] if counts else []
    assert list(it.overload.admission.calls) == calls


async def test_a_quick_cohort_raises_the_limit_and_is_counted_and_logged(caplog):
    caplog.set_level(logging.DEBUG, "fastapi_topaz.pool")
    it = Controlled()
    it.lease()
    checks = [it.check() for _ in range(16)]
    # The pool stays full until all calls of the cohort have begun.
    for _ in range(16):
        assert it.end(checks.pop(), 0.01) is False
        checks.append(it.check())
    # Nine tenths of them must have ended.
    ended = [it.end(check, 0.01) for check in checks]
    assert ended == [False] * 12 + [True] + [False] * 3
    assert it.counters.limit_changes == {"quick": 1}
    assert (it.state.limit, it.state.limit_reason) == (33, "quick")
    assert "the pool: its limit of leases is 32 now, and was 16: quick" in caplog.text


async def test_without_an_adaptive_limit_no_end_changes_it():
    it = Controlled(adaptive_limit=False)
    assert it.end(it.check(), 0.01) is False
    assert it.overload.look(0.0, 99.0) is False
    it.overload.connected()
    assert it.state.limit == 500


def stuck(count=16, **options):
    """Return a pool whose checks do not end, while another one waits."""
    it = Controlled(**options)
    it.checks = [it.check(2.0, 2.0) for _ in range(count)]
    it.overload.admission.queue_begins(0.0)
    it.overload.admit(it.check(2.0, 2.0, served=False), 0.0)
    return it


async def test_checks_that_do_not_end_raise_the_limit_of_a_full_pool(caplog):
    caplog.set_level(logging.DEBUG, "fastapi_topaz.pool")
    it = stuck()
    assert it.overload.look(0.0, 0.4) is False
    assert it.overload.look(0.0, 0.41) is True
    assert (it.state.limit, it.state.limit_reason) == (32, "trial")
    assert it.counters.limit_changes == {"trial": 1}
    assert "limit of leases is 32 now, and was 16: trial" in caplog.text


async def test_a_pool_with_room_does_not_look():
    it = stuck(15)
    assert it.overload.look(0.0, 9.0) is False
    assert it.state.limit == 16


async def test_checks_have_four_times_the_usual_time_to_end():
    it = stuck()
    it.overload.admission.calls.append((0.0, 0.2))
    assert it.overload.look(0.0, 0.8) is False
    assert it.overload.look(0.0, 0.85) is True


async def test_the_end_of_a_check_or_a_new_queue_restarts_the_patience():
    it = stuck()
    it.end(it.checks[0], 1.0, answered=False)
    it.check(2.0, 3.0, now=1.0)
    assert it.overload.look(0.0, 1.39) is False
    it.overload.admission.queue_begins(2.0)
    assert it.overload.look(0.0, 2.39) is False
    it.end(it.checks[1], 3.0, answered=False)
    it.check(2.0, 5.0, now=3.0)
    assert it.overload.look(0.0, 3.39) is False
    assert it.overload.look(0.0, 3.45) is True


async def test_a_late_event_loop_forgets_the_calls_under_way():
    it = stuck()
    assert it.overload.look(0.21, 9.0) is False
    assert (it.overload.adaptive._begun, it.state.limit) == (0, 16)
    # A tenth of the smallest budget is not late.
    assert it.overload.look(0.2, 9.0) is True


async def test_the_only_connection_begins_without_a_past():
    it = Controlled()
    for _ in range(3):
        it.lease()
    overload, state = it.overload, it.state
    overload.joined(Claim())
    overload.adaptive.limit = 4
    second = open_one(state)
    it.leases_take(1.0)
    overload.connected()
    assert (overload.admission.ended, overload.adaptive.limit) == (1, 4)
    state.retire(second, "drain")
    third = open_one(state)
    state.retire(next(iter(state.open)), "drain")
    assert third.retired is None
    overload.connected()
    assert (overload.admission.ended, overload.adaptive.limit) == (0, 16)
    assert (overload.counted, state.limit) == (3, 19)


@pytest.mark.parametrize("adaptive, limit", [(True, 41), (False, 2000)])
async def test_a_resize_gives_the_new_capacity_and_the_new_limit(adaptive, limit):
    it = Controlled(adaptive_limit=adaptive)
    it.lease()
    it.state.resize(attrs.evolve(it.state.options, max_connections=40))
    it.overload.resize()
    assert it.overload.capacity == 2000
    assert it.state.limit == limit


async def test_a_check_that_finds_a_free_lease_does_not_wait():
    it = Controlled()
    it.leases_take(1.0)
    for _ in range(15):
        it.lease()
    assert it.overload.estimated_wait(0.0) == 0
    it.state.enqueue(Claim())
    assert it.overload.estimated_wait(0.0) == 2 / 32
    it.state.waiting.clear()
    it.lease()
    assert it.overload.estimated_wait(0.0) == 1 / 32
    # After a second without an end, the estimate is halved each second.
    assert it.overload.estimated_wait(2.0) == 1 / 64


@pytest.mark.parametrize(
    "streams, grows, limit",
    [(50, True, 32), (50, False, 16), (2, True, 20)],
)
async def test_a_limit_that_grows_counts_twice_up_to_the_capacity(
    streams, grows, limit
):
    it = Controlled(10, streams)
    it.overload.adaptive.grows = grows
    it.leases_take(1.0)
    it.state.enqueue(Claim())
    assert it.overload.estimated_wait(0.0) == 2 / limit


@pytest.mark.parametrize("out, limit, counts", [(4, 16, 4), (16, 8, 8), (0, 16, 1)])
async def test_while_attempts_fail_only_the_leases_that_are_out_count(
    out, limit, counts
):
    it = Controlled()
    it.leases_take(1.0)
    for _ in range(out):
        it.lease()
    it.state.limit = limit
    it.overload.adaptive.grows = False
    it.state.enqueue(Claim())
    slot = it.state.begin(0.0)
    it.state.connect_failed(slot, ConnectFailed("no"), 0.0)
    assert it.overload.estimated_wait(0.0) == 2 / counts
