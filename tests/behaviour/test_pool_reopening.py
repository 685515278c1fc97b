"""A pool that reopens, moves to another loop, or is never closed."""

from __future__ import annotations

import threading

import anyio
import anyio.lowlevel
import pytest
import trio

from fastapi_topaz import PoolClosed, PoolError
from fastapi_topaz.testing import FakeConnector
from kit.backends import asyncio_only
from kit.pools import make_pool


# -- reopening, also on another loop ------------------------------------------------


async def test_a_closed_pool_can_be_opened_again():
    connector = FakeConnector()
    pool = make_pool(connector)
    for _ in range(3):
        async with pool, pool.acquire():
            pass
        with pytest.raises(PoolClosed):
            await pool.acquire()
    assert len(connector.connections) == 3
    assert not connector.open


async def test_initialize_waits_for_a_running_close():
    pool = make_pool()
    conn = await pool.acquire()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.close)
        await anyio.sleep(1)
        with pytest.raises(PoolClosed):
            await pool.acquire()
        tasks.start_soon(pool.initialize)
        await anyio.sleep(1)
        await pool.release(conn)
    async with pool.acquire():
        pass
    await pool.close()


def test_one_pool_serves_one_backend_after_the_other():
    connector = FakeConnector()
    pool = make_pool(connector)

    async def use():
        async with pool, pool.acquire() as conn:
            return conn.connection.number

    numbers = [
        anyio.run(use, backend=backend)
        for backend in ("asyncio", "trio", "asyncio", "trio")
    ]
    assert numbers == [1, 2, 3, 4]
    assert not connector.open


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_pool_not_closed_before_its_loop_ended_reopens_on_the_next_loop(backend):
    connector = FakeConnector()
    pool = make_pool(connector)

    async def use():
        async with pool.acquire():
            pass

    for number in (1, 2, 3):
        anyio.run(use, backend=backend)
        assert len(connector.connections) == number
        assert not connector.open, "closed with its loop"


def test_a_pool_reopens_on_a_new_loop_after_its_loop_was_closed():
    import asyncio

    pool = make_pool()

    async def use():
        async with pool.acquire():
            pass

    loop = asyncio.new_event_loop()
    loop.run_until_complete(use())
    task = pool._open_pool.owner._task
    task._log_destroy_pending = False  # the cost of closing a loop without its tasks
    loop.close()
    anyio.run(use, backend="trio")


@pytest.mark.parametrize("first", ["asyncio", "trio"])
@pytest.mark.parametrize("second", ["asyncio", "trio"])
def test_an_open_pool_refuses_another_loop_and_names_both(first, second):
    pool = make_pool(name="shared")
    opened, finish = threading.Event(), threading.Event()

    async def owner():
        async with pool:
            conn = await pool.acquire()
            opened.set()
            await anyio.to_thread.run_sync(finish.wait)
            assert pool.status().streams_in_use == 1
            await pool.release(conn)

    async def stranger():
        for use in (pool.initialize, pool.close, pool.acquire):
            with pytest.raises(PoolError) as caught:
                await use()
            assert "pool 'shared'" in str(caught.value)
            assert "event loop" in str(caught.value)
        with pytest.raises(PoolError):
            pool.drain()
        with pytest.raises(PoolError):
            pool.resize(0, 3)
        assert pool.status().busy == 1

    thread = threading.Thread(
        target=anyio.run, args=(owner,), kwargs={"backend": first}
    )
    thread.start()
    try:
        assert opened.wait(10)
        anyio.run(stranger, backend=second)
    finally:
        finish.set()
        thread.join()


# -- the end of the process ---------------------------------------------------------


@pytest.mark.costly
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("end", ["return", "raise", "connecting", "exit"])
def test_a_pool_never_closed_leaves_no_process_and_no_traceback(
    backend, end, run_program
):
    program = f"""
        import anyio, sys
        from fastapi_topaz import ConnectionPool
        from fastapi_topaz.testing import FakeConnector, hang, ok

        class Expected(Exception): pass
        held = []

        async def main():
            step = hang() if {end!r} == "connecting" else ok()
            pool = ConnectionPool(
                connector=FakeConnector(default=step), max_connections=3
            )
            if {end!r} == "connecting":
                with anyio.move_on_after(0.05):
                    await pool.acquire()
                return
            held.append(await pool.acquire())
            if {end!r} == "raise":
                raise Expected
            if {end!r} == "exit":
                sys.exit(0)

        try:
            anyio.run(main, backend={backend!r})
        except Expected:
            pass
    """
    ended = run_program(program)
    assert ended.code == 0
    assert "Traceback" not in ended.err
    assert "never awaited" not in ended.err
    assert "destroyed" not in ended.err


async def test_close_leaves_no_task():
    import asyncio

    is_trio = "trio" in str(type(anyio.lowlevel.current_token().native_token))

    def tasks():
        if is_trio:
            return trio.lowlevel.current_statistics().tasks_living
        return len(asyncio.all_tasks())

    before = tasks()
    pool = make_pool(min_connections=3, leak_threshold=1.0)
    async with pool, pool.acquire():
        assert tasks() > before
    # The host task itself ends in the step after it has signalled its end.
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()
    assert tasks() == before


@asyncio_only
async def test_a_host_task_cancelled_before_its_first_step_does_not_hang_close():
    """asyncio.run cancels all tasks at its end, also tasks that have not run yet."""
    import asyncio

    pool = make_pool(min_connections=1, eager_init=True)
    opening = asyncio.create_task(pool.initialize())
    await asyncio.sleep(0)
    pool._open_pool.owner._task.cancel()
    await asyncio.wait([opening])
    with anyio.fail_after(30):
        await pool.close()
        await pool.initialize()
        async with pool.acquire():
            pass
        await pool.close()
