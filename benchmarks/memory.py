"""
Measures the memory of leases and connections, and looks for leaked files and threads.

    .venv/bin/python benchmarks/memory.py [--backend asyncio trio]
        [--cycles 1000000] [--quick] [--save]

There are four measurements, each in its own process:

- How much memory does the process gain in a million leases?
- How much memory does one idle connection take, over each transport, with and without
  TLS? The reference is a channel of grpc.aio with the same options, which has also made
  a call.
- How much memory does the process gain in 20,000 cancelled calls over `native`? Over
  `grpcio`, gRPC leaks about 900 bytes for each.
- Are all files and threads gone after a thousand connections were opened and closed?

The connections of the last three lead to an authorizer in another process.

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
from pathlib import Path

import anyio
import grpc.aio
import psutil
from _peers import open_ours, run
from _rounds import Verdict, parsed, parser, save, versions
from _server import POLICY, authorizer

from fastapi_topaz import AuthorizerOptions, ConnectionPool
from fastapi_topaz._authorizer.options import PROBE
from fastapi_topaz._grpcio.channel import _channel_options
from fastapi_topaz._pool.servers import FIRST_LOOK


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

NATIVE = {"asyncio": (8, 30), "trio": (16, 40)}
"""
Maximum memory of the process for a connection over `native`, in KiB: without and with
TLS, most of whose memory OpenSSL allocates.
"""

CANCELLED = 20_000
BATCH = 100
"""Calls that are cancelled at once."""

PATIENCE = 10.0
"""Time limit in seconds for files and threads to go. gRPC ends its idle threads."""

process = psutil.Process()


def ways(options):
    """Yield each transport with each backend that it works on."""
    yield from (("native", backend) for backend in options.backend)
    if "asyncio" in options.backend:
        yield "grpcio", "asyncio"


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


def pool_of(count, url, ca, transport):
    """Return a pool. *ca* is the file with the CA, or empty for plaintext."""
    pool = ConnectionPool(
        min_connections=count,
        max_connections=count,
        eager_init=True,
        transport=transport,
    )
    pool.configure(
        AuthorizerOptions(url=url, cert_file_path=ca or None, insecure=not ca)
    )
    return pool


async def ask_all(pool, count):
    """Make one call on each connection."""
    async with contextlib.AsyncExitStack() as leases:
        for _ in range(count):
            conn = await leases.enter_async_context(pool.acquire())
            await conn.info(timeout=5)


@contextlib.asynccontextmanager
async def connections(count, url, ca, transport):
    async with pool_of(count, url, ca, transport) as pool:
        await ask_all(pool, count)
        assert pool.status().idle == count
        yield


@contextlib.asynccontextmanager
async def channels(count, url, ca):
    options = _channel_options(10)
    trusted = ca and grpc.ssl_channel_credentials(Path(ca).read_bytes())  # noqa: ASYNC240
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(count):
            if ca:
                channel = grpc.aio.secure_channel(url, trusted, options=options)
            else:
                channel = grpc.aio.insecure_channel(url, options=options)
            await stack.enter_async_context(channel)
            await channel.unary_unary(PROBE)(b"", timeout=5)
        yield


async def cost(opened, measure, *where):
    """Return the result of *measure* per connection."""
    async with opened(2, *where):  # warm-up: imports, caches, threads
        # Until the pool has looked for new servers, which imports more modules.
        await anyio.sleep(FIRST_LOOK + 0.5)
    before = measure()
    async with opened(CONNECTIONS, *where):
        await anyio.sleep(0.5)
        return (measure() - before) / CONNECTIONS


def traced():
    """Return the Python memory allocated since the first call, in bytes."""
    if not tracemalloc.is_tracing():
        tracemalloc.start()
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


# -- cancelled calls ----------------------------------------------------------------


async def cancelled(url, ca, transport):
    """Return the growth of the process by calls that are all cancelled, in bytes."""
    async with pool_of(4, url, ca, transport) as pool:
        await cancel_calls(pool, CANCELLED // 5)
        before = rss()
        await cancel_calls(pool, CANCELLED)
        return rss() - before


async def cancel_calls(pool, count):
    async def call():
        async with pool.acquire() as conn:
            await conn.decisions(policy_path=POLICY, timeout=60)

    for _ in range(count // BATCH):
        async with anyio.create_task_group() as tasks:
            for _ in range(BATCH):
                tasks.start_soon(call)
            await anyio.sleep(0.005)  # so that they are sent
            tasks.cancel_scope.cancel()


# -- files and threads --------------------------------------------------------------


def held():
    """Return the counts of files, of all threads and of Python threads."""
    return process.num_fds(), process.num_threads(), threading.active_count()


async def open_and_close(*where):
    async with connections(CONNECTIONS, *where):
        pass


async def leftovers(*where):
    """Return the counts of `held` before and after connections open and close."""
    await open_and_close(*where)  # gRPC keeps files and threads of its own
    await anyio.sleep(1)
    before = held()
    for _ in range(OPENINGS):
        await open_and_close(*where)
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
    "cancelled": cancelled,
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


def idle(options, servers):
    """
    Print the memory of an idle connection. Return rows and verdicts.

    The verdicts are in two lists: those on exact memory first.
    """
    rows = []
    exact, rough = [], []
    for is_tls, server in enumerate(servers):
        where = server.url, server.cert_file_path or ""
        tls = " with TLS" * is_tls
        channel = measured("channels", f"channel{tls}", "asyncio", *where)
        rows.append(channel)
        for transport, backend in ways(options):
            name = f"connection over {transport}{tls}"
            row = measured("pool", name, backend, *where, transport)
            rows.append(row)
            verdict = judged(row, channel, transport, backend, is_tls)
            (rough if transport == "native" else exact).append(verdict)
            print(verdict)
    return rows, exact, rough


def measured(part, name, backend, *where):
    """Print and return the memory of one connection or channel."""
    python = apart(f"python of {part}", backend, *where)
    resident = apart(f"process of {part}", backend, *where)
    print(
        f"\nOne of {CONNECTIONS}, {name} on {backend}: {python / KIB:.1f} KiB of "
        f"Python, {resident / KIB:.0f} KiB of the process"
    )
    return {"of": name, "backend": backend, "python": python, "process": resident}


def judged(row, channel, transport, backend, is_tls):
    """Return the verdict on the memory of an idle connection."""
    what = f"idle {row['of']} on {backend}"
    if transport == "native":
        most = NATIVE[backend][is_tls] * KIB
        goal = f"{what} at most {most // KIB} KiB of the process"
        return Verdict(goal, f"{row['process'] / KIB:.1f} KiB", row["process"] <= most)
    extra = row["python"] - channel["python"]
    goal = f"{what} at most {EXTRA / KIB:g} KiB of Python above a channel"
    return Verdict(goal, f"{extra / KIB:+.1f} KiB", extra <= EXTRA)


def given_up(options, url):
    """Print and return the verdicts on the growth of the process by cancelled calls."""
    reached = []
    for backend in options.backend:
        growth = apart("cancelled", backend, url, "", "native")
        goal = (
            f"{CANCELLED:,} cancelled calls over native on {backend} grow RSS by less "
            "than 1 MiB"
        )
        reached.append(Verdict(goal, f"{growth / KIB:+,.0f} KiB", growth < GROWTH))
        print(reached[-1])
    return reached


def kept(options, url):
    """Print the files and threads that remain. Return rows and verdicts."""
    rows = []
    reached = []
    for transport, backend in ways(options):
        before, after = apart("leftovers", backend, url, "", transport)
        left = [max(0, now - then) for now, then in zip(after, before, strict=True)]
        name = f"{transport}, {backend}"
        rows.append({"backend": name, "before": before, "after": after})
        goal = (
            f"{OPENINGS * CONNECTIONS:,} connections over {transport} on {backend} "
            "leave no file and no thread"
        )
        told = f"{before[0]} -> {after[0]} files, {before[1]} -> {after[1]} threads"
        reached.append(Verdict(goal, told, not any(left)))
        print(reached[-1])
    return rows, reached


def main(options):
    print(versions("fastapi-topaz-pool", "grpcio", "anyio", "trio"))
    growth = leases(options)
    with authorizer() as server, authorizer(tls=True) as with_tls:
        rows, exact, rough = idle(options, (server, with_tls))
        leftover, left = kept(options, server.url)
    # Far longer than a call waits until it is cancelled.
    with authorizer(latency=0.5) as server:
        growth += given_up(options, server.url)
    data = {
        "title": "Memory, files and threads",
        "connections": rows,
        "leftovers": leftover,
        "goals": [*growth, *exact, *rough, *left],
    }
    save(options, "memory", data)
    return 0 if all(each.met for each in exact + left) else 1


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
