"""Test that no operation of a connection outlives its event loop."""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket

import anyio
import pytest

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectFailed,
    ConnectionLost,
    ConnectionPool,
    PoolError,
)
from fastapi_topaz.connector import GrpcConnector
from kit.backends import backends
from kit.channels import connected


@pytest.fixture
def ports(embedded_authorizer):
    """
    Servers that answer, refuse, or accept without an answer, in plaintext and TLS.
    """
    with socket.socket() as silent, socket.socket() as refusing:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1000)
        refusing.bind(("127.0.0.1", 0))
        urls = ["{}:{}".format(*one.getsockname()) for one in (silent, refusing)]
        yield [
            embedded_authorizer.options,
            *(AuthorizerOptions(url=url, insecure=True) for url in urls),
            AuthorizerOptions(url=urls[0]),
        ]


async def cancelled_connect(options, seconds):
    connection = None
    with anyio.move_on_after(seconds), contextlib.suppress(ConnectFailed):
        connection = await GrpcConnector(options.target).connect(1)
    if connection is not None:
        await connection.close(0)


async def connect_out_of_time(options, seconds):
    with contextlib.suppress(ConnectFailed):
        connection = await GrpcConnector(options.target).connect(seconds)
        await connection.close(0)


async def cancelled_calls(options, seconds):
    with anyio.move_on_after(1), contextlib.suppress(ConnectFailed):
        async with (
            connected(options, 0.02) as connection,
            anyio.create_task_group() as tasks,
        ):
            for _ in range(5):
                tasks.start_soon(connection.probe, 5)
            await anyio.sleep(seconds)
            tasks.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def used_pool(options):
    pool = ConnectionPool(min_connections=3, max_connections=3, eager_init=False)
    pool.configure(options)

    async def ask():
        with contextlib.suppress(PoolError, ConnectionLost):
            async with pool.acquire() as connection:
                await connection.info()

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(ask)
        yield pool
        tasks.cancel_scope.cancel()


async def closed_pool(options, seconds):
    async with used_pool(options) as pool:
        await anyio.sleep(seconds)
        await pool.close(0)


async def pool_left_open(options, seconds):
    async with used_pool(options):
        await anyio.sleep(seconds)


@pytest.mark.filterwarnings("ignore:the pool was not closed:ResourceWarning")
# anyio logs this for a task that asyncio.run cancels before its first step.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize(
    "work",
    [
        cancelled_connect,
        connect_out_of_time,
        cancelled_calls,
        closed_pool,
        pool_left_open,
    ],
)
# gRPC reports the end of cancelled operations to loops that are closed.
@pytest.mark.native
@backends
def test_nothing_is_reported_to_a_closed_loop(caplog, ports, backend, work):
    # Time limits below and above the total duration, in steps of 0.2 ms.
    for step, options in zip(range(30), itertools.cycle(ports), strict=False):
        anyio.run(work, options, 0.0002 * (1 + step), backend=backend)
    # A loop delivers pending events of earlier loops before this ends.
    anyio.run(connect_out_of_time, ports[0], 5, backend=backend)
    logged = [record for record in caplog.records if record.name == "asyncio"]
    wrong = [record for record in logged if record.levelno >= logging.ERROR]
    assert [str(record.exc_info) for record in wrong] == []
