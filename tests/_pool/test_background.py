"""Test the background task of a pool."""

from __future__ import annotations

import logging

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import PoolClosed
from fastapi_topaz._pool.state.pool_state import PoolState
from fastapi_topaz.testing import FakeConnection, FakeConnector
from kit.logs import lines_of
from kit.pools import Making, make_pool


async def test_a_bug_in_the_background_task_closes_only_the_pool(caplog, monkeypatch):
    connector = FakeConnector()
    pool = make_pool(connector, max_connections=1, idle_check_interval=10, name="main")

    def reap(_state, _now):
        raise RuntimeError("a bug")

    async def wait():
        with pytest.raises(PoolClosed, match="closed while waiting"):
            await pool.acquire(timeout=60)

    async with pool:
        held = await pool.acquire()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.sleep(1)
            with monkeypatch.context() as patch:
                patch.setattr(PoolState, "reap", reap)
                await anyio.sleep(10)
        (record,) = [r for r in caplog.records if r.levelno == logging.CRITICAL]
        assert record.getMessage() == "pool 'main': its host task failed"
        assert repr(record.exc_info[1].exceptions) == "(RuntimeError('a bug'),)"
        # The log does not blame a missing close() either.
        assert lines_of(caplog, logging.ERROR) == []
        assert connector.open == []
        await pool.release(held)
        # The next use opens the pool again.
        async with pool.acquire() as conn:
            assert await conn.call("/a/b", b"works") == b"works"
    assert connector.open == []


async def test_a_connection_with_a_failing_refresh_liveness_stays_open(caplog):
    class Blind(FakeConnection):
        def refresh_liveness(self):
            raise RuntimeError("too dark")

    async with make_pool(Making(Blind), name="main") as pool:
        async with pool.acquire():
            pass
        await anyio.sleep(5)
        assert pool.status().idle == 1
        failed = "pool 'main': refresh_liveness() failed"
        assert lines_of(caplog, logging.DEBUG).count(failed) >= 3
