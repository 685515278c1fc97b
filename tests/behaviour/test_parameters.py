"""Each pool parameter of the guide has an effect: one test fails if it is ignored."""

from __future__ import annotations

import anyio
import pytest

from fastapi_topaz import ConnectFailed, ConnectionPool, PoolTimeout
from fastapi_topaz.testing import FakeConnector, fail, hang, ok
from kit.pools import fill


def make_default(connector=None, **options):
    return ConnectionPool(connector=connector or FakeConnector(), **options)


@pytest.mark.costly
@pytest.mark.parametrize("value", [0, 1, 4])
async def test_min_connections(value):
    async with make_default(min_connections=value, eager_init=True) as pool:
        assert pool.status().total == value
        await fill(pool, 8)
        await anyio.sleep(3000)
        assert pool.status().total == value


@pytest.mark.parametrize("value", [1, 3])
async def test_max_connections(value):
    async with make_default(min_connections=0, max_connections=value) as pool:
        leases = [await pool.acquire() for _ in range(value)]
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=1)
        assert pool.status().total == value
        for conn in leases:
            await pool.release(conn)


@pytest.mark.parametrize("value", [0, 0.5, 70])
async def test_acquire_timeout(value):
    options = {"min_connections": 1, "max_connections": 1, "eager_init": True}
    async with make_default(acquire_timeout=value, **options) as pool, pool.acquire():
        began = anyio.current_time()
        with pytest.raises(PoolTimeout):
            await pool.acquire()
        assert anyio.current_time() - began == pytest.approx(value)


@pytest.mark.parametrize("value", [0.5, 40])
async def test_connection_timeout(value):
    connector = FakeConnector(default=hang())
    pool = make_default(
        connector, connection_timeout=value, max_retries=0, min_connections=0
    )
    async with pool:
        began = anyio.current_time()
        with pytest.raises(ConnectFailed, match=f"connection_timeout={value:g} s"):
            await pool.acquire(timeout=100)
        assert anyio.current_time() - began == pytest.approx(value)


@pytest.mark.parametrize("value", [20, 700])
async def test_max_idle_time(value):
    pool = make_default(min_connections=0, max_idle_time=value, idle_check_interval=1)
    async with pool:
        await fill(pool, 3)
        await anyio.sleep(value - 1)
        assert pool.status().total == 3
        await anyio.sleep(2.5)
        assert pool.status().total == 0


@pytest.mark.parametrize("value", [5, 100])
async def test_idle_check_interval(value):
    pool = make_default(min_connections=0, max_idle_time=1, idle_check_interval=value)
    async with pool:
        await fill(pool, 3)
        await anyio.sleep(value - 0.5)
        assert pool.status().total == 3
        await anyio.sleep(1)
        assert pool.status().total == 0


@pytest.mark.parametrize("value", [7, 50])
async def test_health_check_interval(value):
    connector = FakeConnector()
    async with make_default(
        connector, health_check_interval=value, max_idle_time=0
    ) as pool:
        await fill(pool, 1)
        await anyio.sleep(value * 10 + 1)
        assert 9 <= connector.connections[0].probes <= 10


@pytest.mark.parametrize("value", [1, 20])
async def test_health_check_timeout(value):
    connector = FakeConnector()
    options = {"min_connections": 0, "health_check_interval": 30}
    async with make_default(connector, health_check_timeout=value, **options) as pool:
        await fill(pool, 1)
        connector.connections[0].frozen = True
        # Twice, because one failed probe only makes a connection suspect.
        await anyio.sleep(30 + 2 * value - 0.5)
        assert connector.connections[0].closed == 0
        await anyio.sleep(1)
        assert connector.connections[0].closed == 1


@pytest.mark.parametrize("value", [True, False])
async def test_eager_init(value):
    connector = FakeConnector()
    async with make_default(connector, eager_init=value) as pool:
        assert pool.status().total == (2 if value else 0)
        await anyio.sleep(100)
        assert connector.attempts == (2 if value else 0)


@pytest.mark.parametrize("value", [True, False])
async def test_retry_on_failure(value):
    connector = FakeConnector([fail()], default=ok())
    pool = make_default(connector, retry_on_failure=value, min_connections=0)
    async with pool:
        if value:
            async with pool.acquire():
                pass
        else:
            with pytest.raises(ConnectFailed):
                await pool.acquire()
        assert connector.attempts == (2 if value else 1)


@pytest.mark.parametrize("value", [0, 1, 5])
async def test_max_retries(value):
    connector = FakeConnector(default=fail())
    pool = make_default(
        connector, max_retries=value, min_connections=0, acquire_timeout=100
    )
    async with pool:
        with pytest.raises(ConnectFailed):
            await pool.acquire()
        assert connector.attempts == 1 + value


async def test_max_retries_limits_attempts_for_callers_but_not_the_refill():
    connector = FakeConnector(default=fail())
    async with make_default(connector, max_retries=0, min_connections=1) as pool:
        with pytest.raises(ConnectFailed):
            await pool.acquire()
        await anyio.sleep(60)
        assert connector.attempts > 20
        connector.default = ok()
        await anyio.sleep(2)
        assert pool.status().total == 1
