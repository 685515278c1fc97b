"""
Measures an application whose questions follow Zipf's law: with a cache, and without.

    .venv/bin/python benchmarks/zipf.py [--rounds 9] [--requests 5000]
        [--documents 10000] [--callers 10] [--backend asyncio uvloop] [--quick] [--save]

Each request is about one document. The document of rank n is asked for in proportion to
1/n (s = 1.0), as links and names are. All contestants get the same requests. Each round
begins with an empty cache. Each application is a process of its own, and so is the
authorizer, which counts its calls. The contestants are this package without a cache and
with `DecisionCache()`, and fastapi-topaz 2.0.0 with its own `DecisionCache()`. Each has
its defaults.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

from _peers import SUCCESSOR, unpacked
from _rounds import Goal, Race, parsed, parser, save, versions
from _server import counted


HERE = Path(__file__).parent
PATIENCE = 30.0
PLAIN, CACHED = "without a cache", "with a cache"
OTHER = f"{SUCCESSOR}, its cache"
SERIES = {
    "calls": ("Calls of Topaz", "calls for each 100 requests"),
    "p50": ("Median of a request", "ms"),
    "p99": ("99th percentile of a request", "ms"),
}


class Application:
    """A running application; a call of it makes one round, and returns its calls."""

    def __init__(self, port, calls, given):
        self._port = port
        self._calls = calls
        self._given = given
        self._round = 0
        self.latencies = {"p50": [], "p99": []}

    def __call__(self):
        return asyncio.run(self._measure())

    async def started(self):
        """Return when it answers."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await self._load(["/clear"])
                except OSError:
                    await asyncio.sleep(0.05)
                else:
                    return

    async def _measure(self):
        given = self._given
        # Another order in each round, and the same one for all contestants.
        chosen = random.Random(self._round)
        self._round += 1
        weights = itertools.accumulate(1 / n for n in range(1, given.documents + 1))
        ranks = chosen.choices(
            range(given.documents), cum_weights=list(weights), k=given.requests
        )
        await self._load(["/clear"])
        before = self._calls()
        took = sorted(await self._load([f"/documents/{rank}" for rank in ranks]))
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            self.latencies[name].append(took[int(share * (len(took) - 1))] * 1e3)
        return (self._calls() - before) / given.requests * 100

    async def _load(self, paths):
        """Request each of *paths*, by all callers; return how long each took."""
        left, took = iter(paths), []
        callers = min(len(paths), self._given.callers)
        await asyncio.gather(*(self._call(left, took) for _ in range(callers)))
        return took

    async def _call(self, left, took):
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        with contextlib.closing(writer):
            for path in left:
                began = time.perf_counter()
                writer.write(b"GET %s HTTP/1.1\r\nHost: app\r\n\r\n" % path.encode())
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = int(head.partition(b"content-length:")[2].split()[0])
                body = await reader.readexactly(size)
                took.append(time.perf_counter() - began)
                if not head.startswith(b"http/1.1 200"):
                    raise RuntimeError(f"{head.splitlines()[0]!r}: {body!r}")


@contextlib.contextmanager
def running(package, url, loop, *, cache):
    """Start the application with the package in the folder *package*; yield a port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        process = subprocess.Popen(
            [
                *(sys.executable, HERE / "_zipf.py", url, "--loop", loop),
                *("--socket", str(listening.fileno())),
                *(["--cache"] if cache else []),
            ],
            env=os.environ | {"PYTHONPATH": str(package)},
            pass_fds=[listening.fileno()],
        )
    try:
        yield port
    finally:
        process.terminate()
        process.wait(PATIENCE)


def contestants():
    """Return the folder of the package and whether it has a cache, by name."""
    found = {PLAIN: (HERE.parent, False), CACHED: (HERE.parent, True)}
    try:
        found[OTHER] = unpacked(SUCCESSOR), True
    except ImportError as error:
        print(f"left out: {OTHER}: {error}", file=sys.stderr)
    return found


def main(given):
    print(versions("grpcio", "uvicorn", "fastapi", "uvloop"))
    for loop in given.backend:
        with counted() as (options, calls), contextlib.ExitStack() as stack:
            applications = {}
            for name, (package, cache) in contestants().items():
                port = stack.enter_context(
                    running(package, options.url, loop, cache=cache)
                )
                applications[name] = Application(port, calls, given)
                asyncio.run(applications[name].started())
            races = {
                key: Race(f"{title}, Zipf s = 1.0, {loop}", unit)
                for key, (title, unit) in SERIES.items()
            }
            races["calls"].run(applications, given.rounds)
            for key in ("p50", "p99"):
                races[key].rounds = {
                    # Without the warm-up.
                    name: each.latencies[key][1:]
                    for name, each in applications.items()
                }
        for key, race in races.items():
            goals = [Goal(CACHED, (PLAIN,), 1.0)]
            if key == "calls":
                goals.append(Goal(CACHED, (OTHER,), 1.0))
            race.show(PLAIN, goals)
            save(given, f"zipf-{key}-{loop}", race.data(goals))


if __name__ == "__main__":
    loops = ["asyncio", "uvloop"]
    arguments = parser(__doc__, rounds=9)
    arguments.add_argument("--requests", type=int, default=5000)
    arguments.add_argument("--documents", type=int, default=10_000)
    arguments.add_argument("--callers", type=int, default=10)
    arguments.add_argument("--backend", nargs="+", choices=loops, default=loops)
    main(parsed(arguments, rounds=1, requests=200, backend=["asyncio"]))
