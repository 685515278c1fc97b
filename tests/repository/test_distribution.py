"""Test that the package refuses to import beside the other library of this name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastapi_topaz


PACKAGE = Path(fastapi_topaz.__file__).parent


@pytest.fixture
def site(tmp_path):
    """Return a folder like `site-packages` that contains only the package."""
    shutil.copytree(PACKAGE, tmp_path / "site" / "fastapi_topaz")
    return tmp_path / "site"


def add(folder, name, *files):
    """Install these empty files in *folder* as the distribution *name*."""
    metadata = folder / f"{name.replace('-', '_')}-1.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Name: {name}\nVersion: 1.1.0\n")
    (metadata / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()


def imported(*folders):
    return subprocess.run(
        [sys.executable, "-P", "-c", "import fastapi_topaz; print('imported')"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("file", ["fastapi_topaz/cache.py", "fastapi_topaz/a/b.py"])
def test_the_other_library_in_the_same_folder_is_an_import_error(site, file):
    add(site, "fastapi-topaz", "fastapi_topaz-1.1.0.dist-info/METADATA", file)
    result = imported(site)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.endswith(
        f"ImportError: fastapi-topaz 1.1.0 is another library, and it is installed "
        f"into the same folder as fastapi-topaz-pool: {site / 'fastapi_topaz'}. "
        f"Repair it with these two commands:\n"
        f"  pip uninstall -y fastapi-topaz fastapi-topaz-pool\n"
        f"  pip install fastapi-topaz-pool\n"
        f"If pip does not find fastapi-topaz-pool, install it from a copy of its "
        f"repository: pip install .\n"
    )


@pytest.mark.parametrize(
    "name, files",
    [
        ("fastapi-topaz-pool", ["fastapi_topaz/__init__.py"]),
        ("fastapi-topaz", []),
        ("fastapi-topaz", ["_fastapi_topaz.pth"]),
        ("fastapi-topaz", ["fastapi_topaz_more/cache.py"]),
        ("fastapi-topaz-extras", ["fastapi_topaz/cache.py"]),
    ],
)
def test_other_distributions_do_not_matter(site, name, files):
    add(site, name, *files)
    assert imported(site).stdout == "imported\n"


def test_the_other_library_in_another_folder_does_not_matter(site, tmp_path):
    add(tmp_path / "other", "fastapi-topaz", "fastapi_topaz/cache.py")
    assert imported(site, tmp_path / "other").stdout == "imported\n"
