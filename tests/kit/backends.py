"""Backends for tests that start the event loop themselves."""

from __future__ import annotations

import asyncio
import importlib.util

import pytest


backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])
asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)


def event_loops():
    """Yield a parameter for each kind of asyncio loop: what makes a new one."""
    yield pytest.param(asyncio.new_event_loop, id="asyncio")
    if importlib.util.find_spec("uvloop"):
        import uvloop

        yield pytest.param(uvloop.new_event_loop, id="uvloop")
