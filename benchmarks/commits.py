"""
Measures a lease of this pool and one of the pool of an earlier commit.

    .venv/bin/python benchmarks/commits.py [--against 054dee3] [--rounds 30]
        [--leases 20000] [--backend asyncio uvloop trio] [--quick] [--save]

Each measurement is a process of its own, because the same code differs by some percent
between two processes. "free" is one task, for which a connection is always free. "50
streams" is the same with that many for each connection. "waiting" is 40 tasks for 10
connections.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _peers import BACKENDS, OURS, extracted
from _rounds import Goal, Race, parsed, parser, save, versions


HERE = Path(__file__).parent

CASES = {"free": (1, 1), "50 streams": (50, 1), "waiting": (1, 40)}
"""Streams and tasks."""

MOST = 1.05
"""The goal, as a ratio to the earlier commit."""


def lease(package, backend, streams, tasks, leases):
    """Return the microseconds of a lease with the package in the folder *package*."""
    found = subprocess.run(
        [
            *(sys.executable, HERE / "_lease.py", backend),
            *map(str, (streams, tasks, leases)),
        ],
        env=os.environ | {"PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(found.stdout)


def main(given):
    print(versions("anyio", "uvloop", "trio"))
    races = []
    with tempfile.TemporaryDirectory() as old:
        if not extracted(given.against, old):
            raise SystemExit(f"git has no commit {given.against}")
        before = f"at {given.against}"
        for backend in given.backend:
            for name, (streams, tasks) in CASES.items():
                race = Race(f"A lease, {name}, {backend}", "us of CPU")
                sizes = (backend, streams, tasks, given.leases)
                race.run(
                    {
                        OURS: functools.partial(lease, HERE.parent, *sizes),
                        before: functools.partial(lease, old, *sizes),
                    },
                    given.rounds,
                )
                goals = [Goal(OURS, (before,), MOST)]
                race.show(before, goals)
                races.append(race.data(goals))
    save(given, "commits", {"races": races})


if __name__ == "__main__":
    arguments = parser(__doc__, rounds=30)
    arguments.add_argument("--against", default="054dee3", metavar="COMMIT")
    arguments.add_argument("--leases", type=int, default=20000)
    arguments.add_argument(
        "--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS)
    )
    main(parsed(arguments, rounds=1, leases=500, backend=["asyncio"]))
