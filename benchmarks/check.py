"""
Measures the cost of one check: with the pool, bare gRPC, and the client of `aserto`.

    .venv/bin/python benchmarks/check.py [--rounds 9] [--calls 2000]
        [--concurrency 1 10 20 100] [--backend asyncio uvloop trio] [--quick] [--save]

The CPU time is that of all threads of this process. The authorizer runs in another
process. The bare stub sends the same bytes as the pool, built before. "one client per
check" is what fastapi-topaz 1.1.0 does: it makes a client, and so a TLS connection,
for every decision.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time

import anyio
import grpc
import grpc.aio
from _rounds import Goal, Race, parsed, parser, save, versions
from _server import POLICY, authorizer
from aserto import client as aserto
from aserto.authorizer.v2 import AuthorizerStub, IsRequest
from aserto.client.authorizer.aio import AuthorizerClient

from fastapi_topaz import ConnectionPool, Identity, IdentityType
from fastapi_topaz._authorizer.messages import is_request


ALICE = Identity(IdentityType.SUB, "alice")
RESOURCE = {"id": "1"}
WARM_UP = 200
# Fewer calls with a client per check, because each takes milliseconds.
CLIENTS = 200


@contextlib.asynccontextmanager
async def bare_stub(options):
    request = IsRequest.FromString(
        is_request(POLICY, ("allowed",), ALICE, RESOURCE, None, None)
    )
    async with grpc.aio.insecure_channel(options.url) as channel:
        ask = AuthorizerStub(channel).Is

        async def check():
            answer = await ask(request, timeout=5)
            return getattr(answer.decisions[0], "is")

        yield check


@contextlib.asynccontextmanager
async def pool(options, *, streams=50):
    connections = ConnectionPool(
        min_connections=10,
        max_connections=10,
        streams_per_connection=streams,
        eager_init=True,
    )
    connections.configure(options)
    async with connections:

        async def check():
            async with connections.acquire() as conn:
                answer = await conn.decisions(
                    policy_path=POLICY,
                    decisions=("allowed",),
                    identity=ALICE,
                    resource_context=RESOURCE,
                    timeout=5,
                )
            return answer["allowed"]

        yield check


def _aserto_client(options):
    return AuthorizerClient(
        identity=aserto.Identity(aserto.IdentityType.IDENTITY_TYPE_SUB, "alice"),
        options=aserto.AuthorizerOptions(
            url=options.url, cert_file_path=options.cert_file_path
        ),
    )


async def _ask(client):
    answer = await client.decisions(
        policy_path=POLICY, decisions=("allowed",), resource_context=RESOURCE
    )
    return answer["allowed"]


@contextlib.asynccontextmanager
async def one_client(options):
    client = _aserto_client(options)
    yield functools.partial(_ask, client)
    await client.close()


@contextlib.asynccontextmanager
async def client_per_check(options):
    async def check():
        # Not closed, because fastapi-topaz 1.1.0 does not close it either.
        return await _ask(_aserto_client(options))

    yield check


class Contestant:
    """One way to make checks. A call measures it and returns microseconds of CPU."""

    def __init__(self, way, options, concurrency, calls, backend):
        self._way = way
        self._options = options
        self._concurrency = concurrency
        self._calls = calls
        self._backend = backend
        # Wall-clock time of each measurement, in microseconds per check.
        self.wall = []

    def __call__(self):
        uvloop = self._backend == "uvloop"
        cpu, wall = anyio.run(
            self._measure,
            backend="asyncio" if uvloop else self._backend,
            backend_options={"use_uvloop": True} if uvloop else {},
        )
        self.wall.append(wall)
        return cpu

    async def _measure(self):
        async with self._way(self._options) as check:
            await self._check(check, min(WARM_UP, self._calls))
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            await self._check(check, self._calls)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return cpu / self._calls * 1e6, wall / self._calls * 1e6

    async def _check(self, check, calls):
        left = iter(range(calls))

        async def caller():
            for _ in left:
                if await check() is not True:
                    raise RuntimeError("the authorizer denied")

        async with anyio.create_task_group() as tasks:
            for _ in range(self._concurrency):
                tasks.start_soon(caller)


def race(title, contestants, given, reference, goals, *, name):
    """Compare the CPU time of contestants, and show their wall-clock time too."""
    cpu = Race(title, "us of CPU per check")
    cpu.run(contestants, given.rounds)
    goals = [goal for goal in goals if goal.name in contestants]
    cpu.show(reference, goals)
    save(given, f"check-{name}", cpu.data(goals))
    wall = Race(title, "us of wall clock per check")
    # The first measurement is the warm-up.
    wall.rounds = {each: who.wall[1:] for each, who in contestants.items()}
    wall.show(reference)
    save(given, f"check-{name}-wall", wall.data())


def plain_goals(concurrency):
    goals = []
    if concurrency == 20:
        goals += [
            Goal(f"pool, {backend}", (f"bare stub, {backend}",), 1.05)
            for backend in ("asyncio", "uvloop")
        ]
    if concurrency in (1, 10, 100):
        most = 1.45 if concurrency == 1 else 1.20
        goals.append(Goal("pool, trio", ("bare stub, asyncio",), most))
    return goals


def at_once(concurrency):
    return "one at a time" if concurrency == 1 else f"{concurrency} at a time"


def plain(options, given):
    for concurrency in given.concurrency:
        ways = {}
        for backend in ("asyncio", "uvloop"):
            # Always there, because it is the reference for the others.
            if backend == "asyncio" or backend in given.backend:
                ways[f"bare stub, {backend}"] = bare_stub, backend
        for backend in given.backend:
            ways[f"pool, {backend}"] = pool, backend
            if concurrency <= 10:
                exclusive = functools.partial(pool, streams=1)
                ways[f"pool of single streams, {backend}"] = exclusive, backend
        race(
            f"Checks {at_once(concurrency)}, plaintext",
            {
                name: Contestant(way, options, concurrency, given.calls, backend)
                for name, (way, backend) in ways.items()
            },
            given,
            "bare stub, asyncio",
            plain_goals(concurrency),
            name=str(concurrency),
        )


def encrypted(options, given):
    for concurrency in given.concurrency:
        names = {
            "pool": (pool, given.calls),
            "one client": (one_client, given.calls),
            "one client per check": (client_per_check, min(given.calls, CLIENTS)),
        }
        race(
            f"Checks {at_once(concurrency)}, TLS, asyncio",
            {
                name: Contestant(way, options, concurrency, calls, "asyncio")
                for name, (way, calls) in names.items()
            },
            given,
            "one client",
            # There is no goal for several callers.
            [Goal("pool", ("one client per check",), 0.2)] if concurrency == 1 else [],
            name=f"{concurrency}-tls",
        )


def main(given):
    print(versions("grpcio", "anyio", "uvloop", "trio", "aserto"))
    with authorizer() as options:
        plain(options, given)
    if "asyncio" in given.backend:
        with authorizer(tls=True) as options:
            encrypted(options, given)


if __name__ == "__main__":
    backends = ["asyncio", "uvloop", "trio"]
    arguments = parser(__doc__, rounds=9)
    arguments.add_argument("--calls", type=int, default=2000)
    arguments.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 10, 20, 100]
    )
    arguments.add_argument("--backend", nargs="+", choices=backends, default=backends)
    main(parsed(arguments, rounds=1, calls=200, concurrency=[1, 20]))
