"""Test that cancelled calls leak nothing."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap

import pytest

from kit.channels import NEVER


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]


LEAK = """
import asyncio, functools, gc, json, sys
import anyio, psutil
import grpc, grpc.aio
from fastapi_topaz import AuthorizerOptions
from fastapi_topaz._authorizer.messages import is_request
from fastapi_topaz.connector import GrpcConnector

kind, backend, url, rounds = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
IS = "/aserto.authorizer.v2.Authorizer/Is"
REQUEST, BEGUN = (
    is_request(path, ("allowed",), None, None, None, None)
    for path in ("app", "begun")
)
AT_ONCE = 50

async def ours(connection, request):
    await connection.call(
        IS, request,
        timeout=60, metadata=())

async def scoped(call, begun):
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            for _ in range(AT_ONCE):
                tasks.start_soon(call)
            await begun()
            scope.cancel()

async def plainly(call, begun):
    tasks = [asyncio.ensure_future(call()) for _ in range(AT_ONCE)]
    await begun()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)

async def grown(cancel, call, begun):
    async def many(count):
        for _ in range(count // AT_ONCE):
            await cancel(call, begun)
        gc.collect()
        # What was cancelled last ends a little later.
        await anyio.sleep(0.2)
        return psutil.Process().memory_info().rss

    before = await many(2000)
    return await many(rounds) - before

async def main():
    if kind == "bare":
        async with grpc.aio.insecure_channel(url) as channel:
            await channel.channel_ready()
            method = channel.unary_unary(IS)
            async def call():
                await method(REQUEST, timeout=60)
            async def begun():
                await method(BEGUN, timeout=60)
            return await grown(plainly, call, begun)
    options = AuthorizerOptions(url=url, insecure=True)
    connection = await GrpcConnector(options.target).connect(10)
    async with anyio.create_task_group() as tasks:
        if hasattr(connection, "run"):
            tasks.start_soon(connection.run)
        result = await grown(
            scoped,
            functools.partial(ours, connection, REQUEST),
            functools.partial(ours, connection, BEGUN))
        await connection.close(0)
    return result

print(json.dumps(anyio.run(main, backend=backend)))
"""


class Undecided:
    """Policies: one never answers, one answers when 50 more calls have begun."""

    def __init__(self):
        self.begun = 0
        self.policies = {"app": self.app, "begun": self.all_begun}
        self._full = asyncio.Event()

    async def app(self, check):
        self.begun += 1
        if self.begun % 50 == 0:
            self._full.set()
        await asyncio.sleep(NEVER)

    async def all_begun(self, check):
        await self._full.wait()
        self._full.clear()
        return True


def growth(authorizer, kind, backend, rounds):
    """Return the bytes by which a process grows while it cancels *rounds* calls."""
    undecided = Undecided()
    authorizer.policies = undecided.policies
    arguments = [kind, backend, authorizer.url, str(rounds)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LEAK), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    # The server had begun all of the calls, and saw them cancelled.
    assert undecided.begun == rounds + 2000
    assert authorizer.cancelled == undecided.begun
    return json.loads(done.stdout)


# Bytes for each call. A call of bare gRPC leaves about 900 bytes, a call of this
# package 5. The memory of a process can grow by some hundred thousand bytes for other
# reasons.
LEAKED = 500


@pytest.mark.costly
@pytest.mark.native
@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize(
    "rounds", [2_000, pytest.param(20_000, marks=pytest.mark.slow)]
)
def test_cancelled_calls_leak_no_memory(authorizer, backend, rounds):
    assert growth(authorizer, "ours", backend, rounds) < LEAKED * rounds


# `docs/limits.md` warns of it. If this fails, gRPC was repaired.
@pytest.mark.grpcio
@pytest.mark.slow
def test_cancelled_calls_of_bare_grpc_leak(authorizer):
    assert growth(authorizer, "bare", "asyncio", 2_000) > LEAKED * 2_000
