"""
Measures how many checks are answered in time if too many come.

    .venv/bin/python benchmarks/overload.py [--backend asyncio trio]
        [--against 054dee3] [--budgets 0.2 1 5] [--loads 0.8 1 2 3 5 10] [--quick]
        [--save]

The pool is real, the servers are scripted, and the time is virtual: so the results do
not depend on the machine. Callers come at random times and do not wait for each other.
The contestants are this pool, the pool of an earlier commit, and one shared channel, as
fastapi-topaz 2.0.0 has it: that sends each call at once.

Goodput is the number of answers within the budget, as share of what the server can do.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _overload import SERVERS
from _peers import OURS, extracted
from _rounds import Verdict, parsed, parser, save, versions


HERE = Path(__file__).parent
CHANNEL = "one shared channel"

GOODPUT = 0.95
"""The goal from twice the capacity on, if the time of service is constant."""
RANDOM_GOODPUT = 0.85
RECOVERING = "ten workers, 50 ms, 10x1"
RECOVERY = ([0.8, 5], [5, 30], [0.8, 10])
"""Loads and their seconds: an overload of 30 s between two quiet phases."""


def played(package, way, backend, server, budget, phases):
    """Play one scenario with the package in the folder *package*."""
    found = subprocess.run(
        [
            *(sys.executable, HERE / "_overload.py", backend, way, server),
            *(str(budget), json.dumps(phases)),
        ],
        env=os.environ | {"PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise RuntimeError(found.stderr)
    return json.loads(found.stdout)


def ms(seconds):
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"


def matrix(given, contestants, backend):
    """Yield a row for each server, budget, load and contestant."""
    for server, budget in itertools.product(SERVERS, given.budgets):
        print(f"\n{server}, budget {budget:g} s, {backend}")
        print("  load  contestant            goodput  median    refused after")
        for load in given.loads:
            for name, (package, way) in contestants.items():
                warm, seconds = max(2, 2 * budget), given.seconds
                phases = [[load, warm], [load, seconds]]
                told = played(package, way, backend, server, budget, phases)
                row = told["phases"][-1]
                print(
                    f"  {load:4g}  {name:20}  {row['goodput']:7.2f}"
                    f"  {ms(row['median']):8}  {ms(row['refused after'])}"
                )
                yield {
                    "server": server,
                    "budget": budget,
                    "load": load,
                    "name": name,
                    "backend": backend,
                    **row,
                }


def recoveries(given, contestants, backend):
    """Yield the goodput of each second, before, during and after an overload."""
    server, budget = RECOVERING, 1.0
    before, overload, after = RECOVERY
    phases = [before, [overload[0], given.overload], after]
    print(f"\n{given.overload:g} s at 5 times the capacity, then 0.8: {backend}")
    for name, (package, way) in contestants.items():
        told = played(package, way, backend, server, budget, phases)
        begins = int(before[1] + given.overload)
        rest = told["seconds"][begins + 2 :]
        share = sum(rest) / len(rest) / after[0]
        print(f"  {name:20}  answered from 2 s after it: {share:.0%} of the checks")
        yield {"name": name, "backend": backend, "seconds": told["seconds"]}


def verdicts(rows):
    for name, least in (("constant", GOODPUT), ("random", RANDOM_GOODPUT)):
        ours = [
            row["goodput"]
            for row in rows
            if row["name"] == OURS
            and row["load"] >= 2
            and ("exponential" in row["server"]) == (name == "random")
        ]
        goal = f"goodput at least {least:g} above capacity, {name} time of service"
        if not ours:
            yield Verdict(goal, "not measured", None)
        else:
            yield Verdict(goal, f"{min(ours):.2f} at worst", min(ours) >= least)


def main(given):
    print(versions("anyio", "trio"))
    with contextlib.ExitStack() as stack:
        old = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contestants = {OURS: (HERE.parent, "pool")}
        if extracted(given.against, old):
            contestants[f"at {given.against}"] = old, "pool"
        contestants[CHANNEL] = HERE.parent, "channel"
        rows, paths = [], []
        for backend in given.backend:
            rows += matrix(given, contestants, backend)
            paths += recoveries(given, contestants, backend)
    goals = list(verdicts(rows))
    for goal in goals:
        print(goal)
    save(given, "overload", {"rows": rows, "recoveries": paths, "goals": goals})


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument(
        "--backend", nargs="+", choices=["asyncio", "trio"], default=["asyncio", "trio"]
    )
    arguments.add_argument("--against", default="054dee3", metavar="COMMIT")
    arguments.add_argument("--budgets", nargs="+", type=float, default=[0.2, 1, 5])
    loads = [0.8, 1, 2, 3, 5, 10]
    arguments.add_argument("--loads", nargs="+", type=float, default=loads)
    arguments.add_argument("--seconds", type=float, default=8.0)
    arguments.add_argument("--overload", type=float, default=30.0)
    quick = {"budgets": [0.2], "loads": [3], "seconds": 2.0, "overload": 5.0}
    main(parsed(arguments, backend=["asyncio"], **quick))
