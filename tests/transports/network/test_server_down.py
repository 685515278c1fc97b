"""Test a server that is killed, is down, or accepts and stays silent."""

from __future__ import annotations

import functools
import socket

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import ConnectFailed, PoolTimeout
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.faultkit.proxy import Proxy
from kit.logs import lines
from kit.network import (
    ASK,
    HOURS,
    PATH,
    PATIENCE,
    Outcomes,
    checked,
    forget_errors,
    is_a_lost_connection,
    paced,
    patient_config,
    pool_to,
    served,
    sockets,
    soon,
    via,
)
from kit.pools import queued


# -- F1: the server is killed -------------------------------------------------------


@sockets
@pytest.mark.parametrize("end", ["RST", "FIN"])
async def test_each_call_in_flight_on_a_killed_server_gets_its_own_error(
    end, authorizer, proxy, gate
):
    authorizer.policies = {PATH: gate}
    options = {"min_connections": 3, "eager_init": True, "max_retries": 0}
    async with pool_to(via(proxy), **options) as pool:
        leases = [await pool.acquire() for _ in range(3)]
        outcomes = Outcomes()
        async with anyio.create_task_group() as tasks:
            for conn in leases:
                tasks.start_soon(functools.partial(outcomes.of, conn.decisions, **ASK))
            await soon(lambda: gate.held == 3)
            proxy.refuse()
            assert (proxy.cut() == 3) if end == "RST" else (authorizer.stop() is None)
        assert len(outcomes) == 3
        assert all(is_a_lost_connection(error) for error in outcomes)
        assert pool.status().healthy_connections == 0
        await soon(lambda: pool.status().leaving == 3)
        for conn in leases:
            await pool.release(conn)
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire(timeout=PATIENCE)
        assert caught.value.reason == "refused"
        await soon(lambda: sum(pool._counters.closes.values()) == 3)
        assert pool.status().total == 0
        # The first connection is lost by its own call, the others by a call or a probe.
        assert set(pool._counters.closes) <= {"lost", "unhealthy"}

        gate.is_open = True
        authorizer.start()
        proxy.listen()
        await soon(lambda: pool.status().total == 3)
        assert await served(pool)


@sockets
async def test_after_cut_connections_siblings_are_probed_and_cut_ones_replaced(
    replicas, gate
):
    replicas[0].policies[PATH] = gate
    options = {"min_connections": 9, "max_connections": 9, "eager_init": True}
    async with pool_to(replicas.options, **options) as pool:
        outcomes = Outcomes()
        leases = [await pool.acquire() for _ in range(9)]
        async with anyio.create_task_group() as tasks:
            for conn in leases:
                tasks.start_soon(functools.partial(outcomes.of, conn.decisions, **ASK))
            await soon(lambda: gate.held == 9)
            assert replicas.proxy.cut(backend=replicas[1].port) == 3
            await soon(lambda: len(outcomes) == 3)
            assert all(is_a_lost_connection(error) for error in outcomes)
            await soon(lambda: all(replicas.calls(i)["Info"] >= 3 for i in (0, 2)))
            gate.is_open = True
        assert outcomes.count({"allowed": True}) == 6, (
            "the connections were probed, and nothing more"
        )
        for conn in leases:
            await pool.release(conn)
        await soon(lambda: replicas.proxy.accepted >= 12)
        await soon(lambda: pool.status().healthy_connections == 9)


@sockets
async def test_a_check_on_a_cut_connection_is_retried_on_another(replicas, gate):
    replicas[0].policies[PATH] = gate
    async with pool_to(replicas.options, min_connections=3, eager_init=True) as pool:
        config = patient_config(pool, replicas.options)
        outcomes = Outcomes()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(outcomes.of, checked, config)
            await soon(lambda: gate.held == 1)
            (hit,) = [i for i in range(3) if replicas[i].streams]
            assert replicas.proxy.cut(backend=replicas[hit].port) == 1
            gate.is_open = True
        assert outcomes == [True]
        assert sum(replicas.calls(i)["Is"] for i in range(3)) == 2


@sockets
async def test_checks_survive_the_loss_of_all_connections_at_once(
    authorizer, proxy, gate
):
    authorizer.policies = {PATH: gate}
    async with pool_to(via(proxy), max_connections=5) as pool:
        config = patient_config(pool, via(proxy))
        outcomes = Outcomes()
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(outcomes.of, checked, config)
            await soon(lambda: gate.held == 5)
            assert proxy.cut() == 5
            gate.is_open = True
        assert outcomes == [True] * 5
        assert proxy.accepted > 5


@sockets
async def test_a_check_lost_with_its_server_fails_with_the_reason(
    authorizer, proxy, gate
):
    authorizer.policies = {PATH: gate}
    async with pool_to(via(proxy), max_retries=0) as pool:
        config = patient_config(pool, via(proxy))
        outcomes = Outcomes()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(outcomes.of, checked, config)
            await soon(lambda: gate.held == 1)
            proxy.refuse()
            proxy.cut()
        (error,) = outcomes
        assert isinstance(error, ConnectFailed)
        assert error.reason == "refused"


# -- F2: the server is down at startup ----------------------------------------------


@sockets
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "lazy"])
async def test_a_pool_started_before_its_server_reports_why_and_recovers(
    eager, proxy, caplog
):
    proxy.refuse()
    pool = pool_to(
        via(proxy),
        min_connections=2,
        eager_init=eager,
        connection_timeout=1,
        max_retries=1_000_000,
        acquire_timeout=HOURS,
    )
    async with pool:
        if eager:
            (line,) = [line for line in lines(caplog) if "at startup" in line]
            assert "connection refused" in line
        else:
            assert not lines(caplog)
            assert not pool._counters.connect_failures
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout=0)
        await soon(lambda: "refused" in pool._counters.connect_failures)
        with pytest.raises(PoolTimeout, match="connection refused") as caught:
            await pool.acquire(timeout=0.1)
        assert isinstance(caught.value.__cause__, ConnectFailed)
        assert not pool.status().healthy
        proxy.listen()
        async with pool.acquire(timeout=PATIENCE) as conn:
            assert await conn.decisions(**ASK) == {"allowed": True}
        await soon(lambda: pool.status().total == 2)
        assert pool.status().healthy


# -- F3: connects are refused for a while -------------------------------------------


@sockets
async def test_refused_callers_fail_with_each_attempt_and_add_no_attempt(proxy):
    proxy.refuse()
    async with pool_to(via(proxy)) as pool:

        async def caller():
            for _ in range(3):
                with pytest.raises(ConnectFailed) as caught:
                    await pool.acquire(timeout=PATIENCE)
                assert caught.value.reason == "refused"

        with paced(pool):
            async with anyio.create_task_group() as tasks:
                for _ in range(50):
                    tasks.start_soon(caller)
        assert pool._counters.failed == 150
        # Two attempts at once, then three retries, then one for each later request.
        assert pool._counters.connect_failures["refused"] <= 15
        proxy.listen()
        assert await served(pool)


@sockets
async def test_the_next_attempt_serves_waiting_callers_in_order(
    proxy,
):
    proxy.refuse()
    options = {"max_connections": 1, "max_retries": 1_000_000}
    async with pool_to(via(proxy), **options, acquire_timeout=HOURS) as pool:
        failures = pool._counters.connect_failures
        order = []

        async def caller(number):
            async with pool.acquire() as conn:
                order.append(number)
                assert await conn.decisions(**ASK) == {"allowed": True}

        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(caller, number)
                await queued(pool, number + 1)
            with paced(pool):
                await soon(lambda: failures.get("refused", 0) >= 7)
            proxy.listen()
            # One attempt may have been in progress when the server came back.
            before = failures["refused"]
        assert failures["refused"] <= before + 1
        assert order == list(range(10))
        assert proxy.accepted == 1
        assert not pool.status().failing, "one success resets all backoff"


# -- F4: the server accepts and stays silent ----------------------------------------


@pytest.mark.costly
@sockets
@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "tls"])
async def test_a_server_that_accepts_and_hangs_makes_an_attempt_time_out(tls, caplog):
    with (
        EmbeddedAuthorizer({PATH: True}, tls=tls) as authorizer,
        Proxy([authorizer.port]) as proxy,
    ):
        proxy.hang()
        options = {"connection_timeout": 0.5, "max_retries": 0}
        async with pool_to(via(proxy, authorizer.ca_cert_path), **options) as pool:
            with pytest.raises(ConnectFailed) as caught:
                await pool.acquire(timeout=PATIENCE)
            assert (caught.value.reason, caught.value.permanent) == ("timeout", False)
            assert set(pool._counters.connect_failures) == {"timeout"}
            assert pool.status().connecting == 0
            proxy.heal()
            assert await served(pool)
            del caught
            forget_errors(caplog)
            await soon(lambda: proxy.open == 1)


@sockets
async def test_while_one_backend_hangs_the_others_serve_all_waiters(authorizer, caplog):
    # No server accepts: the kernel does, and then stays silent. gRPC also retries by
    # itself before it is told to stop. With two addresses in turn, each attempt might
    # begin at this one.
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        Proxy([silent.getsockname()[1], *[authorizer.port] * 2]) as proxy,
    ):
        options = {"max_connections": 4, "connection_timeout": 0.5}
        pool = pool_to(via(proxy), **options, max_retries=1_000, acquire_timeout=HOURS)
        async with pool:
            leases = []

            async def caller():
                leases.append(conn := await pool.acquire())
                assert await conn.decisions(**ASK) == {"allowed": True}
                # No caller takes the connection of another.
                await soon(lambda: len(leases) == 4)
                await pool.release(conn)

            async with anyio.create_task_group() as tasks:
                for _ in range(4):
                    tasks.start_soon(caller)
            # gRPC sometimes retries in the last moment of an attempt.
            assert pool._counters.connect_failures.keys() <= {"timeout"}
            assert pool.status().total == 4
            forget_errors(caplog)
            await soon(lambda: authorizer.connections_open == 4)
            assert proxy.accepted > authorizer.connections_accepted, (
                "the silent backend"
            )
