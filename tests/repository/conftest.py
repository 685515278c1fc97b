"""Fixtures for the tests of the examples and of the pages."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

import pytest

from kit.examples import DECISIONS
from kit.pages import DOCS, Walk


POLICIES = {
    "myapp.GET.documents.__id": lambda check: check.identity.value == "alice",
    "myapp.GET.greeting": lambda check: check.identity.value == "alice",
}
METRICS = range(9464, 9472)
"""The ports on the page prometheus.md."""


@pytest.fixture
def authorizer(embedded_authorizer):
    embedded_authorizer.policies = DECISIONS
    return embedded_authorizer


@pytest.fixture
def warnings_are(request):
    """The warning filters of this test run, as options for another Python."""
    chosen = request.config.getoption("pythonwarnings") or ["error"]
    return [f"-W{each}" for each in chosen]


@pytest.fixture
def walk(embedded_authorizer, tmp_path):
    """Return a function that makes the walk of a page, beside an authorizer."""
    embedded_authorizer.policies = POLICIES

    def make(name, ports=None, **more):
        # The terminals use the programs of this Python, and write no files elsewhere.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        kept = {
            key: text
            for key, text in os.environ.items()
            if not key.startswith(("PYTEST", "OTEL"))
        }
        env = {**kept, "PATH": path, "HOME": str(tmp_path), **more}
        # Old and new versions of other libraries warn, and the pages do not show it.
        env["PYTEST_ADDOPTS"] = "-p no:warnings"
        ports = {8282: embedded_authorizer.port, **(ports or {})}
        return Walk(DOCS / name, tmp_path, env, ports)

    return make


def free_ports(count):
    """Return the first of *count* free ports that follow each other."""
    for first in range(20000, 30000, 100):
        with contextlib.suppress(OSError), contextlib.ExitStack() as listeners:
            for port in range(first, first + count):
                listeners.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise AssertionError("no free ports")


@pytest.fixture
def metrics_ports():
    """
    Return the first of some free ports, and the ports of the page with theirs.

    One more port after them is free.
    """
    first = free_ports(len(METRICS) + 1)
    return first, {port: first + place for place, port in enumerate(METRICS)}
