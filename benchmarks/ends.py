"""
Measures a pool whose server closes each connection after some calls, as nginx does.

    .venv/bin/python benchmarks/ends.py [--backend asyncio trio] [--rounds 3]
        [--seconds 5] [--calls 100] [--callers 20] [--quick] [--save]

After this number of calls on a connection, the server sends GOAWAY. It closes the
connection when all calls on it are answered. nginx does the same (`keepalive_requests`,
whose default was 100). Callers repeat `TopazConfig.is_allowed` all the time, first with
a server that closes no connection, then with one that does. If a check fails, the exit
code is 1.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import anyio
from _rounds import parsed, parser, save
from starlette.requests import Request

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
)


sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from kit.faultkit.http2 import Http2Server


POLICY = "myapp.GET.documents"
GOAL = 0.7
"""Minimum throughput with closed connections, as a share of that without."""


def serve(calls, pipe):
    """Run a server that closes each connection after *calls* calls. None: never."""

    def answer(call):
        call.reply()
        connection = call.connection
        connection.answered = getattr(connection, "answered", 0) + 1
        if connection.answered == calls:
            connection.goaway(0, b"", close=True)

    with Http2Server() as server:
        server._script(answer, None)
        pipe.send(server.url)
        pipe.recv()
        pipe.send(server.accepted)


async def measure(url, options):
    """Return the checks per second, the failures, and the mean of busy connections."""
    pool = ConnectionPool(max_connections=10, acquire_timeout=options.seconds)
    config = TopazConfig(
        authorizer_options=AuthorizerOptions(url=url, insecure=True),
        policy_path_root="myapp",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
        connection_pool=pool,
    )
    answered, failures, busy, stopped = 0, [], [], False

    async def caller():
        nonlocal answered
        while not stopped:
            try:
                # Each with a request of its own, which has no earlier answer.
                request = Request({"type": "http", "headers": [], "path_params": {}})
                assert await config.is_allowed(request, POLICY)
            except Exception as error:  # noqa: BLE001  (printed at the end)
                failures.append(error)
            else:
                answered += 1

    async with pool, anyio.create_task_group() as tasks:
        for _ in range(options.callers):
            tasks.start_soon(caller)
        while pool.status().total < 10:  # noqa: ASYNC110  (there is no event)
            await anyio.sleep(0.001)
        before, began = answered, time.monotonic()
        while time.monotonic() < began + options.seconds:
            await anyio.sleep(0.02)
            busy.append(pool.status().busy)
        rate = (answered - before) / (time.monotonic() - began)
        stopped = True
    return rate, failures, statistics.mean(busy)


def run(backend, calls, options):
    """Measure in this process, with a server in another process."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    server = context.Process(target=serve, args=(calls, theirs))
    server.start()
    try:
        found = anyio.run(measure, ours.recv(), options, backend=backend)
        ours.send(None)
        return (*found, ours.recv())
    finally:
        server.join(10)
        server.kill()


def main(options):
    rows, failed = [], 0
    for backend in options.backend:
        # In turns, so that other load on the machine affects both equally.
        turns = [
            (run(backend, None, options), run(backend, options.calls, options))
            for _ in range(options.rounds)
        ]
        plain = statistics.median(without[0] for without, _ in turns)
        rate = statistics.median(found[0] for _, found in turns)
        share = statistics.median(found[0] / without[0] for without, found in turns)
        failures = [error for _, found in turns for error in found[1]]
        busy = statistics.mean(found[2] for _, found in turns)
        accepted = sum(found[3] for _, found in turns)
        failed += len(failures)
        rows.append(
            {
                "backend": backend,
                "without an end": plain,
                "with an end": rate,
                "share": share,
                "failed": len(failures),
                "in use": busy,
                "connections": accepted,
            }
        )
        met = "met" if share >= GOAL else "MISSED"
        print(
            f"{backend}: {plain:.0f} /s without an end, {rate:.0f} /s with one after "
            f"{options.calls} calls: {share:.2f} x (goal {GOAL:g} x: {met}), "
            f"{len(failures)} failed, {busy:.1f} of 10 in use, {accepted} connections"
        )
        for error in failures[:3]:
            print(f"  {error!r}")
    title = f"{options.callers} callers, connections end after {options.calls} calls"
    save(options, "ends", {"title": title, "rows": rows})
    return failed


if __name__ == "__main__":
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument(
        "--backend", nargs="+", default=["asyncio", "trio"], choices=["asyncio", "trio"]
    )
    arguments.add_argument("--seconds", type=float, default=5.0)
    arguments.add_argument("--calls", type=int, default=100)
    arguments.add_argument("--callers", type=int, default=20)
    sys.exit(1 if main(parsed(arguments, seconds=1.0, rounds=1)) else 0)
