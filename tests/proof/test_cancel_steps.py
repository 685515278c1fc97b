"""Checks, opening, closing and waiting, each cancelled at each of its steps."""

from __future__ import annotations

import random
import sys

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import AuthorizerOptions, PoolClosed
from fastapi_topaz.testing import slow
from kit.allowing import allowing, virtual
from kit.network import HOURS, checked, patient_config
from kit.pools import assert_whole, queued


STEPS = range(15)


async def cancelled_after(steps, function):
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(function)
        for _ in range(steps):
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("state", ["cold", "warm", "busy", "lost"])
async def test_cancelling_a_check_at_each_step_leaves_the_pool_consistent(steps, state):
    connector = allowing(default=slow(0.0))
    pool = virtual(connector, max_connections=2)
    config = patient_config(pool, AuthorizerOptions())
    async with pool:
        if state != "cold":
            await assert_whole(pool, twice=True)
        await anyio.sleep(1)
        held = [await pool.acquire() for _ in range(2 * (state == "busy"))]
        for conn in connector.connections:
            # Its first call is lost, and is repeated on a new connection.
            conn.alive = state != "lost"

        async def check():
            await checked(config)

        await cancelled_after(steps, check)
        for conn in held:
            await pool.release(conn)
        await anyio.sleep(1)
        for conn in connector.connections:
            conn.alive = True
        await assert_whole(pool, twice=True)
        assert await checked(config)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("method", ["initialize", "close"])
async def test_cancelling_open_and_close_at_each_step_leaves_the_pool_consistent(
    steps, method
):
    connector = allowing(default=slow(0.0))
    pool = virtual(connector, min_connections=2, eager_init=True)
    if method == "close":
        await pool.initialize()
        _held = await pool.acquire()
    await cancelled_after(steps, getattr(pool, method))
    if method == "close":
        await anyio.sleep(0.01)
        # If it was cancelled before it began, it did nothing. Otherwise it did
        # everything.
        assert (not connector.open) == ("closed" in repr(pool))
        await pool.close(grace=0)
        assert not connector.open
    await pool.initialize()
    await assert_whole(pool, twice=True)
    await pool.close()
    assert all(conn.closed == 1 for conn in connector.connections)


async def test_a_timeout_around_close_ends_it_even_if_a_connection_hangs():
    connector = allowing()
    pool = virtual(connector)
    await pool.initialize()
    await assert_whole(pool, twice=True)

    async def hang(_seconds):
        await anyio.sleep_forever()

    connector.connections[1].close = hang
    lease = await pool.acquire()
    began = anyio.current_time()
    with pytest.raises(TimeoutError), anyio.fail_after(1):
        await pool.close(grace=100)
    # Seconds that closing one connection may take. Idle connections close at once.
    assert anyio.current_time() - began == pytest.approx(5)
    assert [conn.closed for conn in connector.connections] == [1, 0, 1]
    assert repr(pool).startswith("<ConnectionPool closed total=0")
    await pool.release(lease)
    with pytest.raises(PoolClosed):
        await pool.acquire()


async def waiters_cancelled(count):
    """Cancel *count* waiters in any order, while connections pass among them."""
    rng = random.Random(count)
    pool = virtual(max_connections=10, acquire_timeout=HOURS)
    ended = 0

    async def wait(scope):
        nonlocal ended
        with scope:
            async with pool.acquire():
                await anyio.lowlevel.checkpoint()
        ended += 1

    async with pool:
        held = [await pool.acquire() for _ in range(10)]
        scopes = [anyio.CancelScope() for _ in range(count)]
        async with anyio.create_task_group() as tasks:
            for scope in scopes:
                tasks.start_soon(wait, scope)
            await queued(pool, count)
            rng.shuffle(scopes)
            for number, scope in enumerate(scopes):
                scope.cancel()
                if number % (count // 10) == 0:
                    await pool.release(held.pop())
                if number % 100 == 0:
                    await anyio.lowlevel.checkpoint()
        assert ended == count
        assert pool._counters.acquisitions + pool._counters.cancelled == count + 10
        assert pool._counters.acquisitions > 10, "some callers were served in between"
        await assert_whole(pool, twice=True)


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_cancelling_waiting_callers_during_releases_loses_no_capacity(count):
    await waiters_cancelled(count)


@pytest.mark.costly
async def test_the_cost_of_a_cancelled_waiter_does_not_grow_with_the_queue():
    async def calls(count):
        made = 0

        def profile(_frame, event, _argument):
            nonlocal made
            made += event in {"call", "c_call"}

        sys.setprofile(profile)
        try:
            await waiters_cancelled(count)
        finally:
            sys.setprofile(None)
        return made / count

    few, many = await calls(250), await calls(1_250)
    assert many < 1.5 * few
