"""Test connections that are silent, cut off or slow."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools

import anyio
import anyio.lowlevel
import grpc
import grpc.aio._utils
import pytest

from fastapi_topaz import ConnectFailed, PoolSaturated, PoolTimeout
from kit.faultkit.proxy import Proxy
from kit.network import (
    ASK,
    PATH,
    PATIENCE,
    Outcomes,
    checked,
    is_a_lost_connection,
    patient_config,
    pool_to,
    served,
    sockets,
    soon,
    via,
)
from kit.pools import assert_whole


# -- F8 and F9: the network loses everything, or the server is frozen ---------------


silences = pytest.mark.parametrize("silence", ["half_open", "freeze"])


@sockets
@silences
async def test_two_unanswered_calls_evict_all_silent_connections(silence, proxy):
    options = {"health_check_timeout": 0.3, "connection_timeout": 1, "max_retries": 0}
    pool = pool_to(via(proxy), min_connections=2, eager_init=True, **options)
    async with pool:
        leases = [await pool.acquire() for _ in range(2)]
        old = {conn.connection for conn in leases}
        getattr(proxy, silence)()
        for suspects in (0, 1):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await leases[0].decisions(**ASK, timeout=0.1)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert pool.status().suspect == suspects
        await soon(lambda: pool.status().leaving == 2)
        for conn in leases:
            await pool.release(conn)
        await soon(lambda: pool._counters.closes == {"unhealthy": 2})
        # gRPC reports READY on the silent channels. The pool never leases them again.
        with pytest.raises(ConnectFailed) as refused:
            await pool.acquire(timeout=PATIENCE)
        assert refused.value.reason == "timeout"
        proxy.heal()
        assert await served(pool) not in old


@sockets
async def test_the_health_check_evicts_unused_silent_connections(
    proxy,
):
    pool = pool_to(
        via(proxy),
        min_connections=2,
        eager_init=True,
        health_check_interval=0.1,
        health_check_timeout=0.3,
        connection_timeout=1,
    )
    async with pool:
        old = [entry.connection for entry in pool._open_pool.state.open]
        proxy.half_open()
        await soon(lambda: not pool.status().healthy)
        assert pool._counters.closes["unhealthy"] >= 2
        proxy.heal()
        assert await served(pool) not in old
        await soon(lambda: pool.status().healthy_connections == 2)


@pytest.mark.costly
@sockets
@silences
async def test_one_silent_replica_of_three_fails_only_the_checks_it_holds(
    silence, replicas
):
    pool = pool_to(
        replicas.options,
        min_connections=6,
        max_connections=6,
        streams_per_connection=4,
        eager_init=True,
        health_check_timeout=0.3,
        connection_timeout=1,
        max_retries=1_000,
    )
    config = patient_config(pool, replicas.options, check_timeout=0.5)
    failures = []

    async def user():
        while True:
            try:
                assert await checked(config)
            except Exception as error:  # noqa: BLE001  (looked at below)
                failures.append(error)

    async with pool:
        await soon(lambda: replicas.serving() == {0, 1, 2})
        async with anyio.create_task_group() as tasks:
            for _ in range(24):
                tasks.start_soon(user)
            await soon(lambda: all(replicas.calls(i)["Is"] for i in range(3)))
            getattr(replicas.proxy, silence)(replicas[1].port)
            await soon(lambda: failures)
            # All data sent before the fault has arrived by now.
            since = anyio.current_time()
            await soon(
                lambda: all(e.proven_at > since for e in pool._open_pool.state.open)
            )
            tasks.cancel_scope.cancel()
        for error in failures:
            # These calls hit their own deadline, in the call or in the queue.
            assert isinstance(error, PoolTimeout | grpc.aio.AioRpcError)
            if isinstance(error, grpc.aio.AioRpcError):
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert pool._counters.closes["unhealthy"]

        config.check_timeout = PATIENCE
        outcomes = Outcomes()
        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(outcomes.of, checked, config)
        assert outcomes == [True] * 100


# -- F10: a response is truncated ---------------------------------------------------


@contextlib.contextmanager
def one_proxy_each(replicas):
    """
    Put a proxy in front of each replica, and one in front of all, to hit only one.
    """
    with contextlib.ExitStack() as stack:
        each = [
            stack.enter_context(Proxy([replicas[index].port])) for index in range(3)
        ]
        whole = stack.enter_context(Proxy([proxy.port for proxy in each]))
        yield whole, each


breaks = pytest.mark.parametrize(
    "fault", ["reset_mid_response", "truncate_mid_response"]
)


@sockets
@breaks
async def test_a_truncated_response_fails_only_its_caller(fault, replicas, gate):
    replicas[0].policies[PATH] = gate
    with one_proxy_each(replicas) as (proxy, each):
        options = {"min_connections": 3, "eager_init": True}
        async with pool_to(via(proxy), **options) as pool:
            leases = [await pool.acquire() for _ in range(3)]
            outcomes = Outcomes()
            async with anyio.create_task_group() as tasks:
                for conn in leases:
                    call = functools.partial(outcomes.of, conn.decisions, **ASK)
                    tasks.start_soon(call)
                await soon(lambda: gate.held == 3)
                getattr(each[1], fault)(20)
                gate.is_open = True
            (error,) = outcomes.errors
            assert is_a_lost_connection(error)
            assert outcomes.count({"allowed": True}) == 2
            assert replicas.calls(1)["Is"] == 1, (
                "the server answered, and the answer was lost"
            )
            for conn in leases:
                await pool.release(conn)
            closes = pool._counters.closes
            await soon(lambda: closes.get("lost", 0) + closes.get("unhealthy", 0))
            await soon(lambda: pool.status().healthy_connections == 3)


@sockets
@breaks
async def test_a_check_with_a_truncated_response_is_answered_by_another_replica(
    fault, replicas, gate
):
    replicas[0].policies[PATH] = gate
    with one_proxy_each(replicas) as (proxy, each):
        options = {"min_connections": 3, "eager_init": True}
        async with pool_to(via(proxy), **options) as pool:
            config = patient_config(pool, via(proxy))
            outcomes = Outcomes()
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(outcomes.of, checked, config)
                await soon(lambda: gate.held == 3)
                getattr(each[1], fault)(20)
                gate.is_open = True
            assert outcomes == [True] * 3
            assert replicas.calls(1)["Is"] == 1
            assert sum(replicas.calls(i)["Is"] for i in range(3)) == 4


# -- F17: the server is slow --------------------------------------------------------


@pytest.mark.costly
@sockets
async def test_a_slow_server_sheds_load_from_the_queue_without_new_connections(
    authorizer,
):
    pace = 0.002

    async def decide(_check):
        await asyncio.sleep(pace)
        return True

    authorizer.policies = {PATH: decide}
    options = {"min_connections": 3, "max_connections": 3, "max_waiting": 5}
    pool = pool_to(authorizer.options, **options, acquire_timeout=0.1)
    config = patient_config(pool, authorizer.options)
    answered, waiting = itertools.count(), set()
    done = 0

    async def user():
        nonlocal done
        while True:
            waiting.add(pool.status().waiting)
            try:
                assert await checked(config)
                done = next(answered)
            except (PoolSaturated, PoolTimeout):
                await anyio.sleep(0.01)

    async with pool:
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(user)
            await soon(lambda: done > 50)
            pace *= 100
            counters = pool._counters
            rejected, timeouts = counters.rejected, counters.timeouts
            await soon(lambda: counters.rejected > rejected + 20)
            await soon(lambda: counters.timeouts > timeouts + 5)
            pace /= 100
            before = done
            await soon(lambda: done > before + 100)
            tasks.cancel_scope.cancel()
        # Callers that wait for capacity, and callers that are about to be served.
        assert 5 <= max(waiting) <= 5 + 3
        assert authorizer.connections_accepted == 3, "neither then nor afterwards"
        assert not counters.closes
        assert not counters.connect_failures
        await assert_whole(pool, twice=True)
