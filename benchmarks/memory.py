"""
Measures the memory of leases and connections, and looks for leaked files and threads.

    .venv/bin/python benchmarks/memory.py [--backend asyncio trio]
        [--cycles 1000000] [--quick] [--save]

There are three measurements, each in its own process:

- How much memory does the process gain in a million leases?
- How much Python memory does one idle connection take? The reference is a channel of
  grpc.aio with the same options, which has also made a call.
- Are all files and threads gone after a thousand connections were opened and closed?

The connections of the last two lead to an authorizer in another process.

If a file or thread remains, or if connections take too much Python memory, the exit
code is 1. The memory that the operating system reports is not exact enough for that.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import subprocess
import sys
import threading
import tracemalloc

import anyio
import grpc.aio
import psutil
from _peers import open_ours, run
from _rounds import Verdict, parsed, parser, save, versions
from _server import authorizer

from fastapi_topaz import AuthorizerOptions, ConnectionPool
from fastapi_topaz._authorizer.options import PROBE
from fastapi_topaz._grpcio.channel import _channel_options


BACKENDS = ("asyncio", "trio")
KIB = 1024
MIB = 1024 * KIB
CONNECTIONS = 100
OPENINGS = 10
"""How many times all connections are opened and closed."""

WARM_UP = 50_000
GROWTH = 1 * MIB
EXTRA = 4 * KIB
"""Maximum Python memory of a connection above that of a channel, in bytes."""

PATIENCE = 10.0
"""Time limit in seconds for files and threads to go. gRPC ends its idle threads."""

process = psutil.Process()


def rss():
    gc.collect()
    return process.memory_info().rss


# -- leases -----------------------------------------------------------------------


async def cycles(count):
    """Return the growth of the process in *count* leases, in bytes."""
    async with open_ours(10) as pool:
        await lease(pool, WARM_UP)
        before = rss()
        await lease(pool, count)
        return rss() - before


async def lease(pool, count):
    for number in range(count):
        async with pool.acquire():
            pass
        if not number % 100:
            await anyio.lowlevel.checkpoint()  # lets the pool's own tasks run


# -- connections ------------------------------------------------------------------


def pool_of(count, url):
    pool = ConnectionPool(min_connections=count, max_connections=count, eager_init=True)
    pool.configure(AuthorizerOptions(url=url, insecure=True))
    return pool


async def ask_all(pool, count):
    """Make one call on each connection."""
    async with contextlib.AsyncExitStack() as leases:
        for _ in range(count):
            conn = await leases.enter_async_context(pool.acquire())
            await conn.info(timeout=5)


@contextlib.asynccontextmanager
async def connections(count, url):
    async with pool_of(count, url) as pool:
        await ask_all(pool, count)
        assert pool.status().idle == count
        yield


@contextlib.asynccontextmanager
async def channels(count, url):
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(count):
            channel = grpc.aio.insecure_channel(url, options=_channel_options(10))
            await stack.enter_async_context(channel)
            await channel.unary_unary(PROBE)(b"", timeout=5)
        yield


async def cost(opened, measure, url):
    """Return the result of *measure* per connection."""
    async with opened(2, url):  # warm-up: imports, caches, threads
        await anyio.sleep(0.5)
    before = measure()
    async with opened(CONNECTIONS, url):
        await anyio.sleep(0.5)
        return (measure() - before) / CONNECTIONS


def traced():
    """Return the Python memory allocated since the first call, in bytes."""
    if not tracemalloc.is_tracing():
        tracemalloc.start()
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


# -- files and threads --------------------------------------------------------------


def held():
    """Return the counts of files, of all threads and of Python threads."""
    return process.num_fds(), process.num_threads(), threading.active_count()


async def open_and_close(url):
    async with connections(CONNECTIONS, url):
        pass


async def leftovers(url):
    """Return the counts of `held` before and after connections open and close."""
    await open_and_close(url)  # gRPC keeps files and threads of its own
    await anyio.sleep(1)
    before = held()
    for _ in range(OPENINGS):
        await open_and_close(url)
    with anyio.move_on_after(PATIENCE):
        while any(now > then for now, then in zip(held(), before, strict=True)):  # noqa: ASYNC110
            await anyio.sleep(0.1)
    return before, held()


# -- processes ----------------------------------------------------------------------


def apart(part, backend, *arguments):
    """Run one part in its own process and return the result."""
    command = [sys.executable, __file__, "--part", part, "--backend", backend]
    command += ["--argument", *map(str, arguments)]
    told = subprocess.check_output(command, text=True)
    return json.loads(told)


PARTS = {
    "cycles": lambda count: cycles(int(count)),
    "python of channels": functools.partial(cost, channels, traced),
    "python of pool": functools.partial(cost, connections, traced),
    # Separate parts, because tracing takes memory too.
    "process of channels": functools.partial(cost, channels, rss),
    "process of pool": functools.partial(cost, connections, rss),
    "leftovers": leftovers,
}


def leases(options):
    """Print and return the verdicts on the growth of the process by leases."""
    reached = []
    for backend in options.backend:
        growth = apart("cycles", backend, options.cycles)
        goal = f"{options.cycles:,} leases on {backend} grow RSS by less than 1 MiB"
        reached.append(Verdict(goal, f"{growth / KIB:+,.0f} KiB", growth < GROWTH))
        print(reached[-1])
    return reached


def idle(options, url):
    """Print the memory of an idle connection. Return rows and verdicts."""
    rows = []
    reached = []
    for who, backend in [("channel", "asyncio")] + [
        ("connection", backend) for backend in options.backend
    ]:
        part = "channels" if who == "channel" else "pool"
        python = apart(f"python of {part}", backend, url)
        resident = apart(f"process of {part}", backend, url)
        rows.append(
            {"of": who, "backend": backend, "python": python, "process": resident}
        )
        print(
            f"\nOne of {CONNECTIONS}, {who} on {backend}: {python / KIB:.1f} KiB of "
            f"Python, {resident / KIB:.0f} KiB of the process"
        )
        if who == "connection":
            extra = python - rows[0]["python"]
            goal = (
                f"idle connection on {backend} at most {EXTRA / KIB:g} KiB of Python "
                "above a channel"
            )
            reached.append(Verdict(goal, f"{extra / KIB:+.1f} KiB", extra <= EXTRA))
            print(reached[-1])
    return rows, reached


def kept(options, url):
    """Print the files and threads that remain. Return rows and verdicts."""
    rows = []
    reached = []
    for backend in options.backend:
        before, after = apart("leftovers", backend, url)
        left = [max(0, now - then) for now, then in zip(after, before, strict=True)]
        rows.append({"backend": backend, "before": before, "after": after})
        goal = (
            f"{OPENINGS * CONNECTIONS:,} connections on {backend} leave no file and no "
            "thread"
        )
        told = f"{before[0]} -> {after[0]} files, {before[1]} -> {after[1]} threads"
        reached.append(Verdict(goal, told, not any(left)))
        print(reached[-1])
    return rows, reached


def main(options):
    print(versions("fastapi-topaz-pool", "grpcio", "anyio", "trio"))
    growth = leases(options)
    with authorizer() as server:
        rows, extra = idle(options, server.url)
        leftover, left = kept(options, server.url)
    data = {
        "title": "Memory, files and threads",
        "connections": rows,
        "leftovers": leftover,
        "goals": [*growth, *extra, *left],
    }
    save(options, "memory", data)
    return 0 if all(each.met for each in extra + left) else 1


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS)
    arguments.add_argument("--cycles", type=int, default=1_000_000)
    arguments.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments.add_argument("--argument", default=[], nargs="*", help=argparse.SUPPRESS)
    options = parsed(arguments, cycles=100_000)
    if options.part:
        (backend,) = options.backend
        result = run(backend, PARTS[options.part], *options.argument)
        print(json.dumps(result))
        sys.exit()
    sys.exit(main(options))
