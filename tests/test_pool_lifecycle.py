"""Opening and closing, on a scripted connector in virtual time."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
import threading

import anyio
import anyio.lowlevel
import pytest
import trio

from fastapi_topaz import (
    ConnectFailed,
    ConnectionLost,
    ConnectionPool,
    PoolClosed,
    PoolError,
    PoolStatus,
    PoolTimeout,
)
from fastapi_topaz.testing import FakeConnector, fail, hang, ok, slow


def make(connector=None, **options):
    options.setdefault("min_connections", 0)
    return ConnectionPool(connector=connector or FakeConnector(), **options)


async def queued(pool, count):
    while pool.status().waiting < count:
        await anyio.lowlevel.checkpoint()


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# -- opening ----------------------------------------------------------------------


def test_building_a_pool_touches_no_loop_and_no_thread():
    threads = threading.active_count()
    connector = FakeConnector()
    pool = make(connector, eager_init=True)
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


async def test_initialize_connects_nothing_unless_it_is_eager():
    connector = FakeConnector()
    pool = make(connector, min_connections=2)
    await pool.initialize()
    await anyio.sleep(10)
    assert connector.attempts == 0
    await pool.close()


async def test_an_eager_initialize_returns_with_the_minimum():
    connector = FakeConnector(default=slow(1.0))
    pool = make(connector, min_connections=2, eager_init=True)
    await pool.initialize()
    assert pool.status().total == 2
    assert connector.attempts == 2
    await pool.close()


async def test_a_pool_in_use_is_filled_to_its_minimum_in_the_background():
    async with make(min_connections=3) as pool:
        async with pool.acquire():
            pass
        await anyio.sleep(0.01)
        assert pool.status().total == 3


async def test_initialize_is_idempotent_and_may_run_twice_at_once():
    connector = FakeConnector(default=slow(1.0))
    pool = make(connector, min_connections=2, eager_init=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.initialize)
        tasks.start_soon(pool.initialize)
    await pool.initialize()
    assert connector.attempts == 2
    await pool.close()


async def test_an_app_that_starts_before_its_authorizer_starts(caplog):
    connector = FakeConnector(default=fail("nobody there yet"))
    pool = make(connector, min_connections=2, eager_init=True, connection_timeout=3)
    began = anyio.current_time()
    await pool.initialize()
    assert anyio.current_time() - began == pytest.approx(3)
    assert any("nobody there yet" in line for line in warnings(caplog))
    assert not pool.status().healthy
    connector.default = ok()
    await anyio.sleep(3)
    assert pool.status().total == 2, "it went on trying"
    assert pool.status().healthy
    await pool.close()


async def test_a_slow_authorizer_delays_the_start_by_the_connection_timeout_at_most(
    caplog,
):
    pool = make(
        FakeConnector(default=hang()),
        min_connections=1,
        eager_init=True,
        connection_timeout=4,
    )
    began = anyio.current_time()
    await pool.initialize()
    assert anyio.current_time() - began == pytest.approx(4)
    assert any("at startup" in line for line in warnings(caplog))
    await pool.close()


async def test_what_no_retry_can_mend_ends_the_start_early(caplog):
    error = ConnectFailed("wrong CA", reason="tls", permanent=True)
    pool = make(FakeConnector(default=fail(error)), min_connections=1, eager_init=True)
    began = anyio.current_time()
    await pool.initialize()
    assert anyio.current_time() == began
    assert any("wrong CA" in line for line in warnings(caplog))
    await pool.close()


async def test_what_the_connector_finds_wrong_raises_from_initialize():
    class Checked(FakeConnector):
        def validate(self):
            raise ValueError("cert_file_path must be a readable file")

    pool = make(Checked())
    with pytest.raises(ValueError, match="cert_file_path"):
        await pool.initialize()
    assert repr(pool).startswith("<ConnectionPool new")


async def test_a_cancelled_initialize_leaves_the_pool_as_it_was():
    connector = FakeConnector(default=hang())
    pool = make(connector, min_connections=1, eager_init=True)
    with anyio.move_on_after(1):
        await pool.initialize()
    await anyio.sleep(0.01)
    assert repr(pool).startswith("<ConnectionPool new")
    connector.default = ok()
    await pool.initialize()
    assert pool.status().total == 1
    await pool.close()


async def test_a_cancelled_initialize_does_not_close_the_pool_under_somebody_else():
    connector = FakeConnector([slow(5.0)])
    pool = make(connector, min_connections=1, eager_init=True)
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


async def test_the_request_that_opened_the_pool_does_not_take_it_along():
    """A cancelled caller cancels neither the host task nor the connect it wanted."""
    connector = FakeConnector(default=slow(2.0))
    pool = make(connector)
    with anyio.move_on_after(1):
        await pool.acquire()
    await anyio.sleep(1.5)
    async with pool.acquire(timeout=0) as conn:
        assert conn.connection.number == 1
    await pool.close()


async def test_two_cancelled_initializes_leave_the_pool_as_it_was():
    connector = FakeConnector(default=hang())
    pool = make(connector, min_connections=1, eager_init=True)
    with anyio.move_on_after(1):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pool.initialize)
            tasks.start_soon(pool.initialize)
    await anyio.sleep(0.01)
    assert repr(pool).startswith("<ConnectionPool new")


async def test_an_acquire_right_after_a_cancelled_initialize_opens_the_pool():
    connector = FakeConnector([hang()])
    pool = make(connector, min_connections=1, eager_init=True)
    with anyio.move_on_after(1):
        await pool.initialize()
    async with pool.acquire():
        pass
    await pool.close()


# -- closing ----------------------------------------------------------------------


async def test_close_closes_everything_exactly_once():
    connector = FakeConnector()
    pool = make(connector, max_connections=5)
    leases = [await pool.acquire() for _ in range(5)]
    for conn in leases:
        await pool.release(conn)
    await pool.close()
    assert [conn.closed for conn in connector.connections] == [1] * 5
    assert repr(pool).startswith("<ConnectionPool closed total=0")
    await pool.close()
    assert [conn.closed for conn in connector.connections] == [1] * 5


async def test_close_may_run_in_another_task_than_initialize_and_twice_at_once():
    connector = FakeConnector()
    pool = make(connector, min_connections=1, eager_init=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.initialize)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.close)
        tasks.start_soon(pool.close)
    assert not connector.open


async def test_those_who_wait_fail_at_once_when_the_pool_closes():
    pool = make(max_connections=1, acquire_timeout=100)
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


async def test_those_who_wait_for_a_connection_fail_at_once_when_the_pool_closes():
    connector = FakeConnector(default=hang())
    pool = make(connector, acquire_timeout=100, connection_timeout=100)
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


async def test_leases_have_the_grace_to_come_back():
    connector = FakeConnector()
    pool = make(connector)
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
        assert anyio.current_time() - began == pytest.approx(3), "and no longer"
    assert connector.connections[0].closed == 1


async def test_after_the_grace_a_lease_is_lost_and_its_late_release_harmless():
    connector = FakeConnector()
    pool = make(connector)
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


async def test_a_cancelled_close_gives_up_the_grace_and_not_the_closing():
    connector = FakeConnector()
    pool = make(connector)
    _held = await pool.acquire()
    began = anyio.current_time()
    with anyio.move_on_after(1) as scope:
        await pool.close(grace=100)
    assert scope.cancelled_caught
    assert anyio.current_time() - began == pytest.approx(1)
    assert not connector.open
    assert repr(pool).startswith("<ConnectionPool closed")


async def test_a_connection_that_will_not_close_does_not_hang_the_pool(caplog):
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

    pool = make(Stuck())
    async with pool.acquire():
        pass
    began = anyio.current_time()
    await pool.close()
    assert anyio.current_time() - began == pytest.approx(5)
    assert any("given up" in line for line in warnings(caplog))


async def test_a_connector_whose_target_cannot_be_read_works_all_the_same():
    class Odd(FakeConnector):
        @property
        def target(self):
            raise ZeroDivisionError

        @target.setter
        def target(self, _target): ...

    async with make(Odd()) as pool, pool.acquire():
        assert pool._open_pool.target == "Odd"


async def test_an_error_while_closing_is_logged_and_loses_nothing(caplog):
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
    pool = make(connector, max_connections=3)
    leases = [await pool.acquire() for _ in range(3)]
    for conn in leases:
        await pool.release(conn)
    await pool.close()
    assert not connector.open
    first, rest = warnings(caplog)
    assert "closing a connection to fake failed" in first
    assert "closing failed: OSError: 2 more" in rest


async def test_a_connect_under_way_is_cancelled_by_close_and_none_follows():
    connector = FakeConnector(default=hang())
    pool = make(connector, min_connections=3)
    with anyio.move_on_after(0.5):
        await pool.acquire()
    attempts = connector.attempts
    await pool.close()
    await anyio.sleep(100)
    assert connector.attempts == attempts
    assert pool.status().connecting == 0


@pytest.mark.parametrize("grace", [-1, float("nan"), True, "5"])
async def test_a_wrong_grace_is_refused_and_the_pool_stays_open(grace):
    async with make() as pool:
        with pytest.raises((TypeError, ValueError)) as caught:
            await pool.close(grace)
        assert "grace" in str(caught.value)
        async with pool.acquire():
            pass


# -- again, and elsewhere -----------------------------------------------------------


async def test_a_closed_pool_can_be_opened_again():
    connector = FakeConnector()
    pool = make(connector)
    for _ in range(3):
        async with pool, pool.acquire():
            pass
        with pytest.raises(PoolClosed):
            await pool.acquire()
    assert len(connector.connections) == 3
    assert not connector.open


async def test_initialize_waits_for_a_close_under_way():
    pool = make()
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
    pool = make(connector)

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
def test_a_pool_whose_loop_ended_without_close_opens_again_on_the_next(backend):
    connector = FakeConnector()
    pool = make(connector)

    async def use():
        async with pool.acquire():
            pass

    for number in (1, 2, 3):
        anyio.run(use, backend=backend)
        assert len(connector.connections) == number
        assert not connector.open, "closed with its loop"


def test_a_pool_on_a_loop_that_was_closed_under_it_opens_again():
    import asyncio

    pool = make()

    async def use():
        async with pool.acquire():
            pass

    loop = asyncio.new_event_loop()
    loop.run_until_complete(use())
    task = pool._open_pool.owner._task
    task._log_destroy_pending = False  # this is what a test of rudeness costs
    loop.close()
    anyio.run(use, backend="trio")


@pytest.mark.parametrize("first", ["asyncio", "trio"])
@pytest.mark.parametrize("second", ["asyncio", "trio"])
def test_an_open_pool_refuses_another_loop_and_names_both(first, second):
    pool = make(name="shared")
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


# -- exit -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("end", ["return", "raise", "connecting", "exit"])
def test_a_pool_never_closed_leaves_no_process_and_no_traceback(backend, end):
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
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    assert "never awaited" not in result.stderr
    assert "destroyed" not in result.stderr


async def test_no_task_is_left_after_close():
    import asyncio

    is_trio = "trio" in str(type(anyio.lowlevel.current_token().native_token))

    def tasks():
        if is_trio:
            return trio.lowlevel.current_statistics().tasks_living
        return len(asyncio.all_tasks())

    before = tasks()
    pool = make(min_connections=3, leak_threshold=1.0)
    async with pool, pool.acquire():
        assert tasks() > before
    # The host itself ends in the step after it has told so.
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()
    assert tasks() == before


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_host_that_was_cancelled_before_it_began_does_not_hang_close():
    """asyncio.run cancels all tasks at its end, also those that had no turn yet."""
    import asyncio

    pool = make(min_connections=1, eager_init=True)
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


# -- other people's code ------------------------------------------------------------


class Odd(FakeConnector):
    """Cancels itself where it is told to, as code over bare grpc.aio does."""

    where = ""

    async def connect(self, timeout):
        if self.where == "connect":
            await self.cancel_itself(timeout)
        conn = await super().connect(timeout)
        if self.where in {"probe", "close"}:
            made = conn

            class Oddity:
                probe = made.probe
                close = made.close

            async def odd(argument):
                await original(argument)
                await self.cancel_itself(argument)

            original = getattr(made, self.where)
            oddity = Oddity()
            setattr(oddity, self.where, odd)
            return oddity
        return conn

    async def cancel_itself(self, _timeout):
        import asyncio

        raise asyncio.CancelledError


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
@pytest.mark.parametrize("where", ["connect", "probe", "close"])
async def test_a_cancellation_that_nobody_asked_for_does_not_end_the_pool(where):
    connector = Odd()
    pool = make(connector, max_connections=3, health_check_interval=5)
    async with pool:
        held = await pool.acquire()
        connector.where = where
        if where == "connect":
            with pytest.raises(PoolTimeout, match="cancelled itself"):
                await pool.acquire(timeout=3)
        else:
            other = await pool.acquire()
            await pool.release(other)
            pool.drain() if where == "close" else await anyio.sleep(20)
        await anyio.sleep(1)
        connector.where = ""
        assert repr(pool).startswith("<ConnectionPool open")
        async with pool.acquire():
            assert await held.call("/a/b", b"works") == b"works"
        await pool.release(held)


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_deadline_answered_with_a_cancellation_is_a_timeout():
    """What bare grpc.aio does: its own CancelledError in place of the scope's."""
    import asyncio

    class Grpc(FakeConnector):
        async def connect(self, timeout):
            try:
                await anyio.sleep_forever()
            except asyncio.CancelledError:
                raise asyncio.CancelledError from None

    pool = make(Grpc(), connection_timeout=2, max_retries=0)
    async with pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire()
        assert caught.value.reason == "timeout"


async def test_a_connector_that_returns_nothing_is_a_failure_that_says_so():
    class Nothing(FakeConnector):
        async def connect(self, timeout):
            return None

    async with make(Nothing()) as pool:
        with pytest.raises(ConnectFailed, match="returned None"):
            await pool.acquire()


async def test_metrics_that_raise_cost_no_capacity(caplog):
    class Broken:
        def record(self, *_args):
            raise OSError("no collector")

    pool = make(max_connections=1)
    report = pool._metrics.observer
    report._wait = report._hold = report._connect = Broken()
    async with pool:
        for _ in range(3):
            async with pool.acquire(timeout=0.1):
                pass
    assert sum("metric" in line for line in warnings(caplog)) == 1


async def test_an_acquire_that_two_tasks_enter_loses_no_lease():
    async with make(max_connections=1) as pool:
        acquire = pool.acquire()
        errors = []

        async def enter():
            try:
                async with acquire:
                    await anyio.sleep(1)
            except PoolError as error:
                errors.append(error)

        async with pool.acquire() as conn, anyio.create_task_group() as tasks:
            tasks.start_soon(enter)
            tasks.start_soon(enter)
            await anyio.sleep(0.1)
            await pool.release(conn)
        assert len(errors) == 1
        async with pool.acquire(timeout=0):
            pass


async def test_connections_that_will_not_close_are_given_up_together():
    class Conn:
        async def probe(self, _timeout):
            pass

        async def close(self, _grace):
            await anyio.sleep_forever()

    class Connector:
        async def connect(self, _timeout):
            return Conn()

    pool = make(Connector(), max_connections=10)
    leases = [await pool.acquire() for _ in range(10)]
    for conn in leases:
        await pool.release(conn)
    began = anyio.current_time()
    await pool.close()
    assert anyio.current_time() - began == pytest.approx(5)


def test_the_status_may_be_asked_for_in_any_thread():
    """Metrics are collected in threads of their own."""
    pool = make(max_connections=50, max_idle_time=0.001, idle_check_interval=0.001)
    stop = threading.Event()
    errors = []

    def ask():
        while not stop.is_set():
            try:
                pool.status()
            except RuntimeError as error:
                errors.append(error)

    async def churn():
        async with pool:
            for _ in range(20):
                leases = [await pool.acquire() for _ in range(50)]
                for conn in leases:
                    await pool.release(conn)
                await anyio.sleep(0.005)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=ask)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        anyio.run(churn)
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert not errors
