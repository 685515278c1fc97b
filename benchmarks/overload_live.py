"""
Measures over real sockets how many checks are answered in time if too many come.

    .venv/bin/python benchmarks/overload_live.py [--backend asyncio uvloop trio]
        [--budget 1] [--load 3] [--seconds 8] [--quick] [--save]

`overload.py` has many more cases, in virtual time. This shows that the pool does the
same with a real server, in three cases of at most 250 checks a second. The contestants
are this pool and the client of fastapi-topaz 2.0.0, which has one channel and sends
each call at once. It runs on asyncio only.

The capacity is measured first, with as many callers as the server has workers. Then
callers come at random times, and do not wait for each other. Goodput is the number of
answers within the budget, as share of the capacity.
"""

from __future__ import annotations

import contextlib
import time

import anyio
import aserto.client as aserto
import grpc
from _peers import OURS, SUCCESSOR, shared_client
from _rounds import Verdict, parsed, parser, save, versions
from _server import POLICY, authorizer
from starlette.requests import Request

from fastapi_topaz import (
    ConnectionPool,
    Identity,
    IdentityType,
    PoolError,
    PoolSaturated,
    TopazConfig,
)
from kit.overload import Check, Crowd


GOODPUT, SHARE_OF_BUDGET = 0.9, 0.5
"""The goals: the goodput at least, and the median time of an answer at most."""

SERVERS = {
    # Seconds for a call, calls at once, streams on each of ten connections.
    "ten workers, 40 ms, 10x1": (0.04, 10, 1),
    "one at a time, 10 ms, 10x50": (0.01, 1, 50),
    "four workers, 20 ms, 10x50": (0.02, 4, 50),
}


def request():
    return Request({"type": "http", "headers": []})


ALICE = aserto.Identity(aserto.IdentityType.IDENTITY_TYPE_SUB, "alice")


class Ours(Crowd):
    """Callers of `decide`, as an application calls it."""

    def __init__(self, config, budget):
        super().__init__(config.connection_pool, budget)
        self.config = config

    async def ask(self):
        try:
            await self.config.decide(request(), POLICY)
        except PoolSaturated:
            return "refused"
        except PoolError:
            return "dismissed"
        except grpc.aio.AioRpcError:
            return "late"
        return "answered"

    async def check(self):
        began = time.perf_counter()
        end = await self.ask()
        # Crowd has the clock of the event loop, so only the length is taken from here.
        took = time.perf_counter() - began
        self.checks.append(Check(anyio.current_time() - took, took, end))


class Shared(Ours):
    """Callers of one shared channel."""

    client = None

    async def ask(self):
        try:
            await self.client.decisions(
                identity=ALICE,
                policy_path=POLICY,
                decisions=("allowed",),
                timeout=self.budget,
            )
        except grpc.aio.AioRpcError:
            return "late"
        return "answered"


@contextlib.asynccontextmanager
async def callers_of(contestant, options, budget, streams):
    """Yield the callers of one contestant."""
    config = TopazConfig(
        authorizer_options=options,
        policy_path_root="myapp",
        identity_provider=lambda _request: Identity(IdentityType.SUB, "alice"),
        connection_pool=ConnectionPool(
            max_connections=10, streams_per_connection=streams
        ),
        check_timeout=budget,
    )
    if contestant == SUCCESSOR:
        callers = Shared(config, budget)
        callers.client = shared_client(options)
        opened = contextlib.nullcontext()
    else:
        callers, opened = Ours(config, budget), config.connection_pool
    async with opened, anyio.create_task_group() as tasks:
        callers._tasks = tasks
        yield callers
        tasks.cancel_scope.cancel()


async def capacity_of(callers, workers, seconds):
    """Return the answers a second with *workers* callers that wait for each answer."""
    answers = 0

    async def ask(end):
        nonlocal answers
        while anyio.current_time() < end:
            outcome = await callers.ask()
            answers += outcome == "answered"

    end = anyio.current_time() + seconds
    async with anyio.create_task_group() as tasks:
        for _ in range(workers):
            tasks.start_soon(ask, end)
    return answers / seconds


async def measure(contestant, options, given, workers, streams):
    """Return the row of one contestant and one server."""
    async with callers_of(contestant, options, given.budget, streams) as callers:
        await capacity_of(callers, workers, 1)
        capacity = await capacity_of(callers, workers, given.seconds / 4)
        await callers.come(capacity * given.load, 2 * given.budget)
        since = anyio.current_time()
        await callers.come(capacity * given.load, given.seconds)
        refused = callers.ended(since, "refused")
        answered = callers.ended(since, "answered")
        return {
            "capacity": capacity,
            "goodput": callers.goodput(since, capacity),
            "median": callers.latency(since) if answered else None,
            "refused after": callers.latency(since, "refused") if refused else None,
        }


def ms(seconds):
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"


def races(given):
    """Yield a row for each server, backend and contestant."""
    contestants = [(OURS, backend) for backend in given.backend]
    contestants.append((SUCCESSOR, "asyncio"))
    for server, (latency, workers, streams) in SERVERS.items():
        print(f"\n{server}, budget {given.budget:g} s, {given.load:g} times too many")
        print("  contestant                     capacity  goodput  median    refused")
        for contestant, backend in contestants:
            uvloop = backend == "uvloop"
            with authorizer(latency=latency, workers=workers) as options:
                row = anyio.run(
                    *(measure, contestant, options, given, workers, streams),
                    backend="asyncio" if uvloop else backend,
                    backend_options={"use_uvloop": True} if uvloop else {},
                )
            print(
                f"  {contestant + ', ' + backend:30} {row['capacity']:5.0f}/s"
                f"  {row['goodput']:7.2f}  {ms(row['median']):8}"
                f"  {ms(row['refused after'])}"
            )
            yield {"server": server, "name": contestant, "backend": backend, **row}


def verdicts(rows, budget):
    ours = [row for row in rows if row["name"] == OURS]
    worst = min(row["goodput"] for row in ours)
    yield Verdict(f"goodput at least {GOODPUT:g}", f"{worst:.2f}", worst >= GOODPUT)
    slowest = max(row["median"] or float("inf") for row in ours)
    most = SHARE_OF_BUDGET * budget
    yield Verdict(f"median at most {ms(most)}", ms(slowest), slowest <= most)


def main(given):
    print(versions("anyio", "uvloop", "trio"))
    rows = list(races(given))
    goals = list(verdicts(rows, given.budget))
    for goal in goals:
        print(goal)
    save(given, "overload_live", {"rows": rows, "goals": goals})


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument(
        "--backend",
        nargs="+",
        choices=["asyncio", "uvloop", "trio"],
        default=["asyncio", "uvloop", "trio"],
    )
    arguments.add_argument("--budget", type=float, default=1.0)
    arguments.add_argument("--load", type=float, default=3.0)
    arguments.add_argument("--seconds", type=float, default=8.0)
    main(parsed(arguments, backend=["asyncio"], budget=0.2, seconds=1.0))
