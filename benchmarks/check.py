"""
Measures the cost of one check: with the pool, bare gRPC, and the client of `aserto`.

    .venv/bin/python benchmarks/check.py [--rounds 9] [--calls 2000]
        [--concurrency 1 10 20 100] [--backend asyncio uvloop trio]
        [--server embedded gopeer topazd] [--quick] [--save]

The CPU time is that of all threads of this process. The authorizer runs in another
process. The bare stub sends the same bytes as the pool, built before. "one client per
check" is what fastapi-topaz 1.1.0 does: it makes a client, and so a TLS connection,
for every decision. "fastapi-topaz 2.0.0" is its client, which keeps one channel.

The transports are compared on three servers: the embedded authorizer (gRPC's core),
`gopeer` (grpc-go) and `topazd` (Topaz). The variables GOPEER and TOPAZD name
their binaries; without its variable a server is left out. With `--server`, only this
comparison runs.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import time

import anyio
import grpc
import grpc.aio
from _peers import shared_client
from _rounds import Goal, Race, parsed, parser, save, versions
from _server import POLICY, SERVERS, authorizer, serving
from aserto import client as aserto
from aserto.authorizer.v2 import AuthorizerStub, IsRequest
from aserto.client.authorizer.aio import AuthorizerClient

from fastapi_topaz import ConnectionPool, Identity, IdentityType
from fastapi_topaz._authorizer.messages import is_request
from fastapi_topaz._rpc.certificates import root_certificates


ALICE = Identity(IdentityType.MANUAL, "alice")
RESOURCE = {"id": "1"}
WARM_UP = 200
# Fewer calls with a client per check, because each takes milliseconds.
CLIENTS = 200


@contextlib.asynccontextmanager
async def bare_stub(options, *, policy=POLICY):
    request = IsRequest.FromString(
        is_request(policy, ("allowed",), ALICE, RESOURCE, None, None)
    )
    if options.insecure:
        channel = grpc.aio.insecure_channel(options.url)
    else:
        credentials = grpc.ssl_channel_credentials(root_certificates(options.target))
        channel = grpc.aio.secure_channel(options.url, credentials)
    async with channel:
        ask = AuthorizerStub(channel).Is

        async def check():
            answer = await ask(request, timeout=5)
            return getattr(answer.decisions[0], "is")

        yield check


@contextlib.asynccontextmanager
async def pool(options, *, streams=50, transport="native", policy=POLICY):
    connections = ConnectionPool(
        min_connections=10,
        max_connections=10,
        streams_per_connection=streams,
        eager_init=True,
        transport=transport,
    )
    connections.configure(options)
    async with connections:

        async def check():
            async with connections.acquire() as conn:
                answer = await conn.decisions(
                    policy_path=policy,
                    decisions=("allowed",),
                    identity=ALICE,
                    resource_context=RESOURCE,
                    timeout=5,
                )
            return answer["allowed"]

        yield check


def _aserto_client(options):
    return AuthorizerClient(
        identity=aserto.Identity(aserto.IdentityType.IDENTITY_TYPE_MANUAL, "alice"),
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


@contextlib.asynccontextmanager
async def version_2(options, *, policy=POLICY):
    client = shared_client(options)
    alice = aserto.Identity(aserto.IdentityType.IDENTITY_TYPE_MANUAL, "alice")

    async def check():
        answer = await client.decisions(
            identity=alice,
            policy_path=policy,
            decisions=("allowed",),
            resource_context=RESOURCE,
            timeout=5,
        )
        return answer["allowed"]

    yield check
    await client.close()


class Contestant:
    """One way to make checks. A call measures it and returns microseconds of CPU."""

    def __init__(self, way, options, concurrency, calls, backend):
        self._way = way
        self._options = options
        self._concurrency = concurrency
        self._calls = calls
        self._backend = backend
        # Wall-clock time, and CPU time of the event loop's thread, of each
        # measurement, in microseconds per check.
        self.wall, self.thread = [], []

    def __call__(self):
        uvloop = self._backend == "uvloop"
        cpu, wall, thread = anyio.run(
            self._measure,
            backend="asyncio" if uvloop else self._backend,
            backend_options={"use_uvloop": True} if uvloop else {},
        )
        self.wall.append(wall)
        self.thread.append(thread)
        return cpu

    async def _measure(self):
        async with self._way(self._options) as check:
            await self._check(check, min(WARM_UP, self._calls))
            gc.collect()
            clocks = time.process_time, time.perf_counter, time.thread_time
            before = [clock() for clock in clocks]
            await self._check(check, self._calls)
            after = [clock() for clock in clocks]
        pairs = zip(before, after, strict=True)
        return [(end - begin) / self._calls * 1e6 for begin, end in pairs]

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


# The most CPU time of a check on the native transport, relative to the bare stub: of
# all threads, and of the event loop's thread. 20 callers share 10 connections.
NATIVE = {
    "gopeer": {"asyncio": 0.40, "uvloop": 0.36, "trio": 0.48},
    "topazd": {"asyncio": 0.46, "uvloop": 0.44, "trio": 0.56},
    "embedded": {"asyncio": 0.60, "uvloop": 0.50, "trio": 0.65},
    "tls": {"asyncio": 0.65, "uvloop": 0.60, "trio": 0.75},
    "thread": {"asyncio": 0.60, "uvloop": 0.55, "trio": 0.75},
}


def transports(given, server, *, tls):
    """Compare both transports with the bare stub and with fastapi-topaz 2.0.0."""
    with serving(server, tls=tls) as (options, policy):
        ways = {"bare stub, asyncio": (bare_stub, "asyncio")}
        if not tls and "asyncio" in given.backend:
            ways["fastapi-topaz 2.0.0, asyncio"] = version_2, "asyncio"
        for backend in given.backend:
            for transport in ("grpcio", "native"):
                if transport == "grpcio" and backend == "trio":
                    continue  # it works on asyncio only
                way = functools.partial(pool, transport=transport)
                ways[f"{transport}, {backend}"] = way, backend
        contestants = {
            name: Contestant(
                functools.partial(way, policy=policy), options, 20, given.calls, backend
            )
            for name, (way, backend) in ways.items()
        }
        goals = NATIVE["tls" if tls else server]
        race(
            f"Both transports: checks 20 at a time, {server}{', TLS' if tls else ''}",
            contestants,
            given,
            "bare stub, asyncio",
            _native_goals(goals),
            name=f"20-{server}{'-tls' if tls else ''}",
        )
        thread = Race(
            "Both transports: the event loop's thread alone", "us of CPU per check"
        )
        thread.rounds = {name: who.thread[1:] for name, who in contestants.items()}
        goals = _native_goals(NATIVE["thread"])
        thread.show(
            "bare stub, asyncio", [goal for goal in goals if goal.name in contestants]
        )


def _native_goals(goals):
    return [
        Goal(f"native, {backend}", ("bare stub, asyncio",), most)
        for backend, most in goals.items()
    ]


def main(given):
    print(versions("grpcio", "anyio", "uvloop", "trio", "aserto"))
    if not given.server:
        with authorizer() as options:
            plain(options, given)
        if "asyncio" in given.backend:
            with authorizer(tls=True) as options:
                encrypted(options, given)
    for server in given.server or SERVERS:
        variable = SERVERS[server]
        if variable and variable not in os.environ:
            print(f"left out: {server}: {variable} names no binary", file=sys.stderr)
            continue
        transports(given, server, tls=False)
        if server != "topazd":
            transports(given, server, tls=True)


if __name__ == "__main__":
    backends = ["asyncio", "uvloop", "trio"]
    arguments = parser(__doc__, rounds=9)
    arguments.add_argument("--calls", type=int, default=2000)
    arguments.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 10, 20, 100]
    )
    arguments.add_argument("--backend", nargs="+", choices=backends, default=backends)
    arguments.add_argument("--server", nargs="+", choices=SERVERS, default=[])
    main(parsed(arguments, rounds=1, calls=200, concurrency=[1, 20]))
