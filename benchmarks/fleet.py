"""
Simulates a fleet of workers and replicas of an authorizer, in virtual time.

    .venv/bin/python benchmarks/fleet.py [--full] [--seed 1] [--backend trio]
        [--scenario rolling frozen] [--streams 1] [--quick] [--save]

Each worker has a real pool, and makes real checks with `TopazConfig.is_allowed`. Only
the network below the connector is scripted; see `_fleet.py`. By default the fleet is
small: 40 workers and 4 replicas. `--full` simulates 500 workers and 20 replicas, which
takes minutes for each scenario. Two runs with the same options give the same numbers.

For each scenario it prints:

- the failed checks;
- the connects in one second at the busiest replica, and its multiple of the fair share;
- the imbalance of connections and of checks: maximum over mean of all replicas;
- the seconds after the last event until the imbalance of checks stays at most 1.3.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import random
import statistics
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

import anyio
from _fleet import SimulatedConnector, network, run_virtually
from _rounds import Verdict, parsed, parser, save
from starlette.requests import Request

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
)


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


POLICY = "app.GET.documents"
OPTIONS = AuthorizerOptions(url="topaz.internal:8282", insecure=True)

WINDOW = 10
"""Seconds over which the imbalance of checks is measured."""

EVEN = 1.3
"""The most that the busiest replica may get, as a multiple of the mean."""

SETTLED = 60
"""
Seconds after the last event, from which on the fleet must be even.

After a change of the DNS record it takes longer: a pool looks at it about every 30 s.
"""

SMOOTH = 5
"""Seconds over which goodput is measured."""

CROWD = 100
"""Connects in one second, from which on their distribution is judged."""

SHARE = 3.0
"""The most connects of one replica in such a second, as a multiple of its share."""


@dataclasses.dataclass(frozen=True)
class Size:
    """
    The size of a fleet, and its load.

    Attributes:
        workers: The number of workers, each with one pool.
        replicas: The number of replicas.
        rate: The checks per second of one worker.
        service: The mean of the seconds that a replica needs for one check.
        parallel: The checks that one replica serves at the same time.
        streams: The streams of each connection that a pool uses.
        warm_up: Seconds before the first event.
    """

    workers: int
    replicas: int
    rate: float
    service: float
    parallel: int
    streams: int = 1
    warm_up: float = 30.0

    @property
    def capacity(self) -> float:
        """The checks per second that one replica can serve."""
        return self.parallel / self.service

    @property
    def load(self) -> float:
        """The rate of all checks, as a share of the capacity of all replicas."""
        return self.workers * self.rate / (self.capacity * self.replicas)


FULL = Size(workers=500, replicas=20, rate=10.0, service=0.1, parallel=36)
SMALL = Size(workers=40, replicas=4, rate=5.0, service=0.2, parallel=14)


# -- the fleet ------------------------------------------------------------------------


class Fleet:
    """
    The workers of one scenario, and the numbers of each second.

    Attributes:
        events: When an event began or ended, in seconds.
        begun, answered: Checks, by the second in which they began or were answered.
        failed: Failed checks, by class and status of the error.
        seconds: A `Second` for each second so far.
    """

    def __init__(self, size, net, tasks, seed):
        self.size = size
        self.net = net
        self.now = net.agenda.now
        self.workers = []
        self.events = []
        self.begun, self.answered = Counter(), Counter()
        self.failed = Counter()
        self.latencies = []
        self.seconds = []
        self._tasks = tasks
        self._random = random.Random(f"{seed} workers")
        self._in_flight = Counter()

    def happens(self):
        """Record that an event begins or ends now."""
        self.events.append(self.now())

    async def open_worker(self):
        """Open the pool of one more worker."""
        pool = ConnectionPool(
            connector=SimulatedConnector(self.net),
            streams_per_connection=self.size.streams,
        )
        config = TopazConfig(
            authorizer_options=OPTIONS,
            policy_path_root="app",
            identity_provider=_identity,
            connection_pool=pool,
        )
        self.workers.append(config)
        await pool.initialize()

    async def deploy(self):
        """Replace all workers at once. The old ones finish their checks."""
        old, self.workers = self.workers, []
        for _ in old:
            await self.open_worker()
        for config in old:
            self._tasks.start_soon(self._stop, config)

    async def _stop(self, config):
        """Stop a worker as a server does: its requests end before its pool closes."""
        while self._in_flight[config]:  # noqa: ASYNC110  (there is no event)
            await anyio.sleep(0.01)
        await config.connection_pool.close()

    async def ask(self):
        """Send checks from random workers, in random intervals, without end."""
        mean = self.size.workers * self.size.rate
        due = self.now()
        while True:
            due += self._random.expovariate(mean)
            if due > self.now():
                await anyio.sleep(due - self.now())
            config = self.workers[int(self._random.random() * len(self.workers))]
            self._in_flight[config] += 1
            self._tasks.start_soon(self._check, config)

    async def _check(self, config):
        began = self.now()
        self.begun[int(began)] += 1
        # Each check has its own request, because equal checks of one share an answer.
        request = Request({"type": "http", "headers": [], "path_params": {}})
        try:
            await config.is_allowed(request, POLICY)
        except Exception as error:  # noqa: BLE001  (each failure is counted)
            code = getattr(error, "code", None)
            name = type(error).__name__
            self.failed[f"{name} {code().name}" if code else name] += 1
        else:
            self.answered[int(self.now())] += 1
            self.latencies.append(self.now() - began)
        self._in_flight[config] -= 1

    async def watch(self):
        """Record the numbers of each replica every second."""
        before: dict[object, tuple[int, int]] = {}
        while True:
            await anyio.sleep(int(self.now()) + 1 - self.now())
            serving = self.net.serving()
            checks, connects, connections = {}, {}, {}
            for each in self.net.replicas:
                was = before.get(each, (0, 0))
                before[each] = each.checks, each.connects
                checks[each.number] = each.checks - was[0]
                connects[each.number] = each.connects - was[1]
                connections[each.number] = len(each.connections)
            numbers = [each.number for each in serving]
            self.seconds.append(Second(numbers, checks, connects, connections))


def _identity(_request):
    return Identity(IdentityType.NONE)


@dataclasses.dataclass(frozen=True)
class Second:
    """
    One second of a fleet. The three dicts have the number of a replica as the key.

    Attributes:
        serving: The numbers of the replicas that served at its end.
        checks: The checks that reached each replica.
        connects: The connections that each replica accepted.
        connections: The open connections of each replica at its end.
    """

    serving: list[int]
    checks: dict[int, int]
    connects: dict[int, int]
    connections: dict[int, int]


# -- scenarios ------------------------------------------------------------------------


async def rolling(fleet):
    """All replicas restart, one after the other, at the same addresses."""
    for replica in fleet.net.replicas:
        await replica.restart(drain=2.0, down=3.0)
        await anyio.sleep(1.0)


async def renewal(fleet):
    """All replicas are replaced by new ones with new addresses, one after the other."""
    size = fleet.size
    for old in fleet.net.replicas[: size.replicas]:
        fleet.net.add(size.parallel, size.service)
        await anyio.sleep(1.0)
        fleet.net.unpublish(old)
        old.stop()
        await anyio.sleep(3.0)
        old.crash()
        fleet.net.remove(old)


async def slow(fleet):
    """One replica becomes three times slower, for 30 s."""
    fleet.net.replicas[0].slowness = 3.0
    await anyio.sleep(30.0)
    fleet.net.replicas[0].slowness = 1.0


async def frozen(fleet):
    """One replica freezes, and is restarted after 30 s."""
    replica = fleet.net.replicas[0]
    replica.freeze()
    await anyio.sleep(30.0)
    replica.crash()
    await anyio.sleep(3.0)
    replica.start()


async def zone(fleet):
    """Half of the replicas crash, and start again after 30 s."""
    await _lose_half(fleet, lambda replica: replica.crash())


async def dark_zone(fleet):
    """Half of the replicas fall silent, and start again after 30 s."""
    await _lose_half(fleet, lambda replica: replica.vanish())


async def _lose_half(fleet, lose):
    lost = fleet.net.replicas[: fleet.size.replicas // 2]
    for replica in lost:
        lose(replica)
    await anyio.sleep(30.0)
    for replica in lost:
        replica.crash()
        replica.start()


async def scaling(fleet):
    """The number of replicas doubles."""
    for _ in range(fleet.size.replicas):
        fleet.net.add(fleet.size.parallel, fleet.size.service)
    await anyio.sleep(fleet.net.dns_lag)


async def deployment(fleet):
    """All workers are replaced at the same moment."""
    await fleet.deploy()


@dataclasses.dataclass(frozen=True)
class Scenario:
    """
    A scenario, and its goals.

    Attributes:
        run: Makes the events happen.
        fails: The most failed checks, as a share of all. None: it is not judged.
        recovers: The seconds within which goodput reaches the remaining capacity.
        settles: The seconds after the events, from which on the fleet must be even.
    """

    run: Callable[[Fleet], Awaitable[None]]
    fails: float | None = 0.0
    recovers: float | None = None
    settles: int = SETTLED

    @property
    def title(self) -> str:
        return self.run.__doc__.strip()


SCENARIOS = {
    "rolling": Scenario(rolling),
    "renewal": Scenario(renewal),
    # The replica needs longer than the budget for 1 of 4,000 checks.
    "slow": Scenario(slow, fails=0.001),
    "frozen": Scenario(frozen),
    "zone": Scenario(zone, fails=None, recovers=2.0),
    "dark_zone": Scenario(dark_zone, fails=None, recovers=2.0, settles=80),
    "scaling": Scenario(scaling, settles=80),
    "deployment": Scenario(deployment),
}


# -- reports --------------------------------------------------------------------------


def imbalance(values):
    """Return maximum over mean, 1 if all are 0."""
    values = list(values)
    mean = statistics.fmean(values) if values else 0.0
    return max(values) / mean if mean else 1.0


def checks_imbalance(seconds):
    """Return the imbalance of checks over replicas that served all *seconds*."""
    serving = set.intersection(*(set(each.serving) for each in seconds))
    return imbalance(sum(each.checks[n] for each in seconds) for n in serving)


@dataclasses.dataclass(frozen=True)
class Report:
    """
    The numbers of one scenario. All times are seconds.

    Attributes:
        checks: All checks.
        failed: The failed checks, by error.
        median, p99: The latencies of answered checks.
        busiest: The most connects of one replica in one second.
        share: The most connects of one replica as a multiple of its fair share, of all
            seconds with at least `CROWD` connects.
        connects: All connects after the warm-up.
        connections: The open connections at the end.
        of_checks: The imbalance of checks, in windows of `WINDOW` seconds.
        of_connections: The imbalance of connections, at the end of these windows.
        event: The beginning of the events, and their end.
        even_after: The seconds from the end of the events until the imbalance of checks
            stays at most `EVEN`. None: never.
        settled: The worst imbalance of checks after `settles` of the scenario.
        recovered_after: The seconds from the beginning of the events until goodput
            stays at the remaining capacity.
        goodput: Answers in each second.
    """

    checks: int
    failed: dict[str, int]
    median: float
    p99: float
    busiest: int
    share: float
    connects: int
    connections: int
    of_checks: list[float]
    of_connections: list[float]
    event: tuple[float, float]
    even_after: float | None
    settled: float
    recovered_after: float | None
    goodput: list[int]


def reported(fleet, settles=SETTLED):
    """Return the `Report` of *fleet*."""
    size, seconds = fleet.size, fleet.seconds
    begin, end = fleet.events
    after = seconds[int(size.warm_up) :]
    crowds = [each for each in seconds if sum(each.connects.values()) >= CROWD]
    # A window ends at each second from the first full one on.
    ends = range(WINDOW, len(seconds) + 1)
    windows = {at: checks_imbalance(seconds[at - WINDOW : at]) for at in ends}
    uneven = [at for at, worst in windows.items() if worst > EVEN and at > end]
    last = max(uneven, default=0)
    even_after = None if last == len(seconds) else max(0.0, last + 1 - WINDOW - end)
    latencies = sorted(fleet.latencies)
    goodput = [fleet.answered[at] for at in range(len(seconds))]
    return Report(
        checks=sum(fleet.begun.values()),
        failed=dict(sorted(fleet.failed.items())),
        median=round(latencies[len(latencies) // 2], 4),
        p99=round(latencies[len(latencies) * 99 // 100], 4),
        busiest=max(max(each.connects.values()) for each in seconds),
        share=round(max((_share(each) for each in crowds), default=0.0), 2),
        connects=sum(sum(each.connects.values()) for each in after),
        connections=sum(seconds[-1].connections.values()),
        of_checks=[round(windows[at], 3) for at in ends[::WINDOW]],
        of_connections=[
            round(imbalance(at.connections[n] for n in at.serving), 3)
            for at in seconds[WINDOW - 1 :: WINDOW]
        ],
        event=(begin, end),
        even_after=None if even_after is None else round(even_after, 1),
        settled=round(
            max(
                (x for at, x in windows.items() if at - WINDOW >= end + settles),
                default=0.0,
            ),
            3,
        ),
        recovered_after=_recovered(fleet, goodput, begin, end),
        goodput=goodput,
    )


def _share(second):
    """Return the connects of the busiest replica as a multiple of the fair share."""
    fair = sum(second.connects.values()) / max(1, len(second.serving))
    return max(second.connects.values()) / fair


def _recovered(fleet, goodput, begin, end):
    """
    Return the seconds after *begin* until goodput stays at nine tenths, or None.

    Goodput is compared with what was asked for, or with the capacity if that is less.
    Both are sums over `SMOOTH` seconds, because arrivals are random.
    """
    # In the last second, lost replicas are back. They have no connections yet.
    first, last = int(begin), int(end) - 1
    can = [
        min(fleet.begun[at], len(each.serving) * fleet.size.capacity)
        for at, each in enumerate(fleet.seconds)
    ]
    low = [
        at
        for at in range(first, last - SMOOTH + 1)
        if sum(goodput[at : at + SMOOTH]) < 0.9 * sum(can[at : at + SMOOTH])
    ]
    if low and low[-1] == last - SMOOTH:
        return None
    return max(0.0, low[-1] + 1 - begin) if low else 0.0


def verdicts(name, report):
    """Return the verdicts on the goals of the scenario *name*."""
    scenario = SCENARIOS[name]
    failed = sum(report.failed.values())
    found = [
        Verdict(
            f"{name}: at most {SHARE:g} x the fair share of connects",
            f"{report.share:.2f} x",
            report.share <= SHARE,
        ),
        Verdict(
            f"{name}: imbalance of checks at most {EVEN:g} after {scenario.settles} s",
            f"{report.settled:.2f}",
            report.settled <= EVEN,
        ),
    ]
    if scenario.fails is not None:
        most = int(scenario.fails * report.checks)
        goal = f"{name}: at most {most} checks fail" if most else f"{name}: none fails"
        text = f"{failed:,} of {report.checks:,}"
        found.insert(0, Verdict(goal, text, failed <= most))
    if scenario.recovers is not None:
        after = report.recovered_after
        text = "never" if after is None else f"{after:.0f} s"
        goal = f"{name}: goodput at the remaining capacity in {scenario.recovers:g} s"
        met = after is not None and after <= scenario.recovers
        found.append(Verdict(goal, text, met))
    return found


async def _run(name, size, seed, backend):
    scenario = SCENARIOS[name]
    async with (
        network(seed, backend, dns_lag=5.0) as net,
        anyio.create_task_group() as tasks,
    ):
        for _ in range(size.replicas):
            net.add(size.parallel, size.service)
        net.is_running = True
        await anyio.sleep(0.001)
        fleet = Fleet(size, net, tasks, seed)
        for _ in range(size.workers):
            await fleet.open_worker()
        tasks.start_soon(fleet.watch)
        tasks.start_soon(fleet.ask)
        await anyio.sleep(size.warm_up - fleet.now())
        fleet.happens()
        await scenario.run(fleet)
        fleet.happens()
        await anyio.sleep(scenario.settles + 2 * WINDOW + 1)
        report = reported(fleet, scenario.settles)
        tasks.cancel_scope.cancel()
    for config in fleet.workers:
        await config.connection_pool.close(0)
    return report


def simulated(name, size=SMALL, seed=1, backend="asyncio"):
    """Run the scenario *name* and return its `Report`."""
    level = logging.getLogger("fastapi_topaz").level
    logging.getLogger("fastapi_topaz").setLevel(logging.ERROR)
    try:
        run = functools.partial(_run, name, size, seed, backend)
        return run_virtually(run, seed, backend)
    finally:
        logging.getLogger("fastapi_topaz").setLevel(level)


def show(name, report, took):
    print(f"\n{name}: {SCENARIOS[name].title}")
    even = "never" if report.even_after is None else f"{report.even_after:g} s"
    rows = {
        "checks": f"{report.checks:,}",
        "failed": f"{sum(report.failed.values()):,} {report.failed or ''}",
        "latency, median and p99": f"{report.median:.3f} s, {report.p99:.3f} s",
        "connects": f"{report.connects:,}",
        "connections at the end": f"{report.connections:,}",
        "connects in one second, busiest replica": f"{report.busiest:,}",
        "the same, times its fair share": f"{report.share:.2f}",
        "events": "{:.0f} s .. {:.0f} s".format(*report.event),
        "imbalance of checks": " ".join(f"{x:.2f}" for x in report.of_checks),
        "imbalance of connections": " ".join(f"{x:.2f}" for x in report.of_connections),
        "even after": even,
        "worst later": f"{report.settled:.2f}",
        "CPU": f"{took:.1f} s",
    }
    for row, value in rows.items():
        print(f"  {row:<41}{value}")


def main(options):
    size = FULL if options.full else SMALL
    size = dataclasses.replace(size, streams=options.streams)
    print(
        f"{size.workers} workers, {size.replicas} replicas, load {size.load:.2f}, "
        f"10 connections x {size.streams} streams, seed {options.seed}, "
        f"{options.backend}"
    )
    goals, rows = [], {}
    for name in options.scenario:
        began = time.process_time()
        report = simulated(name, size, options.seed, options.backend)
        show(name, report, time.process_time() - began)
        found = verdicts(name, report)
        for each in found:
            print(each, flush=True)
        goals += found
        rows[name] = dataclasses.asdict(report)
    save(options, "fleet", {"title": "A simulated fleet", "rows": rows, "goals": goals})
    return 0 if all(each.met for each in goals) else 1


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--full", action="store_true", help="500 workers")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--streams", type=int, default=1)
    arguments.add_argument("--backend", default="asyncio", choices=["asyncio", "trio"])
    arguments.add_argument(
        "--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS)
    )
    sys.exit(main(parsed(arguments, scenario=["rolling"])))
