"""Test the background task of a pool."""

from __future__ import annotations

import logging
import traceback

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import PoolClosed
from fastapi_topaz._pool.state.pool_state import PoolState
from fastapi_topaz.testing import FakeConnection, FakeConnector, fail
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
        # The log shows no variables of the pool, which may lead to secrets.
        (bug,) = record.exc_info[1].exceptions
        own = [
            frame
            for frame, _ in traceback.walk_tb(bug.__traceback__)
            if frame.f_globals["__name__"].startswith("fastapi_topaz.")
        ]
        assert own
        assert not any(frame.f_locals for frame in own)
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


async def test_each_attempt_after_a_failed_one_counts_as_a_retry():
    connector = FakeConnector([fail()] * 3)
    async with make_pool(connector, max_connections=1) as pool:
        async with pool.acquire(timeout=60):
            pass
        assert connector.attempts == 4
        assert pool._counters.connect_retries == 3


# -- companions -----------------------------------------------------------------------


class Companions:
    """Coroutine functions that run until they are cancelled."""

    def __init__(self):
        self.began, self.running = [], []

    def make(self, name):
        async def run():
            self.began.append(name)
            self.running.append(name)
            try:
                await anyio.sleep_forever()
            finally:
                self.running.remove(name)

        return run


async def test_each_companion_runs_once_until_the_pool_closes_also_if_added_later():
    companions = Companions()
    pool = make_pool()
    for name in "ab":
        pool._accompany(companions.make(name))
    async with pool:
        async with pool.acquire():
            await anyio.sleep(1)
        assert sorted(companions.running) == sorted(companions.began) == ["a", "b"]
        for name in "cd":
            pool._accompany(companions.make(name))
            await anyio.sleep(1)
        assert sorted(companions.began) == ["a", "b", "c", "d"]
        assert sorted(companions.running) == ["a", "b", "c", "d"]
    assert companions.running == []
    async with pool:
        await anyio.sleep(1)
        assert sorted(companions.running) == ["a", "b", "c", "d"]


async def test_a_failed_companion_is_logged_without_the_context_of_its_error(caplog):
    companions = Companions()

    async def fails():
        try:
            raise LookupError("swordfish")
        except LookupError:
            raise RuntimeError("a bug")  # noqa: B904  (has a context)

    async with make_pool(name="main") as pool:
        for companion in (fails, companions.make("other")):
            pool._accompany(companion)
        async with pool.acquire():
            await anyio.sleep(1)
        assert companions.running == ["other"]
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.levelno == logging.ERROR
    assert record.getMessage() == "pool 'main': a companion of the pool failed"
    text = logging.Formatter().format(record)
    assert "RuntimeError: a bug" in text
    assert "swordfish" not in text
