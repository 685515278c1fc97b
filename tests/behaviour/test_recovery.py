"""Outages and recovery in virtual time: waiting times and rates of attempts."""

from __future__ import annotations

import itertools
import random

import anyio
import pytest

from fastapi_topaz import ConnectFailed, PoolTimeout
from fastapi_topaz.testing import FakeConnector, fail, hang, ok, slow
from kit.configs import Requests
from kit.pools import fill, make_pool, most_within
from kit.waiting import eventually


def go_down(connector, default):
    """Close all connections, and give new attempts the outcome *default*."""
    connector.default = default
    for conn in connector.connections:
        conn.hung_up = True


class Timed(FakeConnector):
    """Records when each attempt began."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.begun = []

    async def connect(self, timeout):
        self.begun.append(anyio.current_time())
        return await super().connect(timeout)


# -- outages --------------------------------------------------------------------------


async def test_while_the_server_is_down_callers_fail_fast_with_the_cause():
    connector = Timed()
    async with make_pool(connector) as pool:
        await fill(pool, 3)
        go_down(connector, fail("nothing listens there"))
        took = []

        async def caller():
            while True:
                began = anyio.current_time()
                with pytest.raises(ConnectFailed, match="nothing listens") as caught:
                    await pool.acquire()
                took.append(anyio.current_time() - began)
                assert caught.value.__cause__ is not None
                await anyio.sleep(0.01)

        with anyio.move_on_after(20):
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(caller)
        # Callers at the start of the outage got three more attempts, after pauses of
        # .1, .2 and .4 s.
        assert max(took[:20]) <= 0.8
        assert max(took[20:]) <= 0.5


@pytest.mark.costly
@pytest.mark.parametrize(
    "callers", [1, 30, *(pytest.param(n, marks=pytest.mark.slow) for n in (10, 200))]
)
async def test_the_rate_of_attempts_is_bounded_and_does_not_grow_with_callers(callers):
    connector = Timed(default=fail())
    async with make_pool(connector, min_connections=2) as pool:

        async def caller():
            while True:
                with pytest.raises(ConnectFailed):
                    await pool.acquire()

        with anyio.move_on_after(30):
            async with anyio.create_task_group() as tasks:
                for _ in range(callers):
                    tasks.start_soon(caller)
    # A pause is at least 0.05 s, and 0.25 s on average.
    assert most_within(connector.begun[2:], 1.0) <= 20
    assert 60 < len(connector.begun) < 200


async def test_without_callers_attempts_never_stop_and_come_about_once_a_second():
    connector = Timed(default=fail())
    async with make_pool(connector, min_connections=2, eager_init=True) as pool:
        await anyio.sleep(900)
        assert 750 < connector.attempts < 1125
        assert max(b - a for a, b in itertools.pairwise(connector.begun)) <= 2
        assert not pool.status().healthy


async def test_callers_fail_fast_once_a_connect_to_a_hanging_server_is_overdue():
    connector = Timed()
    options = {"acquire_timeout": 5, "connection_timeout": 10}
    async with make_pool(connector, **options) as pool:
        await fill(pool, 2)
        go_down(connector, hang())
        with pytest.raises(PoolTimeout):
            await pool.acquire()
        await anyio.sleep(10)
        for _ in range(20):
            began = anyio.current_time()
            with pytest.raises(ConnectFailed, match="not established within"):
                await pool.acquire()
            assert anyio.current_time() - began <= 2.5, "one overdue attempt"
            await anyio.sleep(1)
        assert connector.peak <= 10


async def test_a_pool_with_minimum_0_detects_the_end_of_an_outage():
    connector = FakeConnector([fail()] * 5)
    pool = make_pool(connector, min_connections=0, max_retries=0)
    async with pool:
        with pytest.raises(ConnectFailed):
            await pool.acquire()
        assert not pool.status().healthy
        # No more callers: a load balancer that uses the health sends no requests.
        await anyio.sleep(20)
        assert pool.status().healthy
        assert connector.attempts == 6


async def test_an_old_connect_failure_does_not_count_for_a_later_outage(caplog):
    connector = FakeConnector([ok(), fail("the limit"), fail("a hiccup")])
    options = {"min_connections": 0, "acquire_timeout": 1, "max_retries": 3}
    async with make_pool(connector, max_connections=2, **options) as pool:
        async with pool.acquire():
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout=0.01)
        await anyio.sleep(10)
        connector.connections[0].hung_up = True
        caplog.clear()
        async with pool.acquire():
            pass
    assert [r.levelname for r in caplog.records if "a hiccup" in r.getMessage()] == [
        "WARNING"
    ]


async def test_a_lost_connection_is_replaced_before_its_lease_is_released():
    connector = FakeConnector()
    options = {"min_connections": 2, "max_connections": 3, "streams_per_connection": 2}
    pool = make_pool(connector, **options, eager_init=True)
    async with pool, pool.acquire() as lost, pool.acquire() as well:
        await anyio.sleep(0.1)  # the pool's own tasks have no more work
        lost.connection.hung_up = True
        async with pool.acquire() as other:
            assert other.connection is well.connection is not lost.connection
            # Before the pool checks whether connections are lost.
            await anyio.sleep(0.7)
            assert pool.status().healthy_connections == 2
            assert connector.attempts == 3


async def test_acquire_with_timeout_0_starts_a_connect_after_the_pause_of_a_loss():
    connector = FakeConnector()
    async with make_pool(connector, streams_per_connection=2) as pool, pool.acquire():
        # So soon after it was opened that the next attempt has to wait a little.
        # Because it is leased, no close triggers the replacement later.
        connector.connections[0].hung_up = True
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0)
        assert connector.attempts == 1
        # Before the pool checks whether connections are lost.
        await anyio.sleep(0.9)
        assert connector.attempts == 2
        async with pool.acquire(timeout=0):
            pass


async def test_a_hanging_attempt_does_not_block_attempts_to_other_servers():
    """Behind one address, one of several servers accepts and stays silent."""
    connector = FakeConnector([hang()])
    async with make_pool(connector, connection_timeout=10) as pool:
        began = anyio.current_time()
        async with pool.acquire(timeout=5):
            assert anyio.current_time() - began == pytest.approx(2)


async def test_a_caller_waiting_for_a_connect_takes_a_connection_released_first():
    connector = FakeConnector([ok()], default=slow(3))
    async with make_pool(connector) as pool:
        held = await pool.acquire()
        began = anyio.current_time()

        async def give_back():
            await anyio.sleep(1)
            await pool.release(held)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(give_back)
            async with pool.acquire() as conn:
                assert conn.connection.number == 1
            assert anyio.current_time() - began == pytest.approx(1)
        await anyio.sleep(3)
        assert pool.status().total == 2, (
            "the connect continued and serves the next caller"
        )


# -- recovery -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "outage", [3, 30, 300, pytest.param(3600, marks=pytest.mark.slow)]
)
async def test_recovery_is_fast_whatever_the_length_of_the_outage(outage):
    connector = FakeConnector()
    async with make_pool(connector, min_connections=5, eager_init=True) as pool:
        go_down(connector, fail())
        await anyio.sleep(outage)
        connector.default = slow(0.01)
        back = anyio.current_time()
        await eventually(lambda: pool.status().total == 5)
        # No caller waited, so the next attempt was at most 2 s away.
        assert anyio.current_time() - back <= 2.2


@pytest.mark.parametrize("outage", [3, 20])
async def test_a_waiting_caller_is_served_within_half_a_second_of_recovery(outage):
    connector = FakeConnector()
    async with make_pool(connector, max_connections=10) as pool:
        await fill(pool, 10)
        go_down(connector, fail())
        first = full = None
        back = anyio.current_time() + outage

        async def caller():
            nonlocal first
            while full is None:
                try:
                    async with pool.acquire():
                        first = first or anyio.current_time()
                        await anyio.sleep(0.1)
                except ConnectFailed:
                    await anyio.sleep(0.05)

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(caller)
            await anyio.sleep(outage)
            connector.default = slow(0.02)
            await eventually(lambda: pool.status().total == 10)
            full = anyio.current_time()
        assert first - back <= 0.6
        assert full - back <= 1.0


async def test_one_successful_connect_resets_the_backoff():
    connector = Timed(default=fail())
    async with make_pool(connector, min_connections=1, eager_init=True) as pool:
        await anyio.sleep(100)
        connector.default = ok()
        await anyio.sleep(2.1)
        assert pool.status().total == 1
        go_down(connector, fail())
        await eventually(lambda: pool.status().total == 0)
        known = len(connector.begun)
        await anyio.sleep(0.35)
        assert len(connector.begun) - known >= 2, "pauses are .1 and .2 s again"


async def test_an_open_pool_always_refills_to_its_minimum():
    connector = FakeConnector()
    async with make_pool(connector, min_connections=3, eager_init=True) as pool:
        for _ in range(20):
            victim = random.choice(connector.open)
            victim.hung_up = True
            await anyio.sleep(random.uniform(2.5, 100))
            assert pool.status().total == 3


# -- the first connections ------------------------------------------------------------


async def test_1000_callers_on_a_cold_pool_are_served_in_order_of_arrival():
    connector = FakeConnector(default=slow(0.05))
    async with make_pool(connector, max_connections=7, acquire_timeout=1000) as pool:
        served, connecting = {}, []

        async def caller(number):
            async with pool.acquire():
                # At the same time, because tasks that wake together run in any order.
                served[number] = anyio.current_time()
                await anyio.sleep(0.01)

        async def watch():
            while len(served) < 1000:
                connecting.append((pool.status().connecting, pool.status().total))
                await anyio.sleep(0.025)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            for number in range(1000):
                tasks.start_soon(caller, number)
                await anyio.lowlevel.checkpoint()
        moments = [served[number] for number in range(1000)]
        assert moments == sorted(moments)
        assert len(set(moments)) > 100
        assert connector.attempts == connector.peak == 7
        assert all(attempts <= max(2, total) for attempts, total in connecting)


async def test_with_streams_1000_callers_need_few_connections():
    connector = FakeConnector(default=slow(0.05))
    options = {"streams_per_connection": 50, "acquire_timeout": 1000}
    async with make_pool(connector, max_connections=10, **options) as pool:
        served = {}

        async def caller(number):
            async with pool.acquire():
                served[number] = anyio.current_time()
                await anyio.sleep(1)

        async with anyio.create_task_group() as tasks:
            for number in range(1000):
                tasks.start_soon(caller, number)
                await anyio.lowlevel.checkpoint()
        moments = [served[number] for number in range(1000)]
        assert moments == sorted(moments)
        assert connector.attempts == 10


# -- spreading connections over servers -----------------------------------------------


async def test_after_a_loss_all_connections_are_replaced_to_reach_all_servers():
    connector = FakeConnector()
    connector.spreads = True
    async with make_pool(connector, min_connections=4, eager_init=True) as pool:
        await anyio.sleep(100)
        assert connector.attempts == 4
        connector.connections[0].hung_up = True
        await anyio.sleep(1.01)
        assert connector.attempts == 5
        # About 2, 8, 16, 32 and 64 s after the loss.
        moments = [(3, 9), (7.5, 13), (10.5, 17), (20, 21), (1000, 25), (1000, 25)]
        for after, attempts in moments:
            await anyio.sleep(after)
            assert connector.attempts == attempts
            assert pool.status().total == 4
        assert pool._counters.closes == {"lost": 1, "spread": 20}
        assert connector.peak <= 6, "one at a time, and the old connection closes"


async def test_connections_of_a_connector_with_one_server_are_not_spread():
    connector = FakeConnector()
    async with make_pool(connector, min_connections=4, eager_init=True):
        connector.connections[0].hung_up = True
        await anyio.sleep(1000)
        assert connector.attempts == 5


# -- reaping at exact times -----------------------------------------------------------


async def test_idle_connections_are_reaped_at_exact_times():
    """Checks come every 10 s. Connections idle for 25 s close, to the minimum of 2."""
    connector = FakeConnector()
    options = {"min_connections": 2, "max_idle_time": 25, "idle_check_interval": 10}
    async with make_pool(connector, **options) as pool:
        began = anyio.current_time()

        async def lease(start, end):
            await anyio.sleep(start)
            async with pool.acquire():
                await anyio.sleep(end - start)

        seen = []
        async with anyio.create_task_group() as tasks:
            for start, end in [(1, 3), (1, 3), (1, 8), (1, 16), (1, 16), (2, 58)]:
                tasks.start_soon(lease, start, end)
            tasks.start_soon(lease, 33, 34)
            for moment in (0, 1, 2, 9, 17, 29, 31, 39, 41, 51, 59, 61, 79, 81, 91, 200):
                await anyio.sleep(began + moment + 0.5 - anyio.current_time())
                status = pool.status()
                seen.append((moment, status.total, status.busy))
        assert seen == [
            (0, 0, 0),
            (1, 5, 5),
            (2, 6, 6),
            (9, 6, 3),
            (17, 6, 1),
            (29, 6, 1),  # of 3 s: idle 26.5 s now, 17 s at 20 s
            (31, 4, 1),  # both are closed at 30 s
            (39, 4, 1),
            (41, 3, 1),  # of 8 s; the last used one is leased at 33 s
            (51, 2, 1),  # of 16 s: one idle for 34 s, one used
            (59, 2, 0),
            (61, 2, 0),  # the minimum
            (79, 2, 0),
            (81, 2, 0),
            (91, 2, 0),
            (200, 2, 0),
        ]


async def test_lifetimes_end_at_exact_times_and_the_replacement_opens_first(
    monkeypatch,
):
    monkeypatch.setattr(random, "random", lambda: 0.5)
    connector = FakeConnector(default=slow(1))
    options = {"min_connections": 2, "eager_init": True, "max_lifetime": 100}
    async with make_pool(connector, **options) as pool:
        began = anyio.current_time()
        seen = []
        for moment in (0, 94, 95.5, 96.5, 97.5, 191.5, 192.5, 193.5):
            await anyio.sleep(began + moment - anyio.current_time())
            status = pool.status()
            seen.append((moment, status.total, status.connecting, connector.attempts))
        # 100 s less half of the random tenth, one after the other.
        assert seen == [
            (0, 2, 0, 2),
            (94, 2, 0, 2),
            (95.5, 2, 1, 3),
            (96.5, 2, 1, 4),
            (97.5, 2, 0, 4),
            (191.5, 2, 1, 5),
            (192.5, 2, 1, 6),
            (193.5, 2, 0, 6),
        ]


async def test_a_loss_without_a_replacement_still_spreads_the_connections():
    connector = FakeConnector()
    connector.spreads = True
    async with make_pool(connector, min_connections=2, eager_init=True) as pool:
        await fill(pool, 3)
        connector.connections[2].hung_up = True
        async with pool.acquire():
            await anyio.sleep(5)
        assert connector.attempts == 5


@pytest.mark.costly
@pytest.mark.parametrize("lives", [0.01, 0.1, 1.0])
async def test_connections_lost_early_are_not_made_faster_than_failed_ones(
    lives,
):
    class Brief(Timed):
        async def connect(self, timeout):
            conn = await super().connect(timeout)
            ends = anyio.current_time() + lives
            conn.is_lost = lambda: anyio.current_time() >= ends
            return conn

    connector = Brief(default=slow(0.001))
    async with make_pool(connector, acquire_timeout=1000) as pool:

        async def caller():
            while True:
                async with pool.acquire():
                    await anyio.sleep(0.02)

        with anyio.move_on_after(15):
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(caller)
    assert most_within(connector.begun[10:], 1.0) <= 20


@pytest.mark.costly
@pytest.mark.parametrize("goes_wrong", [fail(), hang()], ids=["refused", "hangs"])
async def test_a_replica_that_stays_down_does_not_keep_the_others_rotating(goes_wrong):
    class EveryThird(FakeConnector):
        spreads = True

        async def connect(self, timeout):
            self.default = goes_wrong if self.attempts % 3 == 2 else ok()
            return await super().connect(timeout)

    connector = EveryThird()
    options = {"connection_timeout": 1, "max_lifetime": 0}
    async with make_pool(
        connector, min_connections=10, eager_init=True, **options
    ) as pool:
        await anyio.sleep(10)
        pool._open_pool.state.rotation._respread.clear()
        attempts = connector.attempts
        connector.connections[0].hung_up = True
        await anyio.sleep(900)
        # One replacement, and five times ten attempts, of which each third fails.
        assert connector.attempts - attempts <= 80


async def test_draining_a_full_pool_replaces_the_idle_connections_first():
    connector = FakeConnector()
    async with make_pool(connector, max_connections=3) as pool:
        leases = [await pool.acquire() for _ in range(3)]
        await pool.release(leases.pop())
        pool.drain()
        await anyio.sleep(0.1)
        assert [conn.closed for conn in connector.connections[:3]] == [0, 0, 1]
        for conn in leases:
            await pool.release(conn)
        await anyio.sleep(0.1)
        assert [conn.closed for conn in connector.connections[:3]] == [1, 1, 1]


async def test_a_check_on_a_silent_connection_ends_at_its_timeout():

    from fastapi_topaz import AuthorizerOptions, Identity, IdentityType, TopazConfig

    connector = FakeConnector()
    config = TopazConfig(
        authorizer_options=AuthorizerOptions(),
        policy_path_root="myapp",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
        connection_pool=make_pool(connector),
        check_timeout=3,
    )
    async with config.connection_pool as pool:
        await fill(pool, 1)
        connector.connections[0].frozen = True
        began = anyio.current_time()
        request = Requests({"type": "http", "headers": [], "path_params": {}})
        with pytest.raises(TimeoutError):
            await config.is_allowed(request, "myapp.GET.documents")
        assert anyio.current_time() - began == pytest.approx(3)


async def test_after_a_short_lived_connection_a_waiting_caller_waits_for_the_pause():
    pool = make_pool(FakeConnector(), streams_per_connection=5)
    async with pool, pool.acquire() as conn:
        await anyio.sleep(0.5)
        conn.connection.hung_up = True
        began = anyio.current_time()
        async with pool.acquire():
            assert anyio.current_time() - began <= 0.1
