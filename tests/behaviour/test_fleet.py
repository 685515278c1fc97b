"""
Run each scenario of the simulated fleet at its small size, and one at a tiny one.

`benchmarks/fleet.py --full` runs 500 workers and 20 replicas.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

sys.path.append(str(BENCHMARKS))

import fleet  # noqa: E402


# Each scenario takes seconds of CPU.
pytestmark = pytest.mark.timeout(600)

TINY = dataclasses.replace(fleet.SMALL, workers=10, warm_up=5.0)

OVERLOADED = ("zone", "dark_zone")
"""The scenarios whose load is above the capacity that is left."""

QUICK = "rolling"
"""The scenario of the default tests."""

RARE = ("renewal", "slow", "scaling", "deployment")
"""The scenarios of the nightly tests."""


def missed(name, report):
    return [str(each) for each in fleet.verdicts(name, report) if not each.met]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.nightly] * (name in RARE))
        for name in fleet.SCENARIOS
    ],
)
def test_the_goals_of_a_scenario_hold(name):
    report = fleet.simulated(name)
    assert not missed(name, report), report


@pytest.mark.parametrize(
    "backend", ["asyncio", pytest.param("trio", marks=pytest.mark.slow)]
)
def test_the_goals_of_a_scenario_hold_at_a_tiny_size(backend, monkeypatch):
    # Ten workers never connect a hundred times in a second.
    monkeypatch.setattr(fleet, "CROWD", 20)
    report = fleet.simulated(QUICK, TINY, backend=backend)
    assert not missed(QUICK, report), report
    assert report.share > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", OVERLOADED)
def test_half_of_the_replicas_are_enough_for_a_small_load(name):
    size = dataclasses.replace(fleet.SMALL, rate=3.0)
    assert 0.8 < 2 * size.load < 0.9
    report = fleet.simulated(name, size)
    assert not missed(name, report), report
    assert not report.failed


@pytest.mark.nightly
def test_a_fleet_on_trio_meets_the_goals():
    report = fleet.simulated(QUICK, backend="trio")
    assert not missed(QUICK, report), report


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["asyncio", pytest.param("trio", marks=pytest.mark.nightly)]
)
def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(backend):
    report = fleet.simulated("frozen", TINY, 7, backend)
    assert fleet.simulated("frozen", TINY, 7, backend) == report
    assert fleet.simulated("frozen", TINY, 8, backend) != report


@pytest.mark.slow
def test_another_process_reports_the_same(tmp_path):
    """The order of a set depends on addresses, and on the hashes of texts."""
    command = [sys.executable, str(BENCHMARKS / "fleet.py"), "--scenario", "deployment"]
    texts = []
    for number in range(2):
        to = tmp_path / str(number)
        environment = os.environ | {"PYTHONHASHSEED": str(number)}
        subprocess.run([*command, "--save", str(to)], env=environment, check=True)
        texts.append((to / "fleet.json").read_text())
    assert texts[0] == texts[1]


# -- the simulator itself -------------------------------------------------------------


async def nothing(_fleet):
    """Nothing happens."""


async def crash(fleet):
    """All replicas crash."""
    for replica in fleet.net.replicas:
        replica.crash()


def test_checks_that_get_no_answer_are_counted(monkeypatch):
    monkeypatch.setitem(fleet.SCENARIOS, "crash", fleet.Scenario(crash))
    report = fleet.simulated("crash", dataclasses.replace(TINY, workers=3))
    assert 0 < sum(report.goodput) < report.checks / 10
    assert sum(report.failed.values()) > 0.8 * report.checks
    assert set(report.failed) <= {"ConnectFailed", "EndedCall UNAVAILABLE"}
    assert len(missed("crash", report)) == 1


@pytest.mark.slow
def test_a_fleet_in_which_nothing_happens_is_even(monkeypatch):
    monkeypatch.setitem(fleet.SCENARIOS, "nothing", fleet.Scenario(nothing))
    report = fleet.simulated("nothing")
    assert not report.failed
    assert report.even_after == 0


def second(serving, checks, connects=()):
    return fleet.Second(serving, dict(enumerate(checks)), dict(enumerate(connects)), {})


def test_the_imbalance_is_that_of_replicas_that_served_all_the_time():
    seconds = [second([0, 1, 2], [10, 20, 90]), second([0, 1], [10, 40, 0])]
    assert fleet.checks_imbalance(seconds) == 60 / 40


def test_the_fair_share_is_that_of_the_replicas_that_serve():
    assert fleet._share(second([0, 1], [], [60, 20, 20])) == 60 / 50
