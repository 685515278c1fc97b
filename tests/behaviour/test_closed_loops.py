"""Event loops that are closed without an end of their tasks leave nothing open."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import logging
import weakref

import anyio
import psutil
import pytest

from fastapi_topaz import ConnectionPool, PoolMisuse
from fastapi_topaz.testing import FakeConnection, FakeConnector, hang
from kit.pools import Making
from kit.waiting import eventually, until


pytestmark = [
    # Both of asyncio and of the pool: that is what these tests are about.
    pytest.mark.filterwarnings("ignore:.*was not closed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*garbage-collected:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def loops():
    yield pytest.param(asyncio.new_event_loop, id="asyncio")
    if importlib.util.find_spec("uvloop"):
        import uvloop

        yield pytest.param(uvloop.new_event_loop, id="uvloop")


async def used(pool):
    """Use it and give everything back."""
    async with pool.acquire() as conn:
        await conn.info()


async def leased(pool):
    """Keep a lease."""
    await used(pool)
    kept = await pool.acquire()
    asyncio.get_running_loop().kept = kept


async def in_flight(pool):
    """Leave a call without an answer."""
    await used(pool)

    async def ask():
        async with pool.acquire() as conn:
            await conn.info()

    pool.authorizer.freeze()
    task = asyncio.create_task(ask())
    await asyncio.sleep(0.02)
    assert not task.done()


async def connecting(pool):
    """Leave attempts to connect under way."""
    tasks = [asyncio.create_task(pool.acquire().__aenter__()) for _ in range(5)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert not all(task.done() for task in tasks)


async def greeting(pool):
    """Leave a new connection without an answer to its first probe."""
    authorizer = pool.authorizer
    authorizer.delay, before = 0.2, authorizer.calls["Info"]
    pool.tasks = [asyncio.create_task(used(pool))]
    await eventually(lambda: authorizer.calls["Info"] > before, 10)
    assert pool.status().connecting


async def waiting(pool):
    """Leave callers that wait."""
    pool.leases = [await pool.acquire() for _ in range(pool.options.max_connections)]
    pool.tasks = [asyncio.create_task(used(pool)) for _ in range(3)]
    await asyncio.sleep(0)
    assert pool.status().waiting == 3


def run(make_loop, job, pool):
    loop = make_loop()
    loop.run_until_complete(job(pool))
    loop.close()


JOBS = [used, leased, in_flight, connecting, greeting, waiting]


@pytest.mark.parametrize("make_loop", list(loops()))
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
@pytest.mark.parametrize("shared", [False, True], ids=["own pools", "one pool"])
@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_closed_loops_leave_no_socket_and_no_descriptor(
    embedded_authorizer, make_loop, job, shared, count
):
    process = psutil.Process()

    def make():
        pool = ConnectionPool(min_connections=2, max_connections=4)
        pool.configure(embedded_authorizer.options)
        pool.authorizer = embedded_authorizer
        return pool

    one = make()

    def rounds(count):
        for _ in range(count):
            run(make_loop, job, one if shared else make())
            embedded_authorizer.heal()
        gc.collect()

    # What gRPC opens once in a process, and keeps.
    rounds(3)
    until(lambda: embedded_authorizer.connections_open == 0)
    before = process.num_fds()
    rounds(count)
    until(lambda: embedded_authorizer.connections_open == 0)
    until(lambda: process.num_fds() <= before)


@pytest.mark.parametrize("make_loop", list(loops()))
def test_grpc_works_on_the_next_loop_after_one_closed_under_a_call(
    embedded_authorizer, make_loop, caplog
):
    caplog.set_level(logging.WARNING, logger="asyncio")
    for _ in range(5):
        pool = ConnectionPool(min_connections=0)
        pool.configure(embedded_authorizer.options)
        pool.authorizer = embedded_authorizer
        run(make_loop, in_flight, pool)
        embedded_authorizer.thaw()
        loop = make_loop()
        loop.run_until_complete(asyncio.wait_for(used(pool), 10))
        loop.run_until_complete(pool.close())
        loop.close()
    gc.collect()
    assert not [r for r in caplog.records if "is closed" in r.getMessage()]


# -- connections of other connectors --------------------------------------------------


class Abandoning(FakeConnection):
    """Closes at once where it is told to."""

    abandoned = 0

    def abandon(self):
        self.abandoned += 1
        self.closed += 1


def test_a_connection_is_abandoned_once_and_the_pool_says_that_it_was_not_closed():
    connector = Making(Abandoning)
    pool = ConnectionPool(connector=connector, min_connections=0, name="main")

    async def job(pool):
        async with pool.acquire(), pool.acquire():
            pass

    loop = asyncio.new_event_loop()
    loop.run_until_complete(job(pool))
    with pytest.warns(ResourceWarning, match="pool 'main' was not closed before its"):
        loop.close()
    assert [conn.abandoned for conn in connector.connections] == [1, 1]
    assert not connector.open
    assert repr(pool).startswith("<ConnectionPool 'main' new")
    assert pool._counters.closes == {"close": 2}
    # It can be opened again, on another loop.
    asyncio.run(used_and_closed(pool))


async def used_and_closed(pool):
    async with pool, pool.acquire():
        pass


def test_a_connection_that_cannot_be_abandoned_is_at_least_kept_by_nobody():
    connector = FakeConnector()
    pool = ConnectionPool(connector=connector, min_connections=0)

    async def job(pool):
        async with pool.acquire():
            pass

    run(asyncio.new_event_loop, job, pool)
    gone = weakref.ref(connector.connections.pop())
    gc.collect()
    assert gone() is None


def test_an_attempt_under_way_is_ended_so_that_it_frees_what_it_holds():
    ended = []

    class Slow(FakeConnector):
        async def connect(self, timeout, /):
            try:
                return await super().connect(timeout)
            finally:
                ended.append("attempt")

    pool = ConnectionPool(connector=Slow(default=hang()), min_connections=0)

    async def job(pool):
        pool.tasks = [asyncio.ensure_future(pool.acquire())]
        for _ in range(5):
            await asyncio.sleep(0)
        assert pool.status().connecting == 1

    run(asyncio.new_event_loop, job, pool)
    assert ended == ["attempt"]


def test_what_abandon_raises_keeps_no_other_connection_open(caplog):
    class Broken(Abandoning):
        def abandon(self):
            super().abandon()
            raise OSError("no such socket")

    connector = Making(Broken)
    pool = ConnectionPool(connector=connector, min_connections=0)

    async def job(pool):
        async with pool.acquire(), pool.acquire():
            pass

    run(asyncio.new_event_loop, job, pool)
    assert not connector.open
    assert "abandon() of a connection failed" in caplog.text


def test_a_pool_that_was_closed_is_left_alone(caplog):
    connector = Making(Abandoning)
    pool = ConnectionPool(connector=connector, min_connections=0)
    run(asyncio.new_event_loop, used_and_closed, pool)
    assert connector.connections[0].abandoned == 0
    assert "was not closed" not in caplog.text


def test_a_lease_of_a_closed_loop_is_given_back_in_silence():
    connector = FakeConnector()
    pool = ConnectionPool(connector=connector, min_connections=0)
    held = []

    async def job(pool):
        held.append(await pool.acquire())

    run(asyncio.new_event_loop, job, pool)

    async def later():
        await pool.release(held.pop())
        async with pool:
            assert pool.status().streams_in_use == 0

    anyio.run(later)


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"], indirect=True)
async def test_a_loop_that_runs_on_keeps_its_pool():
    connector = Making(Abandoning)
    async with ConnectionPool(connector=connector, min_connections=0) as pool:
        async with pool.acquire():
            pass
        gc.collect()
        assert connector.connections[0].abandoned == 0
        with pytest.raises(PoolMisuse):
            await anyio.to_thread.run_sync(lambda: anyio.run(pool.initialize))
