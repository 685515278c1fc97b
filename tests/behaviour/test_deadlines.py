"""Callers wait exactly as long as their timeout, whatever their number."""

from __future__ import annotations

import random
from functools import partial

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import ConnectFailed, PoolClosed, PoolTimeout
from fastapi_topaz.testing import FakeConnector, fail, ok, slow
from kit.pools import make_pool


make_single = partial(make_pool, max_connections=1)


async def timed_out_after(pool, timeout):
    """Return how long acquire() took until it raised PoolTimeout."""
    began = anyio.current_time()
    with pytest.raises(PoolTimeout, match=f"within {timeout:g} s"):
        await pool.acquire(timeout=timeout)
    return anyio.current_time() - began


async def all_timed_out(pool, timeouts, pause=0.0):
    """Start callers with these *timeouts* one after the other, and check each."""
    took = {}

    async def wait(number, timeout):
        took[number] = await timed_out_after(pool, timeout)

    async with anyio.create_task_group() as callers:
        for number, timeout in enumerate(timeouts):
            callers.start_soon(wait, number, timeout)
            await anyio.lowlevel.checkpoint()
            if pause:
                await anyio.sleep(pause)
    assert [took[number] for number in range(len(timeouts))] == pytest.approx(timeouts)


@pytest.mark.parametrize(
    "timeouts",
    [
        [5.0] * 20,
        [1.0, 2.0, 3.0, 4.0],
        [4.0, 3.0, 2.0, 1.0],
        [3.0, 1.0, 3.0, 1.0, 2.0, 9.0, 0.5],
        [60.0, *[5.0] * 5, 70.0, 65.0, *[5.0] * 5],
    ],
    ids=["one", "rising", "falling", "mixed", "one_long_before_many"],
)
@pytest.mark.parametrize("pause", [0.0, 0.3])
async def test_each_caller_times_out_at_its_own_deadline(timeouts, pause):
    async with make_single() as pool, pool.acquire():
        await all_timed_out(pool, timeouts, pause)
        assert pool.status().waiting == 0


async def test_callers_waiting_for_a_connect_time_out_at_their_own_deadlines():
    async with make_single(
        FakeConnector([slow(1000)] * 9), connection_timeout=2000
    ) as pool:
        await all_timed_out(pool, [3.0, 5.0, 4.0, 5.0])


async def test_callers_with_and_without_a_token_time_out_together():
    connector = FakeConnector([ok(), *[slow(1000)] * 9])
    options = {"max_connections": 3, "connection_timeout": 2000}
    async with make_single(connector, **options) as pool, pool.acquire():
        await all_timed_out(pool, [5.0] * 7)
        assert pool._open_pool.limiter.borrowed_tokens == 1


async def test_a_pool_that_was_idle_for_long_keeps_the_next_deadline():
    async with make_single() as pool:
        async with pool.acquire():
            await all_timed_out(pool, [5.0, 5.0])
        await anyio.sleep(1000)
        async with pool.acquire():
            await all_timed_out(pool, [2.0, 5.0])


async def test_a_timeout_does_not_serve_another_caller_early():
    """A refused caller borrows a token briefly. No other caller may profit from it."""
    async with make_single(max_connections=2) as pool:
        held = [await pool.acquire() for _ in range(2)]
        served = []

        async def wait(name, timeout):
            try:
                async with pool.acquire(timeout=timeout):
                    served.append((name, anyio.current_time() - began))
            except PoolTimeout:
                pass

        began = anyio.current_time()
        async with anyio.create_task_group() as callers:
            for name, timeout in [("a", 1), ("b", 1), ("c", 10), ("d", 1), ("e", 20)]:
                callers.start_soon(wait, name, timeout)
                await anyio.lowlevel.checkpoint()
            await anyio.sleep(5)
            assert served == []
            assert pool.status().waiting == 2
            assert pool._open_pool.limiter.borrowed_tokens == 2
            for conn in held:
                await pool.release(conn)
        assert sorted(served) == [("c", pytest.approx(5)), ("e", pytest.approx(5))]


async def test_a_stream_given_in_the_tick_of_the_deadline_is_used_or_passed_on():
    for _ in range(20):
        async with make_single() as pool:
            held = await pool.acquire()
            outcomes = []

            async def wait(pool, timeout, outcomes):
                try:
                    async with pool.acquire(timeout=timeout):
                        outcomes.append("served")
                except PoolTimeout:
                    outcomes.append("timed out")

            async def give_back(pool, held):
                await anyio.sleep(5)
                await pool.release(held)

            async with anyio.create_task_group() as callers:
                callers.start_soon(give_back, pool, held)
                callers.start_soon(wait, pool, 5, outcomes)
                await anyio.lowlevel.checkpoint()
                callers.start_soon(wait, pool, 50, outcomes)
            assert outcomes in (["served"] * 2, ["timed out", "served"])
            assert pool._open_pool.limiter.borrowed_tokens == 0


async def test_waiting_callers_fail_before_the_deadline_on_close_or_failure():
    async with make_single(acquire_timeout=50) as pool:
        _held = await pool.acquire()
        async with anyio.create_task_group() as callers:

            async def refused():
                with pytest.raises(PoolClosed):
                    await pool.acquire()

            for _ in range(5):
                callers.start_soon(refused)
            await anyio.sleep(1)
            await pool.close(grace=0)
    failing = FakeConnector([fail()] * 20)
    async with make_single(failing, acquire_timeout=50, max_retries=0) as pool:
        began = anyio.current_time()
        with pytest.raises(ConnectFailed):
            await pool.acquire()
        assert anyio.current_time() - began < 5


@pytest.mark.costly
@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 8))]
)
async def test_random_deadlines_cancellations_and_releases(seed):
    """
    Each caller is served in time, cancelled, or timed out exactly at its deadline.
    """
    rng = random.Random(seed)
    streams = rng.choice([1, 3])
    options = {"max_connections": 2, "streams_per_connection": streams}
    counts = {"served": 0, "timed out": 0, "cancelled": 0}

    async def caller(pool, timeout, patience, hold):
        began = anyio.current_time()
        outcome = "cancelled"
        with anyio.move_on_after(patience):
            try:
                async with pool.acquire(timeout=timeout):
                    outcome = "served"
                    assert anyio.current_time() - began <= timeout + 1e-6
                    with anyio.CancelScope(shield=True):
                        await anyio.sleep(hold)
            except PoolTimeout:
                outcome = "timed out"
                assert anyio.current_time() - began == pytest.approx(timeout)
        waited = anyio.current_time() - began
        assert outcome != "cancelled" or waited == pytest.approx(patience)
        counts[outcome] += 1

    async with make_single(**options) as pool:
        async with anyio.create_task_group() as callers:
            for _ in range(300):
                timeout = rng.choice([1.0, 1.0, 1.0, 0.5, 2.0, 20.0])
                patience = rng.choice([1000.0, 1000.0, rng.uniform(0, 2)])
                callers.start_soon(caller, pool, timeout, patience, rng.random())
                if rng.random() < 0.7:
                    await anyio.sleep(rng.uniform(0, 0.2))
        assert sum(counts.values()) == 300
        assert all(counts.values()), counts
        assert pool.status().waiting == pool.status().streams_in_use == 0
        assert pool._open_pool.limiter.borrowed_tokens == 0
