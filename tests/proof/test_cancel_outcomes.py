"""
Cancelling at any await point, with connections that succeed, fail, delay or hang.

Three sets of await points: the pool's own tasks that connect, probe and close; the
lifecycle of a pool, times the possible outcomes of each step of the connector; and
operations on real connections.
"""

from __future__ import annotations

import contextlib
import itertools
from functools import partial

import anyio
import pytest

from fastapi_topaz import ConnectionLost, PoolClosed
from fastapi_topaz._pool import connections as _connections
from fastapi_topaz.connector import GrpcConnector
from kit.strikes import (
    ON_ASYNCIO,
    SCOPE,
    TASK,
    Playing,
    Strike,
    assert_closed,
    assert_serves_all,
    assert_unused,
    make_small,
    on_asyncio,
    sweep,
    whole_after,
)
from kit.waiting import eventually


OUTCOMES = ["ok", "error", "slow", "never"]


# -- the tasks of the host ------------------------------------------------------------


async def at_work(strike, task, who, script):
    """The lifecycle of a pool, with a strike at the awaits of one kind of host task."""
    pool = make_small(Playing(**script), health_check_interval=1)
    scope = anyio.CancelScope()
    original = getattr(_connections, task)

    def cancel():
        if who == "caller":
            scope.cancel()
        else:  # this is what close() does before it waits for the host
            pool._open_pool.begin_close(0)

    async def watched(open_pool, slot):
        await strike.watch(original(open_pool, slot), cancel)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_connections, task, watched)
        await pool.initialize()
        with scope:
            await Strike().hit(partial(use, pool))
        await pool.close()
    assert_closed(pool)
    strike.ended = True


async def use(pool):
    """Acquire, call, release, and wait for a round of health checks."""
    async with pool.acquire(timeout=3) as conn:
        with contextlib.suppress(ConnectionLost, TimeoutError):
            await conn.call("/a/b", b"", timeout=1)
    await anyio.sleep(2.5)
    pool.drain()
    await anyio.sleep(8)


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("who", ["caller", "close"])
@pytest.mark.parametrize("task", ["connect", "probe", "close"])
async def test_cancelling_a_caller_or_closing_at_any_await_of_the_host_tasks(
    task, who, outcome
):
    script = {"connect_" if task == "connect" else task: outcome}
    for how in SCOPE:
        assert await sweep(at_work, how, task, who, script) > 0


# -- each step of the connector, times each outcome ------------------------------------


async def life(strike, script):
    """The whole lifecycle of a pool, with connections that follow the *script*."""
    pool = make_small(
        Playing(*script), min_connections=1, eager_init=True, max_retries=0
    )

    async def whole_life():
        async with pool:
            await use(pool)

    await strike.hit(whole_life)
    await anyio.sleep(6)
    assert_closed(pool)
    pool._connector.mend()
    async with whole_after(pool):
        pass


# Without a connection the other steps do not happen.
SCRIPTS = [
    script
    for script in itertools.product(OUTCOMES, repeat=4)
    if script[0] in {"ok", "slow"} or script[1:] == ("ok", "ok", "ok")
]
SOME = [
    # All combinations except where more than one step does not succeed.
    pytest.param(script, marks=[pytest.mark.slow] * (script.count("ok") < 3))
    for script in SCRIPTS
]


@pytest.mark.parametrize("script", SOME, ids="-".join)
async def test_cancelling_the_scope_of_a_pool_lifecycle_at_any_await(script):
    for how in SCOPE:
        assert await sweep(life, how, script) > 0


@ON_ASYNCIO
@pytest.mark.parametrize("script", SOME, ids="-".join)
async def test_cancelling_the_task_of_a_pool_lifecycle_at_any_await(script):
    for how in TASK:
        assert await sweep(life, how, script) > 0


# -- real connections -----------------------------------------------------------------


def real(authorizer):
    return make_small(GrpcConnector(authorizer.options.target))


async def ask(conn):
    return await conn.decisions(policy_path="app.GET.x", timeout=10)


async def real_check(strike, pool):
    async with pool.acquire() as conn:
        await strike.hit(partial(ask, conn))
        assert await ask(conn) == {"allowed": True}


async def real_life(strike, authorizer):
    pool = real(authorizer)

    async def whole_life():
        async with pool, pool.acquire() as conn:
            await ask(conn)

    await strike.hit(whole_life)
    await pool.close()
    async with pool, pool.acquire() as conn:
        assert await ask(conn) == {"allowed": True}
    assert_unused(pool)


async def real_connect(strike, authorizer):
    """Close at any await of the host task that connects."""
    pool = real(authorizer)
    original = _connections.connect

    async def watched(open_pool, slot):
        await strike.watch(original(open_pool, slot), partial(open_pool.begin_close, 0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_connections, "connect", watched)
        await pool.initialize()
        with contextlib.suppress(PoolClosed):
            await pool.release(await pool.acquire())
        await pool.close()
    strike.ended = True
    async with pool, pool.acquire() as conn:
        assert await ask(conn) == {"allowed": True}
    assert_unused(pool)


@pytest.mark.costly
@pytest.mark.real_clock
async def test_cancelling_operations_on_real_connections_at_any_await(
    embedded_authorizer,
):
    embedded_authorizer.policies = {"app.GET.x": True}
    for how in SCOPE + TASK * on_asyncio():
        async with real(embedded_authorizer) as pool:
            await assert_serves_all(pool, ask)
            assert await sweep(real_check, how, pool) > 0
            await assert_serves_all(pool, ask)
        assert await sweep(real_life, how, embedded_authorizer) > 0
    for how in SCOPE:
        assert await sweep(real_connect, how, embedded_authorizer) > 0
    await eventually(lambda: not embedded_authorizer.connections_open)
