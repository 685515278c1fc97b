"""`is_ready()` over real sockets, with servers that answer and servers that do not."""

from __future__ import annotations

import asyncio
import threading

import anyio
import grpc
import pytest
from anyio.to_thread import run_sync

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
)
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.configs import POLICY, config_of
from kit.faultkit.unavailable import headers, http, trailers
from kit.waiting import eventually


pytestmark = pytest.mark.real_clock

PATIENCE = 20.0


def config_to(options, **pool_options):
    return config_of(ConnectionPool(**{"min_connections": 0, **pool_options}), options)


@pytest.fixture
def authorizer(embedded_authorizer):
    embedded_authorizer.policies = lambda check: True
    return embedded_authorizer


def age(config):
    """
    Make each answer old enough that the pool asks again, without waiting that long.
    """
    for slot in config.connection_pool._open_pool.state.open:
        slot.proven_at -= 1.0


async def recovers(config):
    """Check until the requests sent before the server came back have ended too."""
    with anyio.fail_after(PATIENCE):
        while not await config.is_ready(PATIENCE):
            await anyio.lowlevel.checkpoint()


async def test_a_server_that_answers_is_ready_and_is_probed_once_a_second(authorizer):
    config = config_to(authorizer.options)
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
        assert authorizer.calls["Info"] == 2, "the check counts as an answer too"
    finally:
        await pool.close()
    assert await config.is_ready() is False
    assert not pool.status().ready
    await eventually(lambda: authorizer.connections_open == 0)


async def test_100_concurrent_readiness_checks_share_one_connection_and_one_call(
    authorizer,
):
    config, answers = config_to(authorizer.options), []

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
async def test_a_dead_server_is_not_ready_until_it_is_back(authorizer, warm):
    config = config_to(authorizer.options)
    async with config.connection_pool as pool:
        if warm:
            assert await config.is_ready(PATIENCE)
        await run_sync(authorizer.stop)
        if warm:
            # Until the pool sees that the sockets are closed, the last answer is
            # recent.
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


async def test_a_frozen_server_is_not_ready_and_is_ready_again_once_it_resumes(
    authorizer,
):
    config = config_to(authorizer.options)
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


async def test_a_server_that_accepts_and_stays_silent_is_not_ready(authorizer):
    authorizer.freeze()
    config = config_to(authorizer.options)
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


@pytest.mark.parametrize(
    "warm", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["new", "used"]
)
@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_without_a_grpc_status_is_not_ready(
    lenient_http2_server, name, warm
):
    config = config_to(lenient_http2_server.options)
    async with config.connection_pool as pool:
        if warm:
            assert await config.is_ready(PATIENCE)
            age(config)
        lenient_http2_server._script(ANSWERS[name], None)
        for _ in range(2):
            with anyio.fail_after(PATIENCE):
                assert await config.is_ready() is False
            assert not pool.status().ready
        lenient_http2_server._script(lambda call: call.reply(), None)
        await recovers(config)
        assert pool.status().ready


@pytest.mark.parametrize("code", [2, 7])
async def test_a_reset_stream_does_not_count_as_an_answer(lenient_http2_server, code):
    config = config_to(lenient_http2_server.options)
    async with config.connection_pool as pool:
        assert await config.is_ready(PATIENCE)
        lenient_http2_server._script(lambda call: call.reset(code), None)
        async with pool.acquire() as conn:
            with pytest.raises(grpc.aio.AioRpcError):
                await conn.decisions(policy_path=POLICY, timeout=PATIENCE)
        assert not pool.status().ready
        with anyio.fail_after(PATIENCE):
            assert await config.is_ready() is False


@pytest.mark.parametrize("code", [7, 16, 13, 5])
async def test_an_error_status_of_the_authorizer_counts_as_an_answer(
    lenient_http2_server, code
):
    lenient_http2_server._script(lambda call: call.fail(code, "no"), None)
    config = config_to(lenient_http2_server.options)
    async with config.connection_pool:
        assert await config.is_ready(PATIENCE)
        age(config)
        assert await config.is_ready(PATIENCE)


async def test_a_server_without_the_authorizer_service_is_not_ready(
    lenient_http2_server,
):
    lenient_http2_server._script(lambda call: call.fail(12, "unknown service"), None)
    config = config_to(lenient_http2_server.options)
    async with config.connection_pool:
        assert await config.is_ready(PATIENCE) is False


async def test_the_readiness_check_of_a_saturated_pool_needs_no_lease(authorizer):
    config = config_to(authorizer.options, max_connections=1)
    async with config.connection_pool as pool, pool.acquire():
        age(config)
        assert await config.is_ready(PATIENCE)
        assert authorizer.calls["Info"] == 2
        authorizer.freeze()
        age(config)
        with anyio.fail_after(PATIENCE):
            assert await config.is_ready(0.2) is False
        authorizer.thaw()


async def test_a_cancelled_readiness_check_leaks_nothing(authorizer):
    config = config_to(authorizer.options)
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


def test_a_readiness_check_in_a_task_cancelled_by_asyncio_is_cancelled():
    """Cancel with `Task.cancel()`, which is not visible to anyio's scopes."""

    async def main(authorizer):
        config = config_to(authorizer.options)
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


async def test_on_another_event_loop_is_ready_is_false_and_the_log_says_why(
    authorizer, caplog
):
    config, answers = config_to(authorizer.options), []
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


async def test_with_a_missing_certificate_file_the_pool_is_not_ready(
    tmp_path, authorizer
):
    path = str(tmp_path / "none.pem")
    config = config_to(AuthorizerOptions(url=authorizer.url, cert_file_path=path))
    try:
        with anyio.fail_after(PATIENCE):
            assert await config.is_ready(PATIENCE) is False
        assert not config.connection_pool.status().ready
    finally:
        await config.connection_pool.close()
