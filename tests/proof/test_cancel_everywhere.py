"""Cancelling a call at any await point leaves the pool as if it was never made."""

from __future__ import annotations

import asyncio
from functools import partial

import anyio
import pytest

from fastapi_topaz import ConnectFailed, ConnectionLost, PoolClosed, PoolTimeout
from kit.strikes import (
    ON_ASYNCIO,
    SCOPE,
    TASK,
    Playing,
    Strike,
    assert_closed,
    assert_serves_all,
    make_small,
    sweep,
    whole_after,
)


async def leased(strike, pool, **options):
    conn = await strike.hit(partial(pool.acquire, **options))
    if conn is not None:
        await pool.release(conn)


async def all_out(pool, strike):
    """Lease the full capacity, to be released after a second or by the strike."""
    held = [await pool.acquire() for _ in range(2)]

    def release():
        while held:
            pool._release(held.pop())

    async def later():
        await anyio.sleep(1)
        release()

    strike.trigger = release
    return later


# -- acquire, call and release --------------------------------------------------------


async def acquire_cold(strike):
    async with whole_after(make_small()) as pool:
        await leased(strike, pool)


async def acquire_opening(strike):
    pool = make_small()
    await leased(strike, pool)
    # A pool that was opened stays open, whatever the outcome of the call that opened
    # it.
    async with whole_after(pool):
        pass


async def acquire_contended(strike):
    async with whole_after(make_small()) as pool, anyio.create_task_group() as tasks:
        tasks.start_soon(await all_out(pool, strike))
        await leased(strike, pool)


async def acquire_between_others(strike):
    """Acquire in the middle of the queue, with a different deadline than the others."""
    async with whole_after(make_small()) as pool, anyio.create_task_group() as tasks:
        tasks.start_soon(await all_out(pool, strike))
        tasks.start_soon(leased, Strike(), pool)
        await anyio.sleep(0.1)
        async with anyio.create_task_group() as inner:
            inner.start_soon(partial(leased, strike, pool, timeout=3))
            await anyio.sleep(0.1)
            tasks.start_soon(leased, Strike(), pool)


async def acquire_in_vain(strike):
    async with whole_after(make_small()) as pool, anyio.create_task_group() as tasks:
        tasks.start_soon(await all_out(pool, strike))
        await leased(strike, pool, timeout=0.5)
        assert not strike.ended or strike.result or type(strike.error) is PoolTimeout


async def acquire_in_vain_between_others(strike):
    async with whole_after(make_small()) as pool, anyio.create_task_group() as tasks:
        tasks.start_soon(await all_out(pool, strike))
        tasks.start_soon(leased, Strike(), pool)
        await anyio.sleep(0.1)
        await leased(strike, pool, timeout=0.5)
        assert not strike.ended or strike.result or type(strike.error) is PoolTimeout


async def acquire_at_its_deadline_between_others(strike):
    """Served and timed out in one tick: the outcome is one of the two."""
    async with whole_after(make_small()) as pool, anyio.create_task_group() as tasks:
        tasks.start_soon(await all_out(pool, strike))
        tasks.start_soon(partial(leased, Strike(), pool, timeout=30))
        await anyio.sleep(0.5)
        await leased(strike, pool, timeout=0.5)
        assert not strike.ended or strike.result or type(strike.error) is PoolTimeout


async def acquire_from_the_dead(strike):
    pool = make_small(Playing("error"), max_retries=0)
    async with whole_after(pool):
        await leased(strike, pool)
        assert not strike.ended or type(strike.error) is ConnectFailed
        pool._connector.mend()
        await anyio.sleep(5)


async def acquire_from_the_closing(strike):
    pool = make_small()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(await all_out(pool, Strike()))
        strike.trigger = partial(tasks.start_soon, pool.close)
        tasks.start_soon(leased, strike, pool)
        await anyio.sleep(0.5)
        await pool.close()
        assert not strike.ended or type(strike.error) is PoolClosed
    assert_closed(pool)
    async with whole_after(pool):
        pass


async def acquire_behind_an_opening_that_is_taken_back(strike):
    connector = Playing("ok", close="slow")
    pool = make_small(connector, min_connections=3, max_connections=3, eager_init=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.initialize)
        while not pool.status().total:
            await anyio.lowlevel.checkpoint()
        connector.connect_ = "never"
        tasks.cancel_scope.cancel()
    assert "closing" in repr(pool)
    connector.connect_ = "ok"
    await leased(strike, pool)
    await anyio.sleep(5)
    async with whole_after(pool):
        pass


async def call(strike):
    async with whole_after(make_small()) as pool, pool.acquire() as conn:
        await strike.hit(partial(conn.call, "/a/b", b"", timeout=1))


async def call_lost(strike):
    async with whole_after(make_small()) as pool:
        async with pool.acquire() as conn:
            pool._connector.call = "error"
            await strike.hit(partial(conn.call, "/a/b", b""))
            assert not strike.ended or type(strike.error) is ConnectionLost
            pool._connector.call = "ok"
        await anyio.sleep(1)


async def release(strike):
    async with whole_after(make_small()) as pool:
        conn = await pool.acquire()
        await strike.hit(partial(pool.release, conn))
        assert strike.ended


async def acquire_warm(strike):
    async with whole_after(make_small()) as pool:
        await assert_serves_all(pool)
        await leased(strike, pool)


async def with_acquire(strike):
    async with whole_after(make_small()) as pool:

        async def check():
            async with pool.acquire() as conn:
                await conn.call("/a/b", b"", timeout=1)

        await strike.hit(check)


# -- initialize, resize, drain and close ----------------------------------------------


async def initialize(strike):
    pool = make_small()
    await strike.hit(pool.initialize)
    async with whole_after(pool):
        pass


async def initialize_eagerly(strike):
    pool = make_small(Playing(close="slow"), min_connections=2, eager_init=True)
    await strike.hit(pool.initialize)
    if not strike.ended:
        await anyio.sleep(1)
        assert_closed(pool)
    async with whole_after(pool):
        assert pool.status().total == 2


async def initialize_with_another(strike):
    pool = make_small(min_connections=2, eager_init=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.initialize)
        await strike.hit(pool.initialize)
    open_pool = pool._open_pool
    async with whole_after(pool):
        assert pool._open_pool is open_pool, "the other initialize() depends on it"


async def initialize_behind_close(strike):
    pool = make_small()
    later = await all_out(pool, strike)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(later)
        tasks.start_soon(pool.close)
        await anyio.sleep(0.1)
        await strike.hit(pool.initialize)
    assert ("open" in repr(pool)) == strike.ended
    async with whole_after(pool):
        pass


async def resize_and_drain(strike):
    async with whole_after(make_small(max_connections=3)) as pool:
        await assert_serves_all(pool)

        async def change():
            pool.resize(1, 2)
            pool.drain()

        await strike.hit(change)
        await anyio.sleep(5)
        closed = [conn.closed for conn in pool._connector.connections]
        assert closed[:3] == [1, 1, 1]


async def close_with_leases_and_waiters(strike):
    pool = make_small()
    later = await all_out(pool, strike)
    waiter = Strike()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(leased, waiter, pool)
        await anyio.sleep(0.1)
        tasks.start_soon(later)
        await strike.hit(partial(pool.close, grace=3))
        if "again" not in strike.how:
            # The cancelled close gave up the grace, but still closed.
            assert "closed" in repr(pool)
    assert type(waiter.error) is PoolClosed
    assert_closed(pool, cut=pool.opened.state.in_use and 2)
    async with whole_after(pool):
        pass


async def close_when_the_grace_is_over(strike):
    connector = Playing(close="slow")
    pool = make_small(connector, max_connections=3)
    await pool.initialize()
    held = [await pool.acquire() for _ in range(2)]
    connector.connect_ = "never"

    async def check():
        await anyio.sleep(0.5)
        assert not connector.connecting, "no grace for a connection that no lease uses"

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(leased, Strike(), pool)
        await anyio.sleep(0.1)
        assert connector.connecting
        tasks.start_soon(check)
        await strike.hit(partial(pool.close, grace=1))
    await anyio.sleep(1)
    assert_closed(pool, cut=2)
    for conn in held:
        await pool.release(conn)
    connector.mend()
    async with whole_after(pool):
        pass


async def with_pool(strike):
    pool = make_small(min_connections=2, eager_init=True)

    async def use():
        async with pool, pool.acquire() as conn:
            await conn.call("/a/b", b"", timeout=1)

    await strike.hit(use)
    await anyio.sleep(1)
    assert_closed(pool)
    async with whole_after(pool):
        pass


WITHOUT_POINTS = [acquire_warm, release, initialize, resize_and_drain]
WITH_POINTS = [acquire_cold, acquire_opening, acquire_contended, acquire_between_others]
WITH_POINTS += [acquire_in_vain, acquire_in_vain_between_others, acquire_from_the_dead]
WITH_POINTS += [acquire_from_the_closing, acquire_behind_an_opening_that_is_taken_back]
WITH_POINTS += [call, call_lost, with_acquire, initialize_eagerly, with_pool]
WITH_POINTS += [initialize_with_another, initialize_behind_close]
WITH_POINTS += [acquire_at_its_deadline_between_others]
WITH_POINTS += [close_with_leases_and_waiters, close_when_the_grace_is_over]


RACES = [acquire_contended, acquire_between_others, acquire_from_the_closing]
RACES += [initialize_behind_close, close_with_leases_and_waiters]


@pytest.mark.parametrize("how", SCOPE)
@pytest.mark.parametrize("scenario", WITH_POINTS)
async def test_cancelling_a_scope_at_any_await_leaves_no_trace(scenario, how):
    assert await sweep(scenario, how) > 0


@ON_ASYNCIO
@pytest.mark.parametrize("how", TASK)
@pytest.mark.parametrize("scenario", WITH_POINTS)
async def test_cancelling_a_task_at_any_await_leaves_no_trace(scenario, how):
    assert await sweep(scenario, how) > 0


@pytest.mark.parametrize("scenario", RACES)
async def test_an_event_set_in_the_tick_of_a_scope_cancellation_loses_nothing(scenario):
    assert await sweep(scenario, "scope, both") > 0


@ON_ASYNCIO
@pytest.mark.parametrize("scenario", RACES)
async def test_an_event_set_in_the_tick_of_a_task_cancellation_loses_nothing(
    scenario,
):
    assert await sweep(scenario, "task, both") > 0


@pytest.mark.parametrize("scenario", WITHOUT_POINTS)
async def test_an_operation_that_does_not_wait_has_no_cancellation_point(scenario):
    assert await sweep(scenario, "scope") == 0


async def resized_and_drained(run):
    async with whole_after(make_small(max_connections=3)) as pool:
        await assert_serves_all(pool)

        async def change(cancel):
            cancel()
            pool.resize(1, 2)
            pool.drain()
            await anyio.sleep_forever()

        await run(change)
        await anyio.sleep(5)
        closed = [conn.closed for conn in pool._connector.connections]
        assert closed[:3] == [1, 1, 1]
        assert pool.status().total <= 2


async def test_resize_and_drain_complete_if_the_scope_of_their_caller_is_cancelled():
    async def run(change):
        with anyio.CancelScope() as scope:
            await change(scope.cancel)

    await resized_and_drained(run)


@ON_ASYNCIO
async def test_resize_and_drain_complete_if_their_task_is_cancelled():
    async def run(change):
        async def natively():
            await change(asyncio.current_task().cancel)

        task = asyncio.create_task(natively())
        await asyncio.wait([task])
        assert task.cancelled()

    await resized_and_drained(run)
