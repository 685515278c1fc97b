"""Backends for tests that name their own, or start the event loop themselves."""

from __future__ import annotations

import asyncio
import importlib.util
import os

import pytest

from fastapi_topaz.connector import TRANSPORT_VARIABLE


backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])
asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)


def alternating(names, *, on_both=(), rare=(), marks=None):
    """
    Parametrize `name` and the backend: a test of sockets with many cases.

    Each name runs on both backends in the slow tests, and on one of them by default:
    the first on asyncio, the second on trio, and so on. The slow tests do not run over
    `grpcio`. So if the tests run over it, each name runs.

    Args:
        names: All names.
        on_both: Those that run on both backends by default.
        rare: Those that run only in the slow tests.
        marks: More marks, by name.
    """
    slow = [pytest.mark.slow] * (os.environ.get(TRANSPORT_VARIABLE) != "grpcio")
    cases = []
    for number, name in enumerate(names):
        for turn, backend in enumerate(["asyncio", "trio"]):
            is_default = name in on_both or number % 2 == turn
            chosen = [] if is_default and name not in rare else slow
            chosen = [*chosen, *(marks or {}).get(name, [])]
            cases.append(pytest.param(backend, name, marks=chosen))
    return pytest.mark.parametrize(
        "anyio_backend, name", cases, indirect=["anyio_backend"]
    )


def event_loops():
    """Yield a parameter for each kind of asyncio loop: what makes a new one."""
    yield pytest.param(asyncio.new_event_loop, id="asyncio")
    if importlib.util.find_spec("uvloop"):
        import uvloop

        yield pytest.param(uvloop.new_event_loop, id="uvloop")
