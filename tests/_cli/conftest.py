"""Fixtures of the tests of the command line."""

from __future__ import annotations

import socket

import pytest

from kit.console import FORKED, environment
from kit.programs import BARE, Programs


@pytest.fixture(scope="session")
def run_bare(tmp_path_factory):
    """Run a program in a process that has imported nothing of the extras."""
    with Programs(tmp_path_factory.mktemp("bare"), BARE) as programs:
        yield programs.run


@pytest.fixture(scope="session")
def run_forked(run_program, request):
    """A fast `run`: it forks one process, because a start takes a second."""

    def run_forked(*args, without=None, cwd=None, **env):
        run = request.getfixturevalue("run_bare") if without else run_program
        return run(FORKED, without or "", *args, cwd=cwd, env=environment(**env))

    return run_forked


@pytest.fixture
def nobody():
    """Yield an address that refuses connections while the test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"
