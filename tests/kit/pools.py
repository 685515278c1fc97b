"""Pools over connectors in memory, and actions on them."""

from __future__ import annotations

import contextlib
from collections import Counter

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import ConnectionPool, PoolTimeout
from fastapi_topaz.testing import FakeConnection, FakeConnector


def make_pool(connector=None, **options):
    """Return a pool that opens no connections by itself unless *options* say so."""
    connector = connector or FakeConnector()
    return ConnectionPool(connector=connector, **{"min_connections": 0, **options})


async def queued(pool, count):
    """Return once *count* callers wait; no time passes."""
    while pool.status().waiting < count:
        await anyio.lowlevel.checkpoint()


async def fill(pool, count):
    """Open *count* connections, which are then idle."""
    leases = [await pool.acquire() for _ in range(count)]
    for conn in leases:
        await pool.release(conn)


def most_within(times, seconds):
    """Return how many of *times* lie within any window of this many seconds."""
    return max(sum(t <= other < t + seconds for other in times) for t in times)


class Making(FakeConnector):
    """Makes connections of a class that derives from `FakeConnection`."""

    def __init__(self, kind, **options):
        super().__init__(**options)
        self.kind = kind

    async def connect(self, timeout, /):
        made = await super().connect(timeout)
        made.__class__ = self.kind
        return made


class MakingAny:
    """Makes connections of any class, and records the timeout of each attempt."""

    target = "somewhere"

    def __init__(self, kind):
        self.kind = kind
        self.timeouts = []

    async def connect(self, timeout, /):
        self.timeouts.append(timeout)
        return self.kind()


class Lingering(FakeConnection):
    """A connection that takes a second to close."""

    async def close(self, grace, /):
        await anyio.sleep(1)
        await super().close(grace)


class Gauge:
    """Counts how many of each key are inside at once, and the peak."""

    def __init__(self):
        self.now = Counter()
        self.peak = Counter()

    @contextlib.contextmanager
    def inside(self, key):
        self.now[key] += 1
        self.peak[key] = max(self.peak[key], self.now[key])
        try:
            yield
        finally:
            self.now[key] -= 1


async def assert_whole(pool, *, twice=False):
    """
    Check that the full capacity is available: this many leases at once and not more.

    If no connection is about to be replaced, the check can run *twice*.
    """
    status = pool.status()
    assert (status.waiting, status.streams_in_use) == (0, 0)
    assert pool._open_pool.limiter.borrowed_tokens == 0
    leases = [await pool.acquire(timeout=10) for _ in range(status.streams_max)]
    with pytest.raises(PoolTimeout):
        await pool.acquire(timeout=0)
    for conn in leases:
        await pool.release(conn)
    assert pool.status().streams_in_use == 0
    for conn in [await pool.acquire(timeout=0) for _ in leases if twice]:
        await pool.release(conn)
