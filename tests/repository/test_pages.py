"""
Test that the code on all pages runs.

Blocks with a title are the files of a walk: see test_walks.py. All other blocks in
Python run here, each in a namespace with the names that the page takes for granted.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from types import ModuleType, SimpleNamespace

import anyio
import pytest
from fastapi import Depends, FastAPI

import fastapi_topaz
from fastapi_topaz import (
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
    require_policy_auto,
)
from kit.backends import backends
from kit.configs import Requests
from kit.examples import ROOT
from kit.pages import DOCS, PAGES, blocks, is_terminal


pytestmark = pytest.mark.real_clock

# Pages whose code needs a server or a process of its own, with the test that runs it.
ELSEWHERE = {
    "docs/observability.md": "test_readme.py",
    "docs/services.md": "test_services_page.py",
    "docs/status-page.md": "test_status_page_page.py",
}
WALKS = {
    "docs/tls.md": "test_tutorial.py",
    "docs/tutorial.md": "test_tutorial.py",
    **{
        f"docs/{name}.md": "test_walks.py"
        for name in (
            "kubernetes",
            "lifespan",
            "lists",
            "prometheus",
            "testing",
            "traces",
        )
    },
}
LANGUAGES = {
    *(
        "console",
        "ini",
        "json",
        "mermaid",
        "nginx",
        "prometheus",
        "promql",
        "python",
        "rego",
    ),
    *("text", "yaml"),
    "",
}

METRIC = r"\btopaz_(?:pool|auth|topaz|errors|cache|fallback|circuit)_\w+\b"

# What a block that only defines something is used for.
USES = {
    "may_delete": "assert await may_delete(request)",
    "may_write": "await may_write(request, '7')",
    "writable": "assert writable('7')['object_id'] == '7'",
    "strict_lifespan": "async with strict_lifespan(app): pass",
    "both": "async with both(app): pass",
    "startup": "await startup(); await config.connection_pool.close()",
}

BLOCKS = [block for page in PAGES for block in blocks(page)]
SNIPPETS = [
    block
    for block in BLOCKS
    if block.language == "python"
    and not (block.title or block.not_run or block.page in ELSEWHERE)
]


@pytest.fixture
def names(embedded_authorizer, monkeypatch):
    """The names that the pages take for granted."""
    embedded_authorizer.policies = lambda _check: True
    options = embedded_authorizer.options
    required = {
        "authorizer_options": options,
        "policy_path_root": "myapp",
        "identity_provider": lambda _request: Identity(IdentityType.NONE),
    }
    config = TopazConfig(**required)
    app = FastAPI(lifespan=config.lifespan)
    guard = Depends(require_policy_auto(config))
    app.get("/documents", dependencies=[guard])(lambda: None)
    # The module of the application, for a test on a page.
    main = ModuleType("main")
    main.app, main.may_write = app, lambda: None
    monkeypatch.setitem(sys.modules, "main", main)

    async def renew():
        return "key", 60.0

    async def grant(user, document):
        assert user
        assert document

    return {
        **{name: getattr(fastapi_topaz, name) for name in fastapi_topaz.__all__},
        "AsyncIterator": AsyncIterator,
        "Depends": Depends,
        "FastAPI": FastAPI,
        "Iterator": Iterator,
        "admin_config": TopazConfig(**required),
        "app": app,
        "asynccontextmanager": contextlib.asynccontextmanager,
        "config": config,
        "document": SimpleNamespace(id="7"),
        "grant": grant,
        "options": options,
        "pool": ConnectionPool(),
        "renew": renew,
        "request": Requests({"type": "http", "headers": [], "path_params": {}}),
        "required": required,
        "user": "alice",
    }


async def run(code, page, names):
    """Run *code*, which may await at its top level."""
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    compiled = compile(code, page, "exec", flags, dont_inherit=True)
    if compiled.co_flags & inspect.CO_COROUTINE:
        await eval(compiled, names)
    else:
        exec(compiled, names)


@backends
@pytest.mark.parametrize("block", SNIPPETS, ids=lambda block: block.id)
def test_the_code_of_a_page_runs(block, backend, names):
    code = block.code.replace("(\n    ...,", "(\n    **required,")
    code = code.replace("TopazConfig(...,", "TopazConfig(**required,")
    url = names["options"].url
    code = re.sub(r"(?:localhost|127\.0\.0\.1):8282", url, code)

    async def program():
        await run(code, block.page, names)
        for name, use in USES.items():
            if re.search(rf"^(?:async )?def {name}\b", code, re.MULTILINE):
                await run(use, block.page, names)
        await names["config"].connection_pool.close()

    with warnings.catch_warnings():
        # FastAPI prefers a lifespan, and a page shows the hooks.
        warnings.filterwarnings("ignore", "(?s).*on_event is deprecated")
        anyio.run(program, backend=backend)


def test_each_use_is_of_a_function_on_a_page():
    code = "\n".join(block.code for block in SNIPPETS)
    for name in USES:
        assert re.search(rf"^(?:async )?def {name}\b", code, re.MULTILINE), name


def test_each_command_of_the_pages_is_run():
    for block in BLOCKS:
        if block.language == "console" and not block.not_run:
            assert block.page in WALKS or block.page == "README.md", block.id
            assert block.title is None or is_terminal(block.title), block.id


def test_each_file_of_the_pages_is_used_by_a_walk():
    for block in BLOCKS:
        if block.title and not block.not_run:
            assert block.page in WALKS, block.id


def test_each_walk_and_each_other_test_exists():
    folder = ROOT / "tests" / "repository"
    for page, test in {**WALKS, **ELSEWHERE}.items():
        assert (ROOT / page).exists()
        assert (
            page.removeprefix("docs/").removesuffix(".md")
            in (folder / test).read_text()
        )


def test_each_block_that_is_not_run_has_its_reason():
    for page in PAGES:
        reasons = page.read_text().count("<!-- not run: ")
        assert sum(block.not_run is not None for block in blocks(page)) == reasons, page


def test_each_block_has_a_known_language():
    for block in BLOCKS:
        assert block.language in LANGUAGES, block.id


def test_each_metric_of_the_pages_exists():
    surface = (ROOT / "tests" / "repository" / "surface.txt").read_text()
    known = set(re.findall(r"^(topaz_\w+):", surface, re.MULTILINE))
    for page in DOCS.rglob("*.md"):
        for name in re.findall(METRIC, page.read_text()):
            short = re.sub(r"_(total|bucket|count|sum)$", "", name)
            short = short.removesuffix("_seconds")
            assert {name, short} & known, f"{page.name}: {name}"
