"""The console script, run as its users run it: in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys

import attrs
import pytest
from fastapi import FastAPI

from fastapi_topaz import cli
from fastapi_topaz.testing import EmbeddedAuthorizer


pytestmark = pytest.mark.real_clock

BACKENDS = ["asyncio", "trio"]


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
    # Neither colours nor somebody's proxy or narrow screen.
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
    done = subprocess.run(
        command(*args),
        env=environment(**env),
        capture_output=True,
        encoding="utf-8",
        timeout=50,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


MANY = """
import contextlib, io, json, sys
from fastapi_topaz.cli import main

ended = []
for args in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(args)
        except SystemExit as error:
            ended.append((error.code or 0, out.getvalue(), err.getvalue()))
print(json.dumps(ended))
"""


def run_each(lines):
    """Run one command line after the other in one process, which starts slowly."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MANY, json.dumps(lines)],
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [Ended(*ended) for ended in json.loads(done.stdout)]


@pytest.fixture
def nobody():
    """An address where a connection is refused, as long as the test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(scope="module", params=BACKENDS)
def demo(request):
    return run("demo", "--requests", "200", "--backend", request.param)


def test_all_is_answered_as_the_policies_say(demo):
    ended = demo

    assert (ended.code, ended.err) == (0, "")
    assert ended.number("requests") == 200
    # Three in eight are denied.
    assert ended.number("allowed (200)") == 125
    assert ended.number("denied (403)") == 75
    assert ended.number("failed") == 0
    assert ended.number("checks answered") == 200
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


def test_streams_and_requests_are_as_many_as_asked_for():
    """In one process, which starts slowly."""
    streams, one = run_each(
        [
            ["demo", "--requests", "50", "--streams", "5"],
            ["demo", "--requests", "1", "--concurrency", "7"],
        ]
    )

    assert streams.code == 0
    assert streams.row("afterwards")[-1] == "0/50"
    assert one.code == 0
    assert one.number("requests") == one.number("allowed (200)") == 1


def test_proxies_of_the_environment_are_not_asked(nobody):
    ended = run("demo", "--requests", "8", HTTP_PROXY=f"http://{nobody}")

    assert ended.code == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_real_topaz_that_is_not_there(backend, nobody):
    ended = run(
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
def test_a_real_topaz_may_decide_as_it_likes(backend):
    with EmbeddedAuthorizer(
        {
            "other.GET.documents": False,
            "other.GET.documents.__id": True,
            "other.DELETE.documents.__id": False,
        },
        tls=True,
        api_key="secret",
    ) as topaz:
        ended = run(
            *("demo", "--url", topaz.url, "--cert", topaz.ca_cert_path),
            *("--policy-root", "other", "--requests", "80", "--backend", backend),
            TOPAZ_API_KEY="secret",
        )

        assert (ended.code, ended.err) == (0, "")
        assert ended.number("allowed (200)") == ended.number("denied (403)") == 40
        assert topaz.calls["Is"] == 80
        assert topaz.connections_accepted <= 10


def test_some_requests_that_fail_are_enough_for_exit_code_1():
    policies = {"myapp.GET.documents": True, "myapp.GET.documents.__id": True}
    with EmbeddedAuthorizer(policies) as topaz:
        ended = run("demo", "--url", topaz.url, "--insecure", "--requests", "80")

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
    "dmeo": "dmeo",
}
QUESTIONS = {
    "--version": r"^fastapi-topaz \d+\.\d+",
    "--help": "Usage: fastapi-topaz",
    "demo --help": "Usage: fastapi-topaz demo",
}


@pytest.fixture(scope="module")
def said():
    """What each command line that starts no demo ended with."""
    lines = [*WRONG, *QUESTIONS]
    ended = run_each([line.split() for line in lines])
    return dict(zip(lines, ended, strict=True))


@pytest.mark.parametrize("line, complaint", WRONG.items())
def test_wrong_usage(line, complaint, said):
    assert said[line].code == 2
    assert complaint in said[line].err
    assert "Traceback" not in said[line].err


@pytest.mark.parametrize("line, answer", QUESTIONS.items())
def test_questions_about_itself(line, answer, said):
    assert (said[line].code, said[line].err) == (0, "")
    assert re.search(answer, said[line].out, re.MULTILINE)


@pytest.mark.parametrize("line", ["dmeo", "--version"])
def test_a_process_of_its_own_says_the_same(line, said):
    assert run(*line.split()) == said[line]


MISSING = """
import contextlib, io, json, os, sys
# What takes long to import and needs none of the extra; the forks have it then.
import fastapi_topaz

class Blocker:
    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def ended(name, backend):
    assert name not in sys.modules
    sys.meta_path.insert(0, Blocker(name))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            from fastapi_topaz.cli import main
            main(["demo", "--backend", backend])
        except SystemExit as error:
            return error.code or 0, out.getvalue(), err.getvalue()

for name, backend in json.loads(sys.argv[1]):
    if os.fork() == 0:
        print(json.dumps([name, ended(name, backend)]), flush=True)
        os._exit(0)
    os.wait()
"""
EXTRA = {
    "typer": "asyncio",
    "rich": "asyncio",
    "httpx": "asyncio",
    "uvicorn": "asyncio",
    "hypercorn": "trio",
    "trio": "trio",
}


@pytest.fixture(scope="module")
def without():
    """How the demo ends without each module of the extra."""
    done = subprocess.run(
        [sys.executable, "-c", MISSING, json.dumps(list(EXTRA.items()))],
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: Ended(*ended) for name, ended in lines}


@pytest.mark.parametrize("name", EXTRA)
def test_the_extra_is_named_when_it_is_not_installed(name, without):
    assert without[name].code == 2
    assert re.fullmatch(
        rf"{name}\S* is missing: pip install 'fastapi-topaz\[demo\]'\n",
        without[name].err,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_ends_it_without_a_traceback(backend):
    arguments = ("demo", "--requests", "1000000", "--backend", backend)
    with subprocess.Popen(
        command(*arguments),
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        # Printed when the authorizer runs and the server is about to start.
        process.stdout.readline()
        for _ in range(5):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, err = process.communicate(timeout=10)
                break
            # Python drops a KeyboardInterrupt that happens to be raised in a weakref
            # callback, and says so; a person presses the keys again.
        else:
            process.kill()
            pytest.fail("it did not stop")

    assert process.returncode == 130
    assert "Traceback" not in err or "Exception ignored in" in err


def test_in_this_process_it_leaves_nothing_behind(capsys):
    import logging
    import threading

    before = set(threading.enumerate()), list(logging.getLogger().handlers)

    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--requests", "20", "--backend", "trio"])

    assert ended.value.code in {0, None}
    assert "failed" in capsys.readouterr().out
    threads, handlers = before
    # Of those before, gRPC's own may have ended meanwhile.
    assert set(threading.enumerate()) <= threads
    assert list(logging.getLogger().handlers) == handlers


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_server_that_does_not_start(backend, monkeypatch, capsys):
    from fastapi_topaz import _demo_command

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
    monkeypatch.setitem(sys.modules, "fastapi_topaz._demo_command", None)

    with pytest.raises(ModuleNotFoundError):
        cli.main(["--version"])
