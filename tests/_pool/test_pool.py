"""Test how a pool is configured, opened and closed, and its status meanwhile."""

from __future__ import annotations

import logging

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectFailed,
    ConnectionPool,
    PoolClosed,
    PoolError,
    PoolMisuse,
    PoolStatus,
    PoolTimeout,
    _fork,
)
from fastapi_topaz.testing import FakeConnection, FakeConnector, fail, hang, ok
from kit.backends import asyncio_only
from kit.configs import TOPAZ
from kit.pools import Lingering, Making, make_pool
from kit.threads import in_a_thread


pytestmark = pytest.mark.usefixtures("host_survives")


def closed_status(*, failing=False):
    return PoolStatus(
        total=0,
        idle=0,
        busy=0,
        healthy_connections=0,
        max_connections=7,
        min_connections=2,
        streams_max=21,
        failing=failing,
    )


# -- the status of a pool that is not open --------------------------------------------


async def test_the_status_of_a_pool_that_is_not_open_has_only_its_limits():
    options = {"min_connections": 2, "max_connections": 7}
    pool = make_pool(**options, streams_per_connection=3)
    assert pool.status() == closed_status()
    assert pool.connections() == ()
    async with pool, pool.acquire():
        assert pool.status() != closed_status()
        assert pool.connections()[0].condition == "busy"
    assert pool.status() == closed_status()
    assert pool.connections() == ()


async def test_in_a_forked_child_an_open_pool_fails_and_has_no_connections():
    options = {"min_connections": 2, "max_connections": 7}
    async with make_pool(**options, streams_per_connection=3) as pool, pool.acquire():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_fork.current, "pid", -1)
            assert pool.status() == closed_status(failing=True)
            assert not pool.status().healthy
            assert pool.connections() == ()
            for use in (pool.initialize, pool.close, pool.acquire):
                with pytest.raises(PoolError, match="forked"):
                    await use()
        assert pool.status().busy == 1


class Surviving(FakeConnector):
    survives_fork = True


async def test_a_forked_child_begins_with_a_pool_of_its_own(caplog):
    caplog.set_level("INFO", "fastapi_topaz.pool")

    async def child():
        async with pool, pool.acquire():
            for _ in range(2):
                pool._log_limit.report(logging.WARNING, "no luck", "no luck today")
            return pool.status().total, pool._counters.acquisitions

    async with make_pool(Surviving(), name="main") as pool:
        lease = await pool.acquire()
        parent, pid = pool._open_pool, _fork.current.pid
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_fork.current, "pid", -1)
            assert pool.status().healthy
            assert " new " in repr(pool)
            told = f"^pool 'main' was opened in process {pid}.* the event loop of its"
            for use in (pool.initialize, pool.close, pool.acquire):
                with pytest.raises(PoolMisuse, match=told):
                    await use()
            # The lease belongs to the parent, so its release changes nothing here.
            await pool.release(lease)
            assert in_a_thread(lambda: anyio.run(child)) == (1, 1)
            assert f"process -1 was forked from {pid}; it has a pool" in caplog.text
            assert "pool 'main': no luck: 1 more in the last 0 s" in caplog.text
            # The child never collects what belongs to the parent.
            _fork._inherited.remove(parent)
            pool._open_pool = parent
        assert pool.status().streams_in_use == 1


async def test_a_child_forked_while_the_pool_opens_can_open_it_too():
    class Forking(FakeConnector):
        def validate(self):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_fork.current, "pid", -1)
                self.outcome = in_a_thread(lambda: anyio.run(child))

    async def child():
        async with pool.acquire() as conn:
            number = conn.connection.number
        await pool.close()
        return number

    connector = Forking()
    pool = make_pool(connector)
    async with pool:
        assert connector.outcome == 1


async def test_another_thread_cannot_open_the_pool_meanwhile_or_just_after():
    class Opening(FakeConnector):
        def validate(self):
            self.outcome = in_a_thread(lambda: anyio.run(use))

    async def use():
        async with pool.acquire():
            pass

    async def opened():
        return pool._open()

    connector = Opening()
    pool = make_pool(connector, name="main")
    async with pool:
        await use()
        late = in_a_thread(lambda: anyio.run(opened))
        later = in_a_thread(lambda: anyio.run(use))
        for outcome in (connector.outcome, late, later):
            assert isinstance(outcome, PoolMisuse)
            assert str(outcome).startswith("pool 'main' is open on ")
        assert await opened() is pool._open_pool


async def test_only_initialize_validates_the_connector():
    class Invalid(FakeConnector):
        def validate(self):
            raise ValueError("no certificate")

    pool = make_pool(Invalid())
    with pytest.raises(ValueError, match="no certificate"):
        await pool.initialize()
    async with pool.acquire():
        pass
    await pool.close()


async def test_a_closing_pool_logs_what_it_held_back_and_keeps_no_clock(caplog):
    async with make_pool(name="main") as pool:
        for _ in range(3):
            pool._log_limit.report(logging.WARNING, "no luck", "no luck today")
        assert pool._log_limit.clock == pool._open_pool.now
    assert "pool 'main': no luck: 2 more in the last 0 s" in caplog.text
    assert pool._log_limit.clock is None


@pytest.mark.parametrize("name, told", [(None, "the pool"), ("main", "pool 'main'")])
async def test_an_error_names_the_pool_if_it_has_a_name(name, told):
    pool = make_pool(name=name)
    await pool.close()
    with pytest.raises(PoolClosed, match=f"^{told} is closed "):
        await pool.acquire()


async def test_an_invalid_grace_is_named():
    with pytest.raises(ValueError, match="grace must be at least 0 seconds"):
        await make_pool().close(-1)


# -- opening --------------------------------------------------------------------------


async def test_only_one_caller_that_waits_for_a_close_reopens_the_pool():
    connector = Making(Lingering)
    pool = make_pool(connector, min_connections=1, eager_init=True)
    await pool.initialize()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.close)
        await anyio.sleep(0.5)
        for _ in range(3):
            tasks.start_soon(pool.initialize)
    assert pool.status().total == len(connector.open) == 1
    await pool.close()
    assert connector.open == []


async def test_only_one_caller_that_waits_for_a_cancelled_start_opens_the_pool():
    connector = Making(Lingering, script=[ok(), hang()])
    pool = make_pool(connector, min_connections=2, eager_init=True)
    with anyio.move_on_after(1):
        await pool.initialize()
    assert repr(pool).startswith("<ConnectionPool closing")
    leases = []

    async def caller():
        leases.append(await pool.acquire())

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(caller)
    assert pool.status().streams_in_use == 3
    for conn in leases:
        await pool.release(conn)
    await pool.close()
    assert connector.open == []


async def test_each_caller_that_stops_waiting_for_a_start_is_counted():
    pool = make_pool(
        Making(Lingering, script=[ok(), hang()]), min_connections=2, eager_init=True
    )
    with anyio.move_on_after(1):
        await pool.initialize()
    for _ in range(3):
        with anyio.move_on_after(0.1):
            await pool.acquire()
    assert pool._counters.cancelled == 3
    await pool.close()


# -- the background task --------------------------------------------------------------


async def test_each_second_the_liveness_of_another_connection_is_refreshed():
    looked = []

    class Watched(FakeConnection):
        def refresh_liveness(self):
            looked.append(self.number)

    async with make_pool(Making(Watched)) as pool:
        for conn in [await pool.acquire() for _ in range(2)]:
            await pool.release(conn)
        await anyio.sleep(4.5)
    assert looked in ([1, 2, 1, 2], [2, 1, 2, 1])


async def test_callers_fail_at_once_if_the_only_attempt_hangs():
    options = {"max_connections": 1, "acquire_timeout": 5, "connection_timeout": 10}
    async with make_pool(FakeConnector(default=hang()), **options) as pool:
        with pytest.raises(PoolTimeout):
            await pool.acquire()
        # The first attempt has failed, and the next one is already overdue.
        await anyio.sleep(10)
        began = anyio.current_time()
        with pytest.raises(ConnectFailed, match="not established within"):
            await pool.acquire()
        assert anyio.current_time() == began


# -- closing --------------------------------------------------------------------------


async def test_a_lease_is_cut_off_after_the_grace_if_another_close_hangs():
    closed = {}

    class Slow(FakeConnection):
        async def close(self, grace, /):
            closed[self.number] = anyio.current_time()
            await anyio.sleep_forever()

    pool = make_pool(Making(Slow))
    first, second = [await pool.acquire() for _ in range(2)]
    await pool.release(first)
    began = anyio.current_time()
    await pool.close(grace=2)
    assert closed == {1: pytest.approx(began), 2: pytest.approx(began + 2)}
    assert anyio.current_time() == pytest.approx(began + 7)
    await pool.release(second)


@pytest.mark.parametrize("count, leases", [(1, "a lease"), (2, "2 leases")])
def test_a_loop_that_ends_with_leases_out_logs_how_many(caplog, count, leases):
    async def main():
        held.extend([await pool.acquire() for _ in range(count)])

    for backend in ("asyncio", "trio"):
        held = []
        pool = make_pool()
        caplog.clear()
        with pytest.warns(ResourceWarning, match=f"with {leases} out"):
            anyio.run(main, backend=backend)
        told = [record.getMessage() for record in caplog.records]
        assert f"the pool: closed before {leases} came back" in told


async def test_a_cancelled_close_waits_until_all_connections_are_closed():
    connector = Making(Lingering)
    pool = make_pool(connector)
    async with pool.acquire():
        pass
    with anyio.CancelScope() as scope:
        scope.cancel()
        await pool.close()
    assert scope.cancelled_caught
    assert connector.open == []


async def test_a_cancelled_close_does_not_wait_for_an_uncancellable_close():
    class Stubborn(FakeConnection):
        async def close(self, grace, /):
            with anyio.CancelScope(shield=True):
                await anyio.sleep(60)

    pool = make_pool(Making(Stubborn))
    async with pool.acquire():
        pass
    began = anyio.current_time()
    with anyio.move_on_after(3):
        await pool.close()
    assert anyio.current_time() == pytest.approx(began + 3 + 10)
    await pool.close()
    assert anyio.current_time() == pytest.approx(began + 60)


@asyncio_only
async def test_close_returns_if_the_background_task_was_cancelled_early():
    """
    At its end asyncio.run cancels all tasks, including tasks that have not started.
    """
    pool = make_pool()
    await pool.initialize()
    pool._open_pool.owner._task.cancel()
    with anyio.fail_after(30):
        await pool.close()
    assert repr(pool).startswith("<ConnectionPool closed")


# -- configuration ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["connector", "meter_provider"])
def test_an_argument_of_the_wrong_type_is_named(name):
    with pytest.raises(TypeError, match=f"{name} must .* got 'text'"):
        ConnectionPool(**{name: "text"})


def test_a_flag_that_is_not_a_bool_is_rejected():
    with pytest.raises(TypeError, match="semantic_conventions must be"):
        ConnectionPool(semantic_conventions=1)


async def test_an_open_pool_cannot_be_configured_for_another_authorizer():
    pool = ConnectionPool(min_connections=0)
    pool.configure(TOPAZ)
    async with pool:
        pool.configure(TOPAZ)
        with pytest.raises(PoolError, match="is open; close\\(\\) it to configure it"):
            pool.configure(AuthorizerOptions(url="elsewhere:8282"))
        assert pool.authorizer_options == TOPAZ
    pool.configure(AuthorizerOptions(url="elsewhere:8282"))
    assert pool.authorizer_options.url == "elsewhere:8282"


async def test_configure_does_not_replace_a_custom_connector():
    connector = FakeConnector()
    pool = make_pool(connector)
    pool.configure(TOPAZ)
    assert pool.authorizer_options is None
    async with pool, pool.acquire() as conn:
        assert conn.connection in connector.connections


def test_a_value_with_a_failing_repr_is_rejected_by_its_class_name():
    class Unseen:
        def __repr__(self):
            raise RuntimeError("do not look")

    with pytest.raises(TypeError, match="got a Unseen that cannot be shown"):
        ConnectionPool(connector=Unseen())


def test_a_pool_that_is_not_open_has_nothing_to_drain():
    pool = make_pool()
    pool.drain()
    assert pool.status().total == 0
    assert repr(pool).startswith("<ConnectionPool new")


async def cancelled_start(pool):
    """Open *pool* and cancel that. The pool then takes a second to close."""
    with anyio.move_on_after(1):
        await pool.initialize()
    assert repr(pool).startswith("<ConnectionPool closing")


async def test_a_caller_that_waits_for_a_cancelled_start_can_give_up():
    script = Making(Lingering, script=[ok(), hang()])
    pool = make_pool(script, min_connections=2, eager_init=True)
    await cancelled_start(pool)
    with anyio.move_on_after(0.5) as scope:
        await pool.acquire()
    assert scope.cancelled_caught
    assert pool._counters.cancelled == 1
    async with pool.acquire() as conn:
        assert await conn.call("/a/b", b"works") == b"works"
    await pool.close()
    assert script.open == []


async def test_a_caller_that_waits_for_a_cancelled_start_can_find_it_closed():
    script = Making(Lingering, script=[ok(), hang()])
    pool = make_pool(script, min_connections=2, eager_init=True)
    await cancelled_start(pool)
    await pool.close()
    with pytest.raises(PoolClosed, match="is closed"):
        await pool.acquire()


# -- the start ----------------------------------------------------------------------


@pytest.mark.parametrize("minimum", [0, 2])
async def test_a_successful_start_logs_no_warning(caplog, minimum):
    async with make_pool(min_connections=minimum, eager_init=True) as pool:
        assert pool.status().total == minimum
        assert not [r for r in caplog.records if r.levelname == "WARNING"]


async def test_a_permanent_failure_ends_the_start_at_once_with_a_warning(caplog):
    connector = FakeConnector(default=fail(ConnectFailed("never", permanent=True)))
    async with make_pool(connector, min_connections=1, eager_init=True) as pool:
        assert pool.status().total == 0
        assert [r for r in caplog.records if "at startup" in r.getMessage()]
