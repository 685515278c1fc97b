"""
Measures the time of one lease with a free connection: acquire and release, one task.

    .venv/bin/python benchmarks/acquire.py [--backend asyncio uvloop trio]
        [--rounds 15] [--leases 3000] [--quick] [--save]

`pip install --group peers` installs the other pools. Missing ones are left out. The
connections do nothing. The floor is the minimum work of a pool on anyio's
`CapacityLimiter`: take a token and a connection, then return both.
"""

from __future__ import annotations

import functools
import statistics
import time

import anyio
from _peers import (
    BACKENDS,
    OURS,
    PREDECESSOR,
    open_ours,
    peers,
    run,
    sqlalchemy_sync,
)
from _rounds import Goal, Race, parsed, parser, save, versions


FLOOR = "floor"
EXPLICIT = "ours, acquire and release"
CONNECTIONS = 10
WARM_UP = 200
CHUNK = 30
"""
Leases timed together. The median of all chunks of a round counts. Some short chunks are
free of other load on the machine. The long rounds of slow contestants never are.
"""


def microseconds(chunks):
    return statistics.median(chunks) / CHUNK * 1e6


async def floor(count):
    limiter = anyio.CapacityLimiter(CONNECTIONS)
    idle = [object() for _ in range(CONNECTIONS)]
    chunks = []
    for _ in range(count // CHUNK):
        began = time.perf_counter()
        for _ in range(CHUNK):
            limiter.acquire_nowait()
            conn = idle.pop()
            idle.append(conn)
            limiter.release()
        chunks.append(time.perf_counter() - began)
    return microseconds(chunks)


async def entered(open_pool, count):
    async with open_pool(CONNECTIONS) as lease:
        for _ in range(WARM_UP):
            async with lease():
                pass
        chunks = []
        for _ in range(count // CHUNK):
            began = time.perf_counter()
            for _ in range(CHUNK):
                async with lease():
                    pass
            chunks.append(time.perf_counter() - began)
        return microseconds(chunks)


async def explicit(count):
    async with open_ours(CONNECTIONS) as pool:
        for _ in range(WARM_UP):
            await pool.release(await pool.acquire())
        chunks = []
        for _ in range(count // CHUNK):
            began = time.perf_counter()
            for _ in range(CHUNK):
                conn = await pool.acquire()
                await pool.release(conn)
            chunks.append(time.perf_counter() - began)
        return microseconds(chunks)


def synchronous(count):
    pool = sqlalchemy_sync(CONNECTIONS)
    for _ in range(WARM_UP):
        pool.connect().close()
    chunks = []
    for _ in range(count // CHUNK):
        began = time.perf_counter()
        for _ in range(CHUNK):
            pool.connect().close()
        chunks.append(time.perf_counter() - began)
    return microseconds(chunks)


def contestants(backend, found, count):
    """Return the contestants that run on *backend*, by name."""
    racing = {
        FLOOR: functools.partial(run, backend, floor, count),
        EXPLICIT: functools.partial(run, backend, explicit, count),
    }
    for peer in found:
        if backend in peer.backends:
            racing[peer.name] = functools.partial(
                run, backend, entered, peer.open, count
            )
        if backend == "asyncio" and peer.name.startswith("SQLAlchemy"):
            name = peer.name.replace("AsyncAdaptedQueuePool", "QueuePool, sync")
            racing[name] = functools.partial(synchronous, count)
    return racing


def others_of(names):
    return tuple(name for name in names if name not in {OURS, EXPLICIT, FLOOR})


def goals(backend, names):
    found = []
    if backend == "asyncio":
        found += [Goal(OURS, (PREDECESSOR,), 0.20), Goal(OURS, (FLOOR,), 5)]
    if backend == "trio":
        found.append(Goal(OURS, (FLOOR,), 4))
    if others := others_of(names):
        found.append(Goal(OURS, others, 1, f"{OURS} at most 1 x every other pool"))
    return found


def main(options):
    print(versions("fastapi-topaz-pool", "anyio", "trio", "uvloop"))
    found = peers()
    for backend in options.backend:
        racing = contestants(backend, found, options.leases)
        race = Race(f"One uncontended lease on {backend}", "us")
        race.run(racing, options.rounds, others_of(racing))
        reached = goals(backend, racing)
        race.show(FLOOR, reached)
        save(options, f"acquire-{backend}", race.data(reached))


if __name__ == "__main__":
    arguments = parser(__doc__, rounds=15)
    arguments.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS)
    arguments.add_argument("--leases", type=int, default=3000)
    main(parsed(arguments, rounds=2, leases=600))
