"""
Plays one overload scenario in virtual time, and prints its result as JSON.

`overload.py` starts this file, with the package of a commit in PYTHONPATH.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
from pathlib import Path


# Only helpers that any commit of the package can be used with.
sys.path.append(str(Path(__file__).parent.parent / "tests"))

import anyio
import trio
import trio.testing

from fastapi_topaz import ConnectionPool
from kit.autojump import AutojumpLoop
from kit.overload import Check, Crowd, Server, constant, crowd, exponential


SERVERS = {
    # The time of service, the workers, the capacity a second, streams per connection.
    "ten workers, 50 ms, 10x1": (constant(0.05), 10, 200, 1),
    "ten workers, exponential 50 ms, 10x1": (exponential(0.05), 10, 200, 1),
    "one at a time, 10 ms, 10x1": (constant(0.01), 1, 100, 1),
    "one at a time, 10 ms, 10x50": (constant(0.01), 1, 100, 50),
    "four workers, 20 ms, 10x50": (constant(0.02), 4, 200, 50),
}


class Timed(Crowd):
    """Callers of a pool that may know no budgets: the timeout is the next best."""

    knows_budgets = "budget" in inspect.signature(ConnectionPool.acquire).parameters

    async def check(self):
        if self.knows_budgets:
            await super().check()
            return
        began, end = anyio.current_time(), "late"
        try:
            async with self.pool.acquire(timeout=self.budget) as conn:
                left = self.budget - (anyio.current_time() - began)
                await conn.call("/test/Is", b"", timeout=left)
                end = "answered"
        except Exception:  # noqa: BLE001  (any error is a check without an answer)
            pass
        self.checks.append(Check(began, anyio.current_time() - began, end))


class Channel(Timed):
    """Callers that share one channel: each call is sent at once."""

    server: Server

    async def check(self):
        began, end = anyio.current_time(), "late"
        with anyio.move_on_after(self.budget):
            await self.server("/test/Is", b"")
            end = "answered"
        self.checks.append(Check(began, anyio.current_time() - began, end))


async def scenario(way, server, budget, phases):
    service, workers, capacity, streams = SERVERS[server]
    made = Server(service, workers)
    kind = {"channel": Channel, "pool": Timed}[way]
    async with crowd(made, budget, streams=streams, kind=kind) as callers:
        callers.server = made
        rows, began = [], anyio.current_time()
        for load, seconds in phases:
            since = anyio.current_time()
            await callers.come(load * capacity, seconds)
            rows.append(result(callers, since, capacity))
        seconds = [0] * int(sum(seconds for _, seconds in phases))
        for check in callers.checks:
            if check.end == "answered" and check.took <= budget:
                second = int(check.began + check.took - began)
                if second < len(seconds):
                    seconds[second] += 1 / capacity
    return {"phases": rows, "seconds": seconds}


def result(callers, since, capacity):
    answered = callers.ended(since, "answered")
    refused = callers.ended(since, "refused")
    return {
        "goodput": callers.goodput(since, capacity),
        "median": callers.latency(since) if answered else None,
        "refused after": callers.latency(since, "refused") if refused else None,
        "failed": sum(x.end != "answered" for x in callers.began(since)),
        "checks": len(callers.began(since)),
    }


def main(arguments):
    logging.disable(logging.CRITICAL)
    backend, way, server, budget, phases = arguments
    job = (way, server, float(budget), json.loads(phases))
    if backend == "trio":
        clock = trio.testing.MockClock(autojump_threshold=0)
        found = trio.run(scenario, *job, clock=clock)
    else:
        loop = AutojumpLoop()
        found = loop.run_until_complete(scenario(*job))
        loop.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
