"""
Measures the cost of metrics and traces per lease and per check, with and without SDK.

    .venv/bin/python benchmarks/metrics.py [--backend asyncio trio]
        [--rounds 15] [--leases 6000] [--calls 40000] [--quick] [--save]

It prints three tables:

- One uncontended lease, as in `acquire.py`. The floor has an observer that does
  nothing, instead of the metrics.
- The same calls alone in a hot loop, minus the time of an empty loop. The goal is
  judged by these, because they vary less than the difference of two leases. But in a
  hot loop, everything stays in the caches of the processor.
- The number of measurements that the pool makes for one lease.

If that number is not one record for the wait and one for the hold, the exit code is 1.
No global provider is set here. So a pool without a provider behaves as in an
application without an SDK.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import sys
import time
import timeit
import types

import anyio
from _peers import BACKENDS, OURS, run
from _rounds import Race, Verdict, parsed, parser, save, versions
from opentelemetry import trace
from opentelemetry.context import attach, detach
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

from fastapi_topaz import ConnectionPool
from fastapi_topaz._authorizer.calls import AuthorizerCalls
from fastapi_topaz._authorizer.messages import IS
from fastapi_topaz._authorizer.pool import PooledConnection
from fastapi_topaz._telemetry.tracing import Tracing, propagated
from fastapi_topaz.testing import FakeConnector


FLOOR = "floor, no metrics"
NO_SDK = f"{OURS}, no SDK"
SDK = "SDK"
NAMED = "SDK, named pool"
BOTH = "SDK, semantic_conventions"
LEAKS = "no SDK, leak_threshold"

LEASE = "one lease on asyncio, no SDK"
ACQUIRED = "metrics of acquire(), no SDK"
LEASED = "metrics of a lease, no SDK"

MOST = 0.3
"""Limit for the metrics of one acquire() without an SDK, in microseconds."""

CONNECTIONS = 10
WARM_UP = 200
CHUNK = 30
"""Leases timed together. The median of all chunks of a round counts."""

CALLS = 1000
"""Calls timed together in a hot loop."""

CALLERS = 20
"""Tasks whose leases are counted. Half of them must wait."""

WAIT, HOLD = "topaz_pool_acquire_latency", "topaz_pool_hold_time"
WAIT_TOO, HOLD_TOO = "db.client.connection.wait_time", "db.client.connection.use_time"


class Nobody:
    """An observer that does nothing."""

    def acquired(self, waited, /):
        pass

    def released(self, held, /):
        pass

    def connected(self, took, /):
        pass


def provider():
    """Return an SDK provider whose metrics are never collected."""
    return MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)


# -- a lease ----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def opened(observer=None, **parameters):
    pool = ConnectionPool(
        connector=FakeConnector(),
        min_connections=CONNECTIONS,
        max_connections=CONNECTIONS,
        eager_init=True,
        **parameters,
    )
    if observer is not None:
        pool._metrics.observer = observer
    async with pool:
        yield pool


async def leases(count, observer=None, **parameters):
    """Return the microseconds of one lease."""
    async with opened(observer, **parameters) as pool:
        for _ in range(WARM_UP):
            async with pool.acquire():
                pass
        chunks = []
        for _ in range(count // CHUNK):
            began = time.perf_counter()
            for _ in range(CHUNK):
                async with pool.acquire():
                    pass
            chunks.append(time.perf_counter() - began)
        return statistics.median(chunks) / CHUNK * 1e6


def pools(backend, count):
    """Return the contestants that take leases, by name."""
    sdk = provider()
    ways = {
        FLOOR: {"observer": Nobody()},
        NO_SDK: {},
        SDK: {"meter_provider": sdk},
        NAMED: {"meter_provider": provider(), "name": "orders"},
        BOTH: {"meter_provider": provider(), "semantic_conventions": True},
        LEAKS: {"leak_threshold": 60.0},
    }
    return {
        name: functools.partial(run, backend, functools.partial(leases, count, **way))
        for name, way in ways.items()
    }


def above(race, name, other):
    """Return the median of the differences of *name* and *other* in all rounds."""
    pairs = zip(race.rounds[name], race.rounds[other], strict=True)
    return statistics.median(mine - theirs for mine, theirs in pairs)


# -- the calls by themselves --------------------------------------------------------


class Cost:
    """Measures a statement minus a base statement, in microseconds, at each call."""

    def __init__(self, count, statement, base="pass", setup="pass", **names):
        self._count = count // CALLS
        self._timers = [
            timeit.Timer(each, setup, globals=names) for each in (statement, base)
        ]

    def __call__(self):
        chunks = []
        for _ in range(self._count):
            took, base = (timer.timeit(CALLS) for timer in self._timers)
            chunks.append(took - base)
        return statistics.median(chunks) / CALLS * 1e6


class NoDel(AuthorizerCalls):
    """A lease without the `__del__` that detects a missing release."""

    __slots__ = ("__weakref__", "_claim", "_open_pool", "_pool")
    __init__ = PooledConnection.__init__


def observers(**parameters):
    """Return the observer and the counters of a pool."""
    pool = ConnectionPool(connector=FakeConnector(), **parameters)
    return types.SimpleNamespace(
        observer=pool._metrics.observer, counters=pool._counters
    )


def calls(count):
    """Return the calls that a lease or a check makes, by name."""
    cost = functools.partial(Cost, count)
    acquired = "open_pool.observer.acquired(0.0)"
    both = f"{acquired}; open_pool.observer.released(0.001)"
    counter = "open_pool.counters.acquisitions += 1"
    nobody = types.SimpleNamespace(observer=Nobody())
    sdk = observers(meter_provider=provider())
    semantic = observers(meter_provider=provider(), semantic_conventions=True)
    spans = TracerProvider(shutdown_on_exit=False)
    spans.add_span_processor(SpanProcessor())
    check = "with tracing.check('policy', 'allowed', None) as span:"
    span = f"{check} span.decided(True, 'authorizer')"
    current = trace.set_span_in_context(spans.get_tracer("benchmark").start_span("x"))
    return {
        LEASE: functools.partial(run, "asyncio", leases, max(count // 10, CHUNK)),
        "floor, the two calls of a lease": cost(both, open_pool=nobody),
        ACQUIRED: cost(acquired, open_pool=observers()),
        LEASED: cost(both, open_pool=observers()),
        f"{LEASED}, with its counter": cost(
            f"{counter}; {both}", open_pool=observers()
        ),
        "metrics of a lease, SDK": cost(both, open_pool=sdk),
        "metrics of a lease, SDK, semantic_conventions": cost(both, open_pool=semantic),
        "trace in the metadata, no SDK": cost("propagated(())", propagated=propagated),
        "span of a check, no SDK": cost(span, tracing=Tracing(None, IS)),
        "trace in the metadata, SDK": functools.partial(
            within, current, cost("propagated(())", propagated=propagated)
        ),
        "span of a check, SDK": cost(span, tracing=Tracing(spans, IS)),
        "__del__ of a lease": cost(
            "made(None, None, None)",
            "bare(None, None, None)",
            made=PooledConnection,
            bare=NoDel,
        ),
    }


def within(context, measure):
    """Call *measure* while *context* is the current context."""
    token = attach(context)
    try:
        return measure()
    finally:
        detach(token)


# -- records ------------------------------------------------------------------------


METHODS = {
    "create_histogram": "record",
    "create_counter": "add",
    "create_up_down_counter": "add",
    "create_gauge": "set",
}


class Counting(MeterProvider):
    """An SDK provider that counts the measurements of each instrument by name."""

    def __init__(self):
        super().__init__([InMemoryMetricReader()], shutdown_on_exit=False)
        self.made = {}
        self._meters_counted = []

    def get_meter(self, *arguments, **more):
        meter = super().get_meter(*arguments, **more)
        if meter not in self._meters_counted:  # the SDK returns one meter many times
            self._meters_counted.append(meter)
            for create, method in METHODS.items():
                counted = functools.partial(
                    self._create, getattr(meter, create), method
                )
                setattr(meter, create, counted)
        return meter

    def _create(self, create, method, name, *arguments, **more):
        instrument = create(name, *arguments, **more)
        measure = getattr(instrument, method)

        def counted(*arguments, **more):
            self.made[name] = self.made.get(name, 0) + 1
            return measure(*arguments, **more)

        setattr(instrument, method, counted)
        return instrument


async def records(count, **parameters):
    """Return the measurements of *count* leases, by the name of the instrument."""
    counting = Counting()
    async with opened(meter_provider=counting, **parameters) as pool:
        counting.made.clear()  # without the measurements of connecting

        async def caller():
            for _ in range(count // CALLERS):
                async with pool.acquire():
                    await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            for _ in range(CALLERS):
                tasks.start_soon(caller)
        return dict(counting.made)


def counted(backend, count):
    """Return the records per lease on *backend*, and the verdicts on them."""
    rows, verdicts = [], []
    for way, parameters, expected in (
        (SDK, {}, (WAIT, HOLD)),
        (BOTH, {"semantic_conventions": True}, (WAIT, HOLD, WAIT_TOO, HOLD_TOO)),
    ):
        made = run(backend, functools.partial(records, count, **parameters))
        each = {name: made.get(name, 0) / count for name in (*expected, *made)}
        rows += [
            {"way": way, "backend": backend, "instrument": name, "records": number}
            for name, number in each.items()
        ]
        goal = f"{way}: one record of the wait and one of the hold of a lease"
        goal += " by each convention" if len(expected) > 2 else ""
        reached = ", ".join(f"{number:g}" for number in each.values())
        met = made == dict.fromkeys(expected, count)
        verdicts.append(Verdict(f"{goal}, {backend}", reached, met))
    return rows, verdicts


# -- all of it ----------------------------------------------------------------------


def race_leases(options, backend):
    race = Race(f"One uncontended lease on {backend}, and its metrics", "us")
    race.run(pools(backend, options.leases), options.rounds)
    race.show(FLOOR)
    for name in (NO_SDK, SDK, NAMED, BOTH, LEAKS):
        print(f"  {name}: {above(race, name, FLOOR):+.2f} us a lease above the floor")
    save(options, f"metrics-{backend}", race.data())


def race_calls(options):
    race = Race("What a lease and a check call, by itself", "us")
    race.run(calls(options.calls), options.rounds)
    race.show(LEASE)
    acquired, leased = race.median(ACQUIRED), race.median(LEASED)
    goal = Verdict(
        f"{ACQUIRED}, below {MOST:g} us",
        f"{acquired:.3f} us ({leased:.3f} us with release())",
        acquired < MOST,
    )
    return race, goal


def main(options):
    packages = ("opentelemetry-api", "opentelemetry-sdk")
    print(versions("fastapi-topaz-pool", "anyio", "trio", *packages))
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        del os.environ[name]  # it could configure a global SDK
    for backend in options.backend:
        race_leases(options, backend)
    race, goal = race_calls(options)
    rows, strict = [], []
    for backend in options.backend:
        found, verdicts = counted(backend, options.leases // CALLERS * CALLERS)
        rows += found
        strict += verdicts
    print("\nMeasurements of one lease, with an SDK")
    for row in rows:
        print("  {records:g}  {instrument} ({way}, {backend})".format(**row))
    goals = [goal, *strict]
    for each in goals:
        print(each)
    data = race.data() | {"records": rows, "goals": goals}
    save(options, "metrics-calls", data | {"with": versions(*packages)})
    return 0 if all(each.met for each in strict) else 1


if __name__ == "__main__":
    arguments = parser(__doc__, rounds=15)
    backends = ("asyncio", "trio")
    arguments.add_argument("--backend", nargs="+", choices=BACKENDS, default=backends)
    arguments.add_argument("--leases", type=int, default=6000)
    arguments.add_argument("--calls", type=int, default=40_000)
    sys.exit(main(parsed(arguments, rounds=2, leases=600, calls=4000)))
