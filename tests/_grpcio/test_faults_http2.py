"""What the pool makes of a server that breaks the promises of HTTP/2 and gRPC."""

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

# Far beyond what a test takes: who waits so long got no answer.
PATIENCE = 20.0

NO_ERROR, INTERNAL_ERROR, CANCEL, ENHANCE_YOUR_CALM = 0, 2, 8, 11


@asynccontextmanager
async def opened(http2_server, **options):
    """Open a pool to *server*, and make none of its connections before their use."""
    pool = ConnectionPool(
        **{"min_connections": 0, "acquire_timeout": PATIENCE, **options}
    )
    pool.configure(http2_server.options)
    # Seconds after a loss the others are replaced to spread the load; here they count.
    pool._connector.spreads = False
    # Nor are the first probes of new connections, so that each call is counted.
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
    """Have *number* calls wait at the server, and yield how they end."""
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
    """Answer the next calls, but not those on hold."""
    http2_server._run(lambda: setattr(http2_server, "_is_holding", False))


def only(method, code):
    """Return a script that answers *method* with *code*, and all others well."""

    def answer(call):
        if call.method == method:
            call.fail(code.value[0], "not now")
        else:
            call.reply()

    return answer


def closed_as_broken(pool):
    """Return how many connections were closed, all of them because they broke."""
    closes = pool._counters.closes
    # Mostly the channel knows that its socket is gone when a call has failed by it; if
    # the call is faster, a probe finds out.
    assert set(closes) <= {"lost", "unhealthy"}
    return sum(closes.values())


def assert_untouched(pool, http2_server, connections=1):
    """No connection was closed, made, suspected or probed."""
    status = pool.status()
    assert pool._counters.closes == {}
    assert http2_server.accepted == http2_server.open == connections
    assert status.healthy_connections == status.total == connections
    assert status.suspect == 0
    assert http2_server.calls["Info"] == 0


# -- an answer that breaks off -------------------------------------------------------


async def test_a_truncated_answer_fails_one_call_and_its_connection_leaves(
    http2_server,
):
    # Calls in flight on other connections are answered, and those connections stay.
    async with opened(http2_server, max_connections=3) as pool:
        async with on_hold(http2_server, lambda: call(pool), 3) as ends:
            http2_server.truncate(1)
            http2_server.let_go()
        assert Counter(ends) == {"UNAVAILABLE": 1, "OK": 2}
        await eventually(lambda: closed_as_broken(pool) == 1, PATIENCE)
        await eventually(lambda: pool.status().healthy_connections == 2, PATIENCE)
        assert await call(pool) == "OK"
        assert closed_as_broken(pool) == 1


async def test_checks_survive_a_truncated_answer_by_their_retry(http2_server):
    # All that are in flight on the connection break off, and each is asked again.
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
async def test_refused_checks_are_asked_again_on_the_same_connection(
    http2_server, times
):
    # Each is refused once, and the second answer counts.
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
async def test_a_stream_that_is_reset_for_any_reason_spares_the_connection(
    http2_server, error_code, status
):
    # It is leased again without a probe, however often that happens.
    options = {"max_connections": 1, "streams_per_connection": 2}
    async with opened(http2_server, **options) as pool:
        http2_server.reset_streams(5, error_code)
        assert [await call(pool) for _ in range(5)] == [status] * 5
        assert await call(pool) == "OK"
        assert (http2_server.resets, http2_server.calls) == (5, {"Is": 6})
        assert_untouched(pool, http2_server)


async def test_a_check_whose_stream_is_cancelled_by_the_server_is_asked_again(
    http2_server,
):
    # A server does that to what it has not begun when it stops.
    async with opened(http2_server, max_connections=1) as pool:
        http2_server.reset_streams(1, CANCEL)
        assert await check(pool)
        assert http2_server.calls == {"Is": 2}
        assert_untouched(pool, http2_server)


@pytest.mark.parametrize(
    "early, statuses",
    [
        (PATIENCE, ["DEADLINE_EXCEEDED", "INTERNAL", "CANCELLED"]),
        (0.01, ["CANCELLED", "INTERNAL", "CANCELLED"]),
    ],
)
async def test_a_stream_that_is_cancelled_at_its_deadline_ends_by_its_deadline(
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
async def test_goaway_lets_calls_finish_and_the_connection_is_leased_no_more(
    http2_server, error_code
):
    """
    That goes for "too_many_pings" as well (ENHANCE_YOUR_CALM).

    The longer keepalive interval which it asks for is the business of gRPC's core: it
    doubles the interval of the channel by itself, and the pool has no part in it.
    """
    # The free streams of the old connection are not used, and a new one is made.
    options = {"max_connections": 4, "streams_per_connection": 5}
    async with opened(http2_server, **options) as pool:
        async with on_hold(http2_server, lambda: call(pool), 3) as ends:
            (old,) = pool._open_pool.state.open
            link = old.connection
            http2_server.goaway(error_code)
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


async def test_an_idle_pool_replaces_what_was_told_to_go_away(http2_server):
    # Nobody has to ask for it: the minimum is kept.
    async with opened(http2_server, min_connections=2, eager_init=True) as pool:
        http2_server.goaway(NO_ERROR)
        await eventually(lambda: pool._counters.closes == {"lost": 2}, PATIENCE)
        await eventually(lambda: pool.status().healthy_connections == 2, PATIENCE)
        assert await call(pool) == "OK"
        assert http2_server.accepted == 4


async def test_goaway_again_and_again_fails_no_check_and_starts_no_storm(http2_server):
    # Each costs no more connections than there were. Under a call that has just begun
    # gRPC makes one more by itself, or fails it, and then the check is asked again.
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
            # The second one was asked after this began: none meets two GOAWAYs.
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


@pytest.mark.parametrize("limit", [1, 2])
async def test_calls_beyond_the_servers_limit_wait_for_their_turn(http2_server, limit):
    # None fails, also when the limit is lower than what the pool would send at once.
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


async def test_a_call_beyond_the_limit_ends_with_its_deadline(http2_server):
    # The connection is not held to be dead, because the call before was answered.
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


async def test_the_limit_of_streams_may_rise_and_fall_under_calls(http2_server):
    # What is in flight stays, and the next calls keep to the new limit.
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
            # gRPC makes use of a raised limit no sooner than with the next call.
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


async def test_a_probe_that_is_answered_with_an_error_is_answered(http2_server):
    # Several rounds close nothing: who says no is alive, whatever the words.
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
async def test_an_error_status_reaches_the_caller_and_nobody_is_suspected(
    http2_server, code
):
    # It is an answer, so a check is not repeated either.
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


async def test_an_answer_that_is_too_large_fails_its_caller_and_nobody_else(
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


async def test_one_method_that_is_unavailable_costs_no_connection(http2_server):
    # Each time the connection is probed by another method, and serves again.
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


async def test_many_checks_by_a_method_that_is_unavailable_are_no_storm(http2_server):
    # Each is asked twice, and the pool makes no more connections than it may.
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


async def test_a_check_that_is_unavailable_once_is_asked_again(http2_server):
    # The connection answers its probe first, and then the second time.
    async with opened(http2_server, max_connections=1) as pool:
        http2_server.status(grpc.StatusCode.UNAVAILABLE, "starting", times=1)
        assert await check(pool)
        assert http2_server.calls == {"Is": 2, "Info": 1}
        assert (http2_server.accepted, pool._counters.closes) == (1, {})
