"""Servers with a limited capacity, and callers that come at random times."""

from __future__ import annotations

import math
import random
import statistics
from contextlib import asynccontextmanager
from typing import NamedTuple

import anyio

from fastapi_topaz import ConnectionPool, PoolError, PoolSaturated
from fastapi_topaz.testing import FakeConnector


class Server:
    """
    Answers each call after a time of service.

    Args:
        service: Returns the time of service of one call, from a `random.Random`.
        workers: The calls that it works on at once. None: all.
        seed: The seed of its random numbers.
    """

    def __init__(self, service, workers=None, seed=1):
        self.service = service
        self.factor = 1.0
        """How much slower it is than at first."""
        self.in_flight = self.peak = self.calls = 0
        self._random = random.Random(seed)
        self._workers = anyio.Semaphore(workers) if workers else None

    async def __call__(self, _method, _request):
        self.calls += 1
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            if self._workers is None:
                await anyio.sleep(self.service(self._random) * self.factor)
            else:
                # A caller that gives up leaves the server's queue.
                async with self._workers:
                    await anyio.sleep(self.service(self._random) * self.factor)
        finally:
            self.in_flight -= 1
        return b""


def constant(seconds):
    return lambda _random: seconds


def exponential(mean):
    return lambda random: random.expovariate(1 / mean)


def pareto(mean, alpha=2.5):
    least = mean * (alpha - 1) / alpha
    return lambda random: least * random.paretovariate(alpha)


def bimodal(quick, slow, share=0.1):
    return lambda random: slow if random.random() < share else quick


class Check(NamedTuple):
    """One check: when it began, how long it took, and how it ended."""

    began: float
    took: float
    end: str
    """`answered`, `refused`, `dismissed` (it left the queue), `late` or `gave up`."""


class Crowd:
    """Callers that come at random times and do not wait for each other."""

    def __init__(self, pool, budget, seed=1):
        self.pool = pool
        self.budget = budget
        self.checks = []
        self.come_so_far = 0
        self._random = random.Random(seed)

    async def check_for(self, seconds):
        """Begin a check, and cancel it after some time."""
        began = anyio.current_time()
        with anyio.move_on_after(seconds) as scope:
            await self.check()
        if scope.cancelled_caught:
            self.checks.append(Check(began, anyio.current_time() - began, "gave up"))

    async def check(self):
        began = anyio.current_time()
        try:
            async with self.pool.acquire(budget=self.budget) as conn:
                left = self.budget - (anyio.current_time() - began)
                await conn.call("/test/Is", b"", timeout=left)
        except PoolSaturated:
            end = "refused"
        except PoolError:
            end = "dismissed"
        except TimeoutError:
            end = "late"
        else:
            end = "answered"
        self.checks.append(Check(began, anyio.current_time() - began, end))

    async def come(self, rate, seconds, patience=math.inf):
        """
        Begin *rate* checks a second, on average; return when the last has begun.

        Every third caller gives up after *patience* seconds.
        """
        end = anyio.current_time() + seconds
        while (pause := self._random.expovariate(rate)) < end - anyio.current_time():
            await anyio.sleep(pause)
            hasty = patience < math.inf and self.come_so_far % 3 == 0
            self._tasks.start_soon(self.check_for, patience if hasty else math.inf)
            self.come_so_far += 1
        await anyio.sleep(max(0, end - anyio.current_time()))

    def ended(self, since, end=None):
        """Return the checks that ended from *since* on, in one way or in any."""
        return [
            check
            for check in self.checks
            if check.began + check.took >= since and end in {None, check.end}
        ]

    def began(self, since, end=None):
        return [x for x in self.checks if x.began >= since and end in {None, x.end}]

    def goodput(self, since, capacity):
        """Return the answers within the budget since then, as share of *capacity*."""
        good = [x for x in self.ended(since, "answered") if x.took <= self.budget]
        return len(good) / (anyio.current_time() - since) / capacity

    def latency(self, since, end="answered"):
        """Return the median time of the checks that ended like this."""
        return statistics.median(check.took for check in self.ended(since, end))


@asynccontextmanager
async def crowd(server, budget, *, streams=1, kind=Crowd, **options):
    """Open a pool of ten connections to *server*, and yield its callers."""
    settings = {"max_connections": 10, "min_connections": 0} | options
    pool = ConnectionPool(
        connector=FakeConnector(answer=server),
        streams_per_connection=streams,
        **settings,
    )
    callers = kind(pool, budget)
    async with pool, anyio.create_task_group() as tasks:
        callers._tasks = tasks
        yield callers
        tasks.cancel_scope.cancel()
