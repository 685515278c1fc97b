"""
Measures the cost of a lease and the waiting times if 200 tasks share 10 connections.

    .venv/bin/python benchmarks/contended.py [--backend asyncio uvloop trio]
        [--rounds 15] [--tasks 200] [--leases 20] [--quick] [--save]

Each task takes 20 leases, with one checkpoint in each. The connections do nothing. So
this measures the time to queue, wake and switch tasks. The floors are anyio's
`CapacityLimiter` without connections: bare, and with `fail_after` around each wait, as
applications need it. `pip install --group peers` installs the other pools. Missing ones
are left out.

Every wait is recorded in time and in turns. Turns are the leases that other tasks got
during the wait. Other load on the machine makes a few waits longer in time, but not in
turns. If a pool serves tasks in order, the longest wait is little longer than the mean.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import time

import anyio
from _peers import BACKENDS, OURS, PREDECESSOR, TIMEOUT, Peer, peers, run
from _rounds import Goal, Race, Verdict, parsed, parser, save, versions


LIMITER = "limiter"
TIMED_LIMITER = "limiter, fail_after"
CONNECTIONS = 10
FAIR = 3.0
"""Limit for the longest wait, as a multiple of the mean wait."""


class Borrowed:
    """A lease of a limiter's token. The object itself is the borrower."""

    __slots__ = ("limiter",)

    def __init__(self, limiter):
        self.limiter = limiter

    async def __aenter__(self):
        await self.limiter.acquire_on_behalf_of(self)

    async def __aexit__(self, *_):
        self.limiter.release_on_behalf_of(self)


class BorrowedInTime(Borrowed):
    """As `Borrowed`, with a time limit for the wait."""

    __slots__ = ()

    async def __aenter__(self):
        with anyio.fail_after(TIMEOUT):
            await self.limiter.acquire_on_behalf_of(self)


def limiter(lease):
    @contextlib.asynccontextmanager
    async def opened(count):
        yield functools.partial(lease, anyio.CapacityLimiter(count))

    return opened


class Queue:
    """The tasks that share one pool, and the waits of each round."""

    def __init__(self, peer, backend, tasks, leases):
        self.peer = peer
        self.backend = backend
        self.tasks = tasks
        self.leases = leases
        self.waits = []
        self.turns = []

    def measure(self):
        """Run one round and return the microseconds per lease."""
        took, waits, turns = run(self.backend, self.stand)
        self.waits.append(waits)
        self.turns.append(turns)
        return took / (self.tasks * self.leases) * 1e6

    async def stand(self):
        waits = []
        turns = []
        async with self.peer.open(CONNECTIONS) as lease:
            start = anyio.Event()

            async def take():
                await start.wait()
                for _ in range(self.leases):
                    turn = len(turns)
                    asked = time.perf_counter()
                    async with lease():
                        waits.append(time.perf_counter() - asked)
                        turns.append(len(turns) - turn)
                        await anyio.lowlevel.checkpoint()

            async with anyio.create_task_group() as tasks:
                for _ in range(self.tasks):
                    tasks.start_soon(take)
                await anyio.wait_all_tasks_blocked()
                began = time.perf_counter()
                start.set()
            took = time.perf_counter() - began
        return took, waits, turns

    def forget(self, rounds):
        """Keep only the last *rounds* rounds, without the warm-up."""
        self.waits = self.waits[-rounds:]
        self.turns = self.turns[-rounds:]

    def longest(self, waits):
        """Return the longest wait divided by the mean wait, as the median of rounds."""
        return statistics.median(max(each) / statistics.fmean(each) for each in waits)

    def summary(self):
        """Return waits in milliseconds, and the longest as a multiple of the mean."""
        waits = [1000 * each for each in itertools.chain(*self.waits)]
        percents = statistics.quantiles(waits, n=100)
        return {
            "p50": percents[49],
            "p99": percents[98],
            "longest": max(waits),
            "by mean": self.longest(self.waits),
            "in turns": self.longest(self.turns),
        }


def others_of(names):
    return tuple(name for name in names if name not in {OURS, LIMITER, TIMED_LIMITER})


def goals(backend, names):
    found = []
    if backend == "asyncio":
        found.append(Goal(OURS, (PREDECESSOR,), 0.9))
    else:
        found.append(Goal(OURS, (TIMED_LIMITER,), 1))
    if others := others_of(names):
        found.append(Goal(OURS, others, 1, f"{OURS} at most 1 x every other pool"))
    return found


def show_waits(backend, waits):
    """Print the summaries, and return the verdicts on the longest wait."""
    width = max(map(len, waits))
    print(f"\nWaits for a lease on {backend} (ms; longest by mean, median of rounds)")
    print(
        f"  {'':<{width}}  {'p50':>8}  {'p99':>8}  {'longest':>8}"
        f"  {'by mean':>8}  {'in turns':>8}"
    )
    for name, summary in waits.items():
        numbers = "".join(f"  {number:8.2f}" for number in summary.values())
        print(f"  {name:<{width}}{numbers}")
    reached = [
        Verdict(
            f"{OURS} longest wait {unit} below {FAIR:g} x mean",
            f"{waits[OURS][key]:.2f} x",
            waits[OURS][key] < FAIR,
        )
        for unit, key in (("in time", "by mean"), ("in turns", "in turns"))
    ]
    for each in reached:
        print(each)
    return reached


def main(options):
    print(versions("fastapi-topaz-pool", "anyio", "trio", "uvloop"))
    floors = [
        Peer(LIMITER, limiter(Borrowed), BACKENDS),
        Peer(TIMED_LIMITER, limiter(BorrowedInTime), BACKENDS),
    ]
    found = floors + peers()
    for backend in options.backend:
        queues = {
            peer.name: Queue(peer, backend, options.tasks, options.leases)
            for peer in found
            if backend in peer.backends
        }
        race = Race(
            f"One lease of {CONNECTIONS} connections, wanted by {options.tasks} tasks, "
            f"on {backend}",
            "us",
        )
        race.run(
            {name: queue.measure for name, queue in queues.items()},
            options.rounds,
            others_of(queues),
        )
        reached = goals(backend, queues)
        race.show(LIMITER, reached)
        waits = {}
        for name in sorted(race.rounds, key=race.median):
            queues[name].forget(options.rounds)
            waits[name] = queues[name].summary()
        data = race.data(reached)
        data["goals"] += show_waits(backend, waits)
        save(options, f"contended-{backend}", {**data, "waits": waits})


if __name__ == "__main__":
    arguments = parser(__doc__, rounds=15)
    arguments.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS)
    arguments.add_argument("--tasks", type=int, default=200)
    arguments.add_argument("--leases", type=int, default=20)
    main(parsed(arguments, rounds=1, leases=5))
