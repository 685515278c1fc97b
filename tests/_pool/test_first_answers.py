"""Test the first answer of a new connection, which its connector asks for."""

from __future__ import annotations

import logging

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import ConnectFailed, PoolClosed
from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz._pool.readiness import is_ready
from fastapi_topaz.testing import FakeConnection, slow
from kit.logs import lines
from kit.pools import Making, make_pool, queued


pytestmark = pytest.mark.usefixtures("host_survives")


class Probed(FakeConnection):
    """A connection that records its probes and answers as the test says."""

    greeted = grace = None

    async def probe(self, timeout, /):
        self.greeted = timeout
        await super().probe(timeout)

    async def close(self, grace, /):
        self.grace = grace
        await super().close(grace)


class Unjudged(Probed):
    judge = None


class SilentAtOnce(Probed):
    """As on gRPC: its error for a missing answer is no TimeoutError."""

    async def probe(self, timeout, /):
        await anyio.lowlevel.checkpoint()
        raise OSError

    def judge(self, error, /):
        return Verdict.SILENT


class LongToClose(Probed):
    async def close(self, grace, /):
        await anyio.sleep(1)
        await super().close(grace)


class Unclosable(Probed):
    async def close(self, grace, /):
        await super().close(grace)
        raise OSError("no such socket")


class Leaving(Probed):
    """The server ends the connection together with its answer."""

    async def probe(self, timeout, /):
        await super().probe(timeout)
        self.hung_up = True


class Greeting(Probed):
    async def greet(self, timeout, /):
        self.greeted = ("greet", timeout)


class Wrong(Probed):
    async def greet(self, timeout, /):
        raise ConnectFailed("a wrong server", reason="tls", permanent=True)


class Probing(Making):
    """Sets these attributes of each connection before it is probed."""

    probes = True

    def __init__(self, kind=Probed, *, default=None, **attributes):
        super().__init__(kind, default=default)
        self.attributes = attributes

    async def connect(self, timeout, /):
        made = await super().connect(timeout)
        for name, value in self.attributes.items():
            setattr(made, name, value)
        return made


async def failure(connector, **options):
    """Return the error of an acquire from a pool that tries once."""
    options = {"max_connections": 1, "max_retries": 0, **options}
    async with make_pool(connector, **options) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire()
        (made,) = connector.connections
        assert (made.closed, made.grace) == (1, 0.0)
        assert (pool.status().total, pool._counters.connects) == (0, 0)
    return caught.value


async def test_a_connection_is_leased_only_after_its_first_answer():
    class Slow(Probed):
        async def probe(self, timeout, /):
            await anyio.sleep(3)
            await super().probe(timeout)

    connector = Probing(Slow)
    async with make_pool(connector, health_check_interval=0) as pool:
        began = anyio.current_time()
        async with pool.acquire():
            assert anyio.current_time() - began == pytest.approx(3)
        # The answer counts: so the pool is ready without another probe.
        assert pool._open_pool.answered_probes == 1
        assert await is_ready(pool, 1)
        assert connector.connections[0].probes == 1
        async with pool.acquire(), pool.acquire():
            assert pool._open_pool.answered_probes == 2


async def test_without_probes_of_its_connector_a_connection_is_leased_at_once():
    connector = Probing(frozen=True)
    connector.probes = False
    async with make_pool(connector) as pool, pool.acquire() as conn:
        assert conn.connection.probes == 0
        assert pool._open_pool.answered_probes == 0


async def test_a_connection_with_greet_is_greeted_and_not_probed():
    pool = make_pool(Probing(Greeting), connection_timeout=7)
    async with pool, pool.acquire() as conn:
        assert conn.connection.greeted == ("greet", 7)
        assert conn.connection.probes == 0


@pytest.mark.parametrize("kind", [Probed, Unjudged])
@pytest.mark.parametrize("took", [4, 9.5])
async def test_connect_and_first_answer_share_the_connection_timeout(kind, took):
    connector = Probing(kind, frozen=True, default=slow(took))
    began = anyio.current_time()
    error = await failure(connector, connection_timeout=10, acquire_timeout=60)
    assert anyio.current_time() - began == pytest.approx(10)
    assert connector.connections[0].greeted == pytest.approx(10 - took)
    assert error.reason == "timeout"
    text = (
        "cannot connect to fake: the server accepted the connection, but did not "
        "answer within connection_timeout=10 s"
    )
    assert text in str(error)


async def test_a_silent_verdict_on_a_first_probe_is_a_timeout():
    error = await failure(Probing(SilentAtOnce))
    assert error.reason == "timeout"
    assert "did not answer within connection_timeout=10 s" in str(error)


async def test_a_connection_that_ends_before_its_first_answer_says_so():
    error = await failure(Probing(alive=False))
    assert (error.reason, error.permanent) == ("unanswered", False)
    text = "but it ended before the first answer: fake connection 1 is dead"
    assert text in str(error)


async def test_the_error_of_a_greeting_is_the_error_of_the_attempt():
    error = await failure(Probing(Wrong))
    assert (error.reason, error.permanent) == ("tls", True)
    assert "a wrong server" in str(error)
    assert "first answer" not in str(error)


async def test_a_connection_without_an_answer_that_cannot_be_closed_is_logged(caplog):
    await failure(Probing(Unclosable, alive=False), name="main")
    (line,) = lines(caplog, part="closing a new connection")
    assert line == (
        "pool 'main': closing a new connection to fake failed: no such socket"
    )


async def test_a_refused_first_probe_keeps_the_connection_until_it_is_answered():
    connector = Probing(refuses="503")
    async with make_pool(connector, max_connections=1, acquire_timeout=1) as pool:
        with pytest.raises(ConnectFailed, match="not available: 503") as caught:
            await pool.acquire()
        assert caught.value.reason == "unavailable"
        (made,) = connector.connections
        assert not made.closed
        assert not pool.status().healthy
        assert pool._open_pool.answered_probes == 0
        assert pool.connections()[0].last_error == "503"
        made.refuses = ""
        async with pool.acquire(timeout=60) as conn:
            assert conn.connection is made
        assert connector.attempts == 1
        assert made.probes > 2
        assert pool._counters.probe_failures == made.probes - 1


async def test_a_server_that_leaves_with_its_answer_is_retried_after_a_pause(caplog):
    connector = Probing(Leaving)
    async with make_pool(connector, max_connections=1) as pool:
        with anyio.move_on_after(20):
            while True:
                async with pool.acquire(timeout=60):
                    pass
        assert connector.attempts < 100
        assert pool._open_pool.answered_probes == 0
    assert not lines(caplog, logging.INFO, part="connected to"), "no end of an outage"


async def test_a_pool_that_closes_before_the_first_answer_closes_the_connection():
    connector = Probing(LongToClose, frozen=True)
    async with make_pool(connector) as pool, anyio.create_task_group() as tasks:

        async def wait():
            with pytest.raises(PoolClosed):
                await pool.acquire()

        tasks.start_soon(wait)
        await queued(pool, 1)
        await anyio.sleep(1)
        began = anyio.current_time()
        await pool.close(grace=0)
        assert anyio.current_time() - began == pytest.approx(1)
    (made,) = connector.connections
    assert (made.closed, made.grace) == (1, 0.0)


async def test_a_closing_pool_has_no_attempt_under_way():
    connector = Probing()
    async with make_pool(connector, max_connections=2) as pool:
        held = await pool.acquire()
        connector.attributes["frozen"] = True
        async with anyio.create_task_group() as tasks:

            async def wait():
                with pytest.raises(PoolClosed):
                    await pool.acquire(timeout=50)

            tasks.start_soon(wait)
            await anyio.sleep(1)
            assert pool.status().connecting == 1
            tasks.start_soon(pool.close, 10)
            await anyio.sleep(1)
            assert pool.status().connecting == 0
            await pool.release(held)


async def test_a_connection_after_an_outage_is_logged_with_its_failed_rounds(caplog):
    connector = Probing(alive=False)
    pool = make_pool(connector, name="main")
    async with pool, anyio.create_task_group() as tasks:

        async def wait():
            async with pool.acquire(timeout=60):
                pass

        tasks.start_soon(wait)
        while not connector.connections:
            await anyio.lowlevel.checkpoint()
        connector.attributes.clear()
    (line,) = lines(caplog, logging.INFO, part="connected to")
    assert line.startswith("pool 'main': connected to fake (fake:2) in 0.000 s, the")
    assert "the outage is over (failed rounds of attempts: 1)" in line
