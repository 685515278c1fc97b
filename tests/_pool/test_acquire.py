"""Who gets a lease, who waits, and how each acquire is counted."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import ConnectFailed, PoolClosed, PoolSaturated, PoolTimeout
from fastapi_topaz._pool.state.slot import Claim
from fastapi_topaz.testing import FakeConnector, fail, hang, slow
from kit.pools import make_pool, queued


# -- how each acquire is counted ----------------------------------------------------


async def test_each_caller_who_is_served_is_counted_once_whether_it_waited_or_not():
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


async def test_each_caller_whose_time_is_over_is_counted_once():
    async with make_pool(max_connections=1) as pool, pool.acquire():
        for timeout in (0, 0, 1, 1):
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout=timeout)
        assert pool._counters.timeouts == 4
        assert pool._counters.acquisitions == 1


async def test_each_caller_who_is_refused_is_counted_once():
    async with make_pool(max_connections=1, max_waiting=0) as pool, pool.acquire():
        for _ in range(3):
            with pytest.raises(PoolSaturated):
                await pool.acquire()
        assert pool._counters.rejected == 3


async def test_each_caller_who_fails_is_counted_once():
    connector = FakeConnector(default=fail())
    async with make_pool(connector, max_retries=0) as pool:
        for count in (1, 2, 3):
            with pytest.raises(ConnectFailed):
                await pool.acquire()
            assert pool._counters.failed == count


async def test_each_caller_who_is_cancelled_is_counted_once():
    async with make_pool(max_connections=1) as pool, pool.acquire():
        for _ in range(3):
            with anyio.move_on_after(1):
                await pool.acquire()
        assert pool._counters.cancelled == 3


async def test_each_caller_who_meets_a_closed_pool_is_counted_once():
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


async def test_each_lease_that_is_late_is_counted_once():
    async with make_pool(leak_threshold=1) as pool:
        leases = [await pool.acquire() for _ in range(3)]
        await anyio.sleep(5)
        assert pool._counters.leaked == 3
        for conn in leases:
            await pool.release(conn)


# -- who may wait -------------------------------------------------------------------


async def test_as_many_may_wait_as_max_waiting_says_besides_those_being_connected():
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


async def test_after_a_resize_nobody_gets_a_stream_beyond_the_new_capacity():
    async with make_pool(max_connections=2, streams_per_connection=2) as pool:
        first, second, third = [await pool.acquire() for _ in range(3)]
        assert first.connection is second.connection is not third.connection
        await pool.release(second)
        pool.resize(0, 1)
        # One of the two is on its way out, and the other one has a stream left.
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0)
        for conn in (first, third):
            await pool.release(conn)
        async with pool.acquire(timeout=0):
            pass


async def test_what_an_acquire_finds_lost_is_closed_though_another_one_serves():
    connector = FakeConnector()
    async with make_pool(connector, max_connections=2) as pool:
        first, second = [await pool.acquire() for _ in range(2)]
        await pool.release(first)
        await pool.release(second)
        await anyio.sleep(0.1)  # nothing is left to be done
        connector.connections[1].hung_up = True
        async with pool.acquire() as conn:
            assert conn.connection.number == 1
            await anyio.sleep(0.1)
            assert connector.connections[1].closed == 1


async def test_a_stream_that_comes_to_who_was_just_cancelled_was_used_until_then():
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


async def test_sending_away_who_holds_a_token_lends_none_to_those_behind():
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


async def test_those_with_one_deadline_are_all_watched_by_the_timekeeper():
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


async def test_dismissed_callers_let_no_more_wait_than_max_waiting():
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
            # It holds the only token until it has had its turn.
            open_pool.expire()
            others = [Claim(), Claim()]
            for other in others:
                open_pool._refusals.check_saturation()
                open_pool.state.enqueue(other)
            # One waits for a connection and one for capacity, as many as may.
            with pytest.raises(PoolSaturated):
                open_pool._refusals.check_saturation()
            for other in others:
                open_pool.state.withdraw(other, open_pool.now())
