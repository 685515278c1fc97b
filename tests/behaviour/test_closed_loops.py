"""Event loops that are closed before their tasks ended leave no resource open."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref

import anyio
import psutil
import pytest

from fastapi_topaz import ConnectionPool, PoolMisuse
from fastapi_topaz.testing import FakeConnection, FakeConnector, hang
from kit.backends import event_loops
from kit.logs import lines
from kit.pools import Making
from kit.waiting import eventually, until


pytestmark = [
    # Warnings of both asyncio and the pool: these tests are about them.
    pytest.mark.filterwarnings("ignore:.*was not closed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*garbage-collected:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


async def used(pool):
    """Use the pool and release every lease."""
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
    """Leave connection attempts unfinished."""
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
    """Leave waiting callers."""
    pool.leases = [await pool.acquire() for _ in range(pool.options.max_connections)]
    pool.tasks = [asyncio.create_task(used(pool)) for _ in range(3)]
    await asyncio.sleep(0)
    assert pool.status().waiting == 3


def run(make_loop, job, pool):
    loop = make_loop()
    loop.run_until_complete(job(pool))
    loop.close()


JOBS = [used, leased, in_flight, connecting, greeting, waiting]


@pytest.mark.parametrize("make_loop", list(event_loops()))
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
@pytest.mark.parametrize(
    "shared",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["own pools", "one pool"],
)
@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.native
def test_a_closed_loop_leaves_no_open_socket_or_file_descriptor(
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

    # The first rounds open descriptors that a process opens once and keeps.
    rounds(3)
    until(lambda: embedded_authorizer.connections_open == 0)
    before = process.num_fds()
    rounds(count)
    until(lambda: embedded_authorizer.connections_open == 0)
    until(lambda: process.num_fds() <= before)


@pytest.mark.grpcio
@pytest.mark.parametrize("make_loop", list(event_loops()))
@pytest.mark.parametrize(
    "job", [used, leased, connecting], ids=lambda job: job.__name__
)
def test_a_closed_loop_leaves_no_grpc_channel_without_calls_open(
    embedded_authorizer, make_loop, job
):
    for _ in range(4):
        pool = ConnectionPool(min_connections=2, max_connections=4)
        pool.configure(embedded_authorizer.options)
        run(make_loop, job, pool)
    gc.collect()
    until(lambda: embedded_authorizer.connections_open == 0)


@pytest.mark.native
@pytest.mark.parametrize("make_loop", list(event_loops()))
def test_a_pool_works_on_a_new_loop_after_a_loop_closed_during_a_call(
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
    """Closes at once in `abandon()`."""

    abandoned = 0

    def abandon(self):
        self.abandoned += 1
        self.closed += 1


def test_a_closed_loop_abandons_connections_once_and_logs_the_missing_close():
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
    # The pool can be opened again, on another loop.
    asyncio.run(used_and_closed(pool))


async def used_and_closed(pool):
    async with pool, pool.acquire():
        pass


def test_a_loop_closed_before_the_first_answer_abandons_the_connection(caplog):
    class Silent(Abandoning):
        async def probe(self, timeout, /):
            self.probes += 1
            await asyncio.sleep(100)

        def abandon(self):
            super().abandon()
            raise OSError

    connector = Making(Silent)
    connector.probes = True
    pool = ConnectionPool(connector=connector, min_connections=0)

    async def job(pool):
        pool.tasks = [asyncio.ensure_future(pool.acquire())]
        for _ in range(20):
            await asyncio.sleep(0)
        assert connector.connections[0].probes == 1

    run(asyncio.new_event_loop, job, pool)
    assert [conn.abandoned for conn in connector.connections] == [1]
    assert lines(caplog, part="abandon") == [
        "the pool: abandon() of a connection failed"
    ]


def test_a_connection_without_abandon_is_garbage_after_its_loop_closed():
    connector = FakeConnector()
    pool = ConnectionPool(connector=connector, min_connections=0)

    async def job(pool):
        async with pool.acquire():
            pass

    run(asyncio.new_event_loop, job, pool)
    gone = weakref.ref(connector.connections.pop())
    gc.collect()
    assert gone() is None


def test_a_closed_loop_ends_a_pending_connect_and_frees_its_resources():
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


def test_an_error_in_abandon_does_not_keep_other_connections_open(caplog):
    class Broken(Abandoning):
        def abandon(self):
            super().abandon()
            raise OSError("no such socket")

    connector = Making(Broken)
    pool = ConnectionPool(connector=connector, min_connections=0, name="main")

    async def job(pool):
        async with pool.acquire(), pool.acquire():
            pass

    run(asyncio.new_event_loop, job, pool)
    assert not connector.open
    (told,) = lines(caplog, part="abandon() of a connection failed")
    assert told.startswith("pool 'main': ")
    assert "OSError: no such socket" in caplog.text, "with its traceback"


def test_a_closed_loop_does_not_abandon_a_pool_that_was_closed(caplog):
    connector = Making(Abandoning)
    pool = ConnectionPool(connector=connector, min_connections=0)
    run(asyncio.new_event_loop, used_and_closed, pool)
    assert connector.connections[0].abandoned == 0
    assert "was not closed" not in caplog.text


def test_releasing_a_lease_of_a_closed_loop_is_silent():
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


def returned(pool, conn):
    """Release *conn* without an event loop. It never waits, so that is possible."""
    with pytest.raises(StopIteration):
        pool.release(conn).send(None)


def test_a_lease_of_an_earlier_run_is_released_silently():
    async def later():
        async with pool:
            await pool.release(held)
            assert pool.status().streams_in_use == 0

    for backend in ("asyncio", "trio"):
        pool = ConnectionPool(connector=FakeConnector(), min_connections=0)
        held = anyio.run(pool.acquire, backend=backend)
        anyio.run(later, backend=backend)


def test_a_lease_can_be_released_between_two_steps_of_its_loop():
    pool = ConnectionPool(connector=FakeConnector(), min_connections=0)
    loop = asyncio.new_event_loop()

    async def lease():
        return await pool.acquire()

    conn = loop.run_until_complete(lease())
    assert pool.status().streams_in_use == 1
    returned(pool, conn)
    assert pool.status().streams_in_use == 0
    loop.run_until_complete(pool.close())
    loop.close()


def test_a_pool_reopens_although_it_did_not_notice_that_its_loop_was_closed():
    pool = ConnectionPool(connector=FakeConnector(), min_connections=0)
    held = []

    async def job(pool):
        held.append(await pool.acquire())
        pool._open_pool.owner.stop_watching()

    run(asyncio.new_event_loop, job, pool)
    assert pool._open_pool is not None
    assert (pool.status().total, pool.connections()) == (0, ())
    returned(pool, held.pop())

    async def later():
        async with pool.acquire():
            return pool.status().streams_in_use

    assert anyio.run(later) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"], indirect=True)
async def test_a_running_loop_keeps_its_pool_open():
    connector = Making(Abandoning)
    async with ConnectionPool(connector=connector, min_connections=0) as pool:
        async with pool.acquire():
            pass
        gc.collect()
        assert connector.connections[0].abandoned == 0
        with pytest.raises(PoolMisuse):
            await anyio.to_thread.run_sync(lambda: anyio.run(pool.initialize))
