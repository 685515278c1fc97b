"""Opening and closing a pool, with a scripted connector in virtual time."""

from __future__ import annotations

import threading

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import (
    ConnectFailed,
    ConnectionLost,
    PoolClosed,
    PoolStatus,
)
from fastapi_topaz.testing import FakeConnector, fail, hang, ok, slow
from kit.logs import lines
from kit.pools import make_pool, queued


# -- opening ----------------------------------------------------------------------


def test_creating_a_pool_needs_no_event_loop_and_starts_no_thread():
    threads = threading.active_count()
    connector = FakeConnector()
    pool = make_pool(connector, eager_init=True)
    assert threading.active_count() == threads
    assert connector.attempts == 0
    assert repr(pool) == ("<ConnectionPool new total=0 busy=0 waiting=0 connecting=0>")
    assert pool.status() == PoolStatus(
        total=0,
        idle=0,
        busy=0,
        healthy_connections=0,
        max_connections=10,
        min_connections=0,
        streams_max=10,
    )
    assert pool.status().healthy


async def test_initialize_opens_no_connections_unless_the_pool_is_eager():
    connector = FakeConnector()
    pool = make_pool(connector, min_connections=2)
    await pool.initialize()
    await anyio.sleep(10)
    assert connector.attempts == 0
    await pool.close()


async def test_an_eager_initialize_returns_with_the_minimum_open():
    connector = FakeConnector(default=slow(1.0))
    pool = make_pool(connector, min_connections=2, eager_init=True)
    await pool.initialize()
    assert pool.status().total == 2
    assert connector.attempts == 2
    await pool.close()


async def test_a_pool_in_use_is_filled_to_its_minimum_in_the_background():
    async with make_pool(min_connections=3) as pool:
        async with pool.acquire():
            pass
        await anyio.sleep(0.01)
        assert pool.status().total == 3


async def test_initialize_is_idempotent_and_may_run_twice_at_once():
    connector = FakeConnector(default=slow(1.0))
    pool = make_pool(connector, min_connections=2, eager_init=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.initialize)
        tasks.start_soon(pool.initialize)
    await pool.initialize()
    assert connector.attempts == 2
    await pool.close()


async def test_an_app_starts_even_if_its_authorizer_is_not_up_yet(caplog):
    connector = FakeConnector(default=fail("nobody there yet"))
    pool = make_pool(
        connector, min_connections=2, eager_init=True, connection_timeout=3
    )
    began = anyio.current_time()
    await pool.initialize()
    assert anyio.current_time() - began == pytest.approx(3)
    assert any("nobody there yet" in line for line in lines(caplog))
    assert not pool.status().healthy
    connector.default = ok()
    await anyio.sleep(3)
    assert pool.status().total == 2, "it continued to try"
    assert pool.status().healthy
    await pool.close()


async def test_a_slow_authorizer_delays_the_start_by_the_connection_timeout_at_most(
    caplog,
):
    pool = make_pool(
        FakeConnector(default=hang()),
        min_connections=1,
        eager_init=True,
        connection_timeout=4,
    )
    began = anyio.current_time()
    await pool.initialize()
    assert anyio.current_time() - began == pytest.approx(4)
    assert any("at startup" in line for line in lines(caplog))
    await pool.close()


async def test_a_permanent_failure_ends_an_eager_initialize_early(caplog):
    error = ConnectFailed("wrong CA", reason="tls", permanent=True)
    pool = make_pool(
        FakeConnector(default=fail(error)), min_connections=1, eager_init=True
    )
    began = anyio.current_time()
    await pool.initialize()
    assert anyio.current_time() == began
    assert any("wrong CA" in line for line in lines(caplog))
    await pool.close()


async def test_a_configuration_error_of_the_connector_raises_from_initialize():
    class Checked(FakeConnector):
        def validate(self):
            raise ValueError("cert_file_path must be a readable file")

    pool = make_pool(Checked())
    with pytest.raises(ValueError, match="cert_file_path"):
        await pool.initialize()
    assert repr(pool).startswith("<ConnectionPool new")


async def test_a_cancelled_initialize_leaves_the_pool_unopened():
    connector = FakeConnector(default=hang())
    pool = make_pool(connector, min_connections=1, eager_init=True)
    with anyio.move_on_after(1):
        await pool.initialize()
    await anyio.sleep(0.01)
    assert repr(pool).startswith("<ConnectionPool new")
    connector.default = ok()
    await pool.initialize()
    assert pool.status().total == 1
    await pool.close()


async def test_a_cancelled_initialize_does_not_close_the_pool_for_other_callers():
    connector = FakeConnector([slow(5.0)])
    pool = make_pool(connector, min_connections=1, eager_init=True)
    served = []

    async def caller():
        async with pool.acquire(timeout=10) as conn:
            served.append(conn.connection.number)

    async with anyio.create_task_group() as tasks:
        with anyio.move_on_after(1):
            tasks.start_soon(caller)
            await pool.initialize()
    assert served == [1]
    await pool.close()


async def test_cancelling_the_request_that_opened_the_pool_does_not_close_it():
    """A cancelled caller cancels neither the host task nor the connect it requested."""
    connector = FakeConnector(default=slow(2.0))
    pool = make_pool(connector)
    with anyio.move_on_after(1):
        await pool.acquire()
    await anyio.sleep(1.5)
    async with pool.acquire(timeout=0) as conn:
        assert conn.connection.number == 1
    await pool.close()


async def test_two_cancelled_initializes_leave_the_pool_unopened():
    connector = FakeConnector(default=hang())
    pool = make_pool(connector, min_connections=1, eager_init=True)
    with anyio.move_on_after(1):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pool.initialize)
            tasks.start_soon(pool.initialize)
    await anyio.sleep(0.01)
    assert repr(pool).startswith("<ConnectionPool new")


async def test_an_acquire_right_after_a_cancelled_initialize_opens_the_pool():
    connector = FakeConnector([hang()])
    pool = make_pool(connector, min_connections=1, eager_init=True)
    with anyio.move_on_after(1):
        await pool.initialize()
    async with pool.acquire():
        pass
    await pool.close()


# -- closing ----------------------------------------------------------------------


async def test_close_closes_every_connection_exactly_once():
    connector = FakeConnector()
    pool = make_pool(connector, max_connections=5)
    leases = [await pool.acquire() for _ in range(5)]
    for conn in leases:
        await pool.release(conn)
    await pool.close()
    assert [conn.closed for conn in connector.connections] == [1] * 5
    assert repr(pool).startswith("<ConnectionPool closed total=0")
    await pool.close()
    assert [conn.closed for conn in connector.connections] == [1] * 5


async def test_close_may_run_twice_at_once_and_in_another_task_than_initialize():
    connector = FakeConnector()
    pool = make_pool(connector, min_connections=1, eager_init=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.initialize)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.close)
        tasks.start_soon(pool.close)
    assert not connector.open


async def test_callers_waiting_for_a_release_fail_at_once_when_the_pool_closes():
    pool = make_pool(max_connections=1, acquire_timeout=100)
    conn = await pool.acquire()
    failed = []

    async def caller():
        with pytest.raises(PoolClosed, match="closed"):
            await pool.acquire()
        failed.append(anyio.current_time())

    began = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(caller)
        await queued(pool, 20)
        tasks.start_soon(pool.close)
        await anyio.sleep(2)
        assert failed == [began] * 20
        await pool.release(conn)


async def test_callers_waiting_for_a_connect_fail_at_once_when_the_pool_closes():
    connector = FakeConnector(default=hang())
    pool = make_pool(connector, acquire_timeout=100, connection_timeout=100)
    async with anyio.create_task_group() as tasks:

        async def caller():
            with pytest.raises(PoolClosed):
                await pool.acquire()

        for _ in range(3):
            tasks.start_soon(caller)
        await queued(pool, 3)
        began = anyio.current_time()
        await pool.close()
        assert anyio.current_time() == began


async def test_close_waits_for_leases_until_the_grace_ends():
    connector = FakeConnector()
    pool = make_pool(connector)
    conn = await pool.acquire()
    began = anyio.current_time()

    async def release_late():
        await anyio.sleep(3)
        assert await conn.call("/a/b", b"works") == b"works"
        await pool.release(conn)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(release_late)
        await anyio.lowlevel.checkpoint()
        await pool.close(grace=5)
        assert anyio.current_time() - began == pytest.approx(3), "and not longer"
    assert connector.connections[0].closed == 1


async def test_after_the_grace_a_lease_is_lost_and_releasing_it_is_harmless():
    connector = FakeConnector()
    pool = make_pool(connector)
    conn = await pool.acquire()
    began = anyio.current_time()
    await pool.close(grace=2)
    assert anyio.current_time() - began == pytest.approx(2)
    assert connector.connections[0].closed == 1
    with pytest.raises(ConnectionLost):
        await conn.call("/a/b", b"")
    await pool.initialize()
    await pool.release(conn)
    leases = [await pool.acquire() for _ in range(10)]
    assert pool.status().streams_in_use == 10
    for lease in leases:
        await pool.release(lease)
    await pool.close()


async def test_a_cancelled_close_skips_the_grace_and_still_closes():
    connector = FakeConnector()
    pool = make_pool(connector)
    _held = await pool.acquire()
    began = anyio.current_time()
    with anyio.move_on_after(1) as scope:
        await pool.close(grace=100)
    assert scope.cancelled_caught
    assert anyio.current_time() - began == pytest.approx(1)
    assert not connector.open
    assert repr(pool).startswith("<ConnectionPool closed")


async def test_a_connection_with_a_hanging_close_does_not_hang_the_pool(caplog):
    class Stuck(FakeConnector):
        async def connect(self, timeout):
            conn = await super().connect(timeout)

            async def close(_grace):
                conn.closed += 1
                await anyio.sleep_forever()

            object.__setattr__(self, "conn", conn)
            return type(
                "Stuck", (), {"probe": conn.probe, "close": staticmethod(close)}
            )()

    pool = make_pool(Stuck(), name="main")
    async with pool.acquire() as lease:
        stuck = lease.connection
    began = anyio.current_time()
    await pool.close()
    assert anyio.current_time() - began == pytest.approx(5)
    (line,) = lines(caplog)
    assert line.startswith(f"pool 'main': closing {stuck!r} took more than 5 s; the")


async def test_a_connector_with_a_target_property_that_raises_still_works():
    class Odd(FakeConnector):
        @property
        def target(self):
            raise ZeroDivisionError

        @target.setter
        def target(self, _target): ...

    async with make_pool(Odd()) as pool, pool.acquire():
        assert pool._open_pool.target == "Odd"


async def test_an_error_while_closing_is_logged_and_the_rest_is_closed(caplog):
    class Broken(FakeConnector):
        async def connect(self, timeout):
            conn = await super().connect(timeout)
            original = conn.close

            async def close(grace):
                await original(grace)
                raise OSError("no such socket")

            return type(
                "Broken", (), {"probe": conn.probe, "close": staticmethod(close)}
            )()

    connector = Broken()
    pool = make_pool(connector, max_connections=3)
    leases = [await pool.acquire() for _ in range(3)]
    for conn in leases:
        await pool.release(conn)
    await pool.close()
    assert not connector.open
    first, rest = lines(caplog)
    assert "closing a connection to fake failed" in first
    assert "OSError: no such socket" in caplog.text, "with its traceback"
    assert "closing failed: OSError: 2 more" in rest


async def test_close_cancels_a_pending_connect_and_starts_no_other():
    connector = FakeConnector(default=hang())
    pool = make_pool(connector, min_connections=3)
    with anyio.move_on_after(0.5):
        await pool.acquire()
    attempts = connector.attempts
    await pool.close()
    await anyio.sleep(100)
    assert connector.attempts == attempts
    assert pool.status().connecting == 0


@pytest.mark.parametrize("grace", [-1, float("nan"), True, "5"])
async def test_an_invalid_grace_is_refused_and_the_pool_stays_open(grace):
    async with make_pool() as pool:
        with pytest.raises((TypeError, ValueError)) as caught:
            await pool.close(grace)
        assert "grace" in str(caught.value)
        async with pool.acquire():
            pass
