"""
Workers with several pools each, and servers that break: nothing is lost or left.

    nox -s soak -- --minutes 10
    nox -s soak -- --seed 17  # repeats another run, as far as clocks allow

Each caller accounts for its requests, and the pools must have counted the same.
"""

# ruff: noqa: T201  (prints the summary of a long run)

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fastapi_topaz
from fastapi_topaz.connector import chosen_transport
from kit.soaking.network import Network


pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

OVER_GRPCIO = chosen_transport(None) == "grpcio"
# grpcio works on asyncio only.
WORKERS = ["asyncio", "trio", "asyncio+uvloop"]
if OVER_GRPCIO:
    WORKERS.remove("trio")
SCRIPT = Path(__file__).parents[1] / "kit" / "soaking" / "worker.py"
PACKAGE = str(Path(fastapi_topaz.__file__).parents[1])
FURTHER = os.environ.get("PYTHONPATH")
MINUTES = float(os.environ.get("SOAK_MINUTES", "2.5"))
WARM_UP = 15.0
# KiB that a worker may grow by after the warm-up. Usually it is far less. Memory
# fragmentation does not grow with the duration.
GROWTH = 24 * 1024
PATIENCE = 180.0


class Worker:
    """A process that runs the worker script, and its output."""

    def __init__(self, backend, seed, urls, errors):
        self.backend = backend
        self.errors = errors / f"{backend}.txt"
        options = {"backend": backend, "seed": seed, "urls": urls}
        options |= {"seconds": MINUTES * 60, "warm_up": WARM_UP}
        with self.errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, [PACKAGE, FURTHER])),
                    "PYTHONUNBUFFERED": "1",
                    "GRPC_VERBOSITY": "NONE",
                },
            )

    def says(self, seconds):
        """Return its next line."""
        lines = []
        reader = threading.Thread(
            target=lambda: lines.append(self.process.stdout.readline()), daemon=True
        )
        reader.start()
        reader.join(seconds)
        if not lines or not lines[0]:
            raise AssertionError(f"{self.backend} is silent: {self.errors.read_text()}")
        return lines[0].strip()

    def go_on(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self):
        """Return the exit code; kill the process if it does not end."""
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.kill()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def assert_sound(worker, found):
    print(worker.backend, json.dumps(found, indent=1))
    assert found["wrong"] == []
    assert found["unexpected"] == []
    # Requests were sent, were allowed and denied, and failed.
    assert {"allowed", "denied", "cancelled", "UNAVAILABLE"} <= found["ended"].keys()
    before, after = found["before"], found["after"]
    for name in ("fds", "threads", "tasks"):
        assert after[name] <= before[name], (name, before, after, found["alive"])
    # gRPC leaks about 900 bytes for each cancelled call.
    leaked = found["ended"]["cancelled"] if OVER_GRPCIO else 0
    assert after["rss"] - before["rss"] < GROWTH + leaked, (before, after)


@pytest.mark.real_clock
def test_after_a_soak_no_request_is_lost_and_no_resource_is_left(tmp_path):
    seed = int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(10**6))
    print(f"SOAK_SEED={seed} SOAK_MINUTES={MINUTES:g}")
    with Network(seed) as network:
        workers = [
            Worker(backend, seed + number, network.urls, tmp_path)
            for number, backend in enumerate(WORKERS)
        ]
        try:
            for word in ("ready", "done"):
                for worker in workers:
                    assert worker.says(MINUTES * 60 + PATIENCE) == word
                if word == "done":
                    network.heal()
                for worker in workers:
                    worker.go_on()
            found = [json.loads(worker.says(PATIENCE)) for worker in workers]
            print(f"{network.faults} faults")
            deadline = time.monotonic() + 20
            while network.open and time.monotonic() < deadline:
                time.sleep(0.1)
            assert network.open == 0
            for worker in workers:
                worker.go_on()
            assert [worker.end() for worker in workers] == [0] * len(workers)
        finally:
            for worker in workers:
                worker.kill()
    for worker, each in zip(workers, found, strict=True):
        assert worker.errors.read_text() == ""
        assert_sound(worker, each)
