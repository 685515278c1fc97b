"""Which transport a pool uses, and that the native one serves a pool."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys

import anyio
import pytest
from aserto.authorizer.v2 import Decision, IsResponse

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    GrpcConnector,
    Identity,
    IdentityType,
    Target,
    TopazConfig,
)
from fastapi_topaz.connector import TRANSPORT_VARIABLE
from fastapi_topaz.testing import FakeConnector
from kit.backends import backends
from kit.configs import Requests
from kit.faultkit.http2 import Http2Server
from kit.h2peer import METHOD, SocketServer


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]

REQUEST = Requests({"type": "http", "headers": []})
TARGET = Target(url="127.0.0.1:1", insecure=True)


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(TRANSPORT_VARIABLE, raising=False)


def connector_of(pool):
    pool.configure(AuthorizerOptions(url="127.0.0.1:1", insecure=True))
    return pool._connector


# -- the choice -----------------------------------------------------------


def test_native_is_the_default(monkeypatch):
    assert GrpcConnector(TARGET).transport == "native"
    assert connector_of(ConnectionPool()).transport == "native"
    monkeypatch.setenv(TRANSPORT_VARIABLE, "")
    assert connector_of(ConnectionPool()).transport == "native"


async def test_the_default_works_on_each_event_loop():
    with Http2Server() as server:
        pool = ConnectionPool(min_connections=0)
        pool.configure(server.options)
        async with pool, pool.acquire() as conn:
            assert await conn.decisions(policy_path="app") == {"allowed": True}


@pytest.mark.parametrize("transport", ["native", "grpcio"])
def test_the_transport_is_what_is_passed(transport, monkeypatch):
    for variable in ("", "grpcio", "native"):
        monkeypatch.setenv(TRANSPORT_VARIABLE, variable)
        connector = GrpcConnector(TARGET, transport=transport)
        assert connector.transport == transport
        assert f"transport={transport}" in repr(connector)
        pool = ConnectionPool(transport=transport)
        assert connector_of(pool).transport == transport


@pytest.mark.parametrize("variable", ["native", "grpcio"])
def test_the_environment_decides_where_nothing_is_passed(variable, monkeypatch):
    monkeypatch.setenv(TRANSPORT_VARIABLE, variable)
    assert GrpcConnector(TARGET).transport == variable
    assert connector_of(ConnectionPool()).transport == variable
    # Read once: a pool does not change its transport when it is opened.
    pool = ConnectionPool()
    monkeypatch.setenv(TRANSPORT_VARIABLE, "")
    assert connector_of(pool).transport == variable


@pytest.mark.parametrize("wrong", ["", "Native", "http2", 1, b"native", ["native"]])
def test_another_transport_is_refused(wrong):
    for make in (ConnectionPool, lambda transport: GrpcConnector(TARGET, transport)):
        with pytest.raises(ValueError, match="transport must be 'native' or"):
            make(transport=wrong)


@pytest.mark.parametrize("wrong", ["Native", "h2", " native"])
def test_another_transport_in_the_environment_is_refused(wrong, monkeypatch):
    monkeypatch.setenv(TRANSPORT_VARIABLE, wrong)
    for make in (ConnectionPool, lambda: GrpcConnector(TARGET)):
        with pytest.raises(ValueError, match=TRANSPORT_VARIABLE):
            make()
    # What does not use it does not mind.
    ConnectionPool(connector=FakeConnector())
    ConnectionPool(transport="native")


def test_a_connector_and_a_transport_exclude_each_other():
    for connector in (FakeConnector(), GrpcConnector(TARGET)):
        with pytest.raises(ValueError, match="exclude each other"):
            ConnectionPool(connector=connector, transport="native")


def test_a_url_for_grpcio_alone_is_refused_where_it_is_configured():
    pool = ConnectionPool()
    options = AuthorizerOptions(url="dns://10.0.0.53/topaz:8282", insecure=True)
    with pytest.raises(ValueError, match="transport='grpcio'"):
        pool.configure(options)
    assert pool.authorizer_options is None


def test_the_native_transport_does_not_load_the_other():
    code = (
        "import fastapi_topaz as f, sys; pool = f.ConnectionPool()\n"
        "pool.configure(f.AuthorizerOptions(insecure=True))\n"
        "print('fastapi_topaz._grpcio' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout == "False\n"


# -- the native transport under a pool ------------------------------------


def pool_to(server, **options):
    options = {"min_connections": 0, "max_connections": 2, **options}
    pool = ConnectionPool(transport="native", **options)
    pool.configure(
        server.options
        if hasattr(server, "options")
        else AuthorizerOptions(url=server.url, insecure=True)
    )
    return pool


@pytest.mark.parametrize("transport", ["native", "grpcio"])
async def test_the_log_names_the_transport(transport, caplog):
    caplog.set_level(logging.INFO, "fastapi_topaz.transport")
    with Http2Server() as server:
        pool = ConnectionPool(transport=transport, min_connections=0)
        pool.configure(server.options)
        async with pool:
            pass
    assert f"the pool: its transport is {transport}" in caplog.messages


async def test_a_check_is_answered():
    with Http2Server() as server:
        pool = pool_to(server)
        async with pool, pool.acquire() as conn:
            assert await conn.decisions(policy_path="app") == {"allowed": True}
            assert conn.connection.peer.startswith("ipv4:127.0.0.1:")


async def test_many_checks_are_answered_and_the_pool_leaves_nothing():
    with Http2Server() as server:
        pool = pool_to(server, max_connections=4, streams_per_connection=10)
        async with pool, anyio.create_task_group() as tasks:

            async def ask():
                for _ in range(20):
                    async with pool.acquire() as conn:
                        await conn.decisions(policy_path="app")

            for _ in range(40):
                tasks.start_soon(ask)
        with anyio.fail_after(5):
            while server.open:  # noqa: ASYNC110
                await anyio.sleep(0.01)


async def test_goaway_makes_the_pool_replace_the_connection():
    with Http2Server() as server:
        pool = pool_to(server, max_connections=1)
        async with pool:
            for _ in range(5):
                async with pool.acquire() as conn:
                    await conn.decisions(policy_path="app")
                # In a thread: it waits until the client has noticed.
                await anyio.to_thread.run_sync(server.goaway)
            async with pool.acquire() as conn:
                await conn.decisions(policy_path="app")


async def test_the_stream_limit_of_the_server_is_kept():
    with Http2Server() as server:
        server.set_max_concurrent_streams(2)
        pool = pool_to(server, max_connections=1, streams_per_connection=50)
        async with pool:
            held = [await pool.acquire() for _ in range(2)]
            with pytest.raises(TimeoutError):
                await pool.acquire(timeout=0.05)
            for lease in held:
                await pool.release(lease)
            async with anyio.create_task_group() as tasks:

                async def ask():
                    async with pool.acquire() as conn:
                        await conn.decisions(policy_path="app")

                for _ in range(50):
                    tasks.start_soon(ask)
        assert server.calls["Is"] == 50


async def test_an_unprocessed_check_is_asked_again():
    with Http2Server() as server:
        pool = pool_to(server, max_connections=1)
        config = TopazConfig(
            authorizer_options=server.options,
            policy_path_root="app",
            identity_provider=lambda _request: Identity(IdentityType.NONE),
            connection_pool=pool,
        )
        async with pool:
            assert await config.is_allowed(REQUEST, "app")
            server.refuse_streams(1)
            assert await config.is_allowed(REQUEST, "app")
        assert server.calls["Is"] == 3
        assert server.resets == 1


async def test_a_lost_server_is_seen_without_a_call():
    with SocketServer() as server:
        target = Target(url=server.url, insecure=True)
        connector = GrpcConnector(target, transport="native")
        pool = ConnectionPool(connector=connector, min_connections=1, max_connections=1)
        async with pool:
            async with pool.acquire() as conn:
                assert await conn.call(METHOD, b"x", timeout=5) == b"x"
            server.servers[0].sock.shutdown(socket.SHUT_RDWR)
            with anyio.fail_after(10):
                while server.accepted < 2:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            async with pool.acquire() as conn:
                assert await conn.call(METHOD, b"y", timeout=5) == b"y"


ALLOWED = IsResponse(decisions=[Decision(decision="allowed", **{"is": True})])


class Leaving:
    """Answers, and says GOAWAY after every few calls of a connection."""

    def __init__(self, calls):
        self.calls = calls
        self.left = 0

    def __call__(self, server, number, _data):
        if server.left:
            return  # above the last stream: it is not processed
        path = dict(server.headers[number])[":path"]
        answer = ALLOWED.SerializeToString() if path.endswith("/Is") else b""
        server.answer(number, answer)
        if number > 2 * self.calls:
            self.left += 1
            server.left = True
            goaway = number.to_bytes(4) + bytes(4)
            server.sock.sendall(
                server.output() + bytes.fromhex("000008070000000000") + goaway
            )
            server.sock.shutdown(socket.SHUT_WR)


@pytest.mark.costly
@pytest.mark.parametrize("streams", [1, 20])
async def test_no_check_is_lost_when_connections_end_all_the_time(streams):
    leaving = Leaving(25)
    with SocketServer(leaving) as server:
        options = AuthorizerOptions(url=server.url, insecure=True)
        pool = pool_to(server, max_connections=5, streams_per_connection=streams)
        config = TopazConfig(
            authorizer_options=options,
            policy_path_root="app",
            identity_provider=lambda _request: Identity(IdentityType.NONE),
            connection_pool=pool,
        )
        async with pool, anyio.create_task_group() as tasks:

            async def ask():
                for _ in range(25):
                    assert await config.is_allowed(REQUEST, "app") is True

            for _ in range(20):
                tasks.start_soon(ask)
    assert leaving.left >= 10


FORKS = """
import os, sys, threading
import anyio
from fastapi_topaz import AuthorizerOptions, ConnectionPool

backend, url = sys.argv[1:]

async def ask():
    pool = ConnectionPool(transport="native", min_connections=0)
    pool.configure(AuthorizerOptions(url=url, insecure=True))
    async with pool, pool.acquire() as conn:
        assert await conn.decisions(policy_path="app", timeout=5) == {"allowed": True}

async def fork_and_ask():
    pool = ConnectionPool(transport="native", min_connections=0)
    pool.configure(AuthorizerOptions(url=url, insecure=True))
    async with pool, pool.acquire() as conn:
        assert await conn.decisions(policy_path="app", timeout=5) == {"allowed": True}
        child = os.fork()
        if not child:
            # In a thread, because the loop of the parent runs in this one.
            done = []
            run = lambda: done.append(anyio.run(ask, backend=backend))
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            os._exit(0 if done else 1)
        else:
            _, status = os.waitpid(child, 0)
            assert status == 0, status
            # The connection of the parent was not touched.
            answer = await conn.decisions(policy_path="app", timeout=5)
            assert answer == {"allowed": True}

anyio.run(fork_and_ask, backend=backend)
"""


@backends
def test_a_process_may_fork_while_a_pool_is_open(backend, run_program):
    with Http2Server() as server:
        ended = run_program(FORKS, backend, server.options.url, strict=False)
    assert (ended.code, ended.err) == (0, "")


FORKING = """
import os, sys
import anyio
from fastapi_topaz import AuthorizerOptions, ConnectionPool

async def use(url):
    pool = ConnectionPool(transport="native", min_connections=2)
    pool.configure(AuthorizerOptions(url=url, insecure=True))
    async with pool:
        async with pool.acquire() as conn:
            await conn.info()
        child = os.fork()
        if not child:
            raise SystemExit  # the child closes all that it can
        os.waitpid(child, 0)
        for _ in range(10):
            async with pool.acquire() as conn:
                await conn.info()
        print("the parent goes on", dict(pool._counters.closes))

anyio.run(use, sys.argv[1])
"""


def test_a_forked_process_that_ends_leaves_the_connections_of_its_parent(run_program):
    # Only on asyncio: on trio, the end of the child stops the loop of the parent.
    with Http2Server() as server:
        ended = run_program(FORKING, server.options.url, strict=False)
    assert (ended.code, ended.out) == (0, "the parent goes on {}\n"), ended.err
