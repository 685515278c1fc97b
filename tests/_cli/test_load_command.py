"""Test `load` as users run it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import subprocess

import pytest
from rich.console import Console

from fastapi_topaz import AuthorizerOptions, ConnectionPool
from fastapi_topaz._cli import load_command as _load_command
from fastapi_topaz._cli.load import Plan, Tally
from fastapi_topaz._cli.load_command import LoadSettings
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


# -- the rate is not reached --------------------------------------------------------

FAST = ("--rate", "50", "--duration", "0.5", "--check-timeout", "30")


@pytest.fixture
def slow_topaz():
    """An authorizer that answers after the test has ended."""

    async def slow(_check):
        await asyncio.sleep(1)
        return True

    with EmbeddedAuthorizer({"myapp.GET.slow": slow}) as running:
        yield running


def asking(topaz, *more):
    return to(topaz, "--policy-path", "myapp.GET.slow", *FAST, *more)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_that_a_limit_of_calls_at_once_prevents_gives_exit_code_3(
    backend, slow_topaz, run_forked
):
    ended = run_forked(*asking(slow_topaz, "--concurrency", "1", "--backend", backend))

    assert (ended.code, ended.err) == (3, "")
    assert ended.number("failed") == 0
    missed = ended.number("not made: too many were running")
    assert 0 < missed < 25
    assert (
        f"The rate was not reached: {missed:.0f} of the 25 calls that were due were "
        "not made, because as many others as --concurrency allows (1) were running."
    ) in ended.out


def test_a_rate_that_is_not_reached_is_in_the_json(slow_topaz, run_forked):
    ended = run_forked(*asking(slow_topaz, "--concurrency", "1", "--json"))

    said = json.loads(ended.out)
    assert ended.code == 3
    assert said["calls"] + said["missed"] + said["late"] == 25
    assert said["missed"] > 0
    assert "rate was not reached" in said["verdict"][0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_limit_each_call_is_made_at_the_rate(backend, slow_topaz, run_forked):
    ended = run_forked(
        *asking(slow_topaz, "--connections", "25", "--json", "--backend", backend)
    )

    said = json.loads(ended.out)
    # A machine that stands still for two seconds is late, and says so.
    assert ended.code == (3 if said["late"] else 0)
    assert said["outcomes"] == {"allowed": 25 - said["late"]}
    assert said["missed"] == 0
    assert len(said["verdict"]) == bool(said["late"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_overload_makes_calls_fail_and_is_named_as_the_cause(
    backend, topaz, run_forked
):
    topaz.delay = 60
    ended = run_forked(
        *to(topaz, "--policy-path", "myapp.GET.documents", "--json"),
        *("--rate", "50", "--duration", "0.5", "--check-timeout", "1"),
        *("--connections", "1", "--backend", backend),
        TOPAZ_API_KEY=KEY,
    )

    said = json.loads(ended.out)
    assert ended.code == 1
    assert said["failed"] + said["late"] == 25
    assert said["missed"] == 0
    assert f" of {said['failed']} failed calls)" in said["verdict"][-1]
    assert said["verdict"][-1].startswith("Cause: ")


def test_the_cause_of_refused_calls_is_their_status(topaz, run_forked):
    ended = run_forked(
        *to(topaz, "--policy-path", "myapp.GET.documents"),
        *("--rate", "20", "--duration", "0.5"),
    )

    assert ended.code == 1
    cause = r"Cause: UNAUTHENTICATED: the api_key .* \((\d+) of \1 failed calls\)"
    assert re.search(cause, ended.out)


def some_settings():
    return LoadSettings(
        options=AuthorizerOptions(), plan=Plan(duration=1, rate=10), policy_path=None,
        check_timeout=1, connections=1, streams=1, allows_remote=False, as_json=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "outcomes, is_noted",
    [
        ({"denied": 2}, True),
        ({"denied": 2, "allowed": 1}, False),
        ({"denied": 2, "PoolTimeout": 1}, False),
        ({}, False),
    ],
)
def test_the_result_says_if_all_calls_were_denied(outcomes, is_noted):
    tally = Tally()
    tally.outcomes.update(outcomes)
    noted = list(_load_command.verdict(some_settings(), tally))
    assert [each.startswith("All calls were denied.") for each in noted] == (
        [True] if is_noted else []
    )


def test_calls_that_this_machine_begins_too_late_are_shown():
    settings = some_settings()
    tally = Tally(late=4, behind=1.94)
    tally.outcomes["answered"] = 6

    [verdict] = _load_command.verdict(settings, tally)
    assert verdict == (
        "The rate was not reached: 4 of the 10 calls that were due were not made, "
        "because this machine could not begin them within 2 s."
    )
    console = Console(width=100)
    with console.capture() as capture:
        console.print(_load_command.summary(settings, tally, None))
    assert re.search(r"this machine is too slow +│ +4 ", capture.get())
    assert re.search(r"begun late, by up to +│ +1.9 s", capture.get())


@pytest.mark.parametrize(
    "tally, words",
    [(Tally(missed=2, late=1), "failed 0  not made 3"), (Tally(), "failed 0  conn")],
)
def test_the_line_of_each_second_shows_calls_that_were_not_made(tally, words):
    status = ConnectionPool().status()
    assert words in _load_command.line(tally, status, 1.0, 2.0)


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


@pytest.mark.costly
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
