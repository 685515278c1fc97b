"""Test which callers get a lease or wait, and how each acquire is counted."""

from __future__ import annotations

import math

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import ConnectFailed, PoolClosed, PoolSaturated, PoolTimeout
from fastapi_topaz._pool.state.slot import Claim
from fastapi_topaz.testing import FakeConnector, fail, hang, slow
from kit.pools import make_pool, queued


# -- how each acquire is counted ----------------------------------------------------


async def test_each_served_caller_is_counted_once_with_or_without_a_wait():
    async with make_pool(max_connections=1) as pool:
        for _ in range(3):
            async with pool.acquire():
                pass
        assert pool._counters.acquisitions == 3
        async with anyio.create_task_group() as tasks:

            async def caller():
                async with pool.acquire():
                    await anyio.sleep(1)

            for _ in range(3):
                tasks.start_soon(caller)
        assert pool._counters.acquisitions == 6


async def test_each_timed_out_caller_is_counted_once():
    async with make_pool(max_connections=1) as pool, pool.acquire():
        for timeout in (0, 0, 1, 1):
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout=timeout)
        assert pool._counters.timeouts == 4
        assert pool._counters.acquisitions == 1


async def test_each_rejected_caller_is_counted_once():
    async with make_pool(max_connections=1, max_waiting=0) as pool, pool.acquire():
        for _ in range(3):
            with pytest.raises(PoolSaturated):
                await pool.acquire()
        assert pool._counters.rejected == 3


async def test_each_failed_caller_is_counted_once():
    connector = FakeConnector(default=fail())
    async with make_pool(connector, max_retries=0) as pool:
        for count in (1, 2, 3):
            with pytest.raises(ConnectFailed):
                await pool.acquire()
            assert pool._counters.failed == count


async def test_each_cancelled_caller_is_counted_once():
    async with make_pool(max_connections=1) as pool, pool.acquire():
        for _ in range(3):
            with anyio.move_on_after(1):
                await pool.acquire()
        assert pool._counters.cancelled == 3


async def test_each_caller_of_a_closed_pool_is_counted_once():
    pool = make_pool(max_connections=1)
    held = await pool.acquire()
    async with anyio.create_task_group() as tasks:

        async def caller():
            with pytest.raises(PoolClosed):
                await pool.acquire()

        for _ in range(3):
            tasks.start_soon(caller)
        await queued(pool, 3)
        await pool.close(0)
    await pool.release(held)
    assert pool._counters.closed == 3
    for _ in range(2):
        with pytest.raises(PoolClosed):
            await pool.acquire()
    assert pool._counters.closed == 5


async def test_each_late_lease_is_counted_once():
    async with make_pool(leak_threshold=1) as pool:
        leases = [await pool.acquire() for _ in range(3)]
        await anyio.sleep(5)
        assert pool._counters.leaked == 3
        for conn in leases:
            await pool.release(conn)


# -- how many callers may wait ------------------------------------------------------


async def test_max_waiting_does_not_count_callers_that_wait_for_a_connect():
    connector = FakeConnector(default=slow(1))
    async with make_pool(connector, max_connections=2, max_waiting=1) as pool:
        async with anyio.create_task_group() as tasks:
            served = []

            async def caller():
                async with pool.acquire():
                    served.append(anyio.current_time())
                    await anyio.sleep(1)

            for _ in range(3):
                tasks.start_soon(caller)
            await queued(pool, 3)
            with pytest.raises(PoolSaturated):
                await pool.acquire()
        assert len(served) == 3


async def test_after_a_resize_no_stream_beyond_the_new_capacity_is_leased():
    async with make_pool(max_connections=2, streams_per_connection=2) as pool:
        first, second, third = [await pool.acquire() for _ in range(3)]
        assert first.connection is second.connection is not third.connection
        await pool.release(second)
        pool.resize(0, 1)
        # One of the two connections is leaving. The other one has a free stream.
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0)
        for conn in (first, third):
            await pool.release(conn)
        async with pool.acquire(timeout=0):
            pass


async def test_a_lost_connection_found_by_acquire_is_closed_if_another_serves():
    connector = FakeConnector()
    async with make_pool(connector, max_connections=2) as pool:
        first, second = [await pool.acquire() for _ in range(2)]
        await pool.release(first)
        await pool.release(second)
        await anyio.sleep(0.1)  # nothing is left to do
        connector.connections[0].hung_up = True
        async with pool.acquire() as conn:
            assert conn.connection.number == 2
            await anyio.sleep(0.1)
            assert connector.connections[0].closed == 1


async def test_a_stream_given_to_a_cancelled_caller_counts_as_used_until_then():
    async with make_pool(max_connections=1, max_idle_time=100) as pool:
        held = await pool.acquire()
        async with anyio.create_task_group() as tasks:

            async def caller():
                await pool.acquire()

            tasks.start_soon(caller)
            await queued(pool, 1)
            await anyio.sleep(1)
            tasks.cancel_scope.cancel()
            await pool.release(held)
        await anyio.sleep(2)
        (connection,) = pool.connections()
        assert connection.idle_for == pytest.approx(2)
        assert pool.status().idle == 1


async def test_timing_out_a_token_holder_gives_no_token_to_later_callers():
    connector = FakeConnector(default=hang())
    pool = make_pool(connector, max_connections=1, connection_timeout=100)
    async with pool, anyio.create_task_group() as tasks:

        async def caller(timeout):
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout=timeout)

        for count, timeout in enumerate((1, 10, 10, 10), 1):
            tasks.start_soon(caller, timeout)
            await queued(pool, count)
        await anyio.sleep(1.5)
        assert pool.status().waiting == 3
        assert pool._open_pool.limiter.borrowed_tokens == 1


async def test_callers_with_equal_deadlines_are_all_watched_by_the_timekeeper():
    async with make_pool(max_connections=1) as pool:
        held = await pool.acquire()
        async with anyio.create_task_group() as tasks:

            async def caller():
                with pytest.raises(PoolTimeout):
                    await pool.acquire(timeout=5)

            tasks.start_soon(caller)
            await queued(pool, 1)
            open_pool = pool._open_pool
            (claim,) = open_pool.state.waiting
            assert open_pool.alarm == claim.deadline
            assert open_pool._watch(claim.deadline)
            assert not open_pool._watch(claim.deadline - 1)
        await pool.release(held)


async def test_dismissed_callers_do_not_raise_the_max_waiting_limit():
    options = {"max_connections": 1, "max_waiting": 1, "acquire_timeout": 50}
    async with make_pool(FakeConnector(default=hang()), **options) as pool:

        async def dismissed():
            with pytest.raises(PoolTimeout):
                await pool.acquire()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(dismissed)
            await queued(pool, 1)
            open_pool = pool._open_pool
            (claim,) = open_pool.state.waiting
            claim.deadline = open_pool.now()
            # The claim holds the only token until its task runs again.
            open_pool.expire()
            others = [Claim(), Claim()]
            for other in others:
                open_pool._refusals.check_saturation(1)
                open_pool.state.enqueue(other)
            # One caller waits for a connection and one for capacity: the maximum.
            with pytest.raises(PoolSaturated):
                open_pool._refusals.check_saturation(1)
            for other in others:
                open_pool.state.withdraw(other, open_pool.now())


# -- the budget of a check ----------------------------------------------------------


@pytest.mark.parametrize(
    "budget, error, told",
    [
        (0, ValueError, r"^budget must be more than 0 seconds, got 0$"),
        (math.inf, ValueError, r"^budget must be a finite number of seconds"),
        (True, TypeError, r"^budget must be a number of seconds, got True"),
    ],
)
def test_a_budget_that_is_no_time_is_rejected_by_name(budget, error, told):
    with pytest.raises(error, match=told):
        make_pool().acquire(budget=budget)


async def awaited(acquire):
    return await acquire


async def entered(acquire):
    return await acquire.__aenter__()


@pytest.mark.parametrize("take", [awaited, entered])
@pytest.mark.parametrize("budget", [None, 2])
async def test_a_lease_has_the_budget_of_its_acquire_with_or_without_a_wait(
    take, budget
):
    async with make_pool(max_connections=1, streams_per_connection=2) as pool:
        # The first one waits for the connection.
        for _ in range(2):
            conn = await take(pool.acquire(budget=budget))
            assert getattr(conn._claim, "budget", None) == budget
            await pool.release(conn)


@pytest.mark.parametrize("take", [awaited, entered])
async def test_a_caller_with_a_budget_waits_no_longer_than_it(take):
    async with make_pool(max_connections=1) as pool, pool.acquire():
        began = anyio.current_time()
        with pytest.raises(PoolTimeout):
            await take(pool.acquire(timeout=50, budget=2))
        assert anyio.current_time() - began == pytest.approx(2)
