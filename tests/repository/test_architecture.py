"""Test that ARCHITECTURE.md names files, functions and classes that exist."""

from __future__ import annotations

import re

import pytest

from kit.examples import ROOT


PACKAGE = ROOT / "fastapi_topaz"
MAP = (ROOT / "ARCHITECTURE.md").read_text()
SOURCE = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(_\w+/[\w/]+\.py)`", MAP))))
def test_each_file_named_in_architecture_md_exists(path):
    assert (PACKAGE / path).is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+)\(\)`", MAP))))
def test_each_function_named_in_architecture_md_exists(name):
    assert re.search(rf"def {name}\(", SOURCE)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([A-Z]\w+)`", MAP))))
def test_each_class_named_in_architecture_md_exists(name):
    assert re.search(rf"^(class )?{name}\b", SOURCE, re.MULTILINE)


def test_each_folder_is_named_in_architecture_md():
    folders = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}
    named = set(re.findall(r"^\| `([\w/]+)` \|", MAP, re.MULTILINE))
    assert named == {path.relative_to(PACKAGE).as_posix() for path in folders}


def test_a_cold_acquire_crosses_few_files():
    walk = MAP.partition("## One cold acquire")[2].partition("## Where")[0]
    assert len(set(re.findall(r"`(_\w+/[\w/]+\.py)`", walk))) <= 8
