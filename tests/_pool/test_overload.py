"""
Overload: a crowd of callers, more than the server can answer.

The pool is real, the server is scripted, and the time is virtual.
"""

from __future__ import annotations

from functools import partial

import anyio
import pytest

from fastapi_topaz import PoolTimeout
from kit.overload import (
    Server,
    bimodal,
    constant,
    crowd,
    exponential,
    pareto,
)
from kit.pools import make_pool, queued


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


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
servers = pytest.mark.parametrize("setup", SERVERS.values(), ids=SERVERS)


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


@servers
@pytest.mark.parametrize("load", [2, *(slow(load) for load in (3, 5)), 10])
@pytest.mark.parametrize("budget", [0.2, 1, slow(5)])
async def test_an_overloaded_pool_answers_as_much_as_the_server_can(
    setup, budget, load
):
    callers, since = await overloaded(setup, budget, load)
    assert callers.measured >= 0.95
    assert callers.latency(since) <= max(budget / 3, 1.5 * service_time(setup))
    # The refused ones know at once.
    assert callers.latency(since, "refused") < 0.02


@servers
@pytest.mark.parametrize("budget", [0.2, 1, slow(5)])
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
@pytest.mark.parametrize("load", [3, slow(10)])
async def test_random_times_of_service_leave_the_answers_near_the_capacity(
    service, mean, load
):
    callers, _ = await overloaded((service, None, 10 / mean, 1), 1, load)
    assert callers.measured >= 0.85


@servers
@pytest.mark.parametrize("seconds", [5, slow(30)])
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


@servers
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


async def test_one_slow_policy_among_fast_ones_gets_no_fast_one_refused():
    # One check in twenty takes eight times as long; the pool is used at 0.7.
    service, mean = bimodal(0.02, 0.16, 0.05), 0.95 * 0.02 + 0.05 * 0.16
    callers, _ = await overloaded((service, None, 10 / mean, 1), 1, 0.7, 20)
    assert {check.end for check in callers.checks} == {"answered"}


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


async def test_callers_are_served_in_the_order_of_their_arrival():
    callers, since = await overloaded(FIXED, 1, 5)
    answered = callers.ended(since, "answered")
    assert [x.began for x in answered] == sorted(x.began for x in answered)


@servers
async def test_an_overload_leaves_no_lease_no_waiter_and_no_token(setup):
    service, workers, capacity, streams = setup
    async with crowd(Server(service, workers), 0.5, streams=streams) as callers:
        await callers.come(5 * capacity, 3)
        await anyio.sleep(callers.budget)
        assert len(callers.checks) == callers.come_so_far
        status = callers.pool.status()
        assert (status.waiting, status.streams_in_use) == (0, 0)
        open_pool = callers.pool._open_pool
        assert open_pool.limiter.borrowed_tokens == 0
        assert open_pool._dismissed == 0
        assert 1 <= status.limit <= status.streams_max


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
