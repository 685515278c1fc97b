"""Imports go downwards only, and every module stays small enough to read."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parent.parent / "fastapi_topaz"

# From the ground up: a module may import those of its own layer and below.
LAYERS = [
    {
        *("exceptions", "_errors", "_options", "_target", "_rego", "_backoff"),
        *("_status", "_fork", "_version", "_redaction", "_log_limit", "_slips"),
        "_distribution",
    },
    {"_attempts", "_entry", "_outage", "_rotation", "_snapshot", "_state"},
    {"_resource", "_answers", "_messages", "_authorizer", "_telemetry", "_transport"},
    {
        *("_clock", "_host", "_refusals", "_leaks", "_runtime", "_conformity"),
        *("_connections",),
        *("_maintenance", "_life", "_lease", "_acquire", "_nesting", "_pool"),
        *("_readiness", "_interrupts"),
    },
    {"_routes", "_config", "_dependencies"},
    {"testing"},
    {"_demo", "_demo_server", "_demo_command", "cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# What of other people's a layer may use, besides the standard library and attrs.
ALLOWED = [
    set(),
    set(),
    {"anyio", "aserto", "google", "grpc", "opentelemetry", "trio"},
    {"anyio", "trio"},
    {"anyio", "fastapi", "grpc", "starlette"},
    {"anyio", "aserto", "google", "grpc", "pytest", "trustme"},
    None,
]

# The state is told the time and does nothing by itself.
PURE = [
    "_state.py",
    "_attempts.py",
    "_outage.py",
    "_rotation.py",
    "_snapshot.py",
    "_entry.py",
    "_backoff.py",
    "_status.py",
    "_options.py",
    "_rego.py",
    "_target.py",
    "_errors.py",
    "exceptions.py",
]

MODULES = sorted(PACKAGE.rglob("*.py"))
identify = {"argvalues": MODULES, "ids": [str(m.relative_to(PACKAGE)) for m in MODULES]}


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path, *, typing=False):
    """Yield the modules that *path* imports, by their full names."""
    tree = ast.parse(path.read_text())
    skipped = set()
    if not typing:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                skipped.update(id(child) for child in ast.walk(node))
    package = ("fastapi_topaz", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1])
            start = f"{base}." if node.level else ""
            module = start + (node.module or "")
            if module.rstrip(".") == "fastapi_topaz":
                yield from (f"fastapi_topaz.{alias.name}" for alias in node.names)
            else:
                yield module.rstrip(".")


@pytest.mark.parametrize("path", **identify)
def test_imports_go_downwards(path):
    if path == PACKAGE / "__init__.py":
        return
    level = LEVEL[room(path)]
    for name in imports(path):
        if name.startswith("fastapi_topaz"):
            target = name.split(".")[1] if "." in name else "__init__"
            assert target in LEVEL, f"{path.name} imports {name}"
            assert LEVEL[target] <= level, f"{path.name} imports {name} from above"


@pytest.mark.parametrize("path", **identify)
def test_each_layer_knows_only_its_own_libraries(path):
    if (
        path == PACKAGE / "__init__.py"
        or (allowed := ALLOWED[LEVEL[room(path)]]) is None
    ):
        return
    for name in imports(path):
        top = name.split(".")[0]
        if top in {"fastapi_topaz", "attrs", *sys.stdlib_module_names}:
            continue
        assert top in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("name", PURE)
def test_the_ground_has_no_coroutines_and_no_clock(name):
    tree = ast.parse((PACKAGE / name).read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await)
    assert not {"time", "asyncio", "threading", "random"} & set(
        imports(PACKAGE / name, typing=True)
    )


def test_nothing_imports_the_package_itself():
    for path in MODULES:
        if path != PACKAGE / "__init__.py":
            assert "fastapi_topaz" not in set(imports(path)), path


@pytest.mark.parametrize("path", **identify)
def test_a_module_has_at_most_600_lines(path):
    assert len(path.read_text().splitlines()) <= 600


@pytest.mark.parametrize("path", **identify)
def test_a_function_has_at_most_60_lines_of_code(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                length = (body[-1].end_lineno or 0) - body[0].lineno + 1
                assert length <= 60, f"{node.name} has {length} lines"
