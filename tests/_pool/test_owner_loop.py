"""Test the event loop that owns a pool."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import PoolError
from fastapi_topaz._pool import owner_loop as _host
from kit.pools import make_pool
from kit.threads import in_a_thread


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_callbacks_scheduled_after_the_loop_ended_are_not_called(backend):
    async def main():
        return _host.OwnerLoop()

    owner = anyio.run(main, backend=backend)
    called = []
    owner.call_soon(lambda: called.append(1))
    assert called == []


async def test_a_thread_without_a_loop_gets_an_error_that_says_so():
    async with make_pool(name="main") as pool:
        error = in_a_thread(pool.drain)
        assert isinstance(error, PoolError)
        assert "is used on no event loop" in str(error)
        assert repr(pool).startswith("<ConnectionPool 'main' open")
