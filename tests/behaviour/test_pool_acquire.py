"""Acquire and release, with a scripted connector in virtual time."""

from __future__ import annotations

import math

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import (
    ConnectFailed,
    ConnectionPool,
    PoolClosed,
    PooledConnection,
    PoolError,
    PoolSaturated,
    PoolTimeout,
)
from fastapi_topaz.testing import FakeConnector, fail, hang, ok, slow
from kit.pools import make_pool, queued


def counts(pool):
    status = pool.status()
    return status.total, status.idle, status.busy


async def test_acquire_works_as_a_context_manager():
    async with make_pool() as pool:
        async with pool.acquire() as conn:
            assert isinstance(conn, PooledConnection)
            assert counts(pool) == (1, 0, 1)
        assert counts(pool) == (1, 1, 0)


async def test_acquire_can_be_awaited_and_released():
    async with make_pool() as pool:
        conn = await pool.acquire()
        assert counts(pool) == (1, 0, 1)
        await pool.release(conn)
        assert counts(pool) == (1, 1, 0)


async def test_an_error_in_the_block_returns_the_connection():
    async with make_pool() as pool:
        with pytest.raises(ZeroDivisionError):
            async with pool.acquire():
                raise ZeroDivisionError
        assert counts(pool) == (1, 1, 0)


async def test_a_release_inside_the_block_is_not_repeated_at_its_end():
    async with make_pool() as pool:
        async with pool.acquire() as conn:
            await pool.release(conn)
            assert counts(pool) == (1, 1, 0)
        assert counts(pool) == (1, 1, 0)


async def test_the_first_use_opens_a_pool_that_was_not_initialized():
    pool = make_pool()
    async with pool.acquire() as conn:
        assert conn.connection.number == 1
    await pool.close()


async def test_acquire_follows_the_flowchart_of_the_guide():
    """An idle connection, else a new one below the maximum, else wait for a release."""
    connector = FakeConnector()
    async with make_pool(connector, max_connections=2) as pool:
        first = await pool.acquire()
        await pool.release(first)
        second = await pool.acquire()
        assert second.connection.number == 1, "the idle connection"
        third = await pool.acquire()
        assert third.connection.number == 2, "a new connection"
        got = []

        async def wait():
            async with pool.acquire() as conn:
                got.append(conn.connection.number)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await queued(pool, 1)
            await pool.release(third)
        assert got == [2], "the released connection"
        assert connector.attempts == 2
        await pool.release(second)


async def test_an_uncontended_acquire_and_release_do_not_suspend():
    async with make_pool() as pool:
        async with pool.acquire():
            pass
        steps = 0

        async def tick():
            nonlocal steps
            while True:
                steps += 1
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tick)
            await anyio.lowlevel.checkpoint()
            before = steps
            for _ in range(100):
                async with pool.acquire():
                    pass
                await pool.release(await pool.acquire())
            assert steps == before
            tasks.cancel_scope.cancel()


async def test_callers_are_served_in_the_order_of_arrival():
    async with make_pool(max_connections=3, acquire_timeout=100) as pool:
        held = [await pool.acquire() for _ in range(3)]
        order = []

        async def caller(number):
            async with pool.acquire():
                order.append(number)
                # No two callers release at the same time: trio runs such tasks in any
                # order.
                await anyio.sleep(1 + number / 1000)

        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(caller, number)
                await queued(pool, number + 1)
            for number, conn in enumerate(held):
                await pool.release(conn)
                await anyio.sleep(0.1)
                assert len(order) == number + 1
        assert order == list(range(50))


async def test_callers_on_a_cold_pool_are_served_in_the_order_of_arrival():
    connector = FakeConnector([slow(1.0), slow(1.1), slow(1.2), slow(1.3)])
    async with make_pool(connector, max_connections=4, acquire_timeout=100) as pool:
        order = []

        async def caller(number):
            async with pool.acquire():
                order.append(number)
                await anyio.sleep(1 + number / 1000)

        async with anyio.create_task_group() as tasks:
            for number in range(40):
                tasks.start_soon(caller, number)
                await queued(pool, number + 1)
        assert order == list(range(40))
        assert connector.peak == 4


async def test_a_new_caller_does_not_overtake_while_a_stream_is_briefly_free():
    async with make_pool(max_connections=1) as pool:
        held = await pool.acquire()
        order = []

        async def caller(name):
            async with pool.acquire():
                order.append(name)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller, "waiter")
            await queued(pool, 1)
            await pool.release(held)
            async with pool.acquire():
                order.append("newcomer")
        assert order == ["waiter", "newcomer"]


async def test_the_pool_never_opens_more_than_the_maximum():
    connector = FakeConnector(default=slow(0.5))
    async with make_pool(connector, max_connections=5, acquire_timeout=1000) as pool:

        async def caller():
            async with pool.acquire():
                await anyio.sleep(1)

        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(caller)
            await anyio.sleep(0.1)
            assert pool.status().connecting == 2, "attempts start in a ramp"
        assert connector.peak == 5
        assert connector.attempts == 5


async def test_streams_multiply_the_capacity_but_not_the_connections():
    connector = FakeConnector()
    async with make_pool(
        connector, max_connections=2, streams_per_connection=5
    ) as pool:
        leases = [await pool.acquire() for _ in range(10)]
        assert counts(pool) == (2, 0, 2)
        assert pool.status().streams_in_use == pool.status().streams_max == 10
        assert {lease.connection.number for lease in leases} == {1, 2}
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0)
        for lease in leases:
            await pool.release(lease)
        assert counts(pool) == (2, 2, 0)


async def test_one_connection_serves_as_many_leases_as_it_has_streams():
    connector = FakeConnector(default=slow(1.0))
    async with make_pool(
        connector, max_connections=10, streams_per_connection=8
    ) as pool:
        leases = []

        async def caller():
            leases.append(await pool.acquire())

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(caller)
        assert connector.attempts == 1
        for lease in leases:
            await pool.release(lease)


# -- timeouts ---------------------------------------------------------------------


async def test_a_caller_waits_exactly_for_the_acquire_timeout():
    async with make_pool(max_connections=1, acquire_timeout=7.5) as pool:
        async with pool.acquire():
            began = anyio.current_time()
            with pytest.raises(PoolTimeout) as caught:
                await pool.acquire()
            assert anyio.current_time() - began == pytest.approx(7.5)
            assert isinstance(caught.value, TimeoutError)
            message = str(caught.value)
            assert "within 7.5 s" in message
            assert "total=1 busy=1 waiting=0 connecting=0" in message
            assert pool.status().waiting == 0
        async with pool.acquire(timeout=0):
            pass


async def test_a_timeout_of_acquire_overrides_the_timeout_of_the_pool():
    async with make_pool(max_connections=1) as pool, pool.acquire():
        began = anyio.current_time()
        with pytest.raises(PoolTimeout, match="within 2 s"):
            async with pool.acquire(timeout=2):
                pytest.fail("nothing was free")
        assert anyio.current_time() - began == pytest.approx(2)


async def test_a_timeout_of_0_does_not_wait():
    async with make_pool(max_connections=1) as pool:
        async with pool.acquire():
            began = anyio.current_time()
            with pytest.raises(PoolTimeout, match="within 0 s"):
                await pool.acquire(timeout=0)
            assert anyio.current_time() == began
        async with pool.acquire(timeout=0):
            pass


async def test_an_infinite_timeout_waits_until_a_connection_is_free():
    async with make_pool(max_connections=1) as pool:
        held = await pool.acquire()

        async def release_late():
            await anyio.sleep(1_000)
            await pool.release(held)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(release_late)
            async with pool.acquire(timeout=math.inf):
                assert anyio.current_time() >= 1_000


async def test_the_timeout_covers_waiting_and_connecting_together():
    connector = FakeConnector([ok(), slow(100.0)])
    pool = make_pool(
        connector, max_connections=1, acquire_timeout=5, connection_timeout=200
    )
    async with pool:
        conn = await pool.acquire()
        began = anyio.current_time()

        async def release_late():
            await anyio.sleep(4)
            pool.drain()
            await pool.release(conn)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(release_late)
            with pytest.raises(PoolTimeout):
                await pool.acquire()
        assert anyio.current_time() - began == pytest.approx(5)


async def test_a_connect_that_finishes_after_its_caller_left_serves_the_next():
    connector = FakeConnector([slow(3.0)])
    async with make_pool(connector, acquire_timeout=1) as pool:
        with pytest.raises(PoolTimeout) as caught:
            await pool.acquire()
        assert "connecting=1" in str(caught.value)
        await anyio.sleep(2.5)
        async with pool.acquire(timeout=0) as conn:
            assert conn.connection.number == 1
        assert connector.attempts == 1


async def test_a_released_connection_serves_a_caller_that_waits_for_a_connect():
    connector = FakeConnector([ok(), slow(100.0)])
    async with make_pool(connector, max_connections=2, connection_timeout=200) as pool:
        first = await pool.acquire()
        served = []

        async def caller():
            async with pool.acquire(timeout=50) as conn:
                served.append((conn.connection.number, anyio.current_time()))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller)
            await queued(pool, 1)
            await anyio.sleep(1)
            assert pool.status().connecting == 1
            now = anyio.current_time()
            await pool.release(first)
        assert served == [(1, now)]


# -- saturation -------------------------------------------------------------------


async def test_a_caller_beyond_max_waiting_is_refused_at_once():
    async with make_pool(max_connections=1, max_waiting=2) as pool:
        held = await pool.acquire()

        async def caller():
            async with pool.acquire():
                pass

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller)
            tasks.start_soon(caller)
            await queued(pool, 2)
            began = anyio.current_time()
            with pytest.raises(PoolSaturated) as caught:
                await pool.acquire()
            assert anyio.current_time() == began
            assert "2 callers (max_waiting)" in str(caught.value)
            assert "busy=1 waiting=2" in str(caught.value)
            await pool.release(held)
        async with pool.acquire():
            pass


async def test_callers_that_wait_for_a_connect_do_not_count_for_max_waiting():
    connector = FakeConnector(default=slow(1.0))
    async with make_pool(connector, max_waiting=0) as pool, pool.acquire() as conn:
        assert conn.connection.number == 1


# -- failures ---------------------------------------------------------------------


async def test_after_all_retries_failed_the_caller_gets_the_cause():
    connector = FakeConnector(default=fail("nobody there"))
    async with make_pool(connector, max_retries=2) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire()
        assert connector.attempts == 3
        assert "nobody there" in str(caught.value)
        assert caught.value.reason == "refused"
        assert str(caught.value.__cause__) == "nobody there"
        assert isinstance(caught.value, ConnectionError)


async def test_all_waiting_callers_fail_together_each_with_a_separate_error():
    connector = FakeConnector(default=fail())
    async with make_pool(connector, max_connections=2, retry_on_failure=False) as pool:
        errors = []

        async def caller():
            with pytest.raises(ConnectFailed) as caught:
                await pool.acquire()
            errors.append((anyio.current_time(), caught.value))

        async with anyio.create_task_group() as tasks:
            for _ in range(50):
                tasks.start_soon(caller)
        assert len({id(error) for _, error in errors}) == 50
        assert {time for time, _ in errors} == {anyio.current_time()}
        assert connector.attempts <= 2
        assert pool.status().waiting == 0


async def test_a_pool_recovers_when_the_server_does():
    connector = FakeConnector(default=fail())
    async with make_pool(connector, max_retries=0) as pool:
        for _ in range(3):
            with pytest.raises(ConnectFailed):
                await pool.acquire()
        assert not pool.status().healthy
        connector.default = ok()
        async with pool.acquire():
            pass
        assert pool.status().healthy


async def test_a_failed_connect_fails_no_caller_while_a_connection_is_open():
    connector = FakeConnector([ok()], default=fail())
    async with make_pool(connector, max_connections=2, max_retries=0) as pool:
        first = await pool.acquire()

        async def release_late():
            await anyio.sleep(3)
            await pool.release(first)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(release_late)
            async with pool.acquire() as conn:
                assert conn.connection.number == 1


async def test_a_timeout_names_the_last_connect_error():
    connector = FakeConnector([fail("first no")], default=hang())
    async with make_pool(connector, acquire_timeout=2) as pool:
        with pytest.raises(PoolTimeout) as caught:
            await pool.acquire()
        assert "first no" in str(caught.value)
        assert str(caught.value.__cause__) == "first no"


async def test_a_permanent_failure_is_not_retried():
    error = ConnectFailed("wrong CA", reason="tls", permanent=True)
    connector = FakeConnector(default=fail(error))
    async with make_pool(connector) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire()
        assert connector.attempts == 1
        assert caught.value.permanent
        assert caught.value.reason == "tls"


async def test_any_exception_of_a_connector_is_a_connect_error():
    connector = FakeConnector(default=fail(KeyError("whatever")))
    async with make_pool(connector, max_retries=0) as pool:
        with pytest.raises(ConnectFailed, match="whatever") as caught:
            await pool.acquire()
        assert isinstance(caught.value.__cause__.__cause__, KeyError)
        connector.default = ok()
        async with pool.acquire():
            pass


# -- misuse -----------------------------------------------------------------------


async def test_a_lease_released_twice_is_an_error_and_counts_once():
    async with make_pool(max_connections=1) as pool:
        conn = await pool.acquire()
        await pool.release(conn)
        with pytest.raises(ValueError) as caught:
            await pool.release(conn)
        assert "released" in str(caught.value)
        async with pool.acquire():
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout=0)


async def test_releasing_a_lease_of_another_pool_is_an_error_that_names_both():
    async with make_pool(name="ours") as ours, make_pool(name="theirs") as theirs:
        conn = await theirs.acquire()
        with pytest.raises(ValueError) as caught:
            await ours.release(conn)
        assert "'ours'" in str(caught.value)
        assert "'theirs'" in str(caught.value)
        assert counts(theirs) == (1, 0, 1)
        await theirs.release(conn)


@pytest.mark.parametrize("foreign", [None, 7, object(), "conn"])
async def test_releasing_something_else_is_an_error(foreign):
    async with make_pool() as pool:
        with pytest.raises(ValueError) as caught:
            await pool.release(foreign)
        assert repr(foreign) in str(caught.value)


async def test_every_use_of_a_released_lease_raises():
    async with make_pool() as pool:
        conn = await pool.acquire()
        assert repr(conn) == "<PooledConnection to fake leased>"
        await pool.release(conn)
        assert repr(conn) == "<PooledConnection to fake released>"
        with pytest.raises(PoolError, match="released"):
            _ = conn.connection
        with pytest.raises(PoolError, match="released"):
            await conn.call("/a/b", b"")


async def test_each_acquire_returns_a_separate_lease():
    async with make_pool(max_connections=1) as pool:
        first = await pool.acquire()
        connection = first.connection
        await pool.release(first)
        second = await pool.acquire()
        assert second is not first
        assert second.connection is connection
        with pytest.raises(PoolError):
            _ = first.connection
        await pool.release(second)


async def test_an_acquire_cannot_be_entered_twice_at_once():
    async with make_pool() as pool:
        acquire = pool.acquire()
        async with acquire:
            with pytest.raises(PoolError, match="acquire"):
                async with acquire:
                    pytest.fail("entered twice")
        async with acquire:
            assert counts(pool) == (1, 0, 1)


@pytest.mark.parametrize("timeout", [-1, math.nan, True, "5"])
async def test_an_invalid_timeout_is_refused_with_its_name_and_value(timeout):
    async with make_pool() as pool:
        with pytest.raises((TypeError, ValueError)) as caught:
            pool.acquire(timeout=timeout)
        assert "timeout" in str(caught.value)
        assert repr(timeout) in str(caught.value)


async def test_acquire_on_a_closed_pool_is_refused():
    pool = make_pool()
    await pool.close()
    with pytest.raises(PoolClosed) as caught:
        await pool.acquire()
    assert isinstance(caught.value, RuntimeError)
    assert "initialize" in str(caught.value)


async def test_acquire_without_an_authorizer_says_what_is_missing():
    pool = ConnectionPool()
    with pytest.raises(PoolError, match="TopazConfig"):
        await pool.acquire()
    with pytest.raises(PoolError, match="configure"):
        await pool.initialize()
