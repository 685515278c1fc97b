"""Suspicion, probes and eviction of connections, at exact times in virtual time."""

from __future__ import annotations

import anyio
import pytest

from fastapi_topaz import PoolTimeout
from fastapi_topaz.exceptions import ConnectionLost
from fastapi_topaz.testing import FakeConnector, hang, ok, slow
from kit.autojump import jump
from kit.logs import lines
from kit.pools import fill, make_pool


async def ask(conn):
    return await conn.call("/a/b", b"?")


# -- one failure and two ------------------------------------------------------------


async def test_one_failed_probe_makes_suspect_and_an_answer_clears_it(caplog):
    connector = FakeConnector()
    async with make_pool(connector, health_check_interval=10) as pool:
        await fill(pool, 3)
        flapping = connector.connections[1]
        probe, healthy = flapping.probe, []

        async def once(timeout):
            flapping.probe = probe
            flapping.probes += 1
            raise ConnectionLost("just this once")

        flapping.probe = once
        for _ in range(11):
            await anyio.sleep(1)
            healthy.append(pool.status().healthy)
        assert flapping.probes == 2, "the second one at once"
        assert [conn.closed for conn in connector.connections] == [0, 0, 0]
        assert pool.status().healthy_connections == 3
        assert all(healthy)
        assert not lines(caplog)


async def test_a_second_failed_probe_closes_the_connection(caplog):
    connector = FakeConnector()
    async with make_pool(connector, health_check_interval=10) as pool:
        await fill(pool, 3)
        connector.connections[1].alive = False
        await anyio.sleep(10.01)
        assert [conn.closed for conn in connector.connections] == [0, 1, 0]
        assert connector.connections[1].probes == 2
        assert pool._counters.closes == {"unhealthy": 1}
        (line,) = lines(caplog)
        assert "fake:2" in line
        assert "is dead" in line


async def test_a_pool_with_one_connection_that_is_suspect_stays_healthy():
    connector = FakeConnector()
    options = {"max_connections": 1, "health_check_timeout": 3}
    async with make_pool(connector, health_check_interval=10, **options) as pool:
        await fill(pool, 1)
        connector.connections[0].frozen = True
        await anyio.sleep(13.5)
        status = pool.status()
        assert (status.total, status.suspect, status.healthy_connections) == (1, 1, 0)
        assert status.healthy, "the result is not known yet"
        connector.default = hang()
        await anyio.sleep(3)
        assert pool.status().total == 0


async def test_connections_that_answered_since_the_last_check_are_not_probed():
    connector = FakeConnector()
    async with make_pool(connector, health_check_interval=10) as pool:
        await fill(pool, 2)
        async with pool.acquire():
            for _ in range(10):
                await anyio.sleep(5)
                async with pool.acquire() as conn:
                    await ask(conn)
        first, second = (conn.probes for conn in connector.connections)
        assert (first, second) == (4, 0)


async def test_an_error_status_from_the_server_counts_as_an_answer(embedded_answers):
    connector, pool = embedded_answers
    async with pool:
        for _ in range(4):
            async with pool.acquire() as conn:
                with pytest.raises(PermissionError):
                    await ask(conn)
            await anyio.sleep(9)
        assert connector.connections[0].probes == 0


@pytest.fixture
def embedded_answers():
    """A connector of connections that answer every call with an application error."""
    from fastapi_topaz import Verdict

    def refuse(_method, _request):
        raise PermissionError("not allowed")

    class Connector(FakeConnector):
        async def connect(self, timeout):
            conn = await super().connect(timeout)
            conn.judge = lambda _error: Verdict.ANSWERED
            return conn

    connector = Connector(answer=refuse)
    return connector, make_pool(connector, health_check_interval=10)


async def test_a_health_check_limits_concurrent_probes_and_rounds_do_not_overlap():
    connector = FakeConnector()
    running = most = 0

    async def slow_probe(timeout):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(4)
        running -= 1

    async with make_pool(connector, health_check_interval=1) as pool:
        await fill(pool, 10)
        for conn in connector.connections:
            conn.probe = slow_probe
        await anyio.sleep(60)
        assert most == 4
        assert pool.status().healthy_connections == 10


async def test_a_probe_does_not_delay_a_caller_that_could_be_served():
    connector = FakeConnector()
    options = {"health_check_interval": 10, "health_check_timeout": 5}
    async with make_pool(connector, max_connections=1, **options) as pool:
        await fill(pool, 1)

        async def slow_probe(timeout):
            await anyio.sleep(4)

        connector.connections[0].probe = slow_probe
        await anyio.sleep(11)
        async with pool.acquire(timeout=0) as conn:
            await ask(conn)


# -- results of calls ---------------------------------------------------------------


async def test_after_a_broken_call_other_connections_are_probed_before_a_lease():
    connector = FakeConnector()
    async with make_pool(connector, max_connections=4) as pool:
        leases = [await pool.acquire() for _ in range(4)]
        await anyio.sleep(1)
        for conn in connector.connections[:3]:
            conn.alive = False
        with pytest.raises(ConnectionLost):
            await ask(leases[0])
        for conn in leases:
            await pool.release(conn)
        # All connections but the fourth are dead, and no caller has to discover that.
        for _ in range(8):
            async with pool.acquire() as conn:
                assert conn.connection.number >= 4
                await ask(conn)
        assert [conn.closed for conn in connector.connections[:4]] == [1, 1, 1, 0]
        assert connector.connections[3].probes == 1


async def test_many_broken_calls_on_one_connection_cause_one_round_of_probes():
    connector = FakeConnector()
    async with make_pool(
        connector, streams_per_connection=20, max_connections=2
    ) as pool:
        leases = [await pool.acquire() for _ in range(40)]
        await anyio.sleep(1)
        dead = leases[0].connection
        dead.alive = False
        for conn in leases:
            if conn.connection is dead:
                with pytest.raises(ConnectionLost):
                    await ask(conn)
                await anyio.sleep(0.1)
        assert dead.probes == 1
        (sibling,) = {conn.connection for conn in leases} - {dead}
        assert sibling.probes == 1
        for conn in leases:
            await pool.release(conn)


async def test_two_timeouts_in_a_row_make_a_connection_suspect():
    connector = FakeConnector()
    async with make_pool(connector, max_connections=1, health_check_timeout=1) as pool:

        async def time_out(conn):
            raise TimeoutError

        async with pool.acquire() as conn:
            conn.connection._answer = lambda: time_out(conn)
            for suspects in (0, 1):
                await anyio.sleep(1)
                with pytest.raises(TimeoutError):
                    await ask(conn)
                assert pool.status().suspect == suspects
        await anyio.sleep(0.1)
        assert connector.connections[0].closed == 1


async def test_an_answer_between_two_timeouts_resets_their_count():
    connector = FakeConnector()
    async with make_pool(connector, max_connections=1) as pool, pool.acquire() as conn:
        answer = conn.connection._answer

        async def time_out():
            raise TimeoutError

        for _ in range(5):
            await anyio.sleep(1)
            conn.connection._answer = time_out
            with pytest.raises(TimeoutError):
                await ask(conn)
            conn.connection._answer = answer
            await anyio.sleep(1)
            await ask(conn)
        assert pool.status().suspect == 0
        assert conn.connection.probes == 0


async def test_if_all_are_suspect_the_first_to_answer_serves_the_waiting_caller():
    connector = FakeConnector([ok(), ok(), ok()], default=hang())
    async with make_pool(connector, max_connections=3, health_check_timeout=30) as pool:
        leases = [await pool.acquire() for _ in range(3)]
        await anyio.sleep(1)
        for delay, conn in zip((9, 3, 6), connector.connections, strict=True):

            async def probe(timeout, delay=delay):
                await anyio.sleep(delay)

            conn.probe = probe
        broken = leases[0]
        broken.connection.alive = False
        with pytest.raises(ConnectionLost):
            await ask(broken)
        broken.connection.alive = True
        for conn in leases:
            await pool.release(conn)
        began = anyio.current_time()
        async with pool.acquire() as conn:
            assert conn.connection.number == 2
        assert anyio.current_time() - began == pytest.approx(3)


# -- state of the connection itself ---------------------------------------------------


async def test_a_connection_closed_by_the_server_is_not_leased():
    connector = FakeConnector()
    async with make_pool(connector) as pool:
        await fill(pool, 3)
        for conn in connector.connections[:2]:
            conn.hung_up = True
        async with pool.acquire() as conn:
            assert conn.connection.number == 3
        await anyio.sleep(0.01)
        assert pool._counters.closes == {"lost": 2}


async def test_an_unused_pool_detects_a_dead_server_within_a_second():
    connector = FakeConnector()
    async with make_pool(connector, min_connections=2, eager_init=True) as pool:
        await anyio.sleep(50)
        for conn in connector.connections:
            conn.hung_up = True
        await anyio.sleep(1.01)
        assert [conn.closed for conn in connector.connections] == [1, 1, 0, 0]
        assert pool.status().total == 2


async def test_a_lease_on_a_connection_closed_by_the_server_can_finish():
    connector = FakeConnector()
    async with make_pool(connector) as pool:
        async with pool.acquire() as conn:
            conn.connection.hung_up = True
            await anyio.sleep(5)
            assert pool.status().leaving == 1
            assert pool.status().healthy
            assert conn.connection.closed == 0
        await anyio.sleep(0.01)
        assert connector.connections[0].closed == 1


@pytest.mark.costly
async def test_a_server_that_accepts_and_closes_is_retried_only_after_a_pause():
    class Revolving(FakeConnector):
        async def connect(self, timeout):
            conn = await super().connect(timeout)
            conn.alive = False
            return conn

    connector = Revolving(default=slow(0.005))
    async with make_pool(connector, streams_per_connection=5) as pool:

        async def caller():
            while True:
                async with pool.acquire() as conn:
                    with pytest.raises(ConnectionLost):
                        await ask(conn)

        with anyio.move_on_after(60):
            async with anyio.create_task_group() as tasks:
                for _ in range(50):
                    tasks.start_soon(caller)
    # One or two attempts for each pause, which is full jitter below 0.5 s.
    assert connector.attempts < 60 * 10


# -- clocks ---------------------------------------------------------------------------


async def test_after_a_clock_jump_idle_connections_are_probed_before_a_lease():
    """As after a machine wakes up: no probe was made at its scheduled time."""
    connector = FakeConnector()
    options = {"max_connections": 3, "max_idle_time": 0, "max_lifetime": 0}
    async with make_pool(connector, **options) as pool:
        leases = [await pool.acquire() for _ in range(3)]
        for conn in leases[:2]:
            await pool.release(conn)
        connector.connections[1].alive = False
        jump(8 * 3600)
        async with pool.acquire() as conn:
            assert conn.connection.number != 2
            await ask(conn)
        assert connector.connections[0].probes == 1
        assert connector.connections[2].closed == 0, "a lease is not touched"
        await pool.release(leases[2])


async def test_without_health_checks_no_connection_becomes_stale():
    connector = FakeConnector()
    options = {"health_check_interval": 0, "max_idle_time": 0, "max_lifetime": 0}
    async with make_pool(connector, **options) as pool:
        await fill(pool, 1)
        await anyio.sleep(3600)
        async with pool.acquire(timeout=0) as conn:
            assert conn.connection.number == 1


async def test_a_blocked_event_loop_closes_no_healthy_connection():
    """Each probe is answered while the loop is blocked, after its deadline."""
    connector = FakeConnector()
    options = {"health_check_interval": 10, "health_check_timeout": 2}
    async with make_pool(connector, **options) as pool:
        await fill(pool, 2)

        async def answered_meanwhile(timeout):
            await anyio.sleep(1)

        for conn in connector.connections:
            conn.probe = answered_meanwhile
        for _ in range(3):
            await anyio.sleep(10.5)
            jump(5)
            await anyio.sleep(1)
            assert pool.status().healthy
        await anyio.sleep(5)
        assert pool.status().healthy_connections == 2
        assert [conn.closed for conn in connector.connections] == [0, 0]


async def test_a_late_probe_is_excused_only_once():
    connector = FakeConnector()
    options = {"health_check_interval": 10, "health_check_timeout": 2}
    async with make_pool(connector, max_connections=1, **options) as pool:
        await fill(pool, 1)

        async def late(timeout):
            with anyio.CancelScope(shield=True):
                await anyio.sleep(10)
            raise ConnectionLost("at last")

        connector.connections[0].probe = late
        await anyio.sleep(41)
        assert connector.connections[0].closed == 1


# -- what connections() reports -------------------------------------------------------


async def test_each_connection_reports_peer_age_streams_and_last_error():
    connector = FakeConnector()
    pool = make_pool(connector, streams_per_connection=2, name="main")
    assert pool.connections() == ()
    async with pool:
        leases = [await pool.acquire() for _ in range(3)]
        await anyio.sleep(10)
        await pool.release(leases.pop())
        await anyio.sleep(5)
        connector.connections[0].frozen = True
        leases[0].connection.alive = False
        first, second = pool.connections()
        assert (first.peer, second.peer) == ("fake:1", "fake:2")
        assert (first.streams, second.streams) == (2, 0)
        assert (first.condition, second.condition) == ("busy", "idle")
        assert first.age == pytest.approx(15)
        assert (first.idle_for, second.idle_for) == (0, pytest.approx(5))
        assert first.last_error is None
        connector.connections[0].frozen = False
        with pytest.raises(ConnectionLost):
            await ask(leases[0])
        first, second = pool.connections()
        assert first.condition == second.condition == "suspect"
        assert first.last_error == "fake connection 1 is dead"
        await anyio.sleep(0.01)
        first, second = pool.connections()
        assert (first.condition, second.condition) == ("leaving", "idle")
        for conn in leases:
            await pool.release(conn)
    assert pool.connections() == ()


async def test_a_caller_waiting_for_suspect_connections_times_out_in_time():
    connector = FakeConnector([ok()], default=hang())
    async with make_pool(connector, max_connections=1, health_check_timeout=60) as pool:
        async with pool.acquire() as conn:
            conn.connection.alive = False
            with pytest.raises(ConnectionLost):
                await ask(conn)
            conn.connection.frozen = True
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=2)


async def test_with_timeout_0_a_lost_connection_is_skipped_for_the_next_one():
    connector = FakeConnector()
    async with make_pool(connector, min_connections=2, eager_init=True) as pool:
        async with pool.acquire() as conn:
            conn.connection.hung_up = True
        async with pool.acquire():
            pass  # the other one, so that it is the turn of the lost one
        async with pool.acquire(timeout=0) as conn:
            assert not conn.connection.hung_up
        await anyio.sleep(0.01)
        assert pool._counters.closes == {"lost": 1}


async def test_a_connection_with_optional_methods_that_raise_still_serves(caplog):
    class Careless(FakeConnector):
        async def connect(self, timeout):
            conn = await super().connect(timeout)
            conn.is_lost = conn.judge = conn.refresh_liveness = broken
            return conn

    def broken(*_):
        raise ValueError("careless")

    connector = Careless()
    async with make_pool(connector, health_check_interval=10) as pool:
        for _ in range(3):
            async with pool.acquire(timeout=1) as conn:
                await ask(conn)
            await anyio.sleep(5)
        connector.connections[0].alive = False
        async with pool.acquire() as conn:
            with pytest.raises(ConnectionLost):
                await ask(conn)
        await anyio.sleep(20)
        assert connector.connections[0].closed == 1
        assert pool._open_pool.limiter.borrowed_tokens == 0
    assert not any("host task failed" in line for line in lines(caplog))
