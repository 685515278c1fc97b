"""Cancelling a call at any point leaves the pool as if the call was never made."""

from __future__ import annotations

import asyncio
import contextlib
import random
from functools import partial

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import PoolClosed, PoolTimeout
from fastapi_topaz.testing import FakeConnector, slow
from kit.backends import asyncio_only
from kit.pools import assert_whole, make_pool, queued


make_patient = partial(make_pool, acquire_timeout=1000)


async def test_a_cancelled_waiter_leaves_the_queue():
    async with make_patient(max_connections=1) as pool:
        held = await pool.acquire()
        with anyio.move_on_after(1) as scope:
            await pool.acquire()
        assert scope.cancelled_caught
        assert pool.status().waiting == 0
        await pool.release(held)
        await assert_whole(pool)


@pytest.mark.parametrize("release_first", [True, False])
async def test_a_waiter_cancelled_in_the_tick_of_its_handover_passes_the_stream_on(
    release_first,
):
    async with make_patient(max_connections=1) as pool:
        held = await pool.acquire()
        second_served = anyio.Event()

        async def first(scope):
            with scope:
                async with pool.acquire():
                    await anyio.lowlevel.checkpoint()

        async def second():
            async with pool.acquire():
                second_served.set()

        scope = anyio.CancelScope()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first, scope)
            await queued(pool, 1)
            tasks.start_soon(second)
            await queued(pool, 2)
            if release_first:
                await pool.release(held)
                scope.cancel()
            else:
                scope.cancel()
                await pool.release(held)
        assert second_served.is_set()
        await assert_whole(pool)


@asyncio_only
@pytest.mark.parametrize("release_first", [True, False])
async def test_a_waiter_cancelled_by_its_task_in_the_tick_of_its_handover(
    release_first,
):
    async with make_patient(max_connections=1) as pool:
        held = await pool.acquire()

        async def wait():
            async with pool.acquire():
                pass

        first, second = asyncio.create_task(wait()), asyncio.create_task(wait())
        await queued(pool, 2)
        if release_first:
            await pool.release(held)
            first.cancel()
        else:
            first.cancel()
            await pool.release(held)
        with pytest.raises(asyncio.CancelledError):
            await first
        await second
        await assert_whole(pool)


@asyncio_only
async def test_wait_for_around_acquire_loses_nothing():
    async with make_patient(max_connections=2) as pool:
        held = [await pool.acquire() for _ in range(2)]
        for _ in range(20):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pool.acquire(), 0.1)
        for conn in held:
            await pool.release(conn)
        await assert_whole(pool)


async def test_a_timeout_in_the_tick_of_a_handover_is_a_lease_or_a_timeout():
    """
    A release in the tick of the deadline: the caller is served or timed out, not both.
    """
    async with make_patient(max_connections=1) as pool:
        for _ in range(50):
            held = await pool.acquire()

            async def release_at_the_deadline(conn=held):
                await anyio.sleep(1)
                await pool.release(conn)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(release_at_the_deadline)
                with contextlib.suppress(PoolTimeout):
                    await pool.release(await pool.acquire(timeout=1))
        await assert_whole(pool)


@pytest.mark.parametrize("steps", range(12))
async def test_cancelling_acquire_at_each_step_loses_no_capacity(steps):
    """
    Cancel after *steps*, on a cold pool with connections that take a moment to open.
    """
    async with make_patient(
        FakeConnector(default=slow(0.0)), max_connections=2
    ) as pool:

        async def call():
            async with pool.acquire() as conn:
                await conn.call("/a/b", b"")

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(call)
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        await anyio.sleep(1)
        await assert_whole(pool)


@pytest.mark.parametrize("steps", range(12))
async def test_closing_at_any_step_leaves_nothing_open(steps):
    connector = FakeConnector(default=slow(0.0))
    pool = make_patient(connector, max_connections=2, min_connections=2)

    async def call():
        with contextlib.suppress(PoolClosed):
            async with pool.acquire() as conn:
                await conn.call("/a/b", b"")

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(call)
        for _ in range(steps):
            await anyio.lowlevel.checkpoint()
        await pool.close()
    assert not connector.open
    assert all(conn.closed == 1 for conn in connector.connections)
    await pool.initialize()
    await assert_whole(pool)
    await pool.close()


@pytest.mark.costly
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 4))]
)
@pytest.mark.parametrize("streams", [1, 3])
async def test_random_cancellation_of_all_callers_loses_no_capacity(seed, streams):
    rng = random.Random(seed)
    connector = FakeConnector(default=slow(0.01))
    options = {"max_connections": 3, "streams_per_connection": streams}
    async with make_patient(connector, **options) as pool:

        async def caller():
            with anyio.move_on_after(rng.random() * 0.2):
                while True:
                    async with pool.acquire(
                        timeout=rng.choice([0.01, 0.1, 10])
                    ) as conn:
                        await anyio.sleep(rng.random() * 0.02)
                        await conn.call("/a/b", b"")

        async def patient():
            while True:
                with contextlib.suppress(PoolTimeout):
                    await caller()

        with anyio.move_on_after(2):
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(patient)
        await anyio.sleep(1)
        assert connector.peak <= 3
        await assert_whole(pool)
