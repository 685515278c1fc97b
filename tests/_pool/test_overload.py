"""
Overload: a crowd of callers, more than the server can answer.

The pool is real, the server is scripted, and the time is virtual.
"""

from __future__ import annotations

from functools import partial

import anyio
import pytest

from fastapi_topaz import ConnectionLost, PoolSaturated, PoolTimeout
from fastapi_topaz._pool.state.admission import Load
from fastapi_topaz.testing import FakeConnector, hang
from kit.autojump import jump
from kit.overload import (
    Server,
    bimodal,
    constant,
    crowd,
    exponential,
    pareto,
)
from kit.pools import make_pool, queued


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def nightly(*values):
    return pytest.param(*values, marks=pytest.mark.nightly)


SECONDS = 8.0
"""How long each scenario is measured. Its warm-up takes twice the budget."""

# A server, its capacity in calls a second, and the streams of each connection.
FIXED = (constant(0.05), None, 200, 1)
ONE_AT_A_TIME = (constant(0.01), 1, 100, 1)
HIDDEN_QUEUE = (constant(0.01), 1, 100, 50)
FOUR_WORKERS = (constant(0.02), 4, 200, 50)
SERVERS = {
    "fixed": FIXED,
    "one at a time": ONE_AT_A_TIME,
    "one at a time, 50 streams": HIDDEN_QUEUE,
    "four workers, 50 streams": FOUR_WORKERS,
}
# The default tests have a queue in the pool, and one in the server.
servers = pytest.mark.parametrize(
    "setup",
    [FIXED, slow(ONE_AT_A_TIME), HIDDEN_QUEUE, slow(FOUR_WORKERS)],
    ids=SERVERS,
)
# For tests of which one server is enough by default.
mostly_slow_servers = pytest.mark.parametrize(
    "setup",
    [slow(FIXED), slow(ONE_AT_A_TIME), HIDDEN_QUEUE, slow(FOUR_WORKERS)],
    ids=SERVERS,
)


def service_time(setup):
    service, *_ = setup
    return service(None)


async def overloaded(setup, budget, load, seconds=SECONDS, **options):
    """Return the callers, and when the measured time began."""
    service, workers, capacity, streams = setup
    async with crowd(
        Server(service, workers), budget, streams=streams, **options
    ) as it:
        await it.come(load * capacity, max(2.0, 2 * budget))
        since = anyio.current_time()
        await it.come(load * capacity, seconds)
        it.measured = it.goodput(since, capacity)
    return it, since


@pytest.mark.costly
@servers
@pytest.mark.parametrize(
    "budget, load",
    [
        (0.2, 3),
        *(slow(*x) for x in [(1, 3), (1, 10), (5, 3)]),
        *(nightly(1, load) for load in (2, 5)),
        *(nightly(budget, load) for budget in (0.2, 5) for load in (2, 5, 10)),
    ],
)
async def test_an_overloaded_pool_answers_as_much_as_the_server_can(
    setup, budget, load
):
    callers, since = await overloaded(setup, budget, load)
    assert callers.measured >= 0.95
    assert callers.latency(since) <= max(budget / 3, 1.5 * service_time(setup))
    # The refused ones know at once.
    assert callers.latency(since, "refused") < 0.02


@pytest.mark.costly
@mostly_slow_servers
@pytest.mark.parametrize("budget", [slow(0.2), 1, slow(5)])
async def test_below_saturation_no_check_is_refused_for_overload(setup, budget):
    callers, _ = await overloaded(setup, budget, 0.8)
    assert {check.end for check in callers.checks} == {"answered"}


@pytest.mark.parametrize(
    "service, mean",
    [
        pytest.param(exponential(0.05), 0.05, id="exponential"),
        pytest.param(pareto(0.05), 0.05, id="Pareto"),
        pytest.param(bimodal(0.05, 0.4), 0.085, id="bimodal"),
    ],
)
@pytest.mark.parametrize("load", [slow(3), nightly(10)])
async def test_random_times_of_service_leave_the_answers_near_the_capacity(
    service, mean, load
):
    callers, _ = await overloaded((service, None, 10 / mean, 1), 1, load)
    assert callers.measured >= 0.85


@pytest.mark.costly
@mostly_slow_servers
@pytest.mark.parametrize("seconds", [2, slow(10), nightly(30)])
async def test_after_an_overload_the_pool_is_as_before_within_two_seconds(
    setup, seconds
):
    service, workers, capacity, streams = setup
    async with crowd(Server(service, workers), 1, streams=streams) as callers:
        await callers.come(0.8 * capacity, 3)
        await callers.come(5 * capacity, seconds)
        await callers.come(0.8 * capacity, 2)
        since = anyio.current_time()
        await callers.come(0.8 * capacity, 10)
        assert callers.goodput(since, 0.8 * capacity) >= 0.95
        assert {check.end for check in callers.began(since)} == {"answered"}


@pytest.mark.costly
@mostly_slow_servers
async def test_after_a_slow_phase_the_pool_is_as_before_within_two_seconds(setup):
    service, workers, capacity, streams = setup
    server = Server(service, workers)
    async with crowd(server, 1, streams=streams) as callers:
        await callers.come(0.8 * capacity, 5)
        server.factor = 10
        await callers.come(0.8 * capacity, 10)
        server.factor = 1
        await callers.come(0.8 * capacity, 2)
        since = anyio.current_time()
        await callers.come(0.8 * capacity, 10)
        assert callers.goodput(since, 0.8 * capacity) >= 0.95
        assert {check.end for check in callers.began(since)} == {"answered"}


@pytest.mark.slow
async def test_one_slow_policy_among_fast_ones_gets_no_fast_one_refused():
    # One check in twenty takes eight times as long; the pool is used at 0.7.
    service, mean = bimodal(0.02, 0.16, 0.05), 0.95 * 0.02 + 0.05 * 0.16
    callers, _ = await overloaded((service, None, 10 / mean, 1), 1, 0.7, 20)
    assert {check.end for check in callers.checks} == {"answered"}


@pytest.mark.costly
@pytest.mark.parametrize(
    "times, budget",
    [
        (200, 3),
        *(slow(*x) for x in [(5, 3), (20, 1), (50, 0.5), (200, 1)]),
    ],
)
async def test_a_server_that_needs_longer_for_each_call_gets_all_calls_again(
    times, budget
):
    """It has no queue, so fewer calls at once are not quicker."""
    time = 0.1 * max(budget, 1)
    server = Server(constant(time / times))
    async with crowd(server, budget, streams=20) as callers:
        for _ in range(50):
            await callers.check()
        server.factor = times
        # As many as 80 leases can do, of the 200 that are possible.
        rate = 80 / time
        await callers.come(rate, 6)
        since = anyio.current_time()
        await callers.come(rate, 6)
        assert callers.goodput(since, rate) >= 0.95


async def test_a_refused_check_is_told_the_queue_and_its_budget():
    async with crowd(Server(constant(0.5)), 1, max_connections=1) as callers:
        pool = callers.pool
        await callers.check()
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(callers.check)
            await queued(pool, 1)
            assert pool.status().estimated_wait == pytest.approx(1.0)
            text = r"overloaded: about 1\.0 s of queue for fake, 0\.8 s of budget"
            with pytest.raises(PoolSaturated, match=text) as caught:
                await pool.acquire(budget=0.8)
        assert caught.value.retry_after == pytest.approx(0.2)
        assert pool.status().estimated_wait == 0
        assert pool._counters.rejected == 1 + len(callers.ended(0, "refused"))


async def test_a_waiting_check_leaves_the_queue_when_its_answer_would_be_late():
    async with crowd(Server(constant(0.2)), 1, max_connections=1) as callers:
        await callers.check()
        held = await callers.pool.acquire()
        began = anyio.current_time()
        await callers.check()
        # Its call would take 0.2 s.
        assert anyio.current_time() - began == pytest.approx(0.8)
        assert callers.checks[-1].end == "dismissed"
        await callers.pool.release(held)
        assert callers.pool._counters.timeouts == 1


@pytest.mark.parametrize("waits, seconds", [(True, 5), (False, 4)])
async def test_only_callers_that_still_wait_let_a_check_wait_as_long(waits, seconds):
    async def wait_for_long(scope):
        with scope:
            async with pool.acquire(timeout=50):
                pass

    async with crowd(Server(constant(1)), 5, max_connections=1) as callers:
        pool = callers.pool
        await callers.check()
        async with pool.acquire(), anyio.create_task_group() as tasks:
            scope = anyio.CancelScope()
            tasks.start_soon(wait_for_long, scope)
            await queued(pool, 1)
            if not waits:
                scope.cancel()
                await anyio.wait_all_tasks_blocked()
            began = anyio.current_time()
            with pytest.raises(PoolTimeout):
                await pool.acquire(budget=5)
            # Its call would take a second.
            assert anyio.current_time() - began == pytest.approx(seconds)
            scope.cancel()


@pytest.mark.costly
@pytest.mark.parametrize("quick", [0, 1, 4])
async def test_long_calls_do_not_keep_out_quick_ones_while_the_pool_has_room(quick):
    class Held(Server):
        async def __call__(self, method, request):
            if request == b"long":
                await anyio.sleep(30)
            return await super().__call__(method, request)

    async with (
        crowd(Held(constant(0.01)), 60, streams=50) as callers,
        anyio.create_task_group() as tasks,
    ):

        async def long():
            async with callers.pool.acquire(budget=60) as conn:
                await conn.call("/test/Is", b"long")

        # Together with the quick ones, they are as many as the first limit.
        for _ in range(16 - quick):
            tasks.start_soon(long)
        await anyio.wait_all_tasks_blocked()
        await callers.come(100, 5)
        since = anyio.current_time()
        await callers.come(100, 2)
        assert callers.latency(since) < 0.02
        tasks.cancel_scope.cancel()


async def test_calls_that_freeze_on_one_connection_do_not_lower_the_limit():
    class Frozen(Server):
        async def __call__(self, method, request):
            self.calls += 1
            if self.calls % 10 == 0:
                await anyio.sleep_forever()
            return await super().__call__(method, request)

    # One call in twenty never ends.
    async with crowd(Frozen(constant(0.02)), 1) as callers:
        await callers.come(60, 20)
        assert callers.pool.status().limit == 10
        assert len(callers.ended(0, "answered")) > 0.8 * len(callers.checks)


@pytest.mark.costly
@mostly_slow_servers
async def test_a_late_event_loop_does_not_lower_the_limit(setup):
    service, workers, capacity, streams = setup
    async with crowd(Server(service, workers), 1, streams=streams) as callers:
        await callers.come(0.8 * capacity, 5)
        before = callers.pool.status().limit
        for _ in range(5):
            jump(0.9)
            await callers.come(0.8 * capacity, 1)
        assert callers.pool.status().limit >= before


async def test_calls_on_connections_that_break_do_not_count_as_slow():
    connector = FakeConnector(answer=Server(constant(0.01)))
    pool = make_pool(connector, max_connections=4)
    async with pool:
        for _ in range(10):
            async with pool.acquire(budget=5) as conn:
                await conn.call("/a/b", b"")

        async def frozen():
            async with pool.acquire(budget=5) as conn:
                await anyio.sleep(4)
                conn.connection.hung_up = True
                with pytest.raises(ConnectionLost):
                    await conn.call("/a/b", b"")

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(frozen)
        waited = pool._open_pool._admission.wait(Load(0, 4, 4), anyio.current_time())
        assert waited <= 0.01 / 4


async def test_a_broken_call_does_not_count_as_slow_if_its_connection_recovers():
    connector = FakeConnector(answer=lambda _method, request: request)
    async with make_pool(connector, max_connections=1) as pool:
        async with pool.acquire() as conn:
            connector.connections[0].alive = False
            with pytest.raises(ConnectionLost):
                await conn.call("/a/b", b"")
            connector.connections[0].alive = True
            await anyio.sleep(5)
            (slot,) = pool._open_pool.state.open
            assert not slot.suspect
        admission = pool._open_pool.overload.admission
        assert (admission.ended, admission.held) == (0, 0)


async def test_the_first_connection_after_an_outage_begins_without_a_past():
    server = Server(constant(2.0))
    connector = FakeConnector(answer=server)
    pool = make_pool(connector, max_connections=1)
    async with pool:
        for _ in range(3):
            async with pool.acquire(budget=5) as conn:
                await conn.call("/a/b", b"")
        load = Load(0, 1, 1)
        assert pool._open_pool._admission.wait(load, anyio.current_time()) > 1
        connector.connections[-1].hung_up = True
        async with pool.acquire(budget=5):
            assert pool._open_pool._admission.wait(load, anyio.current_time()) == 0


async def test_an_estimate_of_a_slow_phase_locks_no_caller_out():
    server = Server(constant(0.05))
    async with crowd(server, 1) as callers:
        server.factor = 100
        await callers.come(100, 5)
        server.factor = 1
        await anyio.sleep(2)
        for _ in range(50):
            await callers.check()
        assert {check.end for check in callers.checks[-50:]} == {"answered"}


@pytest.mark.slow
async def test_without_an_adaptive_limit_the_queue_is_still_kept_short():
    callers, since = await overloaded(FIXED, 1, 5, adaptive_limit=False)
    assert callers.measured >= 0.95
    assert callers.latency(since) <= 1 / 3
    callers, _ = await overloaded(HIDDEN_QUEUE, 1, 5, adaptive_limit=False)
    assert callers.pool.status().limit == 0  # closed
    assert callers.pool.options.adaptive_limit is False


async def test_explicit_leases_are_not_limited():
    pool = make_pool(max_connections=10, streams_per_connection=50)
    async with pool:
        assert pool.status().limit == 16
        leases = [await pool.acquire(timeout=0.1) for _ in range(500)]
        assert (pool.status().total, pool.status().limit) == (10, 500)
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0)
        for conn in leases:
            await pool.release(conn)
        assert (pool.status().streams_in_use, pool.status().limit) == (0, 16)


@pytest.mark.slow
async def test_explicit_leases_take_no_room_from_the_checks():
    async def use_often(pool):
        while True:
            async with pool.acquire():
                await anyio.sleep(0.05)

    async with crowd(Server(constant(0.02), 4), 1, streams=50) as callers:
        # They come before the limit is lowered.
        held = [await callers.pool.acquire() for _ in range(16)]
        # Leases come back all the time, but no lease of a check does.
        callers._tasks.start_soon(use_often, callers.pool)
        await callers.come(1000, 5)
        since = anyio.current_time()
        await callers.come(1000, 5)
        assert callers.goodput(since, 200) >= 0.85
        overload = callers.pool._open_pool.overload
        assert callers.pool.status().limit == overload.adaptive.limit + 17
        for conn in held:
            await callers.pool.release(conn)


async def test_explicit_leases_do_not_make_the_checks_look_like_many():
    async with crowd(Server(constant(0.01)), 1, streams=50) as callers:
        held = [await callers.pool.acquire() for _ in range(16)]
        for _ in range(100):
            await callers.check()
        assert callers.pool._open_pool.overload.adaptive.limit == 16
        for conn in held:
            await callers.pool.release(conn)


async def test_the_room_of_an_explicit_lease_ends_with_it_and_with_its_wait():
    connector = FakeConnector()
    pool = make_pool(connector, max_connections=10, streams_per_connection=50)
    async with pool:
        checks = [await pool.acquire(budget=60) for _ in range(16)]
        lease = await pool.acquire()
        assert pool.status().limit == 17
        await pool.release(lease)
        assert pool.status().limit == 16
        connector.default = hang()
        state = pool._open_pool.state
        for slot in state.open:
            slot.streams = slot.leases
        state.ready.clear()
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=1)
        assert pool.status().limit == 16
        assert pool._open_pool.overload.explicit == 0
        for conn in checks:
            await pool.release(conn)


async def test_checks_that_were_dismissed_are_no_explicit_leases():
    async def check():
        with pytest.raises(PoolTimeout):
            await pool.acquire(budget=60)

    options = {"max_connections": 1, "streams_per_connection": 50}
    async with make_pool(FakeConnector(), **options) as pool:
        held = [await pool.acquire(budget=60) for _ in range(16)]
        open_pool = pool._open_pool
        overload = open_pool.overload
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(check)
            await queued(pool, 3)
            for claim in open_pool.state.waiting:
                claim.deadline = open_pool.now()
            open_pool.expire()
            # Their tasks have not run since.
            assert (overload.checks, overload.explicit) == (19, 0)
            overload.resize()
            assert pool.status().limit == 16
        assert (overload.checks, overload.explicit) == (16, 0)
        for conn in held:
            await pool.release(conn)


async def test_a_check_and_explicit_leases_wait_in_one_queue():
    order = []

    async def use(name, **arguments):
        async with pool.acquire(**arguments):
            order.append(name)
            await anyio.sleep(0.01)

    pool = make_pool(max_connections=1)
    async with pool:
        first = await pool.acquire()
        async with anyio.create_task_group() as tasks:
            for number in range(4):
                budget = {} if number % 2 else {"budget": 5}
                tasks.start_soon(partial(use, number, **budget))
                await queued(pool, number + 1)
            await pool.release(first)
    assert order == [0, 1, 2, 3]


@pytest.mark.costly
async def test_callers_are_served_in_the_order_of_their_arrival():
    callers, since = await overloaded(FIXED, 1, 3, 2)
    answered = callers.ended(since, "answered")
    assert [x.began for x in answered] == sorted(x.began for x in answered)


@pytest.mark.costly
@mostly_slow_servers
async def test_an_overload_leaves_no_lease_no_waiter_and_no_token(setup):
    service, workers, capacity, streams = setup
    async with crowd(Server(service, workers), 0.5, streams=streams) as callers:
        await callers.come(5 * capacity, 2)
        await anyio.sleep(callers.budget)
        assert len(callers.checks) == callers.come_so_far
        status = callers.pool.status()
        assert (status.waiting, status.streams_in_use) == (0, 0)
        open_pool = callers.pool._open_pool
        assert open_pool.limiter.borrowed_tokens == 0
        assert open_pool.state.dismissed == 0
        assert 1 <= status.limit <= status.streams_max


@pytest.mark.slow
async def test_with_a_third_of_the_callers_cancelled_the_others_get_their_answers():
    async with crowd(Server(constant(0.05)), 1) as callers:
        await callers.come(600, 2, patience=0.15)
        since = anyio.current_time()
        await callers.come(600, 6, patience=0.15)
        assert callers.ended(since, "gave up")
        assert callers.goodput(since, 200) >= 0.9
        await callers.come(100, 2)
        status = callers.pool.status()
        assert status.waiting == 0
        assert callers.pool._open_pool.limiter.borrowed_tokens == status.streams_in_use
