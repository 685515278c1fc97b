"""Test how programs run in forked processes."""

from __future__ import annotations

import signal

import pytest

from kit.programs import Programs


pytestmark = pytest.mark.real_clock


@pytest.fixture
def programs(tmp_path):
    with Programs(tmp_path, modules=()) as running:
        yield running


def test_a_program_gets_its_arguments_and_environment_and_its_end_is_told(programs):
    program = """
        import os, sys
        print(sys.argv[1:], os.environ["NAME"], os.getcwd() == sys.argv[1])
        print("trouble", file=sys.stderr)
        sys.exit(3)
    """
    folder = str(programs.folder.resolve())
    ended = programs.run(program, folder, env={"NAME": "jane"}, cwd=folder)
    assert ended.code == 3
    assert ended.out == f"{[folder]} jane True\n"
    assert ended.err == "trouble\n"


def test_a_killed_program_is_told_by_its_signal(programs):
    ended = programs.run("import os; os.kill(os.getpid(), 9)")
    assert ended.code == -signal.SIGKILL


@pytest.mark.parametrize("strict, code", [(True, 1), (False, 0)])
def test_warnings_are_errors_if_asked_for(programs, strict, code):
    ended = programs.run("import warnings; warnings.warn('x')", strict=strict)
    assert ended.code == code
    assert "UserWarning: x" in ended.err


def test_after_a_program_that_takes_too_long_the_next_one_runs(programs, monkeypatch):
    def too_late():
        raise KeyboardInterrupt

    first = programs._process
    monkeypatch.setattr(first.stdout, "readline", too_late)
    with pytest.raises(KeyboardInterrupt):
        programs.run("import time; time.sleep(600)")
    assert first.returncode == -signal.SIGKILL
    assert programs.run("print('next')").out == "next\n"
