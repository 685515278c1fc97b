"""
Measures when checks are answered again after an outage: the pool, and one channel.

    .venv/bin/python benchmarks/recovery.py [--outages 10 30 60 120] [--rounds 5]
        [--callers 5] [--quick] [--save]

Each contestant has an embedded authorizer of its own. It is stopped for some seconds,
and started again. Callers ask all the time. The result is the time from the restart to
the first answer.

The contestants are the pool with its defaults, and one shared channel of `grpc.aio`
with its defaults, as fastapi-topaz 2.0.0 has it. All measurements run at the same
time, because they mostly wait.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import time

import anyio
import grpc.aio
from _peers import OURS
from _rounds import parsed, parser, save, versions
from anyio.to_thread import run_sync
from aserto.authorizer.v2 import AuthorizerStub, IsRequest
from aserto.authorizer.v2.api import IdentityContext, PolicyContext

from fastapi_topaz import ConnectionPool, TopazError
from fastapi_topaz.testing import EmbeddedAuthorizer


POLICY = "myapp.GET.documents"
CHANNEL = "one shared channel"
REQUEST = IsRequest(
    policy_context=PolicyContext(path=POLICY, decisions=["allowed"]),
    identity_context=IdentityContext(type=1),
)
TIMEOUT = 5.0
"""Seconds for one check."""
PAUSE = 0.05
"""Seconds between two checks of a caller."""


class PoolAsker:
    """Asks through a pool."""

    def __init__(self, authorizer):
        self._pool = ConnectionPool()
        self._pool.configure(authorizer.options)

    async def check(self):
        async with self._pool.acquire() as conn:
            await conn.decisions(policy_path=POLICY, timeout=TIMEOUT)

    async def close(self):
        await self._pool.close()


class ChannelAsker:
    """Asks through one channel, which all callers share."""

    def __init__(self, authorizer):
        # Otherwise all channels of a process to one address share their connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(authorizer.url, options)
        self._stub = AuthorizerStub(self._channel)

    async def check(self):
        await self._stub.Is(REQUEST, timeout=TIMEOUT)

    async def close(self):
        await self._channel.close()


ASKERS = {OURS: PoolAsker, CHANNEL: ChannelAsker}


class Callers:
    """Callers that repeat a check until they are stopped."""

    def __init__(self, asker):
        self.asker = asker
        self.answered = anyio.Event()
        self.stopped = False

    async def ask(self):
        while not self.stopped:
            try:
                await self.asker.check()
            except (TopazError, grpc.aio.AioRpcError):
                pass
            else:
                self.answered.set()
            await anyio.sleep(PAUSE)


async def measured(kind, down, count):
    """Return the seconds from a restart to the first answer."""
    with EmbeddedAuthorizer({POLICY: True}) as authorizer:
        callers = Callers(kind(authorizer))
        async with anyio.create_task_group() as tasks:
            for _ in range(count):
                tasks.start_soon(callers.ask)
            await callers.answered.wait()
            await run_sync(authorizer.stop)
            await anyio.sleep(down)
            callers.answered = anyio.Event()
            await run_sync(authorizer.start)
            back = time.monotonic()
            await callers.answered.wait()
            took = time.monotonic() - back
            callers.stopped = True
        await callers.asker.close()
    return took


async def main(options):
    logging.getLogger("fastapi_topaz").setLevel(logging.CRITICAL)
    found = {}

    async def run(name, down, number):
        # Not in step, so that the random pauses of the rounds are not alike.
        await anyio.sleep(number * 0.7)
        took = await measured(ASKERS[name], down, options.callers)
        found.setdefault((name, down), []).append(took)

    jobs = itertools.product(ASKERS, options.outages, range(options.rounds))
    async with anyio.create_task_group() as tasks:
        for job in jobs:
            tasks.start_soon(run, *job)
    print(versions("anyio", "grpcio"))
    print("outage  contestant            first answer after, median    at most")
    rows = []
    for down, name in itertools.product(options.outages, ASKERS):
        each = sorted(found[name, down])
        middle, most = statistics.median(each), each[-1]
        print(f"{down:4g} s  {name:20}  {middle:21.2f} s {most:12.2f} s")
        rows.append({"name": name, "down": down, "seconds": each})
    save(options, "recovery", {"rows": rows})


if __name__ == "__main__":
    arguments = parser(__doc__, rounds=5)
    outages = [10, 30, 60, 120]
    arguments.add_argument("--outages", nargs="+", type=float, default=outages)
    arguments.add_argument("--callers", type=int, default=5)
    given = parsed(arguments, outages=[2.0], rounds=1)
    anyio.run(main, given)
