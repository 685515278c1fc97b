"""Test that an error names nested leases: those of tasks that wait for another one."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial

import anyio
import pytest

from fastapi_topaz import AuthorizerOptions, Identity, IdentityType, PoolTimeout
from fastapi_topaz._pool import pool as _pool
from fastapi_topaz._pool.nesting import held_by
from kit.backends import asyncio_only
from kit.configs import Requests, config_of
from kit.pools import make_pool, queued


NESTED = (
    r"all {} leases are out, and {} of them are held by tasks that wait for another"
)


async def nested(pool, kind):
    if kind == "with":
        async with pool.acquire():
            await anyio.sleep(0.1)
            async with pool.acquire(timeout=1):
                pass
    elif kind == "await":
        conn = await pool.acquire()
        try:
            await anyio.sleep(0.1)
            await pool.acquire(timeout=1)
        finally:
            await pool.release(conn)
    elif kind == "exit stack":
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(pool.acquire())
            await anyio.sleep(0.1)
            await stack.enter_async_context(pool.acquire(timeout=1))
    elif kind == "context manager":

        @asynccontextmanager
        async def lent():
            async with pool.acquire() as conn:
                yield conn

        async with lent():
            await anyio.sleep(0.1)
            async with pool.acquire(timeout=1):
                pass
    elif kind == "generator":

        async def lent():
            async with pool.acquire():
                yield

        async with aclosing(lent()) as leases:
            async for _ in leases:
                await anyio.sleep(0.1)
                await pool.acquire(timeout=1)


KINDS = ["with", "await", "exit stack", "context manager", "generator"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_timeout_error_names_the_leases_held_by_waiting_tasks(kind):
    told = []

    async def caller():
        with pytest.raises(PoolTimeout) as caught:
            await nested(pool, kind)
        told.append(str(caught.value))

    async with make_pool(max_connections=4) as pool:
        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(caller)
        assert all(re.search(NESTED.format(4, 4), one) for one in told)
        assert pool.status().streams_in_use == 0


async def test_a_single_nesting_task_is_named_in_the_error():
    async with make_pool(max_connections=1) as pool, pool.acquire():
        with pytest.raises(PoolTimeout, match=NESTED.format(1, 1)):
            await pool.acquire(timeout=1)


class BareTask:
    """A task as a task factory may make it: no instance of `asyncio.Task`."""

    def __init__(self, task):
        self._task = task

    def get_coro(self):
        return self._task.get_coro()


# Only asyncio has task factories.
@asyncio_only
async def test_a_nested_lease_of_a_task_of_any_class_is_named(monkeypatch):
    async with make_pool(max_connections=1) as pool, pool.acquire():
        owner = pool._open_pool.owner
        task = owner.task
        monkeypatch.setattr(owner, "task", lambda: BareTask(task()))
        with pytest.raises(PoolTimeout, match=NESTED.format(1, 1)):
            await pool.acquire(timeout=1)


async def test_a_timeout_of_0_names_the_leases_in_the_callers_variables():
    async with make_pool(max_connections=1) as pool, pool.acquire() as conn:
        with pytest.raises(PoolTimeout, match=NESTED.format(1, 1)):
            await pool.acquire(timeout=0)
        assert conn.connection


async def test_a_check_during_a_lease_is_reported_as_nested():
    async with make_pool(max_connections=1) as pool:
        config = config_of(
            pool,
            AuthorizerOptions(url="unused:1"),
            identity_provider=lambda _request: Identity(IdentityType.SUB, "alice"),
            check_timeout=1,
        )
        request = Requests({"type": "http", "path_params": {}, "headers": []})
        async with pool.acquire():
            with pytest.raises(PoolTimeout, match=NESTED.format(1, 1)):
                await config.is_allowed(request, "myapp.GET.a")


async def test_leases_of_tasks_that_do_not_wait_are_not_reported_as_nested():
    async def hold():
        async with pool.acquire():
            await anyio.sleep(10)

    async def wait():
        with pytest.raises(PoolTimeout, match="all 3 leases are out: raise") as caught:
            await pool.acquire(timeout=1)
        assert "nested" not in str(caught.value)

    async with make_pool(max_connections=3) as pool, anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(hold)
        await anyio.sleep(0.1)
        for _ in range(3):
            tasks.start_soon(wait)


async def first_timeout(pool, leases, nesting, before=0):
    """
    Return the error of a caller that waits while all *leases* are out.

    The holders of *nesting* of them wait for another one, behind this caller and as
    many others as *before*.
    """
    told = []

    async def hold(*, nests):
        async with pool.acquire():
            await anyio.sleep(1)
            if nests:
                await pool.acquire()
            await anyio.sleep_forever()

    async def wait(timeout):
        with pytest.raises(PoolTimeout) as caught:
            await pool.acquire(timeout=timeout)
        told.append(str(caught.value))
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for number in range(leases):
            tasks.start_soon(partial(hold, nests=number < nesting))
        await anyio.sleep(0.5)
        for number in range(1 + before):
            tasks.start_soon(wait, 5 + number)
            await queued(pool, number + 1)
    return told[0]


@pytest.mark.parametrize("leases, nesting", [(4, 2), (5, 3)])
async def test_nested_leases_are_named_if_they_are_half_of_all(leases, nesting):
    async with make_pool(max_connections=leases) as pool:
        error = await first_timeout(pool, leases, nesting)
    assert re.search(NESTED.format(leases, nesting), error)


@pytest.mark.parametrize("leases, nesting", [(3, 1), (4, 1), (5, 2)])
async def test_less_nested_leases_than_half_of_all_are_not_named(leases, nesting):
    async with make_pool(max_connections=leases) as pool:
        error = await first_timeout(pool, leases, nesting)
    assert f"all {leases} leases are out: raise" in error


@pytest.mark.parametrize("before, is_found", [(98, True), (99, False)])
async def test_one_search_looks_at_the_first_hundred_waiting_tasks(before, is_found):
    async with make_pool(max_connections=1) as pool:
        error = await first_timeout(pool, 1, 1, before)
    assert ("nested leases" in error) is is_found


async def test_the_search_for_nested_leases_is_bounded(monkeypatch):
    searches = []
    original = _pool.count_nested

    def counted(*args):
        searches.append(args)
        return original(*args)

    monkeypatch.setattr("fastapi_topaz._pool.pool.count_nested", counted)
    async with make_pool(max_connections=1) as pool, pool.acquire():
        for _ in range(50):
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout=0)
        assert len(searches) == 1
        # Leases of another pool and released leases do not count for this pool.
        async with make_pool() as other, other.acquire() as conn:
            assert held_by([conn], pool._open_pool) == 0
