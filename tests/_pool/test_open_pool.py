"""Test how an open pool assigns its streams."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import PoolTimeout
from fastapi_topaz.testing import FakeConnection
from kit.pools import Making, make_pool


async def test_a_free_stream_beyond_the_limit_is_not_leased():
    pool = make_pool(max_connections=2, streams_per_connection=2)
    async with pool:
        first, second, third = [await pool.acquire() for _ in range(3)]
        assert first.connection is second.connection is not third.connection
        pool.resize(0, 1)
        await pool.release(first)
        # Two of two streams are leased, and one of them belongs to a leaving
        # connection.
        assert (pool.status().streams_in_use, pool.status().leaving) == (2, 1)
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0)
        await pool.release(third)
        async with pool.acquire(timeout=0) as conn:
            assert conn.connection is second.connection
        await pool.release(second)


async def test_an_unknown_verdict_accuses_no_connection():
    class Vague(FakeConnection):
        def judge(self, error):
            return "so so"

    def answer(_method, _request):
        raise OSError("no answer")

    async with make_pool(Making(Vague, answer=answer)) as pool:
        async with pool.acquire() as conn:
            with pytest.raises(OSError, match="no answer"):
                await conn.call("/a/b", b"")
        (told,) = pool.connections()
        assert (told.condition, told.last_error) == ("idle", "no answer")


async def test_the_repr_of_an_open_pool_identifies_it():
    async with make_pool(name="main") as pool:
        assert repr(pool._open_pool).startswith("<OpenPool of pool 'main' total=0 ")


async def test_a_second_resize_skips_leaving_connections():
    pool = make_pool(max_connections=3)
    async with pool:
        leases = [await pool.acquire() for _ in range(3)]
        pool.resize(0, 2)
        assert pool.status().leaving == 1
        pool.resize(0, 1)
        assert pool.status().leaving == 2
        for lease in leases:
            await pool.release(lease)
        await anyio.sleep(1)
        assert (pool.status().total, pool.status().leaving) == (1, 0)


async def test_the_lease_and_wait_durations_are_recorded():
    observed = []

    class Observer:
        def acquired(self, waited):
            observed.append(("waited", waited))

        def released(self, held):
            observed.append(("held", held))

    async with make_pool(max_connections=1) as pool:
        async with pool.acquire():
            pass
        await anyio.sleep(50)
        pool._open_pool.observer = Observer()
        async with pool.acquire():
            await anyio.sleep(3)
        assert observed == [("waited", 0.0), ("held", pytest.approx(3))]
        observed.clear()

        async def caller():
            async with pool.acquire():
                await anyio.sleep(2)

        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(caller)
        assert sorted(observed) == [
            *(("held", pytest.approx(2)), ("held", pytest.approx(2))),
            *(("waited", pytest.approx(0)), ("waited", pytest.approx(2))),
        ]
