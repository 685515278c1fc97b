"""What `is_ready()` says of servers that answer, and that do not: real sockets."""

from __future__ import annotations

import asyncio
import threading

import anyio
import grpc
import pytest
from anyio.to_thread import run_sync
from faultkit.http2 import Http2Server
from test_refusals_grpc import headers, http, trailers
from waiting import eventually

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
)
from fastapi_topaz.testing import EmbeddedAuthorizer


pytestmark = pytest.mark.real_clock

PATIENCE = 20.0
POLICY = "app.GET.documents"


def make(options, **pool_options):
    return TopazConfig(
        authorizer_options=options,
        policy_path_root="app",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
        connection_pool=ConnectionPool(**{"min_connections": 0, **pool_options}),
    )


@pytest.fixture
def authorizer(embedded_authorizer):
    embedded_authorizer.policies = lambda check: True
    return embedded_authorizer


@pytest.fixture
def server():
    with Http2Server() as running:
        yield running


def age(config):
    """Make each answer so old that it is asked for again, without waiting so long."""
    for slot in config.connection_pool._open_pool.state.open:
        slot.proven_at -= 1.0


async def recovers(config):
    """Ask until what was under way before the server came back has ended, too."""
    with anyio.fail_after(PATIENCE):
        while not await config.is_ready(PATIENCE):
            await anyio.lowlevel.checkpoint()


async def test_a_server_that_answers_is_ready_and_is_asked_once_a_second(authorizer):
    config = make(authorizer.options)
    pool = config.connection_pool
    assert not pool.status().ready
    try:
        assert await config.is_ready(PATIENCE) is True
        assert pool.status().ready
        assert authorizer.calls["Info"] == 1
        assert await config.is_ready()
        assert authorizer.calls["Info"] == 1
        age(config)
        assert await config.is_ready(PATIENCE)
        assert authorizer.calls["Info"] == 2
        age(config)
        async with pool.acquire() as conn:
            await conn.decisions(policy_path=POLICY)
        assert await config.is_ready()
        assert authorizer.calls["Info"] == 2, "the check is an answer as well"
    finally:
        await pool.close()
    assert await config.is_ready() is False
    assert not pool.status().ready
    await eventually(lambda: authorizer.connections_open == 0)


async def test_a_hundred_at_once_share_a_connection_and_a_call(authorizer):
    config, answers = make(authorizer.options), []

    async def ask():
        answers.append(await config.is_ready(PATIENCE))

    async with config.connection_pool:
        for calls in (1, 2):
            async with anyio.create_task_group() as tasks:
                for _ in range(100):
                    tasks.start_soon(ask)
            assert answers == [True] * 100 * calls
            assert authorizer.calls["Info"] == calls
            assert authorizer.connections_accepted == 1
            age(config)


@pytest.mark.parametrize("warm", [False, True])
async def test_a_server_that_is_down_is_not_ready_until_it_is_back(authorizer, warm):
    config = make(authorizer.options)
    async with config.connection_pool as pool:
        if warm:
            assert await config.is_ready(PATIENCE)
        await run_sync(authorizer.stop)
        if warm:
            # Until the sockets are seen to be closed, the last answer is recent.
            await eventually(
                lambda: all(e.is_gone() for e in pool._open_pool.state.open)
            )
        for _ in range(3):
            with anyio.fail_after(PATIENCE):
                assert await config.is_ready() is False
            assert not pool.status().ready
        await run_sync(authorizer.start)
        await recovers(config)
        assert pool.status().ready


async def test_a_frozen_server_is_not_ready_in_time_and_ready_once_it_thaws(authorizer):
    config = make(authorizer.options)
    async with config.connection_pool as pool:
        assert await config.is_ready(PATIENCE)
        authorizer.freeze()
        age(config)
        with anyio.fail_after(PATIENCE):
            assert await config.is_ready(0.2) is False
        assert not pool.status().ready
        assert pool.status().streams_in_use == pool.status().waiting == 0
        authorizer.thaw()
        await recovers(config)


async def test_a_server_that_accepts_and_says_nothing_is_not_ready(authorizer):
    authorizer.freeze()
    config = make(authorizer.options)
    async with config.connection_pool as pool:
        with anyio.fail_after(PATIENCE):
            assert await config.is_ready(0.2) is False
        assert not pool.status().ready
        authorizer.thaw()
        await recovers(config)


ANSWERS = {
    "HTTP 503": http(503),
    "HTTP 503 with a page": http(503, body=b"<html>503</html>"),
    "HTTP 200 with a page": http(200, body=b"<html>moved</html>"),
    "HTTP 404": http(404),
    "HTTP 200 without a status": http(200, "application/grpc"),
    "UNAVAILABLE in headers": headers("no healthy upstream"),
    "UNAVAILABLE in trailers": trailers("no healthy upstream"),
    "a reset stream": lambda call: call.reset(2),
    "a refused stream": lambda call: call.reset(7),
    "half an answer": lambda call: call.truncate(),
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_without_a_status_of_the_authorizer_is_not_ready(
    server, name, warm
):
    config = make(server.options)
    async with config.connection_pool as pool:
        if warm:
            assert await config.is_ready(PATIENCE)
            age(config)
        server._script(ANSWERS[name], None)
        for _ in range(2):
            with anyio.fail_after(PATIENCE):
                assert await config.is_ready() is False
            assert not pool.status().ready
        server._script(lambda call: call.reply(), None)
        await recovers(config)
        assert pool.status().ready


@pytest.mark.parametrize("code", [2, 7])
async def test_a_call_whose_stream_is_reset_is_no_answer(server, code):
    config = make(server.options)
    async with config.connection_pool as pool:
        assert await config.is_ready(PATIENCE)
        server._script(lambda call: call.reset(code), None)
        async with pool.acquire() as conn:
            with pytest.raises(grpc.aio.AioRpcError):
                await conn.decisions(policy_path=POLICY, timeout=PATIENCE)
        assert not pool.status().ready
        with anyio.fail_after(PATIENCE):
            assert await config.is_ready() is False


@pytest.mark.parametrize("code", [7, 16, 13, 5])
async def test_an_error_status_of_the_authorizer_is_an_answer(server, code):
    server._script(lambda call: call.fail(code, "no"), None)
    config = make(server.options)
    async with config.connection_pool:
        assert await config.is_ready(PATIENCE)
        age(config)
        assert await config.is_ready(PATIENCE)


async def test_a_server_that_is_no_authorizer_is_not_ready(server):
    server._script(lambda call: call.fail(12, "unknown service"), None)
    config = make(server.options)
    async with config.connection_pool:
        assert await config.is_ready(PATIENCE) is False


async def test_a_saturated_pool_is_asked_without_a_lease(authorizer):
    config = make(authorizer.options, max_connections=1)
    async with config.connection_pool as pool, pool.acquire():
        age(config)
        assert await config.is_ready(PATIENCE)
        assert authorizer.calls["Info"] == 2
        authorizer.freeze()
        age(config)
        with anyio.fail_after(PATIENCE):
            assert await config.is_ready(0.2) is False
        authorizer.thaw()


async def test_a_cancelled_call_leaves_nothing(authorizer):
    config = make(authorizer.options)
    async with config.connection_pool as pool:
        assert await config.is_ready(PATIENCE)
        authorizer.freeze()
        age(config)
        with anyio.move_on_after(0.1) as scope:
            await config.is_ready(PATIENCE)
        assert scope.cancelled_caught
        assert pool.status().streams_in_use == pool.status().waiting == 0
        authorizer.thaw()
        await recovers(config)
    await eventually(lambda: authorizer.connections_open == 0)


def test_a_task_that_asyncio_cancels_is_cancelled():
    """By `Task.cancel()`, which no scope of anyio knows."""

    async def main(authorizer):
        config = make(authorizer.options)
        async with config.connection_pool:
            assert await config.is_ready(PATIENCE)
            authorizer.freeze()
            age(config)
            task = asyncio.create_task(config.is_ready(PATIENCE))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            authorizer.thaw()
            await recovers(config)

    with EmbeddedAuthorizer() as authorizer:
        asyncio.run(main(authorizer))


async def test_on_another_event_loop_it_is_not_ready_and_the_log_says_why(
    authorizer, caplog
):
    config, answers = make(authorizer.options), []
    async with config.connection_pool as pool:
        assert await config.is_ready(PATIENCE)
        other = threading.Thread(
            target=lambda: answers.append(asyncio.run(config.is_ready()))
        )
        other.start()
        await run_sync(other.join)
        assert answers == [False]
        assert pool.status().ready
    assert any(
        record.levelname == "ERROR" and "is used on" in record.getMessage()
        for record in caplog.records
    )


async def test_a_certificate_that_is_missing_is_not_ready(tmp_path, authorizer):
    path = str(tmp_path / "none.pem")
    config = make(AuthorizerOptions(url=authorizer.url, cert_file_path=path))
    try:
        with anyio.fail_after(PATIENCE):
            assert await config.is_ready(PATIENCE) is False
        assert not config.connection_pool.status().ready
    finally:
        await config.connection_pool.close()
