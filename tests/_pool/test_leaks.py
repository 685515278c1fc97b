"""Leases that are late, or that become garbage."""

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


async def test_a_lease_that_gets_lost_as_the_pool_ends_is_not_given_back(caplog):
    pool = make_pool(max_connections=1)
    leases = []

    class Drops(logging.Handler):
        """Drops the lease in the last moment: garbage is collected at any."""

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


# -- leases that become garbage -----------------------------------------------------


async def test_a_lease_that_becomes_garbage_is_shown_with_its_warning():
    async with make_pool() as pool:
        conn = await pool.acquire()
        with pytest.warns(ResourceWarning, match="garbage-collected") as caught:
            del conn
        (warning,) = caught
        assert repr(warning.source) == "<PooledConnection to fake released>"
        await anyio.sleep(0.1)
        assert pool.status().streams_in_use == 0


async def test_who_drops_a_lease_is_warned_in_that_line():
    async with make_pool() as pool:
        conn = await pool.acquire()
        with pytest.warns(ResourceWarning, match="garbage-collected") as caught:
            del conn
        assert caught[0].filename == __file__


# -- late leases --------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, math.inf])
async def test_no_threshold_and_one_that_nothing_reaches_watch_no_lease(threshold):
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


def test_nothing_that_is_out_means_not_to_look_before_it_could_be_late():
    leaks = Leaks("pool", 8.0, PoolCounters())
    assert leaks.look(100.0) == 108.0


async def test_a_late_lease_that_becomes_garbage_is_still_known_by_its_holder(caplog):
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


def test_a_place_is_told_by_its_innermost_frames_and_no_more():
    # Two, because a line that repeats itself is shown three times only.
    def one(depth):
        return two(depth - 1) if depth else str(_Holder.here())

    def two(depth):
        return one(depth - 1) if depth else str(_Holder.here())

    head, *lines = one(2 * STACK_DEPTH).splitlines()
    assert head == "task 'unknown', which took it here:"
    assert sum(line.startswith('  File "') for line in lines) == STACK_DEPTH
    assert all(line.startswith("  ") for line in lines)


async def test_a_task_without_a_name_is_told_of_as_such(monkeypatch):
    class Task:
        name = None

    monkeypatch.setattr(_leaks.anyio, "get_current_task", Task)
    assert str(_Holder.here()).startswith("task 'without a name', which")
