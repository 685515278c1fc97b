"""
Measures a lease of this pool and one of the pool of an earlier commit.

    .venv/bin/python benchmarks/commits.py [--against 054dee3] [--rounds 30]
        [--share 1] [--backend asyncio uvloop trio] [--quick] [--save]

Each measurement is a process of its own, because the same code differs by some percent
between two processes. "free" measures as `acquire.py`: one task, for which a connection
is always free. "50 streams" is the same with that many for each connection. "waiting"
measures as `contended.py`. `--share 0.1` takes a tenth of the leases.
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

CASES = ("free", "50 streams", "waiting")

MOST = 1.05
"""The goal, as a ratio to the earlier commit."""


def lease(package, backend, case, share):
    """Return the microseconds of a lease with the package in the folder *package*."""
    found = subprocess.run(
        [sys.executable, HERE / "_lease.py", backend, case, str(share)],
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
            for name in CASES:
                race = Race(f"A lease, {name}, {backend}", "us")
                sizes = (backend, name, given.share)
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
    arguments.add_argument("--share", type=float, default=1)
    arguments.add_argument(
        "--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS)
    )
    main(parsed(arguments, rounds=1, share=0.1, backend=["asyncio"]))
