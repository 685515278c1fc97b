"""Test how the pool handles a server that violates HTTP/2 and gRPC."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import asynccontextmanager

import anyio
import grpc
import pytest
from anyio.to_thread import run_sync

from fastapi_topaz import ConnectionPool
from fastapi_topaz._grpcio import failures as _failures
from kit.configs import POLICY, REQUEST, config_of
from kit.pools import fill
from kit.waiting import eventually


pytestmark = pytest.mark.real_clock

# Far longer than a test takes: a caller that waits so long got no answer.
PATIENCE = 20.0

NO_ERROR, INTERNAL_ERROR, CANCEL, ENHANCE_YOUR_CALM = 0, 2, 8, 11


@asynccontextmanager
async def opened(http2_server, **options):
    """Open a pool to *server* that makes no connection before its use."""
    pool = ConnectionPool(
        **{"min_connections": 0, "acquire_timeout": PATIENCE, **options}
    )
    pool.configure(http2_server.options)
    # Seconds after a loss the pool replaces the other connections to spread load. Here
    # every connection counts.
    pool._connector.spreads = False
    # The first probes of new connections are off too, so that each call is counted.
    pool._connector.probes = False
    with anyio.fail_after(PATIENCE):
        async with pool:
            yield pool


async def call(pool, timeout=PATIENCE):
    """Make one call, and return the name of its status."""
    async with pool.acquire() as conn:
        try:
            decisions = await conn.decisions(policy_path=POLICY, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            return error.code().name
    assert decisions == {"allowed": True}
    return "OK"


async def check(pool):
    """Make one check as an application does."""
    return await config_of(pool, check_timeout=PATIENCE).is_allowed(REQUEST, POLICY)


@asynccontextmanager
async def on_hold(http2_server, ask, number):
    """Hold *number* calls at the server, and yield their outcomes."""
    ends = []

    async def one():
        ends.append(await ask())

    http2_server.hold()
    async with anyio.create_task_group() as tasks:
        for _ in range(number):
            tasks.start_soon(one)
        await eventually(lambda: http2_server.in_flight == number, PATIENCE)
        yield ends


def hold_no_more(http2_server):
    """Answer the next calls, and not the held calls."""
    http2_server._run(lambda: setattr(http2_server, "_is_holding", False))


def only(method, code):
    """Return a script that answers *method* with *code*, and other methods with OK."""

    def answer(call):
        if call.method == method:
            call.fail(code.value[0], "not now")
        else:
            call.reply()

    return answer


def closed_as_broken(pool):
    """Return how many connections were closed, and check that all of them broke."""
    closes = pool._counters.closes
    # Usually the channel notices the lost socket when a call fails. If the call is
    # faster, a probe finds out.
    assert set(closes) <= {"lost", "unhealthy"}
    return sum(closes.values())


def assert_untouched(pool, http2_server, connections=1):
    """Assert that no connection was closed, made, suspected or probed."""
    status = pool.status()
    assert pool._counters.closes == {}
    assert http2_server.accepted == http2_server.open == connections
    assert status.healthy_connections == status.total == connections
    assert status.suspect == 0
    assert http2_server.calls["Info"] == 0


# -- a truncated answer --------------------------------------------------------------


async def test_a_truncated_answer_fails_one_call_and_retires_its_connection(
    http2_server,
):
    # Calls in flight on other connections are answered, and these connections stay.
    async with opened(http2_server, max_connections=3) as pool:
        async with on_hold(http2_server, lambda: call(pool), 3) as ends:
            http2_server.truncate(1)
            http2_server.let_go()
        assert Counter(ends) == {"UNAVAILABLE": 1, "OK": 2}
        await eventually(lambda: closed_as_broken(pool) == 1, PATIENCE)
        await eventually(lambda: pool.status().healthy_connections == 2, PATIENCE)
        assert await call(pool) == "OK"
        assert closed_as_broken(pool) == 1


async def test_the_retry_lets_checks_survive_a_truncated_answer(http2_server):
    # All calls in flight on the connection fail, and each check is retried.
    options = {"max_connections": 2, "streams_per_connection": 4}
    async with opened(http2_server, **options) as pool:
        async with on_hold(http2_server, lambda: check(pool), 3) as ends:
            assert http2_server.accepted == 1
            http2_server.truncate(1)
            hold_no_more(http2_server)
            assert await check(pool)
        assert ends == [True] * 3
        assert http2_server.calls["Is"] == 2 * 4
        await eventually(lambda: closed_as_broken(pool) == 1, PATIENCE)


# -- one stream is reset -------------------------------------------------------------


async def test_a_refused_stream_fails_one_call_and_spares_the_connection(http2_server):
    # The other calls on the same connection are answered.
    options = {"max_connections": 1, "streams_per_connection": 3}
    async with opened(http2_server, **options) as pool:
        async with on_hold(http2_server, lambda: call(pool), 3) as ends:
            http2_server.refuse_streams(1)
            http2_server.let_go()
        assert Counter(ends) == {"UNAVAILABLE": 1, "OK": 2}
        assert await call(pool) == "OK"
        assert_untouched(pool, http2_server)


@pytest.mark.parametrize("times", [1, 3])
async def test_checks_with_refused_streams_are_retried_on_the_same_connection(
    http2_server, times
):
    # Each check is refused once, and its second answer counts.
    options = {"max_connections": 1, "streams_per_connection": 3}
    async with opened(http2_server, **options) as pool:
        async with on_hold(http2_server, lambda: check(pool), 3) as ends:
            http2_server.refuse_streams(times)
            http2_server.let_go()
        assert ends == [True] * 3
        assert http2_server.calls == {"Is": 3 + times}
        assert_untouched(pool, http2_server)


@pytest.mark.parametrize(
    "error_code, status",
    [
        (NO_ERROR, "INTERNAL"),
        (INTERNAL_ERROR, "INTERNAL"),
        (CANCEL, "CANCELLED"),
        (ENHANCE_YOUR_CALM, "RESOURCE_EXHAUSTED"),
    ],
)
async def test_a_stream_reset_with_any_code_spares_the_connection(
    http2_server, error_code, status
):
    # The connection is leased again without a probe, after each reset.
    options = {"max_connections": 1, "streams_per_connection": 2}
    async with opened(http2_server, **options) as pool:
        http2_server.reset_streams(5, error_code)
        assert [await call(pool) for _ in range(5)] == [status] * 5
        assert await call(pool) == "OK"
        assert (http2_server.resets, http2_server.calls) == (5, {"Is": 6})
        assert_untouched(pool, http2_server)


async def test_a_check_with_a_stream_cancelled_by_the_server_is_retried(
    http2_server,
):
    # A server does that at a shutdown to calls that it has not begun.
    async with opened(http2_server, max_connections=1) as pool:
        http2_server.reset_streams(1, CANCEL)
        assert await check(pool)
        assert http2_server.calls == {"Is": 2}
        assert_untouched(pool, http2_server)


@pytest.mark.grpcio
@pytest.mark.parametrize(
    "early, statuses",
    [
        (PATIENCE, ["DEADLINE_EXCEEDED", "INTERNAL", "CANCELLED"]),
        (0.01, ["CANCELLED", "INTERNAL", "CANCELLED"]),
    ],
)
async def test_a_stream_cancelled_at_its_deadline_is_deadline_exceeded(
    http2_server, early, statuses, monkeypatch
):
    """A server on grpc-go does that, and may be faster than gRPC's own timer."""
    monkeypatch.setattr(_failures, "_EARLY", early)  # any time is the deadline, or none
    async with opened(http2_server, max_connections=1) as pool:
        found = []
        for code, deadline in [(CANCEL, 9), (NO_ERROR, 9), (CANCEL, None)]:
            http2_server.reset_streams(1, code)
            found.append(await call(pool, deadline))
        assert found == statuses


# -- GOAWAY --------------------------------------------------------------------------


@pytest.mark.parametrize("error_code", [NO_ERROR, ENHANCE_YOUR_CALM])
async def test_goaway_lets_calls_finish_and_ends_leasing_of_the_connection(
    http2_server, error_code
):
    """
    "too_many_pings" (ENHANCE_YOUR_CALM) ends a connection in the same way.

    That GOAWAY asks for a longer keepalive interval. gRPC's core handles this: it
    doubles the interval of the channel by itself. The pool does nothing.
    """
    # The pool leases no free stream of the old connection, and makes a new connection.
    options = {"max_connections": 4, "streams_per_connection": 5}
    async with opened(http2_server, **options) as pool:
        async with on_hold(http2_server, lambda: call(pool), 3) as ends:
            (old,) = pool._open_pool.state.open
            link = old.connection
            await run_sync(http2_server.goaway, error_code)
            await eventually(link.is_lost, PATIENCE)
            leases = [await pool.acquire() for _ in range(5)]
            assert all(conn.connection is not link for conn in leases)
            assert (pool.status().leaving, pool._counters.closes) == (1, {})
            assert ends == []
            for conn in leases:
                await pool.release(conn)
            http2_server.let_go()
        assert ends == ["OK"] * 3
        await eventually(lambda: pool._counters.closes == {"lost": 1}, PATIENCE)
        await eventually(lambda: http2_server.open == 1, PATIENCE)
        assert (http2_server.accepted, http2_server.calls["Is"]) == (2, 3)
        assert await call(pool) == "OK"


async def test_an_idle_pool_replaces_a_connection_after_goaway(http2_server):
    # No caller is needed: the pool keeps its minimum.
    async with opened(http2_server, min_connections=2, eager_init=True) as pool:
        await run_sync(http2_server.goaway, NO_ERROR)
        await eventually(lambda: pool._counters.closes == {"lost": 2}, PATIENCE)
        await eventually(lambda: pool.status().healthy_connections == 2, PATIENCE)
        assert await call(pool) == "OK"
        assert http2_server.accepted == 4


async def test_repeated_goaway_fails_no_check_and_starts_no_reconnect_storm(
    http2_server,
):
    # Each GOAWAY costs no more connections than existed. If a call has just begun, gRPC
    # makes one more connection or fails the call. The check is then retried.
    answers = Counter()
    stopped = False
    script, most = [NO_ERROR, ENHANCE_YOUR_CALM, ENHANCE_YOUR_CALM], 3
    options = {"max_connections": most, "streams_per_connection": 4}
    async with opened(http2_server, **options) as pool:

        async def user(number):
            while not stopped:
                assert await check(pool)
                answers[number] += 1

        async def more():
            # The second call began after this point, so no call gets two GOAWAYs.
            goals = {number: answers[number] + 2 for number in range(10)}
            await eventually(lambda: answers >= Counter(goals), PATIENCE)

        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(user, number)
            await more()
            for error_code in script:
                await run_sync(http2_server.goaway, error_code)
                await more()
            stopped = True
        assert pool._counters.connects <= most * (1 + len(script))
        assert http2_server.accepted <= 2 * most * (1 + len(script))


# -- the limit of streams ------------------------------------------------------------


@pytest.mark.grpcio
@pytest.mark.parametrize("limit", [1, 2])
async def test_calls_beyond_the_servers_limit_wait_for_their_turn(http2_server, limit):
    # No call fails, even if the limit is lower than the number of concurrent calls.
    http2_server.set_max_concurrent_streams(limit)
    options = {"max_connections": 2, "streams_per_connection": 10}
    async with opened(http2_server, **options) as pool:
        ends = []
        await fill(pool, 11)

        async def one():
            ends.append(await call(pool))

        http2_server.hold()
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(one)
            await eventually(lambda: http2_server.in_flight == 2 * limit, PATIENCE)
            http2_server.let_go()
        assert ends == ["OK"] * 20
        assert http2_server.max_concurrent_seen == limit
        assert_untouched(pool, http2_server, connections=2)


@pytest.mark.grpcio
async def test_a_call_beyond_the_limit_ends_with_its_deadline(http2_server):
    # The connection is not considered dead, because the earlier call was answered.
    http2_server.set_max_concurrent_streams(1)
    options = {"max_connections": 1, "streams_per_connection": 2}
    async with opened(http2_server, **options) as pool:
        async with on_hold(http2_server, lambda: call(pool), 1) as ends:
            assert await call(pool, timeout=0.05) == "DEADLINE_EXCEEDED"
            http2_server.let_go()
        assert ends == ["OK"]
        assert http2_server.calls == {"Is": 1}
        assert await call(pool) == "OK"
        assert_untouched(pool, http2_server)


@pytest.mark.grpcio
async def test_the_limit_of_streams_may_rise_and_fall_under_calls(http2_server):
    # Calls in flight stay, and the next calls respect the new limit.
    http2_server.set_max_concurrent_streams(1)
    options = {"max_connections": 1, "streams_per_connection": 6}
    async with opened(http2_server, **options) as pool:
        ends = []

        async def one():
            ends.append(await call(pool))

        async with anyio.create_task_group() as tasks:
            http2_server.hold()
            for _ in range(3):
                tasks.start_soon(one)
            await eventually(lambda: http2_server.in_flight == 1, PATIENCE)
            http2_server.set_max_concurrent_streams(4)
            # gRPC uses a raised limit only from the next call on.
            tasks.start_soon(one)
            await eventually(lambda: http2_server.in_flight == 4, PATIENCE)
            http2_server.set_max_concurrent_streams(2)
            http2_server.let_go()
            await eventually(lambda: len(ends) == 4, PATIENCE)
            assert http2_server.max_concurrent_seen == 4
            http2_server.max_concurrent_seen = 0
            for _ in range(6):
                tasks.start_soon(one)
        assert ends == ["OK"] * 10
        assert http2_server.max_concurrent_seen <= 2
        assert_untouched(pool, http2_server)


# -- answers that are errors ---------------------------------------------------------


async def test_a_probe_answered_with_an_error_counts_as_answered(http2_server):
    # Several rounds close no connection: an error status shows that the server is
    # alive.
    noes = [
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.NOT_FOUND,
    ]
    turn = itertools.cycle(noes)
    async with opened(http2_server, health_check_interval=0.05) as pool:
        await fill(pool, 2)
        http2_server._script(lambda call: call.fail(next(turn).value[0], "no"), None)
        await eventually(lambda: http2_server.calls["Info"] >= 2 * len(noes), PATIENCE)
        assert pool._counters.probe_failures == 0
        assert pool._counters.closes == {}
        assert pool.status().healthy_connections == 2
        http2_server.heal()
        assert await call(pool) == "OK"
        assert http2_server.accepted == 2


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAUTHENTICATED,
    ],
)
async def test_an_error_status_reaches_the_caller_and_causes_no_suspicion(
    http2_server, code
):
    # An error status is an answer, so a check is not retried either.
    async with opened(http2_server, max_connections=2) as pool:
        await fill(pool, 2)
        http2_server.status(code, "because of the moon", times=4)
        for _ in range(2):
            assert await call(pool) == code.name
            with pytest.raises(grpc.aio.AioRpcError, match="because of the moon") as no:
                await check(pool)
            assert no.value.code() is code
        assert http2_server.calls == {"Is": 4}
        assert await check(pool)
        assert_untouched(pool, http2_server, connections=2)


@pytest.mark.grpcio
async def test_a_too_large_answer_fails_only_its_caller(
    http2_server,
):
    # Small answers on the same connection arrive meanwhile and afterwards.
    options = {"max_connections": 1, "streams_per_connection": 3}
    async with opened(http2_server, **options) as pool:
        async with on_hold(http2_server, lambda: call(pool), 3) as ends:
            http2_server.answer_size(5 * 2**20, times=1)
            http2_server.let_go()
        assert Counter(ends) == {"RESOURCE_EXHAUSTED": 1, "OK": 2}
        http2_server.answer_size(5 * 2**20, times=1)
        with pytest.raises(grpc.aio.AioRpcError, match="larger than max"):
            await check(pool)
        assert await check(pool)
        assert_untouched(pool, http2_server)


async def test_an_unavailable_method_costs_no_connection(http2_server):
    # Each time another method probes the connection, and the connection serves again.
    async with opened(http2_server, max_connections=1) as pool:
        http2_server._script(only("Is", grpc.StatusCode.UNAVAILABLE), None)
        for n in range(10):
            assert await call(pool) == "UNAVAILABLE"
            assert pool.status().suspect == 1
            await eventually(lambda n=n: http2_server.calls["Info"] == n + 1, PATIENCE)
        http2_server.heal()
        assert await check(pool)
        assert pool._counters.closes == {}
        assert (http2_server.accepted, pool._counters.probe_failures) == (1, 0)


async def test_many_checks_of_an_unavailable_method_start_no_storm(http2_server):
    # Each check is sent twice, and the pool stays within its maximum of connections.
    ends = []
    options = {"max_connections": 3, "streams_per_connection": 5}
    async with opened(http2_server, **options) as pool:
        http2_server._script(only("Is", grpc.StatusCode.UNAVAILABLE), None)

        async def user():
            for _ in range(5):
                with pytest.raises(grpc.aio.AioRpcError, match="not now") as caught:
                    await check(pool)
                ends.append(caught.value.code())

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(user)
        assert ends == [grpc.StatusCode.UNAVAILABLE] * 50
        assert http2_server.calls["Is"] == 2 * 50
        assert http2_server.accepted <= 3
        assert (pool._counters.closes, pool._counters.connect_failures) == ({}, {})
        http2_server.heal()
        assert await check(pool)


async def test_a_check_that_is_unavailable_once_is_retried(http2_server):
    # The connection first answers its probe, and then the retry.
    async with opened(http2_server, max_connections=1) as pool:
        http2_server.status(grpc.StatusCode.UNAVAILABLE, "starting", times=1)
        assert await check(pool)
        assert http2_server.calls == {"Is": 2, "Info": 1}
        assert (http2_server.accepted, pool._counters.closes) == (1, {})
