"""Test the pages that use Topaz itself: their commands, as printed."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from kit.examples import ROOT
from kit.pages import DOCS, Walk
from kit.topaz.server import MISSING, REAL


pytestmark = pytest.mark.real_clock

PAGE = DOCS / "tutorial.md"
TLS = DOCS / "tls.md"
COPIED = ["pyproject.toml", "README.md", "LICENSE", "fastapi_topaz", "examples"]
UNSET = {"PYTHONPATH", "VIRTUAL_ENV", "FASTAPI_TOPAZ_TRANSPORT"}


@pytest.fixture
def repository(tmp_path):
    """A copy of the files of the repository that the tutorial uses."""
    home = tmp_path / "repository"
    home.mkdir()
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, home / name)
    return home


@pytest.mark.skipif(REAL is None, reason=MISSING)
@pytest.mark.timeout(600)
def test_the_tutorial_works_as_printed(repository, tmp_path):
    """Install everything into a new environment."""
    path = f"{Path(REAL).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: text for name, text in os.environ.items() if name not in UNSET}
    env = {**kept, "PATH": path, "HOME": str(tmp_path)}
    with Walk(PAGE, repository, env) as walk:
        walk.run()


@pytest.mark.skipif(REAL is None, reason=MISSING)
@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")
@pytest.mark.timeout(180)
def test_the_page_tls_works_as_printed(tmp_path):
    places = [Path(REAL).parent, Path(sys.executable).parent, os.environ["PATH"]]
    path = os.pathsep.join(map(str, places))
    with Walk(TLS, tmp_path, {**os.environ, "PATH": path, "HOME": str(tmp_path)}) as it:
        it.run()


def test_the_tutorial_names_the_tested_release():
    release = re.search(r'TOPAZ_RELEASE = "(v.+)"', (ROOT / "noxfile.py").read_text())
    assert f"cmd/topazd@{release[1]}\n" in PAGE.read_text()
