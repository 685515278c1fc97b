"""Test how calls on a connection end."""

from __future__ import annotations

import asyncio
import contextlib
import gc

import anyio
import grpc
import grpc.aio
import pytest
import trio

from fastapi_topaz import ConnectionLost, ConnectionPool
from fastapi_topaz._authorizer import messages as _messages
from kit.channels import connected
from kit.waiting import eventually


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]

QUESTION = _messages.is_request("app.GET.x", ("allowed",), None, None, None, None)


@pytest.fixture
def authorizer(embedded_authorizer):
    embedded_authorizer.policies = {"app.GET.x": True}
    return embedded_authorizer


async def ask(connection, *, timeout=10.0, metadata=()):
    return await connection.call(
        _messages.IS, QUESTION, timeout=timeout, metadata=metadata
    )


async def test_a_call_returns_the_bytes_of_the_answer(authorizer):
    async with connected(authorizer.options) as connection:
        answers = []
        async with anyio.create_task_group() as callers:

            async def caller():
                answers.append(await ask(connection, timeout=None))

            for _ in range(30):
                callers.start_soon(caller)
        assert len(answers) == 30
        assert all(isinstance(answer, bytes) and answer for answer in answers)


async def test_an_error_has_the_status_and_details_of_the_server(authorizer):
    authorizer.fail("RESOURCE_EXHAUSTED", "too many of them", times=1)
    async with connected(authorizer.options) as connection:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(connection)
        error = caught.value
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "too many of them"
        assert isinstance(error.trailing_metadata(), grpc.aio.Metadata)
        assert isinstance(error.initial_metadata(), grpc.aio.Metadata)
        assert "too many of them" in (error.debug_error_string() or "")
        assert await ask(connection)


async def test_a_deadline_ends_the_call_and_not_the_connection(authorizer):
    async with connected(authorizer.options) as connection:
        authorizer.delay = 5.0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(connection, timeout=0.1)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        authorizer.delay = 0.0
        assert await ask(connection)


async def test_a_cancelled_call_is_cancelled_on_the_server_too(authorizer):
    authorizer.delay = 60.0
    async with connected(authorizer.options) as connection:
        async with anyio.create_task_group() as callers:

            async def caller():
                with anyio.CancelScope() as scope:
                    scopes.append(scope)
                    await ask(connection, timeout=60)

            scopes = []
            for _ in range(5):
                callers.start_soon(caller)
            await eventually(lambda: authorizer.streams == 5)
            for scope in scopes:
                scope.cancel()
        assert all(scope.cancelled_caught for scope in scopes)
        await eventually(lambda: authorizer.streams == 0)
        authorizer.delay = 0.0
        assert await ask(connection)


async def test_closing_ends_calls_with_connection_lost_at_once(authorizer):
    authorizer.delay = 60.0
    lost = []
    async with connected(authorizer.options) as connection:
        async with anyio.create_task_group() as callers:

            async def caller():
                try:
                    await ask(connection, timeout=60)
                except ConnectionLost:
                    lost.append(True)

            for _ in range(5):
                callers.start_soon(caller)
            await eventually(lambda: authorizer.streams == 5)
            await connection.close(0)
        with pytest.raises(ConnectionLost):
            await ask(connection)
    assert lost == [True] * 5


async def test_a_close_with_grace_lets_calls_end(authorizer):
    authorizer.delay = 0.3
    answers = []
    async with (
        connected(authorizer.options) as connection,
        anyio.create_task_group() as tasks,
    ):

        async def caller():
            answers.append(await ask(connection))

        for _ in range(5):
            tasks.start_soon(caller)
        await eventually(lambda: authorizer.streams == 5)
        await connection.close(30)
    assert len(answers) == 5
    assert all(answers)


async def test_metadata_of_a_call_is_sent_in_any_form(authorizer):
    async with connected(authorizer.options) as connection:
        for metadata in [(("a-b", "c"),), [("a-b", "c"), ("x-bin", b"\0\xff")]]:
            assert await ask(connection, metadata=metadata)
        assert await ask(connection, metadata=(["a-b", "c"],))


@pytest.mark.costly
async def test_an_error_is_freed_with_its_last_reference(authorizer):
    """The error forms no cycle with its own frames, which hold the data of callers."""

    def errors():
        return sum(isinstance(x, grpc.aio.AioRpcError) for x in gc.get_objects())

    authorizer.fail("NOT_FOUND")
    async with connected(authorizer.options) as connection:
        gc.collect()
        gc.disable()
        before = errors()  # other tests may keep theirs
        try:
            for _ in range(20):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await ask(connection)
            assert errors() <= before + 1
        finally:
            gc.enable()


@pytest.mark.native
def test_trio_as_a_guest_of_asyncio_makes_calls_too(authorizer):
    """Two loops share a thread, and the pool runs in the inner loop."""

    async def guest():
        pool = ConnectionPool()
        pool.configure(authorizer.options)
        async with pool:
            for _ in range(20):
                async with pool.acquire() as conn:
                    await conn.info()
        return "asked"

    async def host():
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        trio.lowlevel.start_guest_run(
            guest,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=done.set_result,
        )
        return (await done).unwrap()

    assert asyncio.run(host()) == "asked"
