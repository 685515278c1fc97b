"""A proxy that answers for a server that is down, in virtual time."""

from __future__ import annotations

import itertools

import anyio
import pytest

from fastapi_topaz import ConnectFailed, PoolTimeout
from fastapi_topaz.exceptions import ConnectionLost
from fastapi_topaz.testing import FakeConnector
from kit.logs import lines
from kit.pools import make_pool, most_within


TEXT = "no healthy upstream"
CALL = 0.01


class Proxy(FakeConnector):
    """
    Refuses calls on all connections, also new ones, while it has a text to answer.
    """

    def __init__(self, text="", **options):
        super().__init__(answer=self._served, **options)
        self.text = text
        self.probed = []

    async def _served(self, _method, request):
        await anyio.sleep(CALL)
        return request

    async def connect(self, timeout):
        conn = await super().connect(timeout)
        conn.refuses = self.text
        probe = conn.probe

        async def noted(timeout):
            self.probed.append(anyio.current_time())
            await probe(timeout)

        conn.probe = noted
        return conn

    def refuse(self, text=TEXT, connections=None):
        if connections is None:
            connections, self.text = self.connections, text
        for conn in connections:
            conn.refuses = text


async def fill_answered(pool, count):
    """Open *count* connections that are idle and have each answered."""
    leases = [await pool.acquire() for _ in range(count)]
    for conn in leases:
        await conn.call("/a/b", b"?")
        await pool.release(conn)


async def ask(pool, **options):
    async with pool.acquire(**options) as conn:
        return await conn.call("/a/b", b"?")


class Callers:
    """Send one call after the other, and record the outcome and time of each."""

    def __init__(self, pool, count):
        self.pool, self.count = pool, count
        self.ends = []

    async def __aenter__(self):
        self.tasks = anyio.create_task_group()
        await self.tasks.__aenter__()
        for _ in range(self.count):
            self.tasks.start_soon(self.one)
        return self

    async def __aexit__(self, *exc):
        self.tasks.cancel_scope.cancel()
        await self.tasks.__aexit__(*exc)

    async def one(self):
        while True:
            began, error = anyio.current_time(), None
            try:
                await ask(self.pool)
            except (ConnectFailed, PoolTimeout, ConnectionRefusedError) as caught:
                error = caught
                await anyio.sleep(0.005)
            self.ends.append((began, anyio.current_time(), error))

    def since(self, moment):
        return [end for end in self.ends if end[0] >= moment]


# -- an outage ------------------------------------------------------------------------


@pytest.mark.costly
@pytest.mark.parametrize("streams", [1, 5])
async def test_refusals_by_a_proxy_on_all_connections_are_an_outage(caplog, streams):
    connector = Proxy()
    options = {"streams_per_connection": streams, "max_connections": 4}
    async with make_pool(connector, **options) as pool, Callers(pool, 21) as callers:
        await anyio.sleep(1)
        assert all(error is None for _, _, error in callers.ends)
        made = connector.attempts
        connector.refuse()
        began = anyio.current_time()
        await anyio.sleep(1)
        assert not pool.status().healthy
        (line,) = lines(caplog)
        assert TEXT in line
        assert "fake" in line
        await anyio.sleep(20)
        assert not pool.status().healthy

        errors = [end for end in callers.since(began + 1) if end[2]]
        assert len(errors) == len(callers.since(began + 1)) > 30
        assert max(end - start for start, end, _ in errors) <= 0.5
        for _, _, error in errors:
            assert isinstance(error, ConnectFailed)
            assert error.reason == "unavailable"
            assert not error.permanent
            assert TEXT in str(error)
            assert str(error.__cause__.__cause__) == TEXT
        assert max(end - start for start, end, _ in callers.since(began)) <= 1
        later = [time for time in connector.probed if time > began + 1]
        assert 20 * 2 < len(later) <= 20 * 4
        assert most_within(later, 1) <= 4
        assert connector.attempts == made
        assert not any(conn.closed for conn in connector.connections)
        assert lines(caplog) == [line]
        assert not pool._counters.timeouts

        connector.refuse("")
        began = anyio.current_time()
        await anyio.sleep(1)
        assert pool.status().healthy
        assert pool.status().suspect == 0
        assert all(error is None for _, _, error in callers.since(began + 0.5))
        first = min(end for _, end, error in callers.since(began) if error is None)
        assert first - began <= 0.5
        assert lines(caplog) == [line]
        (over,) = [r for r in caplog.records if "outage is over" in r.getMessage()]
        assert over.levelname == "INFO"


async def test_one_refused_call_detects_an_outage_while_other_connections_are_idle():
    connector = Proxy()
    async with make_pool(connector) as pool:
        await fill_answered(pool, 10)
        connector.refuse()
        with pytest.raises(ConnectionRefusedError):
            await ask(pool)
        await anyio.sleep(1)
        assert not pool.status().healthy
        assert pool.status().suspect == 10
        began = anyio.current_time()
        with pytest.raises(ConnectFailed, match=TEXT):
            await ask(pool)
        assert anyio.current_time() - began <= 0.5
        assert len(connector.probed) <= 10 + 6
        connector.refuse("")
        began = anyio.current_time()
        assert await ask(pool) == b"?"
        assert anyio.current_time() - began <= 0.4
        await anyio.sleep(0.01)
        assert pool.status().healthy_connections == 10, (
            "each connection was probed at once"
        )


async def test_a_health_check_detects_an_outage_without_calls(caplog):
    connector = Proxy()
    async with make_pool(connector, health_check_interval=10) as pool:
        await fill_answered(pool, 3)
        connector.refuse()
        await anyio.sleep(21)
        assert not pool.status().healthy
        assert len(lines(caplog)) == 1
        connector.refuse("")
        await anyio.sleep(0.4)
        assert pool.status().healthy_connections == 3
        assert not any(conn.closed for conn in connector.connections)


async def test_a_pool_opened_in_an_outage_opens_few_connections_and_keeps_them(
    caplog,
):
    connector = Proxy(TEXT)
    options = {"min_connections": 2, "max_connections": 5}
    async with make_pool(connector, **options) as pool, Callers(pool, 20) as callers:
        began = anyio.current_time()
        await anyio.sleep(30)
        assert not pool.status().healthy
        assert connector.attempts == 5
        assert not any(conn.closed for conn in connector.connections)
        assert all(
            isinstance(error, ConnectFailed)
            for _, _, error in callers.since(began + 1.5)
        )
        assert len(lines(caplog)) == 1
        later = [time for time in connector.probed if time > began + 1]
        assert most_within(later, 1) <= 4
        connector.refuse("")
        await anyio.sleep(0.5)
        assert all(
            error is None for _, _, error in callers.since(anyio.current_time() - 0.1)
        )


async def test_in_an_outage_without_callers_connections_stay_and_its_end_is_detected():
    connector = Proxy()
    options = {"max_idle_time": 5, "idle_check_interval": 1, "max_lifetime": 20}
    async with make_pool(connector, **options) as pool:
        await fill_answered(pool, 3)
        connector.refuse()
        with pytest.raises(ConnectionRefusedError):
            await ask(pool)
        await anyio.sleep(100)
        assert not pool.status().healthy
        assert not any(conn.closed for conn in connector.connections)
        connector.refuse("")
        await anyio.sleep(0.4)
        assert pool.status().healthy


async def test_connections_closed_by_the_proxy_do_not_end_an_outage(caplog):
    connector = Proxy()
    async with make_pool(connector) as pool, Callers(pool, 5) as callers:
        await anyio.sleep(1)
        connector.refuse()
        await anyio.sleep(5)
        for conn in connector.open:
            conn.hung_up = True
        moment = anyio.current_time()
        await anyio.sleep(10)
        assert not pool.status().healthy
        late = [end for end in callers.since(moment + 2) if end[2] is None]
        assert late == []
        assert len([line for line in lines(caplog) if TEXT in line]) == 1
        connector.refuse("")
        moment = anyio.current_time()
        await anyio.sleep(1)
        assert all(error is None for _, _, error in callers.since(moment + 0.5))


async def test_a_caller_that_times_out_before_the_outage_is_known_gets_the_refusal():
    connector = Proxy()
    async with make_pool(connector, max_connections=1) as pool:
        await fill_answered(pool, 1)
        connector.refuse()
        with pytest.raises(ConnectionRefusedError):
            await ask(pool)
        with pytest.raises(PoolTimeout, match=TEXT) as caught:
            await ask(pool, timeout=0.1)
        assert TEXT in str(caught.value.__cause__)


async def test_a_hanging_probe_in_an_outage_closes_its_connection():
    connector = Proxy()
    async with make_pool(connector, max_connections=2, health_check_timeout=3) as pool:
        await fill_answered(pool, 2)
        connector.refuse()
        with pytest.raises(ConnectionRefusedError):
            await ask(pool)
        await anyio.sleep(2)
        connector.connections[0].frozen = True
        await anyio.sleep(10)
        assert [conn.closed for conn in connector.connections[:2]] == [1, 0]


# -- one proxy of several -------------------------------------------------------------


@pytest.mark.costly
async def test_if_one_proxy_of_several_refuses_only_its_connections_are_avoided():
    connector = Proxy()
    async with make_pool(connector) as pool, Callers(pool, 10) as callers:
        await anyio.sleep(1)
        assert pool.status().total == 10
        cut_off = connector.connections[::2]
        connector.refuse(connections=cut_off)
        began = anyio.current_time()
        await anyio.sleep(10)
        failed = [end for end in callers.since(began) if end[2]]
        assert len(failed) <= 5, "each connection refuses one call"
        assert pool.status().healthy
        assert pool.status().suspect == 5
        later = [time for time in connector.probed if time > began + 5]
        assert len(later) <= 5 * 4
        assert connector.attempts == 10
        assert not any(conn.closed for conn in connector.connections)
        connector.refuse("", cut_off)
        await anyio.sleep(2)
        assert pool.status().healthy_connections == 10


async def test_another_connection_is_opened_while_all_are_refused():
    connector = Proxy()
    async with make_pool(connector, max_connections=5) as pool:
        await fill_answered(pool, 2)
        # The next connection leads to another proxy, which works.
        connector.refuse(connections=connector.connections)
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                await ask(pool)
        began = anyio.current_time()
        for _ in range(5):
            assert await ask(pool) == b"?"
        assert anyio.current_time() - began <= 0.5
        assert connector.attempts == 3
        assert pool.status().healthy


# -- refusals of some calls -----------------------------------------------------------


@pytest.mark.costly
@pytest.mark.parametrize("connections, streams", [(10, 1), (2, 1), (4, 5)])
async def test_a_rate_limit_closes_no_connection_and_causes_little_delay(
    connections, streams
):
    connector = Proxy()
    options = {"max_connections": connections, "streams_per_connection": streams}
    async with make_pool(connector, **options) as pool:
        async with Callers(pool, connections * streams) as callers:
            await anyio.sleep(1)
            began = anyio.current_time()
            await anyio.sleep(1)
            without = len(callers.since(began))
            turn = itertools.count(1)
            for conn in connector.connections:
                answer = conn._answer

                async def limited(answer=answer):
                    await answer()
                    if next(turn) % 10 == 0:
                        await anyio.sleep(CALL)
                        raise ConnectionRefusedError("over the limit")

                conn._answer = limited
            began = anyio.current_time()
            for _ in range(10):
                await anyio.sleep(0.1)
                assert pool.status().healthy
            limited = callers.since(began)
        refused = [error for _, _, error in limited if error]
        assert {type(error) for error in refused} == {ConnectionRefusedError}
        assert len(refused) > len(limited) / 20
        assert len(limited) > (0.7 if connections == 10 else 0.4) * without
        assert not any(conn.closed for conn in connector.connections)
        assert connector.attempts == connections


async def test_after_one_refused_call_the_next_one_goes_to_another_connection():
    connector = Proxy()
    async with make_pool(connector) as pool:
        await fill_answered(pool, 2)
        async with pool.acquire() as conn:
            last = conn.connection
            last.refuses = TEXT
            with pytest.raises(ConnectionRefusedError):
                await conn.call("/a/b", b"?")
        async with pool.acquire(timeout=0) as conn:
            assert conn.connection is not last
        last.refuses = ""
        await anyio.sleep(0.4)
        async with pool.acquire() as first, pool.acquire() as second:
            assert {first.connection, second.connection} == {*connector.connections}
        assert connector.attempts == 2


async def test_an_answered_call_clears_a_refused_probe():
    connector = Proxy()
    options = {"max_connections": 1, "streams_per_connection": 3}
    async with make_pool(connector, **options) as pool, pool.acquire() as conn:
        link = connector.connections[0]

        async def refused(timeout):
            await anyio.sleep(3 * CALL)
            raise ConnectionRefusedError("a limit of probes")

        link.probe = refused
        link.refuses = "just this once"
        with pytest.raises(ConnectionRefusedError):
            await conn.call("/a/b", b"?")
        link.refuses = ""
        assert pool.status().suspect == 1
        assert await conn.call("/a/b", b"?") == b"?"
        await anyio.sleep(3 * CALL)
        assert pool.status().healthy_connections == 1


# -- connections that never answer ----------------------------------------------------


async def test_connections_that_end_before_an_answer_count_as_failed_attempts(caplog):
    connector = FakeConnector()
    pool = make_pool(connector, min_connections=2, eager_init=True)
    async with pool:
        for conn in connector.connections:
            conn.hung_up = True
        await anyio.sleep(1.01)
        failures = pool._counters.connect_failures
        assert failures == {"unanswered": 2}
        (line,) = lines(caplog)
        assert "closed it before or together with its first answer" in line
        await anyio.sleep(3)
        assert pool.status().total == 2


@pytest.mark.parametrize("answers", [False, True])
async def test_a_connection_lost_during_its_first_call_counts_as_a_failure(
    answers,
):
    connector = FakeConnector()
    async with make_pool(connector, max_connections=1) as pool, pool.acquire() as conn:
        await anyio.sleep(20)  # so that it is old before any health check
        if answers:
            await conn.call("/a/b", b"?")
        conn.connection.alive = False
        with pytest.raises(ConnectionLost):
            await conn.call("/a/b", b"?")
        await anyio.sleep(1)
        assert pool._counters.connect_failures == ({} if answers else {"unanswered": 1})


async def test_an_idle_connection_closed_by_a_proxy_is_not_a_failure():
    connector = FakeConnector()
    pool = make_pool(connector, min_connections=1, eager_init=True)
    async with pool:
        await anyio.sleep(3)
        connector.connections[0].hung_up = True
        await anyio.sleep(1.01)
        assert connector.attempts == 2, "it was replaced at once"
        assert pool._counters.connect_failures == {}
        assert pool._counters.closes == {"lost": 1}


async def test_if_no_connection_answers_the_pool_is_failing_and_logs_it_once(caplog):
    connector = FakeConnector()
    async with make_pool(connector, max_connections=2) as pool:

        async def caller():
            while True:
                async with pool.acquire() as conn:
                    conn.connection.hung_up = True
                    with pytest.raises(ConnectionLost):
                        await conn.call("/a/b", b"?")

        with anyio.move_on_after(60):
            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(caller)
        assert len(lines(caplog)) == 1
        count = pool._counters.connect_failures["unanswered"]
        assert 100 < count == connector.attempts < 60 * 10
        # The last attempt may have just succeeded. Nothing else makes the pool healthy.
        status = pool.status()
        assert status.healthy == (status.healthy_connections > 0)


# -- connections closed in an orderly way ---------------------------------------------


@pytest.mark.costly
async def test_connections_that_end_after_an_answer_are_replaced_without_a_pause():
    connector = FakeConnector()
    async with make_pool(connector) as pool:
        answered, stopped = 0, False
        ends = {}

        async def caller():
            nonlocal answered
            while not stopped:
                async with pool.acquire() as conn:
                    await conn.call("/a/b", b"?")
                    await anyio.sleep(0.001)
                    answered += 1
                    number = conn.connection.number
                    ends[number] = ends.get(number, 0) + 1
                    conn.connection.hung_up = ends[number] == 10

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(caller)
            await anyio.sleep(0.3)
            stopped = True
        # Ten at a time, a millisecond each.
        assert answered >= 0.9 * 10 * 300
        assert pool._counters.connect_failures == {}
        assert pool._counters.connect_retries == 0
