"""Application code that fails: providers, metrics and connectors."""

from __future__ import annotations

import sys
import threading

import anyio
import anyio.lowlevel
import pytest
from opentelemetry.metrics import NoOpHistogram, NoOpMeter, NoOpMeterProvider

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectFailed,
    ConnectionLost,
    PoolError,
    PoolTimeout,
)
from fastapi_topaz.testing import FakeConnector
from kit.allowing import allowing, virtual
from kit.backends import asyncio_only
from kit.logs import lines
from kit.network import checked, patient_config
from kit.pools import assert_whole, make_pool


PROVIDERS = ("identity_provider", "resource_context_provider")


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "error", [ZeroDivisionError("mine"), ConnectionLost("mine")], ids=repr
)
async def test_an_error_in_a_provider_reaches_the_caller_and_loses_no_capacity(
    name, is_async, error
):
    calls = []

    def broken(request):
        calls.append(request)
        raise error

    async def broken_later(request):
        broken(request)

    pool = virtual()
    provider = broken_later if is_async else broken
    config = patient_config(pool, AuthorizerOptions(), **{name: provider})
    async with pool:
        for _ in range(5):
            with pytest.raises(type(error), match="mine"):
                await checked(config)
        assert len(calls) == 5, "its errors are not retried"
        assert pool._counters.acquisitions == 0
        await assert_whole(pool, twice=True)


@pytest.mark.parametrize("name", PROVIDERS)
async def test_a_hanging_provider_holds_no_connection_and_can_be_cancelled(name):
    async def hang(_request):
        await anyio.sleep_forever()

    pool = virtual(max_connections=1)
    config = patient_config(pool, AuthorizerOptions(), **{name: hang})
    async with pool, anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(checked, config)
        await anyio.sleep(10)
        assert pool._counters.acquisitions == 0
        assert await checked(patient_config(pool, AuthorizerOptions()))
        tasks.cancel_scope.cancel()


async def test_errors_in_metrics_are_logged_once_and_callers_are_served(caplog):
    class Histogram(NoOpHistogram):
        def record(self, *_args, **_kwargs):
            raise OSError("no collector")

    class Meter(NoOpMeter):
        def create_histogram(self, name, *_args, **_kwargs):
            return Histogram(name)

    class Provider(NoOpMeterProvider):
        def get_meter(self, name, *_args, **_kwargs):
            return Meter(name)

    pool = virtual(meter_provider=Provider())
    config = patient_config(pool, AuthorizerOptions())
    async with pool:
        for _ in range(20):
            assert await checked(config)
        await assert_whole(pool, twice=True)
    assert sum("metric" in line for line in lines(caplog)) == 1


async def test_a_connection_with_failing_probe_and_close_is_replaced(
    caplog,
):
    async def broken(_seconds):
        raise KeyError("not my key")

    connector = allowing()
    pool = virtual(connector, min_connections=2, health_check_interval=10)
    config = patient_config(pool, AuthorizerOptions())
    async with pool:
        await assert_whole(pool, twice=True)
        victim = connector.connections[1]
        victim.probe = victim.close = broken
        await anyio.sleep(10.01)
        assert pool._counters.closes == {"unhealthy": 1}
        assert pool._counters.probe_failures == 2
        evicted, closing = lines(caplog)
        assert "not my key" in evicted
        assert "failed" in closing
        assert "not my key" in caplog.text
        assert await checked(config)
        await assert_whole(pool, twice=True)
    assert [conn.closed for conn in connector.connections] == [1, 0, 1, 1]


async def test_a_connection_with_hanging_probe_and_close_is_abandoned(caplog):
    async def hang(_seconds):
        await anyio.sleep_forever()

    connector = allowing()
    options = {"health_check_interval": 10, "health_check_timeout": 3}
    pool = virtual(connector, **options)
    config = patient_config(pool, AuthorizerOptions())
    async with pool:
        await assert_whole(pool, twice=True)
        victim = connector.connections[1]
        victim.probe = victim.close = hang
        # A health check round, 3 s for each of two probes, 5 s for the close. After the
        # first probe, the connection gets no calls, which would be answered.
        await anyio.sleep(13.5)
        for _ in range(9):
            await anyio.sleep(1)
            assert await checked(config), "other connections serve meanwhile"
        assert pool._counters.closes == {"unhealthy": 1}
        assert sum("stops waiting for it" in line for line in lines(caplog)) == 1
        await assert_whole(pool, twice=True)


# -- connectors, metrics and tasks that misbehave -----------------------------------


class Odd(FakeConnector):
    """Cancels itself on request, like code over bare grpc.aio does."""

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


@asyncio_only
@pytest.mark.parametrize("where", ["connect", "probe", "close"])
async def test_an_unexpected_cancelled_error_does_not_end_the_pool(where):
    connector = Odd()
    pool = make_pool(connector, max_connections=3, health_check_interval=5)
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


@asyncio_only
async def test_a_cancelled_error_at_the_deadline_is_a_timeout():
    """Like bare grpc.aio: it raises its own CancelledError in place of the scope's."""
    import asyncio

    class Grpc(FakeConnector):
        async def connect(self, timeout):
            try:
                await anyio.sleep_forever()
            except asyncio.CancelledError:
                raise asyncio.CancelledError from None

    pool = make_pool(Grpc(), connection_timeout=2, max_retries=0)
    async with pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire()
        assert caught.value.reason == "timeout"


async def test_a_connector_that_returns_none_is_a_connect_error_that_says_so():
    class Nothing(FakeConnector):
        async def connect(self, timeout):
            return None

    async with make_pool(Nothing()) as pool:
        with pytest.raises(ConnectFailed, match="returned None"):
            await pool.acquire()


async def test_errors_in_metrics_lose_no_capacity(caplog):
    class Broken:
        def record(self, *_args):
            raise OSError("no collector")

    pool = make_pool(max_connections=1)
    report = pool._metrics.observer
    report._wait = report._hold = report._connect = Broken()
    async with pool:
        for _ in range(3):
            async with pool.acquire(timeout=0.1):
                pass
    assert sum("metric" in line for line in lines(caplog)) == 1


async def test_entering_one_acquire_in_two_tasks_loses_no_lease():
    async with make_pool(max_connections=1) as pool:
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


async def test_connections_with_a_hanging_close_are_abandoned_at_the_same_time():
    class Conn:
        async def probe(self, _timeout):
            pass

        async def close(self, _grace):
            await anyio.sleep_forever()

    class Connector:
        async def connect(self, _timeout):
            return Conn()

    pool = make_pool(Connector(), max_connections=10)
    leases = [await pool.acquire() for _ in range(10)]
    for conn in leases:
        await pool.release(conn)
    began = anyio.current_time()
    await pool.close()
    assert anyio.current_time() - began == pytest.approx(5)


def test_the_status_can_be_read_in_any_thread():
    """Metrics are collected in separate threads."""
    pool = make_pool(max_connections=50, max_idle_time=0.001, idle_check_interval=0.001)
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
