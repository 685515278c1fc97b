"""The examples, and how tests start them."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastapi_topaz import Identity, IdentityType
from fastapi_topaz.testing import Check


ROOT = Path(__file__).parent.parent.parent


EXAMPLES = ROOT / "examples"


COMPOSE = EXAMPLES / "compose"


USERS = {"alice", "bob"}


PEOPLE = ("alice", "bob", "mallory")


OWNERS = {"1": "alice", "2": "bob"}


def is_user(check):
    return check.identity.value in USERS


def is_owner(check):
    return OWNERS.get(check.resource["id"]) == check.identity.value


def is_reader(check):
    return is_owner(check) or (check.resource["id"] == "1" and is_user(check))


# The policies of examples/compose. Another policy path is an error, answered with 503.
DECISIONS = {
    "myapp.GET.documents": is_user,
    "myapp.GET.documents.__id": is_reader,
    "myapp.DELETE.documents.__id": is_owner,
}


def asked(path, user, document):
    return Check(
        policy_path=path,
        decisions=("allowed",),
        identity=Identity(IdentityType.MANUAL, user),
        resource={"id": document},
    )


def load(name):
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name.replace(".", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def statuses(client, path="/documents"):
    """Return the statuses for alice, for mallory and without a user."""
    headers = [{"x-user": "alice"}, {"x-user": "mallory"}, {}]
    return [client.get(path, headers=user).status_code for user in headers]


def command(path):
    """Return the command in a file: its one indented line."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    (line,) = re.findall(r"^    (\S.*)$", docstring, re.MULTILINE)
    return line


def program(line, *more, options=()):
    """Return the command to run *line* with this Python."""
    name, *arguments = shlex.split(line)
    module = [] if name == "python" else ["-m", name]
    return [sys.executable, *options, *module, *arguments, *more]


def environment(tmp_path, **more):
    # gunicorn writes into the home directory.
    return {**os.environ, "HOME": str(tmp_path), "PYTHONUNBUFFERED": "1", **more}


@contextlib.contextmanager
def started(arguments, *, cwd, env, workers=0):
    """
    Run a server: yield its URL, and at the end all of its output.

    The server must exit by itself, without an error, when it gets the stop signal.
    """
    found = None
    printed = []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(
        arguments, cwd=cwd, env=env, encoding="utf-8", start_new_session=True, **pipes
    ) as process:
        # With all its child processes, if it hangs.
        watchdog = threading.Timer(60, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.start()
        try:
            for line in process.stdout:
                printed.append(line)
                found = found or re.search(r"http://127\.0\.0\.1:[1-9]\d*", line)
                workers -= "Application startup complete" in line
                if found and workers <= 0:
                    break
            else:
                pytest.fail("it did not start: " + "".join(printed))
            yield found[0], printed
        finally:
            process.send_signal(signal.SIGTERM)
            printed += process.stdout
            process.wait()
            watchdog.cancel()
    # uvicorn ends by the signal that it was sent, after its cleanup.
    assert process.returncode in {0, -signal.SIGTERM}
    assert not re.search("Traceback|Exception|ERROR|WARNING", "".join(printed))


def run(arguments, *, env):
    return subprocess.run(
        arguments,
        cwd=EXAMPLES,
        env=env,
        capture_output=True,
        encoding="utf-8",
        timeout=50,
        check=False,
    )
