"""
Measures a pool with a server that limits the streams of a connection.

    .venv/bin/python benchmarks/streams.py [--backend asyncio trio] [--rounds 3]
        [--seconds 4] [--callers 1000] [--quick] [--save]

A check takes 100 ms, and a connection may carry 100 checks at once. First, 500 callers
use a pool of 10 connections with 50 streams each, and one shared channel. Then 1,000
callers use pools with other numbers of streams. A caller repeats its check as soon as
it has an answer, or 100 ms after a failure. If any check fails with the pool of
10 x 50, the exit code is 1.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import time
from collections import Counter

import anyio
import grpc
import grpc.aio
from _rounds import Race, Verdict, parsed, parser, save, versions
from _server import POLICY, authorizer
from aserto.authorizer.v2 import AuthorizerStub, IsRequest

from fastapi_topaz import ConnectionPool, PoolError
from fastapi_topaz._authorizer.messages import is_request


SHARED = "one shared channel, asyncio"
LATENCY = 0.1
LIMIT = 100
# Seconds. Long, because this measures throughput, so no call should time out.
PATIENCE = 60
SHARE = 0.9
"""Minimum throughput with a limit, as a share of that without a limit."""


@contextlib.asynccontextmanager
async def shared_channel(options, _waits):
    request = IsRequest.FromString(
        is_request(POLICY, ("allowed",), None, None, None, None)
    )
    async with grpc.aio.insecure_channel(options.url) as channel:
        await channel.channel_ready()
        ask = AuthorizerStub(channel).Is

        async def check():
            await ask(request, timeout=PATIENCE)

        yield check


@contextlib.asynccontextmanager
async def pool(options, waits, *, streams=50):
    connections = ConnectionPool(
        min_connections=10,
        max_connections=10,
        streams_per_connection=streams,
        acquire_timeout=PATIENCE,
        eager_init=True,
    )
    connections.configure(options)
    async with connections:

        async def check():
            began = time.monotonic()
            async with connections.acquire() as conn:
                waits.append(time.monotonic() - began)
                await conn.decisions(policy_path=POLICY, timeout=PATIENCE)

        yield check


class Crowd:
    """Callers that repeat checks. A call runs them and returns answers per second."""

    def __init__(self, way, options, *, backend, callers, seconds):
        self._way = way
        self._options = options
        self._backend = backend
        self._callers = callers
        self._seconds = seconds
        self._end = 0.0
        self.checks = 0
        self.answered = 0
        self.failures = Counter()
        self.waits = []

    def __call__(self):
        before = self.answered
        anyio.run(self._ask, backend=self._backend)
        return (self.answered - before) / self._seconds

    async def _ask(self):
        async with self._way(self._options, self.waits) as check:
            self._end = time.monotonic() + self._seconds
            async with anyio.create_task_group() as tasks:
                for _ in range(self._callers):
                    tasks.start_soon(self._caller, check)

    async def _caller(self, check):
        while time.monotonic() < self._end:
            self.checks += 1
            try:
                await check()
            except grpc.aio.AioRpcError as error:
                self.failures[error.code().name] += 1
            except PoolError as error:
                self.failures[type(error).__name__] += 1
            else:
                # Answers after the end are not counted.
                self.answered += time.monotonic() < self._end
                continue
            await anyio.sleep(LATENCY)

    def failed(self):
        """Return the share of failed checks and their statuses, as text."""
        if not self.failures:
            return "none"
        share = self.failures.total() / self.checks
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.failures.most_common())
        return f"{share:.1%}: {kinds}"

    def failures_data(self):
        """Return the counts of checks and failures, for the saved file."""
        return {"checks": self.checks, "failed": dict(self.failures)}


def compare(limited, unlimited, given):
    """Compare pools with the shared channel, and return the data to save."""
    crowd = functools.partial(Crowd, callers=500, seconds=given.seconds)
    crowds = {SHARED: crowd(shared_channel, limited, backend="asyncio")}
    for backend in given.backend:
        name = f"pool of 10 x 50, {backend}"
        crowds[name] = crowd(pool, limited, backend=backend)
        crowds[f"{name}, no limit"] = crowd(pool, unlimited, backend=backend)
    race = Race(
        f"500 callers, {LATENCY * 1000:.0f} ms per check, at most {LIMIT} streams "
        "per connection",
        "checks per second",
    )
    race.run(crowds, given.rounds)
    print(f"\n{race.title} ({race.unit}, median of rounds)")
    width = max(map(len, crowds))
    for name, who in crowds.items():
        print(f"  {name:<{width}}  {race.median(name):6.0f}  failed {who.failed()}")
    data = race.data()
    for backend in given.backend:
        name = f"pool of 10 x 50, {backend}"
        share = race.ratio(name, f"{name}, no limit")
        data["goals"] += [
            no_failures(name, [crowds[name]]),
            Verdict(
                f"{name} at least {SHARE} x its throughput without a limit",
                f"{share:.2f} x",
                share >= SHARE,
            ),
        ]
    who = crowds[SHARED]
    failed = who.failures.total()
    told = f"{failed:,} of {who.checks:,} failed"
    data["goals"].append(
        Verdict(f"for comparison, {SHARED}, fails checks", told, failed > 0)
    )
    data["failures"] = {name: who.failures_data() for name, who in crowds.items()}
    for each in data["goals"]:
        print(each)
    return data


def no_failures(name, crowds):
    failed = sum(who.failures.total() for who in crowds)
    checks = sum(who.checks for who in crowds)
    return Verdict(
        f"{name} fails no check", f"{failed} of {checks:,} failed", failed == 0
    )


def table(limited, unlimited, given, backend):
    """Print a table for several streams per connection, and return its rows."""
    print(
        f"\n{given.callers:,} callers, pool of 10 connections, {backend}\n"
        "  streams  limit  checks/s  wait: median     most  failed"
    )
    rows = []
    for streams in (1, 10, 50, 100):
        for limit, options in ((LIMIT, limited), (None, unlimited)):
            who = Crowd(
                functools.partial(pool, streams=streams),
                options,
                backend=backend,
                callers=given.callers,
                seconds=given.seconds,
            )
            rate = who()
            print(
                f"  {streams:7}  {limit or 'none':>5}  {rate:8.0f}"
                f"  {statistics.median(who.waits):10.3f} s  {max(who.waits):5.2f} s"
                f"  {who.failed()}"
            )
            rows.append(
                {
                    "backend": backend,
                    "streams": streams,
                    "limit": limit,
                    "rate": rate,
                    "wait": statistics.median(who.waits),
                    "longest": max(who.waits),
                    **who.failures_data(),
                }
            )
    return rows


def main(given):
    print(versions("grpcio", "anyio", "trio"))
    with (
        authorizer(latency=LATENCY, streams=LIMIT) as limited,
        authorizer(latency=LATENCY) as unlimited,
    ):
        data = compare(limited, unlimited, given)
        data["table"] = [
            row
            for backend in given.backend
            for row in table(limited, unlimited, given, backend)
        ]
    save(given, "streams", data)
    pools = [who for name, who in data["failures"].items() if name != SHARED]
    pools += [row for row in data["table"] if row["streams"] == 50]
    return sum(sum(each["failed"].values()) for each in pools)


if __name__ == "__main__":
    backends = ["asyncio", "trio"]
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--backend", nargs="+", choices=backends, default=backends)
    arguments.add_argument("--seconds", type=float, default=4.0)
    arguments.add_argument("--callers", type=int, default=1000, help="in the second")
    given = parsed(arguments, rounds=1, seconds=1.0, callers=200)
    sys.exit(1 if main(given) else 0)
