"""
What a lease costs, and who waits how long, when 200 tasks share 10 connections.

    .venv/bin/python benchmarks/contended.py [--backend asyncio uvloop trio]
        [--rounds 15] [--tasks 200] [--leases 20] [--quick] [--save]

Each task takes 20 leases, with one checkpoint in each. Connections do nothing, so that
the time is that of queueing, waking and switching. The floors are anyio's
`CapacityLimiter` without connections: bare, and with `fail_after` around each wait, as
every application wants one. The others come with `pip install --group peers`; those
that are missing are left out.

All waits are noted, from asking to getting: in time, which whatever else the machine
does makes longer for a few, and in turns, the leases that others got meanwhile. Where
everybody is served in turn, the longest wait is hardly longer than the mean one.
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
"""What the longest wait must be below, in mean waits."""


class Borrowed:
    """A token of a limiter for a borrower of its own."""

    __slots__ = ("limiter",)

    def __init__(self, limiter):
        self.limiter = limiter

    async def __aenter__(self):
        await self.limiter.acquire_on_behalf_of(self)

    async def __aexit__(self, *_):
        self.limiter.release_on_behalf_of(self)


class BorrowedInTime(Borrowed):
    """The same, not waited for longer than a while."""

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
    """The tasks in front of one pool, and the waits of each round."""

    def __init__(self, peer, backend, tasks, leases):
        self.peer = peer
        self.backend = backend
        self.tasks = tasks
        self.leases = leases
        self.waits = []
        self.turns = []

    def measure(self):
        """Return the microseconds for one lease."""
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
        """Keep the last *rounds* only: one more was to warm up."""
        self.waits = self.waits[-rounds:]
        self.turns = self.turns[-rounds:]

    def longest(self, waits):
        """Return the longest of the *waits* of a round, in mean ones."""
        return statistics.median(max(each) / statistics.fmean(each) for each in waits)

    def summary(self):
        """Return milliseconds, and then the longest wait in mean ones."""
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
    """Show the summaries, and return how the goal for the longest was met."""
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
