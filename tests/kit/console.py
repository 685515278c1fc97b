"""The console script as users run it: in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import attrs


@attrs.frozen
class Ended:
    code: int
    out: str
    err: str

    def row(self, name):
        """Return the cells of the table row that begins with *name*."""
        for line in self.out.splitlines():
            cells = [cell.strip() for cell in re.split(r"[│|]", line)[1:-1]]
            if cells and cells[0] == name:
                return cells[1:]
        raise AssertionError(f"no row {name!r} in {self.out}")

    def number(self, name):
        return float(self.row(name)[0].removesuffix(" ms"))


def command(*args):
    return [sys.executable, "-W", "error", "-m", "fastapi_topaz", *args]


def environment(**more):
    # Exclude colours, proxies and a narrow screen of the environment.
    hidden = ("FORCE_COLOR", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "TOPAZ_API_KEY")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return {
        **kept,
        "NO_COLOR": "1",
        "COLUMNS": "80",
        "PYTHONIOENCODING": "utf-8",
        **more,
    }


def run(*args, **env):
    """Run the command in a separate process."""
    done = subprocess.run(
        command(*args),
        env=environment(**env),
        capture_output=True,
        encoding="utf-8",
        timeout=50,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


FORKED = """
import importlib, os, sys, traceback

class Blocker:
    def __init__(self, name):
        assert name not in sys.modules
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def main(without, *args):
    if without:
        sys.meta_path.insert(0, Blocker(without))
    try:
        importlib.import_module("fastapi_topaz.cli").main(args)
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

code = main(*sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""
"""The command as a program for `Programs`, without the module named first."""
