"""
Contestants measured in turns, in one run.

What else the machine does then hits them alike, and only their ratios are told: the
ratio of each round, and of those the median.
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
    What the ratio of one contestant to others must not exceed.

    Attributes:
        name: Of the contestant.
        others: Those that were measured count; of their ratios the worst does.
        most: The ratio.
        text: The goal in words, if there is more than one other.
    """

    name: str
    others: tuple[str, ...]
    most: float
    text: str = ""

    def __str__(self) -> str:
        return self.text or f"{self.name} at most {self.most:g} x {self.others[0]}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was reached of one goal; *met* is None where nothing was measured."""

    goal: str
    reached: str
    met: bool | None

    def __str__(self) -> str:
        met = {True: "met", False: "MISSED", None: "not judged"}[self.met]
        return f"  goal: {self.goal}: {self.reached}, {met}"


class Race:
    """
    The measurements of all rounds by contestant, each list in order of rounds.

    Attributes:
        left_out: Contestants that failed, and why.
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
        Let each measure itself once a round.

        Every round begins with another one. The *optional* may fail, and are left out.
        """
        names = list(contestants)
        self.rounds = {name: [] for name in names}
        for each in names:  # imports, caches, the first connection
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
        """Return the median of what *name* took in each round for one of *other*."""
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
        """Print a table, and how each goal was met."""
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
        """Return what `save` is to write of it."""
        return {
            "title": self.title,
            "unit": self.unit,
            "rounds": self.rounds,
            "left_out": self.left_out,
            "goals": [self.judge(goal) for goal in goals],
        }


def parser(doc: str, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return a parser of what all benchmarks may be told."""
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
    """Return the options; with `--quick` those of *quick* replace others."""
    options = made.parse_args()
    if options.quick:
        vars(options).update(quick)
    return options


def save(options: argparse.Namespace, name: str, data: Mapping[str, object]) -> None:
    """Write *data* with what it was measured with, if that was asked for."""
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
    """Return what was measured when, with which versions, on which machine."""
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
    """Return what was measured with, for the head of a report."""
    parts = [f"Python {platform.python_version()}"]
    parts += [f"{package} {version(package)}" for package in packages]
    return ", ".join(parts)


def loaded(directory: Path, name: str) -> dict[str, object] | None:
    """Return what was saved, or None if it was not."""
    path = directory / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def race_of(data: Mapping[str, object]) -> Race:
    """Return the race that was saved as *data*."""
    race = Race(data["title"], data["unit"])
    race.rounds = data["rounds"]
    race.left_out = data["left_out"]
    return race


def drawing_options(doc: str) -> argparse.Namespace:
    """Return where results are, and where what is made of them goes."""
    made = argparse.ArgumentParser(description=doc.partition("\n\n")[0])
    made.add_argument("--results", type=Path, default=RESULTS, metavar="DIRECTORY")
    made.add_argument("--to", type=Path, default=RESULTS.parent, metavar="DIRECTORY")
    return made.parse_args()
