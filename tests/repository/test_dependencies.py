"""Test that each dependency is explained, and that the lower bounds are tested."""

from __future__ import annotations

import re
import tomllib

import pytest

from kit.examples import ROOT


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs" / "dependencies.md").read_text()


def rows(page):
    for line in page.splitlines():
        if line.startswith("| `"):
            yield tuple(cell.strip().strip("`") for cell in line.split("|")[1:-1])


def test_each_dependency_has_a_documented_reason(page):
    told = {asked: why for asked, why, _ in rows(page) if asked not in EXTRAS}
    assert list(told) == PROJECT["dependencies"]
    assert all(told.values())


def test_each_dependency_of_an_extra_has_a_documented_reason(page):
    told = {(extra, asked): why for extra, asked, why in rows(page) if extra in EXTRAS}
    assert list(told) == [(name, each) for name in EXTRAS for each in EXTRAS[name]]
    assert all(told.values())


def test_the_oldest_allowed_versions_are_tested():
    source = (ROOT / "noxfile.py").read_text()
    pinned = dict(re.findall(r'"([\w-]+)==([\w.]+)"', source))
    for asked in PROJECT["dependencies"] + EXTRAS["trio"]:
        name, _, least = asked.partition(">=")
        assert re.fullmatch(rf"{re.escape(least)}(\.0)*", pinned[name]), name
