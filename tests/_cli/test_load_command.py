"""Test `load` as users run it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess

import pytest

from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.console import command, environment
from kit.secrets import KEY


pytestmark = pytest.mark.real_clock

BACKENDS = ["asyncio", "trio"]
POLICIES = {"myapp.GET.documents": True, "myapp.POST.documents": False}


@pytest.fixture
def topaz():
    with EmbeddedAuthorizer(POLICIES, api_key=KEY) as running:
        yield running


def to(topaz, *more):
    return ("load", "--url", topaz.url, "--insecure", *more)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "path, outcome",
    [("myapp.GET.documents", "allowed"), ("myapp.POST.documents", "denied")],
)
def test_decisions_are_counted(path, outcome, backend, topaz, run_forked):
    ended = run_forked(
        *to(topaz, "--policy-path", path, "--rate", "40", "--duration", "0.5"),
        *("--concurrency", "1000", "--check-timeout", "30", "--json"),
        *("--backend", backend),
        TOPAZ_API_KEY=KEY,
    )

    assert (ended.code, ended.err) == (0, "")
    told = json.loads(ended.out)
    assert told["outcomes"] == {outcome: 20}
    assert (told["calls"], told["failed"], told["missed"]) == (20, 0, 0)
    assert 0 < told["latency"]["p50"] <= told["latency"]["p99"]
    assert told["pool"]["max_connections"] == 10
    assert topaz.calls["Is"] == 20
    assert KEY not in ended.out


def test_the_size_of_the_pool_can_be_set(topaz, run_forked):
    ended = run_forked(
        *to(topaz, "--duration", "0.2", "--connections", "3", "--streams", "7"),
        *("--json", "--concurrency", "50"),
    )

    pool = json.loads(ended.out)["pool"]
    assert (pool["max_connections"], pool["streams_max"]) == (3, 21)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_terminal_there_are_plain_lines_and_a_summary(
    backend, topaz, run_forked
):
    ended = run_forked(
        *to(topaz, "--rate", "10", "--duration", "1.5", "--backend", backend)
    )

    assert (ended.code, ended.err) == (0, "")
    assert "\x1b" not in ended.out
    assert f"Info at {topaz.url}" in ended.out
    assert " p99 " in ended.out
    assert ended.number("calls") == ended.number("answered") == 15
    assert ended.row("healthy")[4].endswith("/10")


@pytest.mark.parametrize("backend", BACKENDS)
def test_failed_calls_give_exit_code_1_and_a_cause(backend, nobody, run_forked):
    ended = run_forked(
        *("load", "--url", nobody, "--insecure", "--rate", "10", "--duration", "0.5"),
        *("--backend", backend),
    )

    assert (ended.code, ended.err) == (1, "")
    assert ended.number("failed") == 5
    assert "refused" in ended.out[ended.out.index("Cause: ") :]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("url", ["192.0.2.7:8282", "0.0.0.0:8282"])
def test_another_machine_is_refused(url, backend, run_forked):
    ended = run_forked("load", "--url", url, "--insecure", "--backend", backend)

    assert (ended.code, ended.out) == (2, "")
    assert "not on this machine" in ended.err
    assert "--allow-remote" in ended.err


def test_another_machine_is_loaded_if_that_is_allowed(run_forked):
    # A wildcard address counts as another machine, and leads to this one.
    with EmbeddedAuthorizer(POLICIES) as topaz:
        ended = run_forked(
            *("load", "--url", f"0.0.0.0:{topaz.port}", "--insecure", "--allow-remote"),
            *("--rate", "10", "--duration", "0.5", "--json"),
        )

    assert (ended.code, json.loads(ended.out)["outcomes"]) == (0, {"answered": 5})


@contextlib.contextmanager
def started(*args, **streams):
    with subprocess.Popen(
        command(*args),
        env=environment(PYTHONUNBUFFERED="1", **streams.pop("env", {})),
        **streams,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_ends_it_with_the_summary(backend, topaz):
    arguments = to(topaz, "--duration", "600", "--backend", backend)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    with started(*arguments, **pipes) as process:
        # The second line is printed during the test.
        assert process.stdout.readline().startswith("Info at")
        assert " p99 " in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=50)

    assert (process.returncode, err) == (130, "")
    assert "calls per second" in out
    assert "latency" in out
    assert topaz.connections_open == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_terminal_shows_the_test_while_it_runs(backend, topaz):
    ours, theirs = pty.openpty()
    arguments = to(topaz, "--duration", "600", "--backend", backend)
    env = {"TERM": "xterm", "LINES": "50"}
    with started(*arguments, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        seen = read_until(ours, "left", "running", "p99.9", "connections", "waiting")
        process.send_signal(signal.SIGINT)
        seen += read_to_the_end(ours)
        assert process.wait(50) == 130, seen
    os.close(ours)
    assert "Result" in seen


def read_until(terminal, *words):
    """Return the output once it has all *words* after some answered calls."""
    seen = ""
    while not all(word in seen for word in (*words, "answered ")):
        seen += os.read(terminal, 65536).decode(errors="replace")
    return seen


def read_to_the_end(terminal):
    seen = ""
    # On Linux, the end of the other side is an error.
    with contextlib.suppress(OSError):
        while data := os.read(terminal, 65536):
            seen += data.decode(errors="replace")
    return seen
