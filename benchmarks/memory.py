"""
What the pool keeps: memory for each lease and connection, files and threads.

    .venv/bin/python benchmarks/memory.py [--backend asyncio trio]
        [--cycles 1000000] [--quick] [--save]

Three questions, each in a process of its own: how much the process grows by a million
leases; how much Python memory one idle connection takes, compared with a channel of
grpc.aio with the same options that has made a call, too; and whether all files and
threads are gone after a thousand connections were opened and closed. The connections of
the last two lead to an authorizer in one more process.

The exit code is 1 if a file or thread is left, or if connections cost more than they
may; what the operating system says of memory is not exact enough for that.
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
"""Times that all of them are opened and closed."""

WARM_UP = 50_000
GROWTH = 1 * MIB
EXTRA = 4 * KIB
"""Bytes of Python memory that a connection may take more than a channel."""

PATIENCE = 10.0
"""Seconds until files and threads must be gone; gRPC ends its own when they idle."""

process = psutil.Process()


def rss():
    gc.collect()
    return process.memory_info().rss


# -- leases -----------------------------------------------------------------------


async def cycles(count):
    """Return the bytes that the process grows by *count* leases."""
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
            await anyio.lowlevel.checkpoint()  # the pool's own tasks want turns


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
    """Return what *measure* counts for one connection."""
    async with opened(2, url):  # imports, caches, threads
        await anyio.sleep(0.5)
    before = measure()
    async with opened(CONNECTIONS, url):
        await anyio.sleep(0.5)
        return (measure() - before) / CONNECTIONS


def traced():
    """Return the bytes of Python memory that were taken since the first call."""
    if not tracemalloc.is_tracing():
        tracemalloc.start()
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


# -- files and threads --------------------------------------------------------------


def held():
    """Return how many files and threads there are, and how many are Python's."""
    return process.num_fds(), process.num_threads(), threading.active_count()


async def open_and_close(url):
    async with connections(CONNECTIONS, url):
        pass


async def leftovers(url):
    """Return what is held before and after connections were opened and closed."""
    await open_and_close(url)  # gRPC's own files and threads, which it keeps
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
    """Return the result of one part, run in a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--backend", backend]
    command += ["--argument", *map(str, arguments)]
    told = subprocess.check_output(command, text=True)
    return json.loads(told)


PARTS = {
    "cycles": lambda count: cycles(int(count)),
    "python of channels": functools.partial(cost, channels, traced),
    "python of pool": functools.partial(cost, connections, traced),
    # Apart, because tracing takes memory of its own.
    "process of channels": functools.partial(cost, channels, rss),
    "process of pool": functools.partial(cost, connections, rss),
    "leftovers": leftovers,
}


def leases(options):
    """Tell how much leases make the process grow."""
    reached = []
    for backend in options.backend:
        growth = apart("cycles", backend, options.cycles)
        goal = f"{options.cycles:,} leases on {backend} grow RSS by less than 1 MiB"
        reached.append(Verdict(goal, f"{growth / KIB:+,.0f} KiB", growth < GROWTH))
        print(reached[-1])
    return reached


def idle(options, url):
    """Tell what an idle connection takes; return rows and how the goal was met."""
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
    """Tell what is left of connections; return rows and how the goal was met."""
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
