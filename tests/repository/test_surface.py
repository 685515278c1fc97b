"""Test that the public surface changes only together with `surface.txt`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from repository.surface import surface


pytestmark = pytest.mark.real_clock

HERE = Path(__file__).parent

# Modules of other projects that `import fastapi_topaz` loads, with their own imports.
IMPORTED = {
    *("aserto", "anyio", "attr", "attrs", "google", "grpc", "idna", "opentelemetry"),
    *("sniffio", "typing_extensions", "importlib_metadata", "zipp", "deprecated"),
    *("wrapt", "protoc_gen_openapiv2", "exceptiongroup", "cython_runtime"),
}


def test_the_public_surface_matches_surface_txt():
    """
    After an intended change, run `tests/repository/surface.py` into `surface.txt`.
    """
    assert surface().splitlines() == (HERE / "surface.txt").read_text().splitlines()


def test_an_import_loads_no_more_than_it_needs():
    """
    The loaded modules decide the import time. `benchmarks/imports.py` measures it.
    """
    program = """
import sys
before = set(sys.modules)
import fastapi_topaz
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(loaded - set(sys.stdlib_module_names)))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = {name for name in result.stdout.split() if not name.startswith("_")}
    assert loaded - IMPORTED == {"fastapi_topaz"}
