"""Test leases that are late or garbage-collected."""

from __future__ import annotations

import logging
import math

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz._pool import leaks as _leaks
from fastapi_topaz._pool.leaks import STACK_DEPTH, Leaks, _Holder
from fastapi_topaz._pool.state.status import PoolCounters
from kit.logs import lines_of
from kit.pools import make_pool


async def test_a_lease_dropped_while_the_pool_ends_is_not_returned(caplog):
    pool = make_pool(max_connections=1)
    leases = []

    class Drops(logging.Handler):
        """Drop the lease at the last moment. Garbage collection can run at any time."""

        def emit(self, record):
            if "closed before" in record.getMessage():
                leases.clear()

    handler = Drops()
    logging.getLogger("fastapi_topaz.pool").addHandler(handler)
    try:
        async with pool:
            leases.append(await pool.acquire())
            with pytest.warns(ResourceWarning, match="garbage-collected"):
                await pool.close(grace=0)
    finally:
        logging.getLogger("fastapi_topaz.pool").removeHandler(handler)
    assert leases == []
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()
    assert pool._counters.reclaimed == 0
    assert not any("took back" in line for line in lines_of(caplog, logging.WARNING))


# -- garbage-collected leases -------------------------------------------------------


async def test_a_garbage_collected_lease_is_shown_in_its_warning():
    async with make_pool() as pool:
        conn = await pool.acquire()
        with pytest.warns(ResourceWarning, match="garbage-collected") as caught:
            del conn
        (warning,) = caught
        assert repr(warning.source) == "<PooledConnection to fake released>"
        await anyio.sleep(0.1)
        assert pool.status().streams_in_use == 0


async def test_a_dropped_lease_warns_at_the_line_of_the_drop():
    async with make_pool() as pool:
        conn = await pool.acquire()
        with pytest.warns(ResourceWarning, match="garbage-collected") as caught:
            del conn
        assert caught[0].filename == __file__


# -- late leases --------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, math.inf])
async def test_no_lease_is_watched_with_no_threshold_or_an_infinite_one(threshold):
    async with make_pool(leak_threshold=threshold) as pool, pool.acquire():
        assert pool._open_pool.leaks is None


async def test_a_lease_is_late_exactly_at_the_threshold():
    async with make_pool(leak_threshold=8) as pool:
        conn = await pool.acquire()
        claim, leaks = conn._claim, pool._open_pool.leaks
        assert leaks.look(claim.acquired_at + 7) == claim.acquired_at + 8
        assert pool._counters.leaked == 0
        leaks.look(claim.acquired_at + 8)
        assert pool._counters.leaked == 1
        await pool.release(conn)


def test_without_leases_the_next_look_is_one_threshold_later():
    leaks = Leaks("pool", 8.0, PoolCounters())
    assert leaks.look(100.0) == 108.0


async def test_a_late_lease_that_becomes_garbage_still_names_its_holder(caplog):
    async with make_pool(leak_threshold=1) as pool:
        conn = await pool.acquire()
        await anyio.sleep(2)
        caplog.clear()
        with pytest.warns(ResourceWarning):
            del conn
        await anyio.sleep(0.1)
        (line,) = (
            record.getMessage()
            for record in caplog.records
            if "garbage-collected" in record.getMessage()
        )
        assert "held by task" in line


def test_a_place_shows_only_its_innermost_frames():
    # Two frames, because a traceback shows a repeated line only three times.
    def one(depth):
        return two(depth - 1) if depth else str(_Holder.here())

    def two(depth):
        return one(depth - 1) if depth else str(_Holder.here())

    head, *lines = one(2 * STACK_DEPTH).splitlines()
    assert head == "task 'unknown', which took it here:"
    assert sum(line.startswith('  File "') for line in lines) == STACK_DEPTH
    assert all(line.startswith("  ") for line in lines)


async def test_a_task_without_a_name_is_reported_as_unnamed(monkeypatch):
    class Task:
        name = None

    monkeypatch.setattr(_leaks.anyio, "get_current_task", Task)
    assert str(_Holder.here()).startswith("task 'without a name', which")
