"""Test the life of one connection: its attempt, its probes, and its close."""

from __future__ import annotations

import asyncio
import contextlib
import errno

import anyio
import anyio.lowlevel
import grpc
import pytest

from fastapi_topaz import ConnectFailed, PoolError
from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz.testing import FakeConnection, FakeConnector, fail, slow
from kit.backends import asyncio_only
from kit.pools import Making, MakingAny, make_pool


pytestmark = pytest.mark.usefixtures("host_survives")

LATE_STATUS = grpc.aio.AioRpcError(
    grpc.StatusCode.DEADLINE_EXCEEDED, grpc.aio.Metadata(), grpc.aio.Metadata()
)


class Recorded:
    """A connection that fails its calls and records when it was probed and closed."""

    made = None

    def __init__(self):
        self.probed, self.closed, self.arguments = [], [], []
        type(self).made = self

    async def call(self, method, request, **options):
        raise ZeroDivisionError

    def judge(self, error, /):
        return Verdict.UNAVAILABLE

    async def probe(self, timeout, /):
        self.arguments.append(("probe", timeout))
        self.probed.append(anyio.current_time())
        await self.answer()

    async def answer(self):
        pass

    async def close(self, grace, /):
        self.arguments.append(("close", grace))
        self.closed.append(anyio.current_time())


async def accuse(conn):
    """Let a call fail on *conn*, so that the connection has to answer a probe."""
    with pytest.raises(ZeroDivisionError):
        await conn.call("/a.B/C", b"")


# -- arguments of connectors and connections ------------------------------------------


async def test_a_connector_and_its_connections_receive_their_timeouts():
    connector = MakingAny(Recorded)
    options = {"connection_timeout": 7, "health_check_timeout": 3}
    async with make_pool(connector, **options) as pool, pool.acquire() as conn:
        await accuse(conn)
        await anyio.sleep(0.1)
    assert connector.timeouts == [7]
    assert Recorded.made.arguments == [("probe", 3), ("close", 0.0)]


async def test_the_connect_duration_is_recorded_in_the_histogram():
    observed = []

    class Observer:
        def connected(self, took):
            observed.append(took)

        def acquired(self, waited):
            pass

        released = acquired

    async with make_pool(FakeConnector(default=slow(3))) as pool:
        await anyio.sleep(50)
        pool._open_pool.observer = Observer()
        async with pool.acquire():
            pass
    assert observed == [pytest.approx(3)]


# -- failed attempts ------------------------------------------------------------------


async def test_a_connector_that_returns_none_is_not_retried():
    connector = MakingAny(lambda: None)
    async with make_pool(connector) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire()
        assert caught.value.permanent
        assert len(connector.timeouts) == 1


async def test_a_connect_in_a_forked_process_is_permanent_and_not_retried():
    connector = FakeConnector(default=fail(PoolError("this process was forked")))
    async with make_pool(connector) as pool:
        with pytest.raises(ConnectFailed, match="forked") as caught:
            await pool.acquire()
        assert caught.value.permanent
        assert connector.attempts == 1


async def test_an_attempt_that_has_ended_is_not_kept():
    async with make_pool(FakeConnector([fail()])) as pool:
        async with pool.acquire(timeout=60):
            pass
        await anyio.sleep(0.1)
        assert pool._open_pool.attempts == set()


class AlikeError(Exception):
    """Has the attributes of `ConnectFailed` with other meanings."""

    reason = "CERTIFICATE_VERIFY_FAILED"
    permanent = True


class Uninitialised(ConnectFailed):
    def __init__(self):
        OSError.__init__(self, "half made")


class WithoutPermanent(Uninitialised):
    reason = "tls"


class WithoutReason(Uninitialised):
    permanent = True


class Unreadable(Uninitialised):
    @property
    def reason(self):
        raise LookupError


@pytest.mark.parametrize(
    "kind",
    [OSError, AlikeError, Uninitialised, WithoutPermanent, WithoutReason, Unreadable],
)
async def test_an_incomplete_connect_failed_counts_as_reason_other(kind):
    connector = FakeConnector(default=fail(kind()))
    async with make_pool(connector, max_retries=1) as pool:
        with pytest.raises(ConnectFailed, match="cannot connect to fake") as caught:
            await pool.acquire()
        assert (caught.value.reason, caught.value.permanent) == ("other", False)
        assert connector.attempts == 2
        assert pool._counters.connect_failures == {"other": 2}


# -- probes ---------------------------------------------------------------------------


async def test_a_silent_connection_gets_two_probes_and_both_count(caplog):
    class Silent(Recorded):
        async def answer(self):
            await anyio.sleep_forever()

    options = {"health_check_interval": 10, "health_check_timeout": 2}
    async with make_pool(MakingAny(Silent), **options) as pool:
        async with pool.acquire():
            pass
        await anyio.sleep(30)
        first = Silent.made.probed[0]
        assert Silent.made.probed == [pytest.approx(first), pytest.approx(first + 2)]
        assert Silent.made.closed == [pytest.approx(first + 4)]
        assert pool._counters.probe_failures == 2
        assert pool._counters.closes == {"unhealthy": 1}
    assert [r for r in caplog.records if "its last error" in r.getMessage()]


async def test_a_probe_whose_stream_is_reset_closes_nothing_and_is_no_answer():
    class Resetting(Recorded):
        async def answer(self):
            raise OSError

        def judge(self, error, /):
            return Verdict.ANSWERED

    async with make_pool(MakingAny(Resetting), health_check_interval=10) as pool:
        async with pool.acquire():
            pass
        await anyio.sleep(25)
        assert len(Resetting.made.probed) == 2
        assert Resetting.made.closed == []
        assert pool.connections()[0].condition == "idle"
        assert pool._counters.probe_failures == 0
        assert pool._open_pool.answered_probes == 0


@pytest.mark.parametrize(
    "error, told",
    [
        (TimeoutError(), "no answer within health_check_timeout=2 s"),
        (LATE_STATUS, "no answer within health_check_timeout=2 s"),
        (OSError("the pipe broke"), "the pipe broke"),
    ],
    ids=["timeout", "status", "other"],
)
async def test_a_failed_probe_is_kept_with_its_reason(error, told):
    class Failing(Recorded):
        async def answer(self):
            raise error

    options = {"health_check_interval": 10, "health_check_timeout": 2}
    async with make_pool(MakingAny(Failing), **options) as pool, pool.acquire():
        await anyio.sleep(15)
        assert pool.connections()[0].last_error == told
        failed = [e for e in pool._events.recent() if e.kind == "probe failed"]
        assert [each.detail for each in failed] == [told, told]


async def test_a_connection_is_not_probed_twice_at_once():
    under_way = anyio.Event()

    class Slow(Recorded):
        async def answer(self):
            under_way.set()
            await anyio.sleep(3)

    options = {"health_check_interval": 10, "health_check_timeout": 5}
    async with make_pool(MakingAny(Slow), **options) as pool, pool.acquire() as conn:
        await under_way.wait()
        await accuse(conn)
        assert pool.status().suspect == 1
        await anyio.sleep(4)
        assert len(Slow.made.probed) == 1
        assert pool.status().suspect == 0


async def test_a_leaving_connection_is_not_probed():
    async with make_pool(MakingAny(Recorded)) as pool:
        first, second = [await pool.acquire() for _ in range(2)]
        await accuse(first)
        pool.resize(0, 1)
        await anyio.sleep(1)
        assert pool.connections()[0].condition == "leaving"
        assert first.connection.probed == []
        for conn in (first, second):
            await pool.release(conn)


async def test_a_health_check_round_closes_lost_connections_without_a_probe():
    connector = FakeConnector()
    async with make_pool(connector, health_check_interval=0.5) as pool:
        async with pool.acquire():
            pass
        await anyio.sleep(0.3)
        (connection,) = connector.connections
        probes = connection.probes
        connection.hung_up = True
        await anyio.sleep(0.5)  # before the loss watcher looks again
        assert (connection.probes, connection.closed) == (probes, 1)
        assert pool._counters.closes == {"lost": 1}


class Late(Recorded):
    """A connection whose probes end far too late, as on a blocked loop."""

    times = 1

    async def answer(self):
        if len(self.probed) <= self.times:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(4)
            raise OSError


async def test_a_suspect_is_probed_again_if_its_probe_ended_too_late():
    pool = make_pool(MakingAny(Late), health_check_timeout=2)
    async with pool, pool.acquire() as conn:
        await accuse(conn)
        await anyio.sleep(5)
        assert len(Late.made.probed) == 2
        assert pool.connections()[0].condition == "busy"
        assert pool._counters.probe_failures == 0


async def test_a_late_probe_is_excused_only_once():
    class Always(Late):
        times = 10

    pool = make_pool(MakingAny(Always), health_check_timeout=2)
    async with pool:
        async with pool.acquire() as conn:
            await accuse(conn)
            await anyio.sleep(10)
            assert len(Always.made.probed) == 2
            assert pool.connections()[0].condition == "leaving"
        await anyio.sleep(1)
        assert pool._counters.closes == {"unhealthy": 1}
        assert pool._counters.probe_failures == 1


@pytest.mark.parametrize(
    "error, told",
    [
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "Connection timed out"),
        (TimeoutError("no route in 3 s"), "no route in 3 s"),
        (TimeoutError(), "not established within connection_timeout=10 s"),
    ],
)
async def test_a_connector_timeout_keeps_its_own_message(error, told):
    connector = FakeConnector([fail(error)])
    async with make_pool(connector, max_retries=0) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire()
        assert told in str(caught.value)
        assert ("connection_timeout" in str(caught.value)) == (not str(error))
        assert caught.value.reason == "timeout"


# -- cancellations by the connector itself ------------------------------------------


@asyncio_only
async def test_a_connectors_own_cancellation_after_the_deadline_is_a_timeout():
    """A cancellation without the scope's as context. anyio would recognize that one."""

    class Late(FakeConnector):
        async def connect(self, timeout):
            with contextlib.suppress(asyncio.CancelledError):
                await anyio.sleep_forever()
            raise asyncio.CancelledError

    async with make_pool(Late(), connection_timeout=2, max_retries=0) as pool:
        with pytest.raises(ConnectFailed, match="not established within") as caught:
            await pool.acquire()
        assert caught.value.reason == "timeout"
        assert repr(pool).startswith("<ConnectionPool open")


@pytest.mark.parametrize("anyio_backend", ["trio"], indirect=True)
async def test_an_asyncio_cancelled_error_is_a_failure_on_trio():
    class Bridged(FakeConnector):
        async def connect(self, timeout):
            raise asyncio.CancelledError

    async with make_pool(Bridged(), max_retries=0) as pool:
        with pytest.raises(ConnectFailed, match="was cancelled by code for asyncio"):
            await pool.acquire()
        assert repr(pool).startswith("<ConnectionPool open")


# -- connections whose is_lost or peer fails ----------------------------------------


async def test_a_connection_with_a_failing_is_lost_still_serves():
    class Untold(FakeConnection):
        @property
        def is_lost(self):
            raise RuntimeError("ask somebody else")

    async with make_pool(Making(Untold)) as pool:
        async with pool.acquire() as conn:
            assert await conn.call("/a/b", b"works") == b"works"
        assert pool.status().idle == 1


class Failing(FakeConnection):
    """A connection whose is_lost() raises *error* from the first lease on."""

    error = None
    calls = 0

    def is_lost(self):
        if self.error is None:
            return False
        type(self).calls += 1
        raise self.error


async def test_a_failing_is_lost_is_not_called_again(monkeypatch):
    async with make_pool(Making(Failing), max_connections=1) as pool:
        async with pool.acquire():
            monkeypatch.setattr(Failing, "error", RuntimeError("broken"))
            monkeypatch.setattr(Failing, "calls", 0)
        for _ in range(3):
            async with pool.acquire():
                pass
        assert Failing.calls == 1


async def test_an_is_lost_that_interrupts_the_caller_costs_no_capacity(monkeypatch):
    class Interrupt(BaseException):
        pass

    async with make_pool(Making(Failing), max_connections=1) as pool:
        async with pool.acquire():
            monkeypatch.setattr(Failing, "error", Interrupt())
        with pytest.raises(Interrupt):
            await pool.acquire()
        monkeypatch.setattr(Failing, "error", None)
        async with pool.acquire(timeout=0):
            pass
        assert pool._open_pool.limiter.borrowed_tokens == 0


async def test_a_connection_without_a_peer_is_shown_without_it():
    class Nowhere(FakeConnection):
        @property
        def peer(self):
            raise RuntimeError("nobody knows")

    async with make_pool(Making(Nowhere)) as pool:
        async with pool.acquire():
            (told,) = pool.connections()
        assert (told.peer, told.condition) == (None, "busy")
