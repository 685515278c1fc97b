"""
Mutate the modules of the pool, and compare the survivors with the known ones.

    python tests/proof/mutation/survivors.py

mutates the state, which takes minutes. Arguments:

    parts        the clock and the checks of the pool: minutes
    pool         the pool around the state: longer
    state pool   several groups
    --list       print the survivors in the format of the list

mutmut makes the mutants. A pytest plugin, `forks`, runs the tests. Nothing is left in
the work tree. The script fails if a mutant survives that is not in `survivors.txt`, or
if at most 95 % of the mutants of the state die.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import attrs


# ruff: noqa: T201  (a script)

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
KNOWN = HERE / "survivors.txt"
PARTED = " || "
LEAST = {"pool_state": 95.0}
"""
The percentage of a module's mutants that must be exceeded by the mutants that die.
"""

QUICK = """
(not real_clock or test_options)
and not trio and not asyncio+eager and not asyncio+shuffled and not random_cancellation
and not never_expire and not attempts_never_stop and not rate_of_attempts
and not whatever_the_length and not keeps_idle
and not never_closed and not outage_do_not_grow and not an_injected_provider_and
and not in_any_thread and not fail_fast_with_the_cause and not half_a_second
and not faster_than_failed and not at_the_line_of_the_drop
and not no_open_socket and not no_grpc_channel and not closed_during_a_call
"""
"""
One backend. No gRPC, because it does not survive a fork. No test that takes a second.
No test that counts frames, because mutants add frames.
"""


VIRTUAL = ["-m", "not slow and not soak and not nightly", "-k", " ".join(QUICK.split())]

WORDS = [r"logger\.", r'^\s+f?"', r'raise \w+\(f?"', r"^\s+\*\("]
"""Lines with texts of logs and errors, and parts of a repr()."""


@attrs.frozen
class Group:
    """Modules, and the tests that must detect their mutants."""

    modules: list[str]
    tests: list[str]
    options: list[str] = attrs.field(factory=list)
    unmutated: list[str] = attrs.field(factory=list)


GROUPS = {
    # Without the random scripts of test_model_state: they find mutants by luck. Each
    # rule needs a deterministic test that detects its mutants.
    "state": Group(
        modules=[
            *("_pool/state/pool_state", "_pool/state/outage", "_pool/state/attempts"),
            *("_pool/state/rotation", "_pool/state/backoff", "_pool/state/slot"),
            *("_pool/state/snapshot", "_pool/state/admission", "_pool/state/limit"),
            "_pool/state/turns",
        ],
        tests=["_pool/state", "_pool/test_readiness.py"],
        options=["-k", "not trio and not asyncio"],  # only the state
    ),
    # Not `interrupts`, which works on trio only.
    "parts": Group(
        modules=[
            *("_pool/clock", "_pool/conformity", "_pool/readiness", "_pool/servers"),
        ],
        tests=[
            *("_pool/test_clocks.py", "_pool/test_connection_kinds.py"),
            *("_pool/test_readiness.py", "_pool/test_servers.py"),
        ],
        options=VIRTUAL,
        unmutated=WORDS,
    ),
    "pool": Group(
        modules=[
            *("_pool/refusals", "_pool/leaks", "_pool/open_pool", "_pool/connections"),
            *("_pool/overload", "_pool/nested_search"),
            *("_pool/owner_loop", "_pool/background", "_pool/handle"),
            *("_pool/acquire", "_pool/pool"),
        ],
        tests=[
            *("_pool/test_acquire.py", "_pool/test_background.py"),
            *("_pool/test_clocks.py", "_pool/test_connection_kinds.py"),
            *("_pool/test_connections.py", "_pool/test_events.py"),
            *("_pool/test_first_answers.py", "_pool/test_handle.py"),
            *("_pool/test_leaks.py", "_pool/test_misuse.py", "_pool/test_open_pool.py"),
            *("_pool/test_owner_loop.py", "_pool/test_pool.py"),
            *("_pool/test_overload.py", "_pool/test_overload_rules.py"),
            *("_pool/test_readiness.py", "_pool/test_refusals.py"),
            *("_pool/test_nested_search.py", "_pool/test_servers.py"),
            *("_pool/state/test_options.py", "_pool/state/test_snapshot.py"),
            *("behaviour/test_closed_loops.py", "behaviour/test_connection_tasks.py"),
            *("behaviour/test_deadlines.py", "behaviour/test_foreign_code.py"),
            *("behaviour/test_health.py", "behaviour/test_leaks.py"),
            *("behaviour/test_logs.py", "behaviour/test_maintenance.py"),
            *("behaviour/test_parameters.py", "behaviour/test_pool_acquire.py"),
            *("behaviour/test_pool_lifecycle.py", "behaviour/test_pool_reopening.py"),
            *("behaviour/test_recovery.py", "behaviour/test_refusals.py"),
            "behaviour/test_streams.py",
            *("proof/test_cancel_everywhere.py", "proof/test_cancel_outcomes.py"),
            "proof/test_pool_cancellation.py",
            "_telemetry/test_metrics.py",
        ],
        options=VIRTUAL,
        unmutated=WORDS,
    ),
}


@attrs.frozen
class Mutant:
    """A change of one function, identified by the changed lines."""

    module: str
    function: str
    old: str
    new: str

    def __str__(self) -> str:
        return PARTED.join((f"{self.module}.{self.function}", self.old, self.new))


def stem(module: str) -> str:
    """Return the name of *module* without its folders."""
    return module.rpartition("/")[2]


def mutate(module: str, scratch: Path) -> dict[str, Mutant]:
    """Put all mutants of *module* into its copy, and return them by mutmut's names."""
    from mutmut.mutation.file_mutation import mutate_file_contents

    file = scratch / "fastapi_topaz" / f"{module}.py"
    # mutmut leaves out functions with decorators. This one returns its function.
    source = re.sub(r"(?m)^ *@protected\n", "", file.read_text())
    mutated = mutate_file_contents(str(file), source)
    file.write_text(mutated.code)
    lines = mutated.code.splitlines()
    sources = {
        node.name: [line.strip() for line in lines[node.lineno - 1 : node.end_lineno]]
        for node in ast.walk(ast.parse(mutated.code))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    mutants = {}
    for name in mutated.mutant_names:
        plain = name.rpartition(".")[2]
        mangled = plain.rpartition("__mutmut_")[0]
        was, now = (
            # Without the function names, which always differ.
            [head.partition("(")[2], *body]
            for head, *body in (sources[f"{mangled}__mutmut_orig"], sources[plain])
        )
        changes = [line for line in difflib.ndiff(was, now) if line[0] in "-+"]
        mutants[f"fastapi_topaz.{module.replace('/', '.')}.{plain}"] = Mutant(
            stem(module),
            mangled.removeprefix("x_").removeprefix("xǁ").replace("ǁ", "."),
            *(
                " ".join(line[2:] for line in changes if line[0] == sign)
                for sign in "-+"
            ),
        )
    return mutants


def fates_of(group: Group, scratch: Path) -> dict[str, list[tuple[Mutant, str]]]:
    """Return the outcome of each mutant, by module."""
    from mutmut.configuration import config

    for part in ("fastapi_topaz", "tests"):
        shutil.copytree(
            ROOT / part, scratch / part, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", scratch)
    (scratch / "setup.cfg").write_text("[mutmut]\nsource_paths=fastapi_topaz\n")
    os.chdir(scratch)  # mutmut looks for its configuration here
    config().do_not_mutate_patterns = group.unmutated
    mutants = {}
    for module in group.modules:
        mutants |= mutate(module, scratch)
    file = scratch / "mutants.json"
    file.write_text(json.dumps(list(mutants)))
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-n0", "-q", "-p", "forks"),
            # No other timer than the timer of `forks`.
            *("-p", "no:cacheprovider", "-o", "timeout=0", *group.options),
            *(f"tests/{test}" for test in group.tests),
        ],
        check=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (scratch, HERE))),
            "MUTANTS": str(file),
            "SHUFFLE_SEED": "1",
        },
    )
    fates = json.loads(file.read_text())
    return {
        module: [
            (mutant, fates[name])
            for name, mutant in mutants.items()
            if mutant.module == module
        ]
        for module in map(stem, group.modules)
    }


def known() -> dict[str, str]:
    """Return the reason why each known survivor lives."""
    listed = {}
    for line in KNOWN.read_text().splitlines():
        if line and not line.startswith("#"):
            mutant, _, reason = line.rpartition(PARTED)
            listed[mutant] = reason
    return listed


def main() -> int:
    """Return 1 if the mutants show that tests are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", help=f"some of {', '.join(GROUPS)}")
    parser.add_argument("--modules", nargs="+", help="only these, as outage")
    parser.add_argument("--list", action="store_true", help="print all survivors")
    arguments = parser.parse_args()
    if not GROUPS.keys() >= set(arguments.groups):
        parser.error(f"no such group among {arguments.groups}")
    listed = known()
    began = time.monotonic()
    fates = {}
    for name in arguments.groups or ["state"]:
        group = GROUPS[name]
        if arguments.modules:
            modules = [
                each for each in group.modules if stem(each) in arguments.modules
            ]
            group = attrs.evolve(group, modules=modules)
        with tempfile.TemporaryDirectory() as scratch:
            fates |= fates_of(group, Path(scratch).resolve())
            os.chdir(ROOT)
    failed = False
    met = set()
    for module, outcomes in fates.items():
        alive = [str(m) for m, fate in outcomes if fate in {"survived", "unreached"}]
        late = sum(fate == "late" for _, fate in outcomes)
        score = 100 * (1 - len(alive) / len(outcomes))
        print(
            f"{module}: {score:.1f} % of {len(outcomes)} mutants died "
            f"({late} of them by never ending), {len(alive)} live"
        )
        failed |= score <= LEAST.get(module, 0.0)
        met |= {*alive}
        for mutant in alive:
            if mutant not in listed or arguments.list:
                print(f"{mutant}{PARTED}{listed.get(mutant, '?')}")
        failed |= any(mutant not in listed for mutant in alive)
    for mutant in listed:
        if mutant.partition(".")[0] in fates and mutant not in met:
            print(f"listed, and dead: {mutant}")
    print(f"it took {time.monotonic() - began:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
