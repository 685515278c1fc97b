"""Test the event loop that owns a pool."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import PoolError, PoolMisuse
from fastapi_topaz._pool import owner_loop as _host
from fastapi_topaz.testing import FakeConnector
from kit.backends import asyncio_only
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


@asyncio_only
async def test_a_callback_of_the_loop_is_no_running_coroutine():
    owner, found = _host.OwnerLoop(), []
    asyncio.get_running_loop().call_soon(
        lambda: found.append(_host.coroutine_of(owner.task()))
    )
    await anyio.lowlevel.checkpoint()
    assert found == [None]


async def test_an_open_pool_keeps_nothing_of_the_context_that_opened_it():
    request = contextvars.ContextVar("request", default=None)
    values, seen = [], []

    class Request:
        """Unlike an object(), it can have weak references."""

    class Seeing(FakeConnector):
        async def connect(self, timeout, /):
            seen.append(request.get())
            return await super().connect(timeout)

    async def open_pool():
        request.set(Request())
        values.append(weakref.ref(request.get()))
        async with pool.acquire():
            pass

    pool = make_pool(Seeing())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(open_pool)
    gc.collect()
    assert seen == [None]
    assert values[0]() is None
    await pool.close()


async def test_a_closed_pool_is_garbage_while_its_loop_runs():
    pool = make_pool()
    async with pool, pool.acquire():
        pass
    gone = weakref.ref(pool)
    del pool
    # The host task ends in the step after the end of close().
    await anyio.sleep(0.1)
    gc.collect()
    assert gone() is None


async def test_a_scheduled_callback_does_not_run_in_the_context_of_its_caller():
    request = contextvars.ContextVar("request", default=None)
    request.set("GET /")
    found = []
    _host.OwnerLoop().call_soon(lambda: found.append(request.get()))
    await anyio.sleep(0.1)
    assert found == [None]


async def test_the_task_of_a_pool_has_a_name():
    async with make_pool() as pool:
        task = pool._open_pool.owner._task
        name = task.get_name() if isinstance(task, asyncio.Task) else task.name
        assert name == "fastapi_topaz pool"


async def test_a_thread_without_a_loop_gets_an_error_that_says_so():
    async with make_pool(name="main") as pool:
        error = in_a_thread(pool.drain)
        assert isinstance(error, PoolError)
        assert "is used on no event loop" in str(error)
        assert repr(pool).startswith("<ConnectionPool 'main' open")


async def test_after_a_fork_the_inherited_loop_is_misuse_and_a_new_loop_is_not():
    owner = _host.OwnerLoop()
    with pytest.raises(PoolMisuse, match=r"^the pool was opened in process "):
        owner.check_new_loop("the pool")

    async def elsewhere():
        owner.check_new_loop("the pool")

    assert in_a_thread(lambda: anyio.run(elsewhere)) is None


# -- the text that describes a loop ---------------------------------------------------


async def test_a_running_loop_is_described_by_its_class_and_its_thread():
    loop = _host.OwnerLoop().native
    if isinstance(loop, asyncio.AbstractEventLoop):
        kind, state = type(loop).__name__, "running, "
    else:
        kind, state = "of trio", ""
    text = f"the event loop {kind} {id(loop):#x} ({state}thread 'main')"
    assert _host._described(loop, "main") == text


def test_a_loop_is_described_as_not_running_or_closed():
    loop = asyncio.new_event_loop()
    kind = f"the event loop {type(loop).__name__} {id(loop):#x}"
    assert _host._described(loop, "main") == f"{kind} (not running, thread 'main')"
    loop.close()
    assert _host._described(loop, "main") == f"{kind} (closed, thread 'main')"


def test_a_loop_of_another_library_is_described_without_a_state():
    loop = object()
    text = f"the event loop of trio {id(loop):#x} (thread 'main')"
    assert _host._described(loop, "main") == text
