"""
Measures what `require_policy_auto` adds to a trivial endpoint under uvicorn.

    .venv/bin/python benchmarks/endpoint.py [--rounds 9] [--requests 2000]
        [--callers 20] [--against 054dee3] [--backend asyncio uvloop] [--quick] [--save]

Each application is a process of its own, which counts its CPU time. It has two routes:
one returns a constant, the other asks the authorizer before. What the check adds is
the difference between them. The same application also runs with the package of the
commit `--against`, which git extracts. The authorizer is topazd if the environment
variable TOPAZD names one, and the embedded authorizer otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from _peers import extracted
from _rounds import Goal, Race, parsed, parser, save, versions
from _server import POLICY, serving


HERE = Path(__file__).parent
MOST = 0.7
"""The most that a check adds, as a share of what it added at the other commit."""

PATIENCE = 30.0


class Application:
    """A running application; a call of it returns what a check adds, in us of CPU."""

    def __init__(self, port, requests, callers):
        self._port = port
        self._requests = requests
        self._callers = callers

    async def started(self):
        """Return when it answers."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await self._load(b"/documents", 1)
                except OSError:
                    await asyncio.sleep(0.05)
                else:
                    return

    def __call__(self):
        return asyncio.run(self._measure())

    async def _measure(self):
        spent = {}
        for path in (b"/plain", b"/documents"):
            await self._load(path, self._callers * 5)
            before = await self._cpu()
            await self._load(path, self._requests)
            spent[path] = await self._cpu() - before
        return (spent[b"/documents"] - spent[b"/plain"]) / self._requests * 1e6

    async def _cpu(self):
        return float((await self._load(b"/cpu", 1))[0])

    async def _load(self, path, requests):
        """Make *requests* requests by all callers; return the last body of each."""
        left = iter(range(requests))
        callers = min(requests, self._callers)
        return await asyncio.gather(*(self._call(path, left) for _ in range(callers)))

    async def _call(self, path, left):
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        body = None
        with contextlib.closing(writer):
            for _ in left:
                writer.write(b"GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % path)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = int(head.partition(b"content-length:")[2].split()[0])
                body = await reader.readexactly(size)
                if not head.startswith(b"http/1.1 200"):
                    raise RuntimeError(f"{head.splitlines()[0]!r}: {body!r}")
        return body


@contextlib.contextmanager
def running(package, url, policy, loop, transport, given):
    """Start the application with the package in the folder *package*."""
    environment = os.environ | {"PYTHONPATH": str(package)}
    environment["FASTAPI_TOPAZ_TRANSPORT"] = transport
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        process = subprocess.Popen(
            [
                *(sys.executable, HERE / "_endpoint.py", url),
                *("--root", policy.partition(".")[0], "--loop", loop),
                *("--socket", str(listening.fileno())),
            ],
            env=environment,
            pass_fds=[listening.fileno()],
        )
    try:
        application = Application(port, given.requests, given.callers)
        asyncio.run(application.started())
        yield application
    finally:
        process.terminate()
        process.wait(PATIENCE)


def main(given):
    print(versions("grpcio", "uvicorn", "fastapi", "uvloop"))
    with contextlib.ExitStack() as stack:
        server = "topazd" if os.environ.get("TOPAZD") else "embedded"
        policies = {POLICY.replace(".", "_"): f"package {POLICY}\n\nallowed := true\n"}
        options, policy = stack.enter_context(serving(server, policies=policies))
        old = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        has_old = extracted(given.against, old)
        for loop in given.backend:
            race = Race(
                f"A check in an endpoint, {server}, {loop}",
                "us of CPU that the check adds",
            )
            before = f"at {given.against}"
            ways = {
                "grpcio": (HERE.parent, "grpcio"),
                "native": (HERE.parent, "native"),
            }
            if has_old:
                ways[before] = old, "grpcio"
            with contextlib.ExitStack() as applications:
                race.run(
                    {
                        name: applications.enter_context(
                            running(package, options.url, policy, loop, way, given)
                        )
                        for name, (package, way) in ways.items()
                    },
                    given.rounds,
                )
            goals = [Goal("native", (before,), MOST)]
            race.show(before if has_old else "grpcio", goals)
            save(given, f"endpoint-{loop}", race.data(goals))


if __name__ == "__main__":
    loops = ["asyncio", "uvloop"]
    arguments = parser(__doc__, rounds=9)
    arguments.add_argument("--requests", type=int, default=2000)
    arguments.add_argument("--callers", type=int, default=20)
    arguments.add_argument("--against", default="054dee3", metavar="COMMIT")
    arguments.add_argument("--backend", nargs="+", choices=loops, default=loops)
    main(parsed(arguments, rounds=1, requests=100))
