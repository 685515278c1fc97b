"""Leases on connections with several streams, and callers beyond the capacity."""

from __future__ import annotations

import random
from collections import Counter

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import (
    ConnectionLost,
    PoolSaturated,
    PoolTimeout,
)
from fastapi_topaz.testing import FakeConnector, slow
from kit.pools import Gauge, make_pool, queued


async def leased(pool, count):
    return [await pool.acquire() for _ in range(count)]


async def give_back(pool, leases):
    for conn in leases:
        await pool.release(conn)


def numbers(leases):
    return [conn.connection.number for conn in leases]


def load(pool):
    """Return how many leases each open connection has, the fullest first."""
    return sorted((conn.streams for conn in pool.connections()), reverse=True)


def told(pool):
    status = pool.status()
    return {
        "total": status.total,
        "busy": status.busy,
        "idle": status.idle,
        "in use": status.streams_in_use,
        "most": status.streams_max,
        "waiting": status.waiting,
    }


# -- filling connections ------------------------------------------------------------


async def test_the_status_counts_streams_and_connections_at_each_step():
    async with make_pool(max_connections=2, streams_per_connection=3) as pool:
        leases = []
        for in_use, total in [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]:
            leases += await leased(pool, 1)
            assert told(pool) == {
                "total": total,
                "busy": total,
                "idle": 0,
                "in use": in_use,
                "most": 6,
                "waiting": 0,
            }
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0)
        # Three leases of the first connection, then the leases of the second.
        for in_use, busy in [(5, 2), (4, 2), (3, 1), (2, 1), (1, 1), (0, 0)]:
            await pool.release(leases.pop(0))
            assert told(pool) == {
                "total": 2,
                "busy": busy,
                "idle": 2 - busy,
                "in use": in_use,
                "most": 6,
                "waiting": 0,
            }


async def test_another_connection_is_opened_only_when_the_open_ones_are_full():
    connector = FakeConnector()
    async with make_pool(
        connector, max_connections=4, streams_per_connection=5
    ) as pool:
        leases = []
        for count in range(1, 21):
            leases += await leased(pool, 1)
            await anyio.sleep(1)  # whatever other connections the pool wants to open
            assert connector.attempts == -(-count // 5)
        assert load(pool) == [5, 5, 5, 5]
        await give_back(pool, leases)


async def test_the_minimum_is_opened_even_if_one_connection_is_enough():
    connector = FakeConnector()
    options = {"min_connections": 3, "streams_per_connection": 10}
    async with make_pool(connector, **options) as pool:
        leases = await leased(pool, 1)
        await anyio.sleep(1)
        assert connector.attempts == 3
        leases += await leased(pool, 29)
        assert connector.attempts == 3
        leases += await leased(pool, 1)
        assert connector.attempts == 4
        await give_back(pool, leases)


@pytest.mark.parametrize("streams", [1, 7, 50, 100])
async def test_500_callers_on_a_cold_pool_never_overfill_a_new_connection(streams):
    connector = FakeConnector(default=slow(0.1))
    gauge = Gauge()
    options = {"max_connections": 10, "streams_per_connection": streams}
    async with make_pool(connector, acquire_timeout=1000, **options) as pool:

        async def caller():
            async with pool.acquire() as conn:
                with gauge.inside(conn.connection.number), gauge.inside("all"):
                    await anyio.sleep(1)

        async with anyio.create_task_group() as tasks:
            for _ in range(500):
                tasks.start_soon(caller)
        most = gauge.peak.pop("all")
        assert most == min(500, 10 * streams)
        assert set(gauge.peak.values()) == {streams}
        assert connector.peak == len(gauge.peak) == min(10, -(-500 // streams))
        assert told(pool)["in use"] == 0


async def test_callers_are_served_in_the_order_of_arrival_over_all_streams():
    options = {"max_connections": 3, "streams_per_connection": 4}
    async with make_pool(acquire_timeout=1000, **options) as pool:
        rng = random.Random(1)
        held = await leased(pool, 12)
        order = []

        async def caller(number):
            async with pool.acquire():
                order.append(number)
                # No two callers release at the same time: trio runs such tasks in any
                # order.
                await anyio.sleep(1 + rng.random())

        async with anyio.create_task_group() as tasks:
            for number in range(200):
                tasks.start_soon(caller, number)
                await queued(pool, number + 1)
            rng.shuffle(held)
            for number, conn in enumerate(held):
                await pool.release(conn)
                await anyio.sleep(0.01)
                assert order == list(range(number + 1))
        assert order == list(range(200))


# -- keeping few connections busy -----------------------------------------------------


async def test_after_a_burst_a_small_load_uses_few_connections():
    """30 leases that come and go need 3 or 4 connections, and the rest is reaped."""
    rng = random.Random(2)
    connector = FakeConnector()
    pool = make_pool(
        connector,
        min_connections=2,
        max_connections=10,
        streams_per_connection=10,
        max_idle_time=60,
        idle_check_interval=10,
        max_lifetime=0,
    )
    async with pool:
        burst = await leased(pool, 100)
        assert load(pool) == [10] * 10
        # The long leases are spread over all connections at first.
        rng.shuffle(burst)
        rest, burst = burst[:30], burst[30:]
        await give_back(pool, burst)
        assert told(pool)["in use"] == 30
        assert told(pool)["busy"] > 6

        async def caller(conn):
            while not over:
                await anyio.sleep(rng.uniform(0.5, 1.5))
                await pool.release(conn)
                conn = await pool.acquire()
            await pool.release(conn)

        over = False
        async with anyio.create_task_group() as tasks:
            for conn in rest:
                tasks.start_soon(caller, conn)
            await anyio.sleep(200)
            assert told(pool)["total"] == len(connector.open) <= 4
            assert told(pool)["in use"] == 30
            assert min(load(pool)) >= 5, "they take turns"
            over = True
        assert told(pool)["in use"] == 0
        await anyio.sleep(100)
        assert told(pool)["total"] == told(pool)["idle"] == len(connector.open) == 2
        assert connector.attempts == 10, "no connection was closed and opened again"


async def test_long_leases_are_not_moved_and_keep_their_connections_open():
    connector = FakeConnector()
    pool = make_pool(
        connector,
        max_connections=10,
        streams_per_connection=10,
        max_idle_time=60,
        idle_check_interval=10,
        max_lifetime=0,
    )
    async with pool:
        burst = await leased(pool, 100)
        kept = [conn for conn in burst if conn.connection.number in (3, 7)][::4]
        assert len(kept) == 5
        await give_back(pool, [conn for conn in burst if conn not in kept])
        await anyio.sleep(200)
        assert [conn.number for conn in connector.open] == [3, 7]
        assert load(pool) == [3, 2]
        await give_back(pool, kept)


# -- resize, suspicion ----------------------------------------------------------------


async def test_raising_the_maximum_serves_as_many_callers_as_new_streams():
    options = {"max_connections": 1, "streams_per_connection": 4}
    async with make_pool(acquire_timeout=50, **options) as pool:
        held = await leased(pool, 4)
        served = []

        async def caller(number):
            async with pool.acquire():
                served.append((number, anyio.current_time()))
                await anyio.sleep(1)

        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(caller, number)
                await queued(pool, number + 1)
            await anyio.sleep(5)
            now = anyio.current_time()
            pool.resize(0, 3)
            await anyio.sleep(0.5)
            # Callers that are served at once run in any order on trio.
            assert sorted(served) == [(number, now) for number in range(8)]
            assert told(pool) == {
                "total": 3,
                "busy": 3,
                "idle": 0,
                "in use": 12,
                "most": 12,
                "waiting": 2,
            }
        await give_back(pool, held)


async def test_lowering_the_maximum_ends_no_lease_and_admits_no_caller_early():
    connector = FakeConnector()
    options = {"max_connections": 3, "streams_per_connection": 4}
    async with make_pool(connector, acquire_timeout=50, **options) as pool:
        held = await leased(pool, 12)
        served = []

        async def caller():
            async with pool.acquire() as conn:
                served.append(conn.connection.number)
                await anyio.sleep(1)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller)
            await queued(pool, 1)
            pool.resize(0, 1)
            assert told(pool)["most"] == 4
            (stays,) = [
                number
                for number, state in enumerate(pool.connections(), 1)
                if state.condition != "leaving"
            ]
            # First the long leases end, then the others. Either way one lease less.
            held.sort(key=lambda conn: conn.connection.number == stays)
            for _ in range(8):
                await pool.release(held.pop())
                await anyio.sleep(0.1)
                assert served == [], "still at least as many as the new maximum"
            assert len(connector.open) == 1 + len(set(numbers(held)) - {stays})
            await pool.release(held.pop())
            await anyio.sleep(0.1)
            assert served == [stays]
            await give_back(pool, held)
        await anyio.sleep(0.1)
        assert [conn.number for conn in connector.open] == [stays]


async def test_a_suspect_with_several_leases_gets_no_new_lease_until_it_answers():
    options = {"max_connections": 1, "streams_per_connection": 5}
    async with make_pool(**options) as pool:
        leases = await leased(pool, 3)
        assert numbers(leases) == [1, 1, 1]
        first = leases[0].connection
        first.alive = False
        with pytest.raises(ConnectionLost):
            await leases[0].call("/a/b", b"")
        first.alive = True
        # No task has run since, so the probe has not been sent yet.
        assert pool.status().suspect == 1
        assert [conn.condition for conn in pool.connections()] == ["suspect"]
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0)
        await pool.release(leases.pop())
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0)
        await anyio.sleep(1)
        assert first.probes == 1
        assert pool.status().suspect == 0
        more = await leased(pool, 3)
        assert numbers(more) == [1, 1, 1]
        await give_back(pool, leases + more)


async def test_other_connections_serve_while_a_suspect_with_leases_is_silent():
    connector = FakeConnector()
    options = {"max_connections": 2, "streams_per_connection": 5}
    async with make_pool(connector, health_check_timeout=3, **options) as pool:
        leases = await leased(pool, 3)
        first = leases[0].connection
        first.alive = False
        with pytest.raises(ConnectionLost):
            await leases[0].call("/a/b", b"")
        first.frozen = True
        more = await leased(pool, 5)
        assert numbers(more) == [2] * 5
        assert told(pool)["in use"] == 8
        # Two places are free on the suspect connection, and none on any other.
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=1)
        await anyio.sleep(5)
        assert [c.condition for c in pool.connections()] == ["leaving", "busy"]
        assert first.closed == 0, "the suspect connection has leases"
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=1)
        await give_back(pool, leases)
        (third,) = await leased(pool, 1)
        assert third.connection.number == 3
        assert first.closed == 1
        await give_back(pool, [*more, third])


# -- load shedding --------------------------------------------------------------------


async def refused(pool):
    """Return whether one more caller is refused at once; leave the pool unchanged."""
    before = told(pool), anyio.current_time()
    try:
        with anyio.move_on_after(0.5):
            await pool.release(await pool.acquire())
    except PoolSaturated:
        assert (told(pool), anyio.current_time()) == before
        return True
    return False


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("max_waiting", [0, 1, 3])
async def test_max_waiting_callers_can_wait_and_one_more_is_refused_at_once(
    streams, max_waiting
):
    options = {"max_connections": 2, "streams_per_connection": streams}
    async with make_pool(max_waiting=max_waiting, **options) as pool:
        held = await leased(pool, 2 * streams)

        async def caller():
            async with pool.acquire():
                pass

        async with anyio.create_task_group() as tasks:
            for number in range(max_waiting):
                assert not await refused(pool)
                tasks.start_soon(caller)
                await queued(pool, number + 1)
            assert await refused(pool)
            assert await refused(pool)
            await give_back(pool, held)
        assert not await refused(pool)


async def test_callers_waiting_for_a_connect_are_not_an_overload_on_any_stream():
    connector = FakeConnector(default=slow(1.0))
    options = {"max_connections": 2, "streams_per_connection": 5, "max_waiting": 2}
    async with make_pool(connector, **options) as pool:
        served = []

        async def caller():
            async with pool.acquire():
                served.append(anyio.current_time())
                await anyio.sleep(1)

        async with anyio.create_task_group() as tasks:
            for number in range(12):
                assert not served
                tasks.start_soon(caller)
                await queued(pool, number + 1)
            assert told(pool)["total"] == 0
            assert await refused(pool), "ten wait for a connect, two for capacity"
        assert len(served) == 12


@pytest.mark.parametrize("leaves", ["served", "timed out", "cancelled"])
@pytest.mark.parametrize("streams", [1, 3])
async def test_a_waiting_caller_that_leaves_makes_room_for_one_more(leaves, streams):
    options = {"max_connections": 1, "streams_per_connection": streams}
    async with make_pool(max_waiting=2, acquire_timeout=100, **options) as pool:
        held = await leased(pool, streams)
        scope = anyio.CancelScope()
        outcomes = []

        async def first():
            with scope:
                try:
                    async with pool.acquire(timeout=5):
                        outcomes.append("served")
                        await anyio.sleep(50)
                except PoolTimeout:
                    outcomes.append("timed out")
            if scope.cancelled_caught and not outcomes:
                outcomes.append("cancelled")

        async def other():
            async with pool.acquire():
                pass

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first)
            await queued(pool, 1)
            tasks.start_soon(other)
            await queued(pool, 2)
            assert await refused(pool)
            if leaves == "served":
                await pool.release(held.pop())
            elif leaves == "cancelled":
                scope.cancel()
            else:
                await anyio.sleep(5)
            await queued(pool, 1)
            await anyio.sleep(0.1)
            assert outcomes == [leaves]
            tasks.start_soon(other)
            await queued(pool, 2)
            assert await refused(pool), "there is room for one caller, not for two"
            scope.cancel()
            await give_back(pool, held)
        assert not await refused(pool)


@pytest.mark.costly
@pytest.mark.parametrize("seed", range(4))
async def test_the_counters_add_up_for_all_outcomes_of_acquire(seed):
    rng = random.Random(seed)
    outcomes = Counter()
    connector = FakeConnector(default=slow(0.2))
    streams = rng.choice([1, 4])
    options = {"max_connections": 3, "streams_per_connection": streams}
    async with make_pool(connector, max_waiting=4, **options) as pool:

        async def caller(timeout, patience, hold):
            outcome = "cancelled"
            with anyio.move_on_after(patience):
                try:
                    async with pool.acquire(timeout=timeout):
                        outcome = "acquisitions"
                        await anyio.sleep(hold)
                except PoolSaturated:
                    outcome = "rejected"
                except PoolTimeout:
                    outcome = "timeouts"
            outcomes[outcome] += 1

        async with anyio.create_task_group() as tasks:
            for _ in range(400):
                patience = rng.choice([100, 100, rng.uniform(0.01, 1)])
                timeout = rng.choice([0.1, 1, 20])
                tasks.start_soon(caller, timeout, patience, rng.uniform(0, 2))
                # Slightly more callers come than there is room for.
                await anyio.sleep(rng.expovariate(4 * streams))
                status = pool.status()
                assert status.waiting <= 4 + status.streams_max - status.streams_in_use
                assert status.streams_in_use <= status.streams_max
        counters = pool._counters
        assert outcomes == {name: getattr(counters, name) for name in outcomes}
        assert len(outcomes) == 4
        assert counters.failed == counters.closed == 0
        assert told(pool)["in use"] == told(pool)["waiting"] == 0
