"""
Check the types of the code on all pages with mypy.

    python tests/repository/snippets.py

The files of a walk are checked together, because they import each other. Each other
block is a module of its own. Names that a page takes for granted are declared before
it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from kit.pages import PAGES, blocks


IMPORTS = """
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from fastapi import Depends, FastAPI, Request
from fastapi_topaz import *
"""
DECLARED = {
    "admin_config": "TopazConfig",
    "app": "FastAPI",
    "config": "TopazConfig",
    "document": "Any",
    "get_identity": "Any",
    "grant": "Any",
    "pool": "ConnectionPool",
    "renew": "Any",
    "request": "Request",
    "required": "Any",
    "user": "Any",
}
# The modules that protoc generates on the page services.md.
GENERATED = "from typing import Any\n\ndef __getattr__(name: str) -> Any: ...\n"
MYPY = ("--config-file=", "--check-untyped-defs", "--ignore-missing-imports")
ALLOWED = ("--disable-error-code=import-untyped", "--allow-redefinition")


def module(code: str) -> str:
    """Return a module of the block *code*."""
    code = code.replace("(\n    ...,", "(\n    **required,")
    code = code.replace("TopazConfig(...,", "TopazConfig(**required,")
    bound = set(
        re.findall(r"^(?:async )?(?:def|class) (\w+)|^(\w+) =", code, re.MULTILINE)
    )
    names = {name for pair in bound for name in pair}
    for imported in re.findall(r"^from main import (.+)$", code, re.MULTILINE):
        names.update(imported.split(", "))
    needed = {name: of for name, of in DECLARED.items() if name not in names}
    head = IMPORTS + "".join(f"{name}: {of}\n" for name, of in needed.items())
    try:
        compile(code, "page", "exec")
    except SyntaxError:
        # It awaits at its top level.
        compile(code, "page", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        code = "async def block() -> None:\n" + textwrap.indent(code, "    ")
    return head + code


def write(folder: Path) -> list[list[Path]]:
    """Write the modules of all pages. Return those that are checked together."""
    alone, together = [], []
    for name in ("greeter_pb2", "greeter_pb2_grpc"):
        (folder / f"{name}.pyi").write_text(GENERATED)
    for page in PAGES:
        files = []
        for block in blocks(page):
            if block.language != "python":
                continue
            name = re.sub(r"\W", "_", f"{block.page}_{block.line}")
            if block.title is None:
                file = folder / f"{name}.py"
                file.write_text(module(block.code))
                alone.append(file)
            else:
                (folder / page.stem).mkdir(exist_ok=True)
                file = folder / page.stem / block.title.replace(".conf", "_conf")
                file.write_text(block.code)
                files.append(file)
        together += [files] if files else []
    return [alone, *together]


def main() -> int:
    """Check all modules, and return the exit code."""
    codes = []
    with tempfile.TemporaryDirectory() as folder:
        for files in write(Path(folder)):
            names = [file.name for file in files]
            command = [sys.executable, "-m", "mypy", *MYPY, *ALLOWED, *names]
            codes.append(
                subprocess.run(command, cwd=files[0].parent, check=False).returncode
            )
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(main())
