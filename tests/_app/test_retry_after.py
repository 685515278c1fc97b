"""Test the header `Retry-After` of a refused request."""

from __future__ import annotations

import contextlib

import anyio
import pytest
from fastapi import HTTPException

from fastapi_topaz import ConnectionPool, PoolSaturated, require_policy_allowed
from fastapi_topaz._app import guards
from fastapi_topaz.testing import FakeConnector
from kit.configs import POLICY, REQUEST, config_of


async def refused(wait, monkeypatch, jitter):
    monkeypatch.setattr(guards.random, "randint", lambda low, high: (low, high)[jitter])
    config = config_of(ConnectionPool(connector=FakeConnector()))

    async def ask(_question):
        raise PoolSaturated("about 1.4 s of queue, 0.8 s of budget", retry_after=wait)

    config._ask = ask
    with pytest.raises(HTTPException) as caught:
        await require_policy_allowed(config, POLICY)(REQUEST)
    assert caught.value.status_code == 503
    assert caught.value.__cause__ is caught.value.__context__ is None
    return caught.value.headers["Retry-After"]


@pytest.mark.parametrize(
    "wait, jitter, header",
    [(0.0, 0, "1"), (0.3, 1, "2"), (3.2, 0, "4"), (4.0, 1, "8")],
)
async def test_the_header_is_the_estimate_with_jitter_and_at_least_one_second(
    wait, jitter, header, monkeypatch
):
    assert await refused(wait, monkeypatch, jitter) == header


async def test_without_an_estimate_the_header_is_one_second(monkeypatch):
    assert await refused(None, monkeypatch, 1) == "1"


async def test_an_overloaded_pool_refuses_a_request_with_the_estimate():
    async def slow(_method, _request):
        await anyio.sleep(0.5)
        return b""

    pool = ConnectionPool(
        connector=FakeConnector(answer=slow), min_connections=0, max_connections=1
    )
    config = config_of(pool, check_timeout=1.0)
    guard = require_policy_allowed(config, POLICY)
    ends = []

    async def visit():
        # A fake connection raises TimeoutError at the end of the budget.
        with contextlib.suppress(TimeoutError):
            try:
                await guard(REQUEST)
            except HTTPException as error:
                ends.append((error.status_code, int(error.headers["Retry-After"])))

    async with pool:
        # The pool learns how long a lease takes.
        async with pool.acquire() as conn:
            await conn.call("/a/b", b"")
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(visit)
        assert pool._counters.rejected > 10
    assert {status for status, _ in ends} == {503}
    assert max(seconds for _, seconds in ends) >= 1
