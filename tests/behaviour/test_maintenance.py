"""The maintenance loops of a pool in virtual time: exact counts and times."""

from __future__ import annotations

from functools import partial

import anyio
import pytest

from fastapi_topaz import ConnectFailed
from fastapi_topaz.testing import FakeConnector, fail, hang, ok, slow
from kit.logs import lines
from kit.pools import fill, make_pool


make_unprobed = partial(make_pool, health_check_interval=0)


# -- reaping ----------------------------------------------------------------------


async def test_idle_connections_are_reaped_at_the_next_check_down_to_the_minimum():
    pool = make_unprobed(
        min_connections=2, max_connections=5, max_idle_time=30, idle_check_interval=20
    )
    async with pool:
        await fill(pool, 5)
        await anyio.sleep(39.9)
        assert pool.status().total == 5, "idle for 30 s, but not checked yet"
        await anyio.sleep(0.2)
        assert pool.status().total == 2
        await anyio.sleep(1000)
        assert pool.status().total == 2


async def test_max_idle_time_0_keeps_idle_connections():
    pool = make_unprobed(max_idle_time=0, idle_check_interval=1, max_lifetime=0)
    async with pool:
        await fill(pool, 5)
        # The default is 5 minutes.
        await anyio.sleep(1_000)
        assert pool.status().total == 5


async def test_idle_check_interval_0_turns_reaping_off():
    pool = make_unprobed(max_idle_time=1, idle_check_interval=0, max_lifetime=0)
    async with pool:
        await fill(pool, 5)
        # The default is a minute.
        await anyio.sleep(1_000)
        assert pool.status().total == 5


async def test_a_connection_in_use_is_not_reaped():
    connector = FakeConnector()
    pool = make_unprobed(connector, max_idle_time=10, idle_check_interval=10)
    async with pool, pool.acquire() as conn:
        await anyio.sleep(1000)
        assert conn.connection.closed == 0


async def test_surplus_connections_of_a_burst_are_reaped_while_others_are_in_use():
    connector = FakeConnector()
    pool = make_unprobed(connector, max_idle_time=30, idle_check_interval=10)
    async with pool:
        await fill(pool, 8)
        for _ in range(100):
            async with pool.acquire():
                await anyio.sleep(1)
        assert pool.status().total == 1


# -- health -----------------------------------------------------------------------


async def test_connections_are_probed_at_each_interval():
    connector = FakeConnector()
    pool = make_unprobed(connector, health_check_interval=30)
    async with pool:
        await fill(pool, 2)
        await anyio.sleep(29)
        assert [conn.probes for conn in connector.connections] == [0, 0]
        await anyio.sleep(2)
        await anyio.sleep(90)
        assert all(conn.probes >= 3 for conn in connector.connections)


async def test_a_connection_that_answered_a_call_skips_the_next_probe():
    connector = FakeConnector()
    pool = make_unprobed(connector, health_check_interval=30)
    async with pool:
        await fill(pool, 2)
        await anyio.sleep(31)
        before = [conn.probes for conn in connector.connections]
        async with pool.acquire() as conn:
            used = conn.connection
            await conn.call("/a/b", b"")
        await anyio.sleep(29.5)
        after = [conn.probes for conn in connector.connections]
        grown = [new - old for old, new in zip(before, after, strict=True)]
        assert grown[used.number - 1] == 0
        assert sum(grown) == 1


async def test_a_dead_connection_is_closed_and_the_minimum_restored(caplog):
    connector = FakeConnector()
    pool = make_unprobed(
        connector, min_connections=2, eager_init=True, health_check_interval=10
    )
    async with pool:
        connector.connections[0].alive = False
        await anyio.sleep(11)
        assert connector.connections[0].closed == 1
        assert len(connector.open) == 2
        assert pool.status().total == 2
        assert any("health check" in line for line in lines(caplog))


async def test_a_connection_that_does_not_answer_in_time_is_closed():
    connector = FakeConnector()
    pool = make_unprobed(connector, health_check_interval=10, health_check_timeout=3)
    async with pool:
        await fill(pool, 1)
        connector.connections[0].frozen = True
        await anyio.sleep(15.9)
        assert connector.connections[0].closed == 0
        await anyio.sleep(0.2)
        assert connector.connections[0].closed == 1
        assert connector.connections[0].probes == 2


async def test_a_lost_call_makes_its_connection_suspect_and_probes_it_at_once():
    connector = FakeConnector()
    pool = make_unprobed(connector)
    async with pool:
        async with pool.acquire() as conn:
            conn.connection.alive = False
            with pytest.raises(ConnectionError):
                await conn.call("/a/b", b"")
            assert pool.status().healthy_connections == 0
        began = anyio.current_time()
        async with pool.acquire() as conn:
            assert conn.connection.number == 2
        assert anyio.current_time() == began
        await anyio.sleep(0.01)
        assert connector.connections[0].closed == 1


async def test_a_suspect_connection_that_answers_its_probe_serves_again():
    connector = FakeConnector()
    pool = make_unprobed(connector, max_connections=1)
    async with pool:
        async with pool.acquire() as conn:
            conn.connection.alive = False
            with pytest.raises(ConnectionError):
                await conn.call("/a/b", b"")
            conn.connection.alive = True
        async with pool.acquire() as conn:
            assert conn.connection.number == 1
        assert connector.connections[0].probes == 1


async def test_an_application_error_does_not_make_a_connection_suspect():
    def refuse(_method, _request):
        raise KeyError("no such policy")

    connector = FakeConnector(answer=refuse)
    async with make_unprobed(connector) as pool, pool.acquire() as conn:
        with pytest.raises(KeyError):
            await conn.call("/a/b", b"")
        assert pool.status().healthy_connections == 1


async def test_a_leased_connection_that_fails_its_check_closes_on_release():
    connector = FakeConnector()
    pool = make_unprobed(connector, health_check_interval=10)
    async with pool:
        async with pool.acquire() as conn:
            conn.connection.alive = False
            await anyio.sleep(20)
            assert conn.connection.closed == 0
        await anyio.sleep(0.01)
        assert connector.connections[0].closed == 1


# -- lifetime ---------------------------------------------------------------------


async def test_an_expired_connection_is_replaced_before_it_is_closed():
    connector = FakeConnector(default=slow(1.0))
    pool = make_unprobed(
        connector, min_connections=1, eager_init=True, max_lifetime=100
    )
    async with pool:
        await anyio.sleep(102)
        assert len(connector.connections) == 2
        assert connector.connections[0].closed == 1
        assert connector.peak == 2, "the replacement is opened first"
        async with pool.acquire(timeout=0) as conn:
            assert conn.connection.number == 2


async def test_connection_lifetimes_vary_by_up_to_10_percent():
    connector = FakeConnector()
    pool = make_unprobed(
        connector, min_connections=10, eager_init=True, max_lifetime=100
    )
    async with pool:
        await anyio.sleep(89.9)
        assert len(connector.connections) == 10
        closed_at = set()
        for _ in range(1100):
            await anyio.sleep(0.01)
            closed_at.add(sum(conn.closed for conn in connector.connections))
        assert len(connector.open) == 10
        assert sum(conn.closed for conn in connector.connections) >= 10
        assert len(closed_at) > 3, "not all at the same time"


@pytest.mark.costly
async def test_max_lifetime_0_means_connections_never_expire():
    connector = FakeConnector()
    pool = make_unprobed(connector, min_connections=1, eager_init=True, max_lifetime=0)
    async with pool:
        # The default is an hour.
        await anyio.sleep(4_500)
        assert len(connector.connections) == 1


async def test_drain_replaces_every_connection_and_ends_no_lease():
    connector = FakeConnector()
    pool = make_unprobed(connector, min_connections=3, eager_init=True)
    async with pool:
        async with pool.acquire() as conn:
            held = conn.connection
            pool.drain()
            await anyio.sleep(1)
            assert held.closed == 0
        await anyio.sleep(1)
        assert [conn.number for conn in connector.open] == [4, 5, 6]
        assert all(conn.closed == 1 for conn in connector.connections[:3])


async def test_drain_of_a_full_pool_never_exceeds_the_maximum():
    connector = FakeConnector(default=slow(0.1))
    pool = make_unprobed(
        connector, min_connections=3, max_connections=3, eager_init=True
    )
    async with pool:
        pool.drain()
        await anyio.sleep(5)
        assert connector.peak == 3
        assert [conn.number for conn in connector.open] == [4, 5, 6]


async def test_a_drain_that_cannot_connect_keeps_the_old_connections():
    connector = FakeConnector([ok()])
    pool = make_unprobed(connector, min_connections=1, eager_init=True)
    async with pool:
        connector.default = fail()
        pool.drain()
        await anyio.sleep(10)
        async with pool.acquire(timeout=0) as conn:
            assert conn.connection.number == 1
        connector.default = ok()
        await anyio.sleep(5)
        async with pool.acquire(timeout=0) as conn:
            assert conn.connection.number != 1


# -- resizing ---------------------------------------------------------------------


async def test_raising_the_maximum_serves_waiting_callers_at_once():
    pool = make_unprobed(max_connections=1, acquire_timeout=50)
    async with pool, pool.acquire():
        served = []

        async def caller():
            async with pool.acquire():
                served.append(anyio.current_time())
                await anyio.sleep(1)

        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(caller)
            await anyio.sleep(5)
            now = anyio.current_time()
            pool.resize(0, 3)
        assert served == [now, now]


async def test_lowering_the_maximum_closes_idle_connections_and_ends_no_lease():
    connector = FakeConnector()
    pool = make_unprobed(connector, max_connections=4)
    async with pool:
        leases = [await pool.acquire() for _ in range(4)]
        await pool.release(leases.pop())
        pool.resize(0, 2)
        await anyio.sleep(0.01)
        assert len(connector.open) == 3
        for conn in leases:
            await pool.release(conn)
        await anyio.sleep(0.01)
        assert len(connector.open) == 2
        assert pool.status().streams_max == 2


async def test_a_wrong_size_is_refused_and_changes_nothing():
    async with make_unprobed(max_connections=4) as pool:
        with pytest.raises(ValueError, match="min_connections=5"):
            pool.resize(5, 3)
        assert pool.status().max_connections == 4


async def test_a_pool_can_be_resized_before_it_is_open():
    pool = make_unprobed(max_connections=4)
    pool.resize(1, 2)
    assert pool.status().max_connections == 2
    async with pool:
        assert pool.status().max_connections == 2


# -- outages ----------------------------------------------------------------------


@pytest.mark.costly
async def test_attempts_in_an_outage_do_not_grow_with_the_number_of_callers():
    connector = FakeConnector(default=fail())
    pool = make_unprobed(connector, min_connections=2)
    async with pool:

        async def caller():
            while True:
                with pytest.raises(ConnectFailed):
                    await pool.acquire()

        with anyio.move_on_after(60):
            async with anyio.create_task_group() as tasks:
                for _ in range(30):
                    tasks.start_soon(caller)
        # Full jitter below 0.5 s while a caller waits: four a second on average.
        assert 180 < connector.attempts < 330


async def test_one_outage_logs_one_warning(caplog):
    connector = FakeConnector(default=fail("out of order"))
    pool = make_unprobed(connector, min_connections=1)
    async with pool:
        with pytest.raises(ConnectFailed):
            await pool.acquire()
        await anyio.sleep(60)
    assert sum("out of order" in line for line in lines(caplog)) == 1


# -- hanging probes and long leases ----------------------------------------------


async def test_a_hanging_probe_does_not_keep_other_suspects_from_serving():
    connector = FakeConnector()
    pool = make_unprobed(connector, max_connections=5, health_check_timeout=100)
    async with pool:
        leases = [await pool.acquire() for _ in range(5)]
        leases[0].connection.frozen = True
        for conn in leases:
            pool._open_pool.state.suspect(conn._claim.slot, anyio.current_time())
            pool._open_pool.after_change()
            await anyio.sleep(0.1)
            await pool.release(conn)
        assert pool.status().healthy_connections == 4
        async with pool.acquire(timeout=0):
            pass


async def test_a_long_lease_does_not_stop_the_replacement_of_other_connections():
    connector = FakeConnector()
    pool = make_unprobed(
        connector, min_connections=3, eager_init=True, max_lifetime=100
    )
    async with pool, pool.acquire() as conn:
        held = conn.connection
        await anyio.sleep(500)
        assert held.closed == 0
        others = [c for c in connector.connections if c is not held]
        assert sum(c.closed for c in others) >= 6
        assert pool.status().total <= 4


async def test_hanging_probes_do_not_stop_the_pool():
    connector = FakeConnector([ok(), ok()], default=hang())
    pool = make_unprobed(connector, health_check_interval=5, health_check_timeout=100)
    async with pool:
        await fill(pool, 2)
        for conn in connector.connections:
            conn.frozen = True
        await anyio.sleep(6)
        async with pool.acquire(timeout=0):
            pass
