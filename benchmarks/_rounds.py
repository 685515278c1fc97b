"""
Measures several contestants in turns, in one run, and reports their ratios.

Because they take turns, other load on the machine affects all of them equally. The
result is the median of the ratios of all rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import gc
import json
import os
import platform
import statistics
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping


RESULTS = Path(__file__).parent / "results"

PACKAGES = (
    "fastapi-topaz-pool",
    "anyio",
    "trio",
    "uvloop",
    "grpcio",
    "aserto",
    "generic-connection-pool",
    "aiosqlitepool",
    "SQLAlchemy",
    "greenlet",
    "psycopg",
    "psycopg-pool",
)


@dataclasses.dataclass(frozen=True)
class Goal:
    """
    A limit for the ratio of one contestant to others.

    Attributes:
        name: The name of the contestant.
        others: The other contestants. The worst ratio to a measured one counts.
        most: The maximum ratio.
        text: The goal in words, if there are several others.
    """

    name: str
    others: tuple[str, ...]
    most: float
    text: str = ""

    def __str__(self) -> str:
        return self.text or f"{self.name} at most {self.most:g} x {self.others[0]}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result for one goal. *met* is None if nothing was measured."""

    goal: str
    reached: str
    met: bool | None

    def __str__(self) -> str:
        met = {True: "met", False: "MISSED", None: "not judged"}[self.met]
        return f"  goal: {self.goal}: {self.reached}, {met}"


class Race:
    """
    The measurements of each contestant, in the order of rounds.

    Attributes:
        left_out: The contestants that failed, with the reason.
    """

    def __init__(self, title: str, unit: str) -> None:
        self.title = title
        self.unit = unit
        self.rounds: dict[str, list[float]] = {}
        self.left_out: dict[str, str] = {}

    def run(
        self,
        contestants: Mapping[str, Callable[[], float]],
        rounds: int,
        optional: Collection[str] = (),
    ) -> None:
        """
        Call each contestant once per round to measure itself.

        Every round starts with a different contestant. If one of *optional* fails, it
        is left out.
        """
        names = list(contestants)
        self.rounds = {name: [] for name in names}
        for each in names:  # warm-up: imports, caches, the first connection
            self._measure(contestants, each, optional)
        for each in self.rounds.values():
            each.clear()
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                if name in self.rounds:
                    gc.collect()
                    self._measure(contestants, name, optional)

    def _measure(self, contestants, name, optional):
        try:
            self.rounds[name].append(contestants[name]())
        except Exception as error:
            if name not in optional:
                raise
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            del self.rounds[name]
            self.left_out[name] = f"{type(error).__name__}: {error}"
            print(f"left out: {name}: {self.left_out[name]}", file=sys.stderr)

    def median(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def ratio(self, name: str, other: str) -> float:
        """Return the median of the ratios of *name* to *other* in all rounds."""
        pairs = zip(self.rounds[name], self.rounds[other], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def judge(self, goal: Goal) -> Verdict:
        if goal.name not in self.rounds:
            return Verdict(str(goal), "not measured", None)
        others = [each for each in goal.others if each in self.rounds]
        if not others:
            return Verdict(str(goal), "not measured", None)
        worst = max(others, key=lambda other: self.ratio(goal.name, other))
        ratio = self.ratio(goal.name, worst)
        digits = 3 if abs(ratio - goal.most) < 0.005 else 2
        reached = f"{ratio:.{digits}f} x"
        if len(goal.others) > 1:
            reached += f" {worst}"
        return Verdict(str(goal), reached, ratio <= goal.most)

    def show(self, reference: str, goals: Iterable[Goal] = ()) -> None:
        """Print a table, and the verdict for each goal."""
        print(f"\n{self.title} ({self.unit}, median of rounds)")
        width = max(map(len, self.rounds))
        for name in sorted(self.rounds, key=self.median):
            print(
                f"  {name:<{width}}  {self.median(name):10.2f}"
                f"  {self.ratio(name, reference):7.2f} x {reference}"
            )
        for goal in goals:
            print(self.judge(goal))

    def data(self, goals: Iterable[Goal] = ()) -> dict[str, object]:
        """Return the data for `save`."""
        return {
            "title": self.title,
            "unit": self.unit,
            "rounds": self.rounds,
            "left_out": self.left_out,
            "goals": [self.judge(goal) for goal in goals],
        }


def parser(doc: str, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks."""
    made = argparse.ArgumentParser(description=doc.partition("\n\n")[0])
    if rounds:
        made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument(
        "--quick",
        action="store_true",
        help="few and short rounds: whether it runs, not what is measured",
    )
    made.add_argument(
        "--save",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="DIRECTORY",
        help="write what was measured for plots.py and report.py, to results/",
    )
    return made


def parsed(made: argparse.ArgumentParser, **quick: object) -> argparse.Namespace:
    """Parse and return the options. With `--quick`, *quick* replaces some of them."""
    options = made.parse_args()
    if options.quick:
        vars(options).update(quick)
    return options


def save(options: argparse.Namespace, name: str, data: Mapping[str, object]) -> None:
    """If `--save` is given, write *data* with the date, versions and settings."""
    if options.save is None:
        return
    options.save.mkdir(parents=True, exist_ok=True)
    settings = {
        key: value
        for key, value in vars(options).items()
        if isinstance(value, bool | int | float | str | list)
    }
    text = json.dumps({**about(), "settings": settings, **data}, indent=1, default=vars)
    (options.save / f"{name}.json").write_text(text + "\n")


def about() -> dict[str, object]:
    """Return the date, the versions and the machine of the measurement."""
    packages = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[package] = version(package)
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "packages": packages,
    }


def versions(*packages: str) -> str:
    """Return the versions of Python and *packages*, for the head of a report."""
    parts = [f"Python {platform.python_version()}"]
    parts += [f"{package} {version(package)}" for package in packages]
    return ", ".join(parts)


def loaded(directory: Path, name: str) -> dict[str, object] | None:
    """Return the saved data, or None if there is none."""
    path = directory / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def race_of(data: Mapping[str, object]) -> Race:
    """Return the race that was saved as *data*."""
    race = Race(data["title"], data["unit"])
    race.rounds = data["rounds"]
    race.left_out = data["left_out"]
    return race


def drawing_options(doc: str) -> argparse.Namespace:
    """Parse and return the options for the folders of results and of output."""
    made = argparse.ArgumentParser(description=doc.partition("\n\n")[0])
    made.add_argument("--results", type=Path, default=RESULTS, metavar="DIRECTORY")
    made.add_argument("--to", type=Path, default=RESULTS.parent, metavar="DIRECTORY")
    return made.parse_args()
