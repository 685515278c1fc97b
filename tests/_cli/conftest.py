"""Fixtures of the tests of the command line."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from kit.console import FORKS, Ended, environment


@pytest.fixture(scope="module")
def run_forked(tmp_path_factory):
    """A fast `run`: it forks one process, because a start takes a second."""
    folder = tmp_path_factory.mktemp("forked")
    numbers = itertools.count()
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", FORKS],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    ) as process:

        def run_forked(*args, without=None, cwd=None, **env):
            number = next(numbers)
            out, err = folder / f"{number}.out", folder / f"{number}.err"
            task = {"args": args, "env": environment(**env), "without": without}
            task |= {"cwd": cwd and str(cwd), "out": str(out), "err": str(err)}
            process.stdin.write(json.dumps(task))
            process.stdin.write("\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
            return Ended(code, out.read_text("utf-8"), err.read_text("utf-8"))

        yield run_forked
        # Also kill a child that hangs.
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def nobody():
    """Yield an address that refuses connections while the test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"
