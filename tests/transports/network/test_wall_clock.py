"""Test jumps of the wall clock."""

from __future__ import annotations

import time
import types

import anyio
import anyio.lowlevel
import grpc
import grpc.aio._utils
import pytest

from fastapi_topaz import ConnectionPool, PoolTimeout
from fastapi_topaz.testing import FakeConnector
from kit.network import checked, patient_config, pool_to, sockets, soon


@pytest.fixture
def jump(monkeypatch):
    """Set the wall clock to another time."""
    real = time.time
    # gRPC's core reads the clock itself. Its driver must read the same clock.
    monkeypatch.setattr(grpc.aio._utils, "time", types.SimpleNamespace(time=real))

    def jump(seconds):
        monkeypatch.setattr(time, "time", lambda: real() + seconds)

    return jump


@pytest.mark.parametrize("seconds", [3600, -3600])
async def test_a_wall_clock_jump_closes_no_connection_and_shifts_no_probe(
    jump, seconds
):
    connector = FakeConnector()
    pool = ConnectionPool(
        connector=connector, min_connections=2, eager_init=True, idle_check_interval=1
    )
    async with pool:
        began = anyio.current_time()
        probed = {}
        while (now := anyio.current_time() - began) < 100:
            if now > 40:
                jump(seconds * (-1) ** int(now))
            for conn in connector.connections:
                probed.setdefault(conn.probes, round(now))
            await anyio.sleep(1)
        assert probed == {0: 0, 1: 31, 2: 61, 3: 91}
        assert connector.attempts == 2
        assert not pool._counters.closes
        leases = [await pool.acquire() for _ in range(10)]
        began = anyio.current_time()
        jump(-seconds)
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=3)
        assert anyio.current_time() - began == pytest.approx(3)
        for conn in leases:
            await pool.release(conn)


@sockets
@pytest.mark.parametrize("seconds", [3600, -3600])
async def test_a_wall_clock_jump_does_not_affect_real_connections(
    jump, seconds, authorizer
):
    options = {"min_connections": 2, "eager_init": True, "idle_check_interval": 0.01}
    async with pool_to(authorizer.options, **options) as pool:
        config = patient_config(pool, authorizer.options)
        reap, reaped = pool._open_pool.state.reap, []
        pool._open_pool.state.reap = lambda now: (reaped.append(now), reap(now))
        assert await checked(config)
        for offset in (seconds, 0, seconds):
            jump(offset)
            rounds = len(reaped)
            assert await checked(config)
            await soon(lambda rounds=rounds: len(reaped) > rounds + 3)
        # One more lease makes the pool check the lifetimes of all connections.
        async with pool.acquire(), pool.acquire(), pool.acquire():
            assert pool.status().total == 3
        assert authorizer.connections_accepted == 3
        assert authorizer.calls == {"Is": 4, "Info": 3}, (
            "no probe except the first ones"
        )
        assert not pool._counters.closes
