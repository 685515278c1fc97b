"""Backends for tests that name their own, or start the event loop themselves."""

from __future__ import annotations

import asyncio
import importlib.util

import pytest


backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])
asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)


def alternating(names, marks=None):
    """
    Parametrize `name` and the backend: a test of sockets with many cases.

    Each name runs on both backends in the slow tests, and on one of them by default:
    the first on asyncio, the second on trio, and so on. *marks* has more marks by name.
    """
    cases = []
    for number, name in enumerate(names):
        for backend in ("asyncio", "trio"):
            is_default = (number % 2 == 0) == (backend == "asyncio")
            chosen = [] if is_default else [pytest.mark.slow]
            chosen += (marks or {}).get(name, [])
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
