"""What users rely on changes only where a change of `surface.txt` says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from repository.surface import surface


pytestmark = pytest.mark.real_clock

HERE = Path(__file__).parent

# What `import fastapi_topaz` loads of other projects, with what these load in turn.
IMPORTED = {
    *("aserto", "anyio", "attr", "attrs", "google", "grpc", "idna", "opentelemetry"),
    *("sniffio", "typing_extensions", "importlib_metadata", "zipp", "deprecated"),
    *("wrapt", "protoc_gen_openapiv2", "exceptiongroup", "cython_runtime"),
}


def test_names_signatures_log_lines_metrics_and_spans_are_those_of_the_file():
    """If a change is meant, run `tests/repository/surface.py` into `surface.txt`."""
    assert surface().splitlines() == (HERE / "surface.txt").read_text().splitlines()


def test_an_import_loads_no_more_than_it_needs():
    """What is loaded decides how long it takes; `benchmarks/imports.py` measures it."""
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
