"""A frozen server (SIGSTOP) is found in two seconds, and checks are asked elsewhere."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from functools import partial

import anyio
import grpc
import pytest

from fastapi_topaz import AuthorizerOptions, ConnectionPool
from fastapi_topaz._http2 import opening
from fastapi_topaz._http2.connection import PING_TIMEOUT, SILENCE, ClientConnection
from kit.configs import REQUEST, config_of
from kit.gopeer.process import Gopeer
from kit.processes import AuthorizerProcess, freeze
from kit.waiting import eventually


pytestmark = [pytest.mark.real_clock, pytest.mark.slow, pytest.mark.uvloop]

FOUND = SILENCE + PING_TIMEOUT
BUDGET = 3.0
CALLERS = 20
# Long enough that the callers use all connections.
SECONDS = "0.03"
needs_go = pytest.mark.skipif(
    "GOPEER" not in os.environ,
    reason="GOPEER does not name the server of tests/kit/gopeer: `nox -s gopeer`",
)


class GoProcess(Gopeer):
    """The grpc-go server, which can be frozen like an `AuthorizerProcess`."""

    def freeze(self):
        freeze(self._process.pid)

    def thaw(self):
        self.send(signal.SIGCONT)


@pytest.fixture(params=["embedded", pytest.param("grpc-go", marks=needs_go)])
def server(request):
    """Return what makes a server that takes `SECONDS` for a decision."""
    if request.param == "embedded":
        return AuthorizerProcess
    return partial(GoProcess, delay=f"{SECONDS}s")


@contextlib.asynccontextmanager
async def opened(*servers, **options):
    pool = ConnectionPool(transport="native", **options)
    url = "ipv4:" + ",".join(each.url for each in servers)
    pool.configure(AuthorizerOptions(url=url, insecure=True))
    async with pool:
        try:
            yield pool
        finally:
            for each in servers:
                each.thaw()


def peers(pool):
    return {status.peer.removeprefix("ipv4:") for status in pool.connections()}


async def both_serve(pool, *servers):
    """Open all connections, until each server has one: addresses are random."""
    leases = [await pool.acquire() for _ in range(pool.options.capacity)]
    for lease in leases:
        await pool.release(lease)
    while peers(pool) != {server.url for server in servers}:
        enough = pool._counters.connects + pool.options.max_connections
        pool.drain()
        await eventually(lambda enough=enough: pool._counters.connects >= enough)


class Traffic:
    """Callers who check all the time."""

    def __init__(self, config):
        self.config = config
        self.failures = []
        self.answered = [0] * CALLERS
        self.stopped = False

    async def ask(self, caller):
        while not self.stopped:
            try:
                assert await self.config.is_allowed(REQUEST, "app.allowed") is True
            except Exception as error:  # noqa: BLE001  (kept, whatever it is)
                self.failures.append(error)
            self.answered[caller] += 1

    async def flows(self, more):
        """Return when each caller has got *more* answers."""
        enough = [answered + more for answered in self.answered]
        await eventually(
            lambda: all(a >= b for a, b in zip(self.answered, enough, strict=True)), 30
        )


def checks(pool, seconds=SECONDS, **settings):
    def resource(_request):
        return {"seconds": seconds}

    return config_of(pool, resource_context_provider=resource, **settings)


@pytest.mark.parametrize("connections, streams", [(10, 1), (2, 10)])
async def test_no_check_fails_when_one_of_two_servers_freezes(
    server, connections, streams
):
    with server() as one, server() as other:
        options = {
            "min_connections": connections,
            "max_connections": connections,
            "streams_per_connection": streams,
        }
        async with opened(one, other, **options) as pool:
            traffic = Traffic(checks(pool, check_timeout=BUDGET))
            await both_serve(pool, one, other)
            async with anyio.create_task_group() as tasks:
                for caller in range(CALLERS):
                    tasks.start_soon(traffic.ask, caller)
                await traffic.flows(5)
                one.freeze()
                # The checks that met the frozen server are answered by the other.
                await eventually(lambda: one.url not in peers(pool))
                await traffic.flows(20)
                one.thaw()
                await traffic.flows(5)
                traffic.stopped = True
    assert traffic.failures == []


async def test_a_frozen_server_is_found_in_the_second_after_the_silent_one(server):
    with server() as only:
        async with opened(only, min_connections=1, max_connections=1) as pool:
            async with pool.acquire() as conn:
                await conn.decisions(policy_path="app.allowed")
                only.freeze()
                began = anyio.current_time()
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await conn.decisions(policy_path="app.allowed", timeout=30)
            took = anyio.current_time() - began
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "did not answer a PING within 1 s" in caught.value.details()
            # Never earlier; later only if this machine is busy.
            assert FOUND <= took < 15
            # The pool opens a connection again once the server goes on.
            only.thaw()
            assert await checks(pool, check_timeout=10.0).is_allowed(
                REQUEST, "app.allowed"
            )


async def test_a_new_pool_opens_its_connections_to_the_other_server(server):
    with server() as one, server() as other:
        one.freeze()
        async with opened(one, other, min_connections=0, max_connections=20) as pool:
            config = checks(pool, check_timeout=BUDGET)
            async with anyio.create_task_group() as tasks:

                async def ask():
                    assert await config.is_allowed(REQUEST, "app.allowed") is True

                for _ in range(CALLERS):
                    tasks.start_soon(ask)
            assert peers(pool) == {other.url}


@pytest.fixture
def patient(monkeypatch):
    """Wait longer for PINGs: a server on a busy machine may not run for a second."""
    patient = partial(ClientConnection, ping_timeout=3.0)
    monkeypatch.setattr(opening, "ClientConnection", patient)


@pytest.mark.usefixtures("patient")
async def test_a_slow_policy_is_not_cut():
    with AuthorizerProcess() as server:
        async with opened(server, min_connections=0) as pool:
            config = checks(pool, "9", check_timeout=60.0)
            assert await config.is_allowed(REQUEST, "app.allowed")
            assert server.counts["accepted"] == 1
            assert server.counts["calls"]["Is"] == 1


@needs_go
@pytest.mark.usefixtures("patient")
async def test_a_slow_policy_on_grpc_go_is_neither_cut_nor_pinged_too_often():
    with GoProcess(delay="9s") as server:
        async with opened(server, min_connections=0) as pool:
            config = config_of(pool, check_timeout=60.0)
            assert await config.is_allowed(REQUEST, "app.allowed")
        assert server.count("Accepted") == 1
        assert server.count("Calls", "Is") == 1
        assert server.count("Frames", "received PING") == 2
        # At the start, and after both PINGs.
        assert server.count("Frames", "received SETTINGS") >= 3


@needs_go
@pytest.mark.usefixtures("patient")
async def test_a_server_that_freezes_late_in_a_slow_call_is_found():
    # By then both PINGs are used up.
    with GoProcess() as server:
        async with (
            opened(server, min_connections=0) as pool,
            pool.acquire() as conn,
            anyio.create_task_group() as tasks,
        ):
            core = conn.connection._core

            async def freeze_late():
                await eventually(
                    lambda: core._asked_by == "SETTINGS" and core._heard, 60
                )
                server.freeze()

            tasks.start_soon(freeze_late)
            with pytest.raises(grpc.aio.AioRpcError, match="SETTINGS within 3 s"):
                await conn.decisions(policy_path="app.held", timeout=90)


async def test_a_blocked_event_loop_is_not_a_silent_server():
    with AuthorizerProcess() as server:
        async with opened(server, min_connections=1, max_connections=1) as pool:
            config = checks(pool, "3", check_timeout=20.0)
            async with anyio.create_task_group() as tasks:

                async def block():
                    await eventually(lambda: pool.status().streams_in_use)
                    (slot,) = pool._open_pool.state.open
                    core = slot.connection._core
                    await eventually(lambda: core._ping_deadline < math.inf)
                    # Far longer than the server has to answer.
                    time.sleep(3 * PING_TIMEOUT)  # noqa: ASYNC251

                tasks.start_soon(block)
                assert await config.is_allowed(REQUEST, "app.allowed")
            assert server.counts["accepted"] == 1
