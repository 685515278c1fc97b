"""Test the console script as users run it: in a separate process."""

from __future__ import annotations

import contextlib
import importlib
import re
import signal
import subprocess
import sys

import pytest
from fastapi import FastAPI

from fastapi_topaz import cli
from fastapi_topaz._cli import commands as _commands
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.console import command, environment, run


pytestmark = pytest.mark.real_clock

BACKENDS = ["asyncio", "trio"]


@pytest.fixture(scope="module", params=BACKENDS)
def demo(request, run_forked):
    return run_forked(
        *("demo", "--requests", "80", "--no-faults", "--backend", request.param)
    )


def test_all_requests_are_answered_as_the_policies_decide(demo):
    ended = demo

    assert (ended.code, ended.err) == (0, "")
    assert ended.number("requests") == 80
    # Three of eight requests are denied.
    assert ended.number("allowed (200)") == 50
    assert ended.number("denied (403)") == 30
    assert ended.number("failed") == 0
    assert ended.number("checks answered") == 80
    assert 0 < ended.number("latency p50") <= ended.number("latency p99")
    assert ended.number("requests per second") > 0


def test_there_are_never_more_connections_than_allowed(demo):
    ended = demo

    status, total, idle, busy, healthy, most, streams = ended.row("afterwards")
    assert (status, busy, streams) == ("ok", "0", "0/10")
    assert (
        int(total) == int(idle) == int(healthy) == ended.number("TCP connections open")
    )
    assert 1 <= ended.number("TCP connections accepted") <= int(most) == 10
    total, idle, busy = map(int, ended.row("halfway")[1:4])
    assert total == idle + busy <= 10


def test_streams_set_the_capacity_of_a_connection(run_forked):
    ended = run_forked(*("demo", "--requests", "50", "--streams", "5", "--no-faults"))

    assert ended.code == 0
    assert ended.row("afterwards")[-1] == "0/50"


def test_a_demo_with_one_request_works(run_forked):
    ended = run_forked(
        *("demo", "--requests", "1", "--concurrency", "7", "--no-faults")
    )

    assert ended.code == 0
    assert ended.number("requests") == ended.number("allowed (200)") == 1


def test_proxies_from_the_environment_are_not_used(nobody, run_forked):
    ended = run_forked(
        *("demo", "--requests", "8", "--no-faults"), HTTP_PROXY=f"http://{nobody}"
    )

    assert ended.code == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unreachable_topaz_is_reported(backend, nobody, run_forked):
    ended = run_forked(
        *("demo", "--url", nobody, "--insecure", "--backend", backend),
        *("--requests", "500", "--concurrency", "10"),
    )

    assert (ended.code, ended.err) == (1, "")
    assert ended.number("failed") == ended.number("requests") < 500
    assert ended.number("allowed (200)") == ended.number("denied (403)") == 0
    assert ended.row("checks answered") == ["n/a"]
    assert "Gave up after" in ended.out
    assert "x answered 503" in ended.out
    [cause] = re.findall(r"^Cause: .*", ended.out, re.MULTILINE)
    assert nobody in cause
    assert "refused" in cause


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_external_topaz_may_make_other_decisions(backend, run_forked):
    with EmbeddedAuthorizer(
        {
            "other.GET.documents": False,
            "other.GET.documents.__id": True,
            "other.DELETE.documents.__id": False,
        },
        tls=True,
        api_key="secret",
    ) as topaz:
        ended = run_forked(
            *("demo", "--url", topaz.url, "--cert", topaz.ca_cert_path),
            *("--policy-root", "other", "--requests", "80", "--backend", backend),
            TOPAZ_API_KEY="secret",
        )

        assert (ended.code, ended.err) == (0, "")
        assert ended.number("allowed (200)") == ended.number("denied (403)") == 40
        assert topaz.calls["Is"] == 80
        assert topaz.connections_accepted <= 10


def test_some_failed_requests_give_exit_code_1(run_forked):
    policies = {"myapp.GET.documents": True, "myapp.GET.documents.__id": True}
    with EmbeddedAuthorizer(policies) as topaz:
        ended = run_forked("demo", "--url", topaz.url, "--insecure", "--requests", "80")

    assert (ended.code, ended.err) == (1, "")
    assert ended.number("requests") == 80
    assert ended.number("allowed (200)") == 60
    assert ended.number("failed") == 20
    assert "Failed: 20 x answered 500" in ended.out
    assert "Cause: no decision on myapp.DELETE.documents.__id" in ended.out


WRONG = {
    "demo --bogus": "--bogus",
    "demo --requests 0": "--requests",
    "demo --concurrency=-1": "--concurrency",
    "demo --streams 0": "--streams",
    "demo --backend curio": "--backend",
    "demo --insecure": "need --url",
    "demo --url http://topaz": "without a scheme",
    "demo --url x:1 --cert there-is-none.pem": "--cert",
    f"demo --url x:1 --insecure --cert {__file__}": "exclude",
    "demo --policy-root=": "policy_path_root",
    "demo --url x:1 --insecure --faults": "--faults",
    "doctor --timeout 0": "--timeout",
    "doctor --timeout nan": "--timeout",
    "doctor --streams 0": "--streams",
    "doctor --backend curio": "--backend",
    "load --duration inf": "--duration",
    "load --duration 99999": "--duration",
    "load --rate -1": "--rate",
    "load --concurrency 0": "--concurrency",
    "load --url http://topaz": "without a scheme",
    "load --url 127.0.0.1:1 --insecure --cert nothing.pem": "exclude",
    "load --url 127.0.0.1:1 --cert there-is-none.pem": "cert_file_path",
    "load --insecure --policy-path not-rego": "policy_path",
    "routes": "MODULE:ATTRIBUTE",
    "doctor main:config more": "more",
    "dmeo": "dmeo",
}
QUESTIONS = {
    "--version": r"^fastapi-topaz-pool \d+\.\d+",
    "--help": "Usage: fastapi-topaz-pool",
    "demo --help": "Usage: fastapi-topaz-pool demo",
    "doctor --help": "Usage: fastapi-topaz-pool doctor",
    "load --help": "Usage: fastapi-topaz-pool load",
    "routes --help": "Usage: fastapi-topaz-pool routes",
}


@pytest.mark.parametrize("line, complaint", WRONG.items())
def test_invalid_usage_is_reported(line, complaint, run_forked):
    ended = run_forked(*line.split())
    assert ended.code == 2
    assert complaint in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("line, answer", QUESTIONS.items())
def test_help_and_version_are_printed(line, answer, run_forked):
    ended = run_forked(*line.split())
    assert (ended.code, ended.err) == (0, "")
    assert re.search(answer, ended.out, re.MULTILINE)


@pytest.mark.parametrize("line", ["dmeo", "--version"])
def test_a_separate_process_prints_the_same(line, run_forked):
    assert run(*line.split()) == run_forked(*line.split())


@pytest.mark.parametrize(
    "name, backend",
    [
        ("typer", "asyncio"),
        ("rich", "asyncio"),
        ("httpx", "asyncio"),
        ("uvicorn", "asyncio"),
        ("hypercorn", "trio"),
        ("trio", "trio"),
    ],
)
def test_a_missing_extra_is_named(name, backend, run_forked):
    ended = run_forked("demo", "--backend", backend, without=name)

    assert ended.code == 2
    assert re.fullmatch(
        rf"{name}\S* is missing: pip install 'fastapi-topaz-pool\[demo\]'\n", ended.err
    )


@pytest.mark.parametrize(
    "line, name, extra",
    [
        ("doctor", "rich", "cli"),
        ("doctor", "typer", "cli"),
        ("doctor", "cryptography", "cli"),
        ("load --url 127.0.0.1:1 --insecure --backend trio", "trio", "cli,trio"),
    ],
)
def test_the_extra_of_a_command_is_named(line, name, extra, run_forked):
    ended = run_forked(*line.split(), without=name)

    assert ended.code == 2
    wanted = re.escape(f"pip install 'fastapi-topaz-pool[{extra}]'")
    assert re.search(rf"{name}\S* is missing: {wanted}\n$", ended.err)


@pytest.mark.parametrize("line", ["doctor --url 127.0.0.1:1 --insecure", "--help"])
@pytest.mark.parametrize("name", ["httpx", "uvicorn", "hypercorn", "trustme"])
def test_only_the_demo_needs_its_extra(line, name, run_forked):
    assert run_forked(*line.split(), without=name).err == ""


@pytest.mark.costly
@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_ends_the_demo_without_a_traceback(backend):
    arguments = ("demo", "--requests", "1000000", "--backend", backend)
    with subprocess.Popen(
        command(*arguments),
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        # This line is printed when the authorizer runs and the server is about to
        # start.
        process.stdout.readline()
        for _ in range(5):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, err = process.communicate(timeout=10)
                break
            # Python drops a KeyboardInterrupt raised in a weakref callback, and prints
            # it. A person presses the keys again.
        else:
            process.kill()
            pytest.fail("it did not stop")

    assert process.returncode == 130
    assert "Traceback" not in err or "Exception ignored in" in err


def test_the_command_leaves_no_threads_and_handlers_in_this_process(capsys):
    import logging
    import threading

    before = set(threading.enumerate()), list(logging.getLogger().handlers)

    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--requests", "20", "--no-faults", "--backend", "trio"])

    assert ended.value.code in {0, None}
    assert "failed" in capsys.readouterr().out
    threads, handlers = before
    # Some of gRPC's own earlier threads may have ended meanwhile.
    assert set(threading.enumerate()) <= threads
    assert list(logging.getLogger().handlers) == handlers


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_demo_server_that_does_not_start_is_reported(backend, monkeypatch, capsys):
    from fastapi_topaz._cli import demo_command as _demo_command

    @contextlib.asynccontextmanager
    async def lifespan(_app):
        raise OSError("no space left")
        yield

    monkeypatch.setattr(
        _demo_command, "application", lambda _: FastAPI(lifespan=lifespan)
    )

    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--backend", backend])

    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "Failed: the server did not start" in printed.out
    assert "no space left" in printed.out
    assert printed.err == ""


def test_another_missing_module_is_not_blamed_on_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi_topaz._cli.commands", None)

    with pytest.raises(ModuleNotFoundError):
        cli.main(["--version"])


# -- loading the command ------------------------------------------------------------


def test_importing_the_console_script_runs_nothing():
    """As by tools that import all modules of a package."""
    importlib.import_module("fastapi_topaz.__main__")


def test_ctrl_c_while_the_command_loads_prints_no_traceback(monkeypatch, capsys):
    class Pressed:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "fastapi_topaz._cli.commands":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "fastapi_topaz._cli.commands")
    monkeypatch.setattr(sys, "meta_path", [Pressed, *sys.meta_path])

    with pytest.raises(SystemExit) as ended:
        cli.main(["demo"])

    assert ended.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_ctrl_c_in_a_task_of_trio_ends_a_command(monkeypatch, capsys):
    def commands(**_):
        raise BaseExceptionGroup("tasks", [KeyboardInterrupt()])

    monkeypatch.setattr(_commands, "commands", commands)
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])

    assert ended.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_an_error_beside_ctrl_c_does_not_vanish(monkeypatch):
    def commands(**_):
        raise BaseExceptionGroup("tasks", [KeyboardInterrupt(), OSError()])

    monkeypatch.setattr(_commands, "commands", commands)
    with pytest.raises(BaseExceptionGroup):
        cli.main(["doctor"])


def test_a_command_that_returns_exits_with_0(monkeypatch):
    monkeypatch.setattr(_commands, "commands", lambda **_: None)

    with pytest.raises(SystemExit) as ended:
        cli.main([])

    assert ended.value.code is None
