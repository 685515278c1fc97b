"""gRPC connections and channels without a pool."""

from __future__ import annotations

import contextlib
import threading

import anyio
import grpc
import grpc.aio
import pytest

from fastapi_topaz import ConnectFailed
from fastapi_topaz.connector import GrpcConnector


INFO = "/aserto.authorizer.v2.Authorizer/Info"


# Longer than any test: a call that gets an answer was not cancelled.
NEVER = 60.0


async def ask(connection, method=INFO, *, timeout=NEVER):
    """Make one call, by default one that any authorizer answers."""
    return await connection.call(method, b"", timeout=timeout, metadata=())


@contextlib.asynccontextmanager
async def hosted(connection):
    """Yield *connection* while its task runs, if it needs one, and close it."""
    failure = None
    async with anyio.create_task_group() as tasks:
        if hasattr(connection, "run"):
            tasks.start_soon(connection.run)
        try:
            yield connection
        except Exception as error:  # noqa: BLE001  (raised outside of the group)
            failure = error
        finally:
            with anyio.CancelScope(shield=True):
                await connection.close(0)
    if failure is not None:
        raise failure


@contextlib.asynccontextmanager
async def bare(authorizer):
    """Yield a callable that a program without this package would use."""
    async with grpc.aio.insecure_channel(authorizer.url) as channel:
        await channel.channel_ready()
        method = channel.unary_unary(INFO)

        async def call():
            return await method(b"", timeout=NEVER)

        yield call


@contextlib.asynccontextmanager
async def connected(options, timeout=10.0):
    """Connect to the server of *options*, and close the connection at the end."""
    async with hosted(await GrpcConnector(options.target).connect(timeout)) as link:
        yield link


# Seconds that a busy machine may take on top of a timeout.
PATIENCE = 10.0


def threads():
    """Return all threads except the ones that trio waits in as a guest, as in tests."""
    every = threading.enumerate()
    return {thread for thread in every if not thread.name.startswith("Trio thread")}


async def refused_by(options, timeout=5.0):
    """Return why a connect failed, which must not take much longer than *timeout*."""
    with anyio.fail_after(timeout + PATIENCE), pytest.raises(ConnectFailed) as caught:
        await GrpcConnector(options.target).connect(timeout)
    assert options.url in str(caught.value)
    return caught.value
