"""Late leases are reported, and garbage-collected leases return to the pool."""

from __future__ import annotations

import copy
import gc
import logging
import os
import pickle
import threading
import warnings

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import (
    ConnectionPool,
    Identity,
    IdentityType,
    PooledConnection,
    PoolTimeout,
    TopazConfig,
)
from kit.configs import Requests
from kit.logs import lines_of
from kit.pools import make_pool


async def drop(pool):
    """Take a lease and drop it, which has to warn."""
    conn = await pool.acquire()
    with pytest.warns(ResourceWarning, match="garbage-collected and not released"):
        del conn
    # The pool takes it back in a separate step.
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()


# -- late leases --------------------------------------------------------------------


async def test_a_lease_held_too_long_logs_one_warning_with_its_code_location(caplog):
    pool = make_pool(leak_threshold=10, name="main")
    async with pool:
        conn = await pool.acquire()
        await anyio.sleep(9.9)
        assert not lines_of(caplog, logging.WARNING)
        await anyio.sleep(0.2)
        (line,) = lines_of(caplog, logging.WARNING)
        assert "pool 'main'" in line
        assert "10.0 s" in line
        assert "test_leaks.py" in line
        assert "conn = await pool.acquire()" in line
        assert repr(anyio.get_current_task().name) in line
        await anyio.sleep(100)
        assert len(lines_of(caplog, logging.WARNING)) == 1
        assert pool._counters.leaked == 1
        await pool.release(conn)


@pytest.mark.real_clock
async def test_the_reported_code_location_of_a_check_is_outside_the_package(
    caplog, embedded_authorizer
):
    """The frames of the application layer would fill the limited number of lines."""
    embedded_authorizer.policies = {"myapp.GET.x": True}
    embedded_authorizer.delay = 0.3
    config = TopazConfig(
        authorizer_options=embedded_authorizer.options,
        policy_path_root="myapp",
        identity_provider=lambda _: Identity(IdentityType.NONE),
        connection_pool=ConnectionPool(leak_threshold=0.01),
    )
    request = Requests({"type": "http", "path_params": {}, "headers": []})
    async with config.connection_pool:
        assert await config.is_allowed(request, "myapp.GET.x")
    line = next(line for line in lines_of(caplog, logging.WARNING) if "held" in line)
    assert "test_leaks.py" in line
    assert "_app" not in line
    assert "_authorizer" not in line


async def test_a_late_lease_that_had_to_wait_is_reported_with_its_code_location(caplog):
    pool = make_pool(leak_threshold=10, max_connections=1)
    async with pool:
        async with anyio.create_task_group() as tasks:

            async def hold():
                async with pool.acquire():
                    await anyio.sleep(1)

            tasks.start_soon(hold)
            await anyio.sleep(0.5)
            conn = await pool.acquire()
            assert conn.waited == pytest.approx(0.5)
        await anyio.sleep(11)
        (line,) = lines_of(caplog, logging.WARNING)
        assert "held for 10.0 s" in line
        assert "conn = await pool.acquire()" in line
        await pool.release(conn)


async def test_a_leaked_lease_is_reported_whenever_it_was_acquired(caplog):
    pool = make_pool(leak_threshold=10)
    async with pool:
        first = await pool.acquire()
        await anyio.sleep(7)
        second = await pool.acquire()
        await anyio.sleep(3.1)
        assert len(lines_of(caplog, logging.WARNING)) == 1
        await pool.release(first)
        await anyio.sleep(7)
        assert len(lines_of(caplog, logging.WARNING)) == 2
        await pool.release(second)


async def test_many_late_leases_are_reported_once_each_and_in_order(caplog):
    async with make_pool(leak_threshold=10, streams_per_connection=50) as pool:
        leases = []
        for _ in range(100):
            leases.append(await pool.acquire())
            await anyio.sleep(0.2)
        await anyio.sleep(20)
        assert len(lines_of(caplog, logging.WARNING)) == pool._counters.leaked == 100
        for conn in leases:
            await pool.release(conn)
        assert not pool._open_pool.leaks._out
        assert not pool._open_pool.leaks._late


async def test_a_tiny_threshold_does_not_keep_the_loop_busy():
    looks = 0
    async with make_pool(leak_threshold=1e-9) as pool:
        original = pool._open_pool.leaks.look

        def look(now):
            nonlocal looks
            looks += 1
            return original(now)

        pool._open_pool.leaks.look = look
        await anyio.sleep(1)
    assert looks <= 21


def test_a_lease_acquired_without_a_current_task_can_be_released():
    async def main():
        pool = make_pool(leak_threshold=10, max_connections=1)
        async with pool:
            async with pool.acquire():
                pass
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(anyio, "get_current_task", no_task)
                async with pool.acquire(timeout=0):
                    pass
            assert pool.status().streams_in_use == 0

    def no_task():
        raise anyio.NoEventLoopError

    anyio.run(main)


async def test_leases_released_in_time_log_no_warning(caplog):
    async with make_pool(leak_threshold=10) as pool:
        for _ in range(50):
            async with pool.acquire():
                await anyio.sleep(1)
    assert not lines_of(caplog, logging.WARNING)


async def test_the_release_of_a_late_lease_is_logged(caplog):
    async with make_pool(leak_threshold=10) as pool:
        first, second = await pool.acquire(), await pool.acquire()
        await anyio.sleep(15)
        caplog.clear()
        await pool.release(first)
        (line,) = lines_of(caplog, logging.INFO)
        assert "came back after 15.0 s (others still late: 1)" in line
        await pool.release(second)
        async with pool.acquire():
            pass
        assert len(lines_of(caplog, logging.INFO)) == 2, "only the late leases"


# -- garbage-collected leases -------------------------------------------------------


async def test_a_garbage_collected_lease_returns_its_stream(caplog):
    async with make_pool(max_connections=1, acquire_timeout=1) as pool:
        for count in (1, 2, 3):
            await drop(pool)
            assert pool.status().streams_in_use == 0
            assert pool._counters.reclaimed == count
            assert len(lines_of(caplog, logging.WARNING)) == 1
        async with pool.acquire(timeout=0):
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout=0)
        await anyio.sleep(10)
        await drop(pool)
    first, second = lines_of(caplog, logging.WARNING)
    assert "streams in use: 1 -> 0" in first
    assert "held by an unknown task (set leak_threshold to record it)" in first
    assert "(and 2 more in the last 10 s)" in second


async def test_a_garbage_collected_lease_serves_a_waiting_caller():
    async with make_pool(max_connections=1) as pool, anyio.create_task_group() as tasks:
        conn = await pool.acquire()
        served = []

        async def wait():
            async with pool.acquire():
                served.append(anyio.current_time())

        tasks.start_soon(wait)
        await anyio.sleep(1)
        with pytest.warns(ResourceWarning):
            del conn
        await anyio.sleep(1)
        assert served


async def test_the_warning_names_the_code_location_if_it_is_known(caplog):
    async with make_pool(leak_threshold=100) as pool:
        await drop(pool)
    (line,) = lines_of(caplog, logging.WARNING)
    assert "conn = await pool.acquire()" in line


async def test_a_lease_in_a_reference_cycle_is_found_by_the_garbage_collector():
    async with make_pool(max_connections=1) as pool:
        circle = [await pool.acquire()]
        circle.append(circle)
        del circle
        with pytest.warns(ResourceWarning):
            gc.collect()
        async with pool.acquire(timeout=1):
            pass


async def test_a_lease_collected_in_another_thread_returns_on_its_own_loop():
    async with make_pool(max_connections=1) as pool:
        box = [await pool.acquire()]

        def collect():
            with warnings.catch_warnings(record=True):
                warnings.simplefilter("always")
                box.clear()

        thread = threading.Thread(target=collect)
        thread.start()
        thread.join()
        # Visible only after a step of the loop, because threads do not change the
        # state.
        assert pool.status().streams_in_use == 1
        async with pool.acquire(timeout=1):
            pass


async def test_a_resource_warning_raised_as_an_error_loses_no_capacity():
    async with make_pool(max_connections=1) as pool:
        conn = await pool.acquire()
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.unraisablehook", lambda _: None)
            warnings.simplefilter("error")
            del conn
        async with pool.acquire(timeout=1):
            pass


async def test_a_destroyed_block_returns_its_lease_in_a_step_of_the_loop():
    # A task can become garbage at any moment, even in the middle of the pool's code.
    async with make_pool(max_connections=1) as pool:

        async def hold():
            async with pool.acquire():
                await anyio.sleep(10)

        async with pool.acquire():
            pass
        task = hold().__await__()
        task.send(None)
        assert pool.status().streams_in_use == 1
        task.close()
        assert pool.status().streams_in_use == 1
        async with pool.acquire(timeout=1):
            assert pool.status().streams_in_use == 1
    assert pool._counters.reclaimed == 0


async def test_closing_an_async_generator_returns_its_lease():
    async with make_pool(max_connections=1) as pool:

        async def connections():
            async with pool.acquire() as conn:
                yield conn

        for _ in range(3):
            lent = connections()
            await anext(lent)
            await lent.aclose()
            async with pool.acquire(timeout=1):
                pass


async def test_dropping_a_released_lease_or_one_of_a_closed_pool_is_silent(caplog):
    pool = make_pool()
    async with pool:
        conn = await pool.acquire()
        await pool.release(conn)
        del conn
        kept = await pool.acquire()
        await pool.close(grace=0)
    caplog.clear()
    del kept
    gc.collect()
    assert not lines_of(caplog, logging.WARNING)
    assert pool._counters.reclaimed == 0


async def test_dropping_a_lease_from_before_a_reopening_changes_nothing():
    pool = make_pool(max_connections=1)
    async with pool:
        kept = await pool.acquire()
        await pool.close(grace=0)
    async with pool, pool.acquire():
        del kept
        await anyio.lowlevel.checkpoint()
        assert pool.status().streams_in_use == 1


async def test_a_forked_child_does_not_return_the_leases_of_its_parent():
    async with make_pool(max_connections=1) as pool:
        conn = await pool.acquire()
        with warnings.catch_warnings():
            # A warning of Python 3.12 and newer about threads that other tests may have
            # left.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                del conn
            os._exit(len(caught))
        assert os.waitpid(child, 0) == (child, 0)  # noqa: ASYNC222  (it ends at once)
        await pool.release(conn)


async def test_a_lease_cannot_be_copied():
    # When destroyed, the copy would return the stream that the original still uses.
    async with make_pool() as pool, pool.acquire() as conn:
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="acquire"):
                duplicate(conn)


def test_a_lease_dropped_after_its_event_loop_ended_logs_no_warning(
    anyio_backend_names,
):
    for backend in anyio_backend_names:
        kept = []

        async def main(kept=kept):
            kept.append(await make_pool().acquire())

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            anyio.run(main, backend=backend)
            kept.clear()
        assert not [w for w in caught if "garbage" in str(w.message)]


@pytest.fixture
def anyio_backend_names():
    return ["asyncio", "trio"]


def test_destroying_a_handle_without_init_is_silent():
    # A library that mocks or copies objects may create one this way.
    assert PooledConnection.__new__(PooledConnection) is not None
