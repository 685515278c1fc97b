"""Test that a folder of the package imports only the folders below it."""

from __future__ import annotations

import ast
import functools
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


TESTS = Path(__file__).parent.parent
PACKAGE = TESTS.parent / "fastapi_topaz"

# From the bottom up. The modules beside the folders are the bottom, except for the
# entry points, which import any folder, and the connector, which picks a transport.
FOLDERS = {
    ".": set(),
    "_pool/state": set(),
    "_pool": {"anyio", "trio"},
    "_rpc": {"grpc"},
    "_telemetry": {"opentelemetry"},
    "_http2": {"anyio", "grpc", "hpack", "trio"},
    "_grpcio": {"anyio", "grpc"},
    "connector.py": set(),
    "_authorizer": {"anyio", "aserto", "google", "grpc", "opentelemetry"},
    "_decisions": {"anyio", "aserto", "google", "grpc", "starlette"},
    "_app": {"anyio", "fastapi", "grpc", "opentelemetry", "starlette"},
    "testing": {
        *("anyio", "aserto", "fastapi", "google", "grpc", "pytest", "starlette"),
        "trustme",
    },
    "_cli/doctor": {"anyio", "cryptography", "google", "grpc"},
    "_cli": None,
    "entrances": None,
}
"""The libraries that each folder may import. None means any."""

ENTRANCES = {"__init__.py", "__main__.py", "cli.py"}
PRIVATE = 8
"""The private modules that may be directly in the package folder."""


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def each_module(test):
    """Run *test* for each module. Parametrized, it would be a thousand tests."""

    def each():
        for module in MODULES:
            test(module)

    each.__name__ = test.__name__
    return each


def package_of(module):
    """Return the names that a relative import of *module* begins with."""
    return list(MODULES[module].relative_to(PACKAGE.parent).parent.parts)


def folder_of(module):
    path = MODULES[module].relative_to(PACKAGE)
    if path.parent != Path():
        return path.parent.as_posix()
    if path.name in ENTRANCES:
        return "entrances"
    return path.name if path.name in FOLDERS else "."


@functools.cache
def nodes(module):
    """Return the nodes of the syntax tree of *module*."""
    return [*ast.walk(ast.parse(MODULES[module].read_text()))]


def imports(module):
    """Yield the imports of *module*, including imports for type checkers only."""
    for node in nodes(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = package_of(module)[: 1 - node.level or None] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base


@each_module
def test_a_folder_imports_only_folders_below_it(module):
    order = list(FOLDERS)
    own = order.index(folder_of(module))
    for name in imports(module):
        if name in MODULES:
            assert order.index(folder_of(name)) <= own, f"{name} is above {module}"


def test_there_are_no_import_circles():
    graph = {module: set(imports(module)) & MODULES.keys() for module in MODULES}
    TopologicalSorter(graph).prepare()


@each_module
def test_only_the_public_api_of_grpc_is_used(module):
    for name in imports(module):
        first, *parts = name.split(".")
        private = first == "grpc" and any(part.startswith("_") for part in parts)
        assert not private, name
    # ruff detects private attributes.
    if folder_of(module) == "_grpcio":
        assert "SLF001" not in MODULES[module].read_text()


# The transports are beside each other.
APART = [{"_http2", "_grpcio"}]
IO = {"asyncio_io", "dialing", "opening", "rpc_connection", "trio_io", "addresses"}
IO |= {"successors"}


@each_module
def test_the_transports_do_not_know_each_other(module):
    own = folder_of(module)
    for pair in APART:
        others = {folder_of(name) for name in imports(module) if name in MODULES}
        assert own not in pair or not others & (pair - {own})


@pytest.mark.parametrize(
    "module", [module for module in MODULES if folder_of(module) == "_http2"]
)
def test_the_core_of_http2_has_no_input_and_output_and_no_clock(module):
    if module.rpartition(".")[2] in IO:
        return
    for node in nodes(module):
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await)
    names = {name.partition(".")[0] for name in imports(module)}
    assert not {"time", "asyncio", "threading", "random", "anyio", "trio"} & names


PURE = {"circuit", "invalidation", "keys", "seal", "store", "tags", "tokens"}


@pytest.mark.parametrize("name", sorted(PURE))
def test_the_core_of_the_decision_layers_has_no_coroutines_and_no_clock(name):
    module = f"fastapi_topaz._decisions.{name}"
    for node in nodes(module):
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await)
    assert not {"time", "asyncio", "random", "anyio", "trio"} & set(imports(module))


@each_module
def test_each_folder_imports_only_its_own_libraries(module):
    allowed = FOLDERS[folder_of(module)]
    known = {"fastapi_topaz", "attrs", *sys.stdlib_module_names}
    used = {name.partition(".")[0] for name in imports(module)} - known
    assert allowed is None or used <= allowed


@pytest.mark.parametrize(
    "module", [module for module in MODULES if folder_of(module) == "_pool/state"]
)
def test_the_state_has_no_coroutines_and_no_clock(module):
    for node in nodes(module):
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await)
    assert not {"time", "asyncio", "threading", "random"} & set(imports(module))


def test_few_private_modules_are_directly_in_the_package():
    private = [path.name for path in PACKAGE.glob("_*.py") if path.name[1] != "_"]
    assert len(private) <= PRIVATE, private


@each_module
def test_a_module_has_at_most_600_lines(module):
    assert len(MODULES[module].read_text().splitlines()) <= 600


@each_module
def test_a_function_has_at_most_60_lines_of_code(module):
    for node in nodes(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                length = (body[-1].end_lineno or 0) - body[0].lineno + 1
                assert length <= 60, f"{node.name} has {length} lines"


def test_each_folder_of_internals_has_its_tests_under_the_same_name():
    mirrors = {path.name for path in TESTS.iterdir() if path.name.startswith("_")}
    mirrors.discard("__pycache__")
    assert all((PACKAGE / name).is_dir() for name in mirrors)


@pytest.mark.parametrize(
    "path", sorted((TESTS / "behaviour").rglob("*.py")), ids=lambda path: path.stem
)
def test_tests_of_behaviour_import_nothing_private(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            assert not name.startswith("fastapi_topaz") or "._" not in name, name


def test_a_test_file_has_at_most_600_lines():
    lengths = {path: len(path.read_text().splitlines()) for path in TESTS.rglob("*.py")}
    assert not [path for path, length in lengths.items() if length > 600]


def test_no_test_helper_is_defined_twice():
    """Helpers used by several test files are in `tests/kit`."""
    by_name, found = {}, {}
    for path in TESTS.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                by_name.setdefault(node.name, []).append((path.name, node))
    for places in by_name.values():
        # To write a tree as text takes long.
        for name, node in places if len(places) > 1 else ():
            found.setdefault(ast.dump(node), []).append((name, node.name))
    assert not [places for places in found.values() if len(places) > 1]
