"""Topaz stops under traffic and comes back: real sockets and the real clock."""

from __future__ import annotations

import time

import anyio
import pytest
from anyio.to_thread import run_sync

from fastapi_topaz import ConnectFailed, ConnectionPool
from kit.waiting import eventually


CALLERS = 20


@pytest.mark.real_clock
@pytest.mark.parametrize(
    "seconds", [1, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(120)])]
)
async def test_an_outage_costs_little_cpu_and_recovery_is_fast(
    embedded_authorizer, seconds
):
    authorizer = embedded_authorizer
    authorizer.policies = lambda check: True
    pool = ConnectionPool(max_connections=10)
    pool.configure(authorizer.options)
    answered, failures, stopped = 0, [], False

    async def caller():
        nonlocal answered
        while not stopped:
            try:
                async with pool.acquire() as conn:
                    assert await conn.decisions(policy_path="myapp.GET.documents")
                answered += 1
                await anyio.sleep(0.005)
            except Exception as error:  # noqa: BLE001  (checked below)
                failures.append(error)

    async def flows(checks=100):
        goal = answered + checks
        await eventually(lambda: answered >= goal, timeout=20)

    async with pool, anyio.create_task_group() as tasks:
        for _ in range(CALLERS):
            tasks.start_soon(caller)
        await flows()
        await eventually(lambda: pool.status().total == 10)
        assert failures == []

        await run_sync(authorizer.stop)
        # Calls in flight were lost. All later callers get the reason, and quickly.
        await eventually(lambda: pool.status().failing)
        # The first refused attempt may come before the last call in flight is lost.
        await eventually(lambda: pool.status().streams_in_use == 0)
        under_way = len(failures)
        assert under_way <= 2 * CALLERS
        cpu, began = time.process_time(), anyio.current_time()
        attempts = pool._counters.connect_failures.get("refused", 0)
        before = answered
        await anyio.sleep(seconds)
        took = anyio.current_time() - began
        attempts = pool._counters.connect_failures["refused"] - attempts
        assert answered == before
        assert 1 <= attempts <= 20 * took
        # A busy loop would use a whole core. The callers' errors need a few hundredths.
        assert time.process_time() - cpu < 0.5 * took
        told = [error for error in failures if isinstance(error, ConnectFailed)]
        assert len(told) >= CALLERS
        assert len(failures) - len(told) <= under_way
        assert {error.reason for error in told} == {"refused"}

        await run_sync(authorizer.start)
        await flows(1)
        await eventually(lambda: authorizer.connections_open == 10)
        failed = len(failures)
        await flows()
        assert len(failures) == failed
        assert pool.status().healthy
        stopped = True
