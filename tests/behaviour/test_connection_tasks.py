"""What a connection may bring along: a task of its own, and a limit of streams."""

from __future__ import annotations

import anyio
import pytest

from fastapi_topaz import ConnectionPool
from fastapi_topaz.testing import FakeConnector


class Connection:
    """A connection that is as good as its connector says."""

    def __init__(self, connector):
        self.connector = connector
        self.closed = anyio.Event()

    async def probe(self, timeout):
        pass

    async def close(self, grace):
        self.closed.set()


class WithTask(Connection):
    async def run(self):
        self.connector.running += 1
        try:
            if self.connector.error is not None:
                raise self.connector.error
            await self.closed.wait()
        finally:
            self.connector.running -= 1


class WithLimit(Connection):
    @property
    def max_streams(self):
        if isinstance(self.connector.limit, Exception):
            raise self.connector.limit
        return self.connector.limit


class Connector:
    def __init__(self, make, *, error=None, limit=None):
        self.make = make
        self.error = error
        self.limit = limit
        self.running = 0
        self.made = 0

    async def connect(self, timeout):
        self.made += 1
        return self.make(self)


def pool_of(connector, **options):
    return ConnectionPool(connector=connector, min_connections=0, **options)


async def test_a_task_of_a_connection_runs_as_long_as_it():
    connector = Connector(WithTask)
    async with pool_of(connector, max_connections=2) as pool:
        async with pool.acquire():
            await anyio.wait_all_tasks_blocked()
            assert connector.running == 1
        pool.drain()
        await anyio.wait_all_tasks_blocked()
        async with pool.acquire():
            await anyio.wait_all_tasks_blocked()
            assert connector.running == 1
    assert connector.running == 0


@pytest.mark.parametrize("error", [OSError("broken"), ExceptionGroup("", [OSError()])])
async def test_a_task_that_fails_does_not_end_the_pool(error, caplog):
    connector = Connector(WithTask, error=error)
    async with pool_of(connector) as pool:
        for _ in range(2):
            async with pool.acquire():
                await anyio.wait_all_tasks_blocked()
    (record,) = [r for r in caplog.records if "task of a connection" in r.getMessage()]
    assert "failed" in record.getMessage()
    assert record.exc_info[1] is error


async def test_a_run_that_is_no_coroutine_function_is_refused():
    class Wrong(Connection):
        def run(self):
            pass

    pool = pool_of(Connector(Wrong), acquire_timeout=1, retry_on_failure=False)
    async with pool:
        with pytest.raises(Exception, match="its run is not an `async def`"):
            await pool.acquire()


@pytest.mark.parametrize("limit, leases", [(2, 2), (5, 3), (float("inf"), 3), (0, 1)])
async def test_no_connection_gets_more_leases_than_its_server_takes(limit, leases):
    connector = Connector(WithLimit, limit=limit)
    pool = pool_of(
        connector, max_connections=2, streams_per_connection=3, acquire_timeout=5
    )
    async with pool:
        held = [await pool.acquire() for _ in range(2 * leases)]
        assert connector.made == 2
        streams = [one.streams for one in pool.connections()]
        assert streams == [leases, leases]
        if leases < 3:
            with pytest.raises(TimeoutError):
                await pool.acquire(timeout=1)
        async with anyio.create_task_group() as tasks:
            served = []

            async def wait():
                async with pool.acquire():
                    served.append(None)

            for _ in range(10):
                tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            assert not served
            await pool.release(held.pop())
        assert len(served) == 10
        for lease in held:
            await pool.release(lease)


@pytest.mark.parametrize("limit", ["3", None, float("nan"), OSError("no")])
async def test_a_limit_that_is_none_is_ignored(limit):
    connector = Connector(WithLimit, limit=limit)
    async with pool_of(connector, max_connections=1, streams_per_connection=3) as pool:
        held = [await pool.acquire(timeout=1) for _ in range(3)]
        for lease in held:
            await pool.release(lease)


async def test_a_connection_without_a_limit_has_that_of_the_pool():
    pool = ConnectionPool(
        connector=FakeConnector(), max_connections=1, streams_per_connection=3
    )
    async with pool:
        held = [await pool.acquire(timeout=1) for _ in range(3)]
        with pytest.raises(TimeoutError):
            await pool.acquire(timeout=0)
        for lease in held:
            await pool.release(lease)
