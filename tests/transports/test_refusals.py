"""Test how the pool handles answers of a proxy whose server is down: real sockets."""

from __future__ import annotations

import itertools
import logging

import anyio
import grpc
import pytest
from hyperframe.frame import GoAwayFrame

from fastapi_topaz import (
    ConnectFailed,
    ConnectionPool,
)
from fastapi_topaz._rpc.statuses import is_unprocessed
from kit.backends import alternating
from kit.configs import POLICY, REQUEST
from kit.faultkit.unavailable import headers, http, trailers
from kit.network import patient_config
from kit.waiting import eventually


pytestmark = pytest.mark.real_clock

PATIENCE = 20.0


def make_unspread(lenient_http2_server, **options):
    pool = ConnectionPool(**{"min_connections": 0, **options})
    pool.configure(lenient_http2_server.options)
    pool._connector.spreads = False
    return pool


async def ask(pool):
    async with pool.acquire() as conn:
        return await conn.decisions(policy_path=POLICY, timeout=PATIENCE)


async def recovers(pool):
    """Make calls until a probe that was refused before has ended too."""
    with anyio.fail_after(PATIENCE):
        while True:
            try:
                assert await ask(pool) == {"allowed": True}
            except ConnectFailed:
                continue
            return


def goaway(call):
    """End the connection without having processed the call."""
    call.connection.flush()
    frame = GoAwayFrame(0, call.stream - 2 if call.stream > 1 else 0, 0, b"bye")
    call.connection.transport.write(frame.serialize())
    call.connection.forget(call.stream)


REFUSALS = {
    **{f"HTTP {n}": (http(n), f"{n}") for n in (429, 500, 502, 503, 504, 403, 404)},
    "HTTP 503 with a page": (http(503, body=b"<html>503</html>"), "503"),
    "HTTP 200 with a page": (http(200, body=b"<html>moved</html>"), "gRPC status"),
    "HTTP 200 without a status": (http(200, "application/grpc"), "gRPC status|status"),
    "headers": (headers("no healthy upstream"), "no healthy upstream"),
    "trailers": (trailers("no healthy upstream"), "no healthy upstream"),
    "no text": (headers(""), "UNAVAILABLE"),
    # Error texts of gRPC that a proxy forwards from its own connection to the server.
    "Socket closed": (headers("Socket closed"), "Socket closed"),
    "Stream removed": (headers("Stream removed (Socket closed)"), "Socket closed"),
    "reset": (
        headers("upstream connect error. reset reason: Connection reset by peer"),
        "Connection reset",
    ),
    "Go": (
        headers("stream terminated by RST_STREAM with error code: REFUSED_STREAM"),
        "RST_STREAM",
    ),
    "connect": (headers("failed to connect to all addresses"), "failed to connect"),
    "GOAWAY": (headers("GOAWAY received; Error code: 0"), "GOAWAY"),
    "streams are reset": (lambda call: call.reset(2), "RST_STREAM"),
}


# Each case takes more than a second, so by default some run on one backend only.
ON_BOTH = {"HTTP 503", "HTTP 200 with a page", "headers", "trailers", "GOAWAY"}
ON_BOTH |= {"HTTP 200 without a status", "streams are reset"}


@alternating(REFUSALS, on_both=ON_BOTH)
async def test_a_proxy_answer_is_an_outage_and_closes_no_connection(
    lenient_http2_server, name, caplog
):
    refuse, text = REFUSALS[name]
    async with make_unspread(
        lenient_http2_server, max_connections=3, health_check_interval=0.2
    ) as pool:
        await ask(pool)
        lenient_http2_server._script(refuse, None)
        await eventually(lambda: not pool.status().healthy, PATIENCE)
        assert pool.status().total >= 1
        with anyio.fail_after(2), pytest.raises(ConnectFailed, match=text) as caught:
            await ask(pool)
        assert caught.value.reason == "unavailable"
        assert isinstance(caught.value.__cause__.__cause__, grpc.aio.AioRpcError)
        assert pool._counters.closes == {}
        lines = [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert len(lines) == 1
        lenient_http2_server.heal()
        await recovers(pool)
        await eventually(lambda: pool.status().suspect == 0, PATIENCE)
        assert pool._counters.closes == {}
        assert (
            lenient_http2_server.accepted
            == lenient_http2_server.open
            == pool.status().total
        )


@pytest.mark.parametrize("name", ["HTTP 502", "headers"])
async def test_a_pool_opened_during_an_outage_keeps_its_connections(
    lenient_http2_server, name
):
    refuse, text = REFUSALS[name]
    lenient_http2_server._script(refuse, None)
    pool = make_unspread(
        lenient_http2_server, min_connections=1, max_connections=2, eager_init=True
    )
    with anyio.fail_after(PATIENCE):
        async with pool:
            assert not pool.status().healthy
            for _ in range(5):
                with pytest.raises(ConnectFailed, match=text):
                    await ask(pool)
            assert lenient_http2_server.accepted <= 2
            assert pool._counters.closes == {}
            lenient_http2_server.heal()
            await recovers(pool)


async def test_a_refused_check_is_retried_on_a_connection_without_a_refusal(
    lenient_http2_server,
):
    async with make_unspread(lenient_http2_server, max_connections=2) as pool:
        leases = [await pool.acquire() for _ in range(2)]
        for conn in leases:
            await pool.release(conn)
        lenient_http2_server.status(grpc.StatusCode.UNAVAILABLE, "just once", times=1)
        assert await patient_config(pool).is_allowed(REQUEST, POLICY)
        assert lenient_http2_server.calls["Is"] == 2
        assert pool._counters.retries == 1
        assert pool._counters.closes == {}


@pytest.mark.parametrize(
    "refuse, text, is_logged",
    [
        (headers("no\nupstream for jane.doe"), "no upstream for jane.doe", False),
        (http(502), "status: 502", True),
    ],
)
async def test_the_details_of_a_proxy_reach_the_caller_and_not_the_log(
    lenient_http2_server, caplog, refuse, text, is_logged
):
    async with make_unspread(lenient_http2_server, max_connections=1) as pool:
        await recovers(pool)
        lenient_http2_server._script(refuse, None)
        for _ in range(2):
            with pytest.raises((grpc.aio.AioRpcError, ConnectFailed)):
                await ask(pool)
        with pytest.raises(ConnectFailed, match=text):
            await ask(pool)
        lines = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(lines) == 1
        assert (text in lines[0]) is is_logged
        assert "jane" not in caplog.text


async def test_a_rate_limit_closes_no_connection(lenient_http2_server):
    turn, lines = itertools.count(1), []

    def limited(call):
        if next(turn) % 10 == 0:
            http(429)(call)
        else:
            call.reply()

    async with make_unspread(lenient_http2_server, max_connections=5) as pool:
        lenient_http2_server._script(limited, None)

        async def user():
            for _ in range(60):
                try:
                    await ask(pool)
                except grpc.aio.AioRpcError as error:
                    lines.append(error.details())
                assert pool.status().healthy

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(user)
        assert lines
        assert all("429" in line for line in lines)
        assert (pool._counters.closes, pool._counters.failed) == ({}, 0)
        assert lenient_http2_server.accepted == 5


# -- a server that is not an authorizer -----------------------------------------------


async def test_a_server_without_the_authorizer_fails_at_once_and_permanently(
    embedded_authorizer, caplog
):
    embedded_authorizer.fail("UNIMPLEMENTED")
    pool = ConnectionPool(min_connections=1, eager_init=True)
    pool.configure(embedded_authorizer.options)
    with anyio.fail_after(PATIENCE):
        async with pool:
            with pytest.raises(ConnectFailed, match="not an authorizer") as caught:
                await pool.acquire()
            assert caught.value.permanent
            assert not pool.status().healthy
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any(
        "at startup" in line and "not an authorizer" in line for line in warnings
    )
    assert embedded_authorizer.calls["Info"] >= 1
    assert "Is" not in embedded_authorizer.calls
    await eventually(lambda: embedded_authorizer.connections_open == 0)


async def test_a_connection_counts_after_its_first_probe_is_answered(
    lenient_http2_server,
):
    async with make_unspread(lenient_http2_server) as pool:
        lenient_http2_server.hold()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, pool)
            await eventually(lambda: lenient_http2_server.in_flight == 1, PATIENCE)
            assert (pool.status().connecting, pool.status().total) == (1, 0)
            lenient_http2_server.let_go()
        assert lenient_http2_server.calls == {"Info": 1, "Is": 1}


async def test_a_connection_that_ends_in_its_first_probe_is_a_failed_attempt(
    lenient_http2_server,
):
    async with make_unspread(lenient_http2_server, max_retries=0) as pool:
        lenient_http2_server._script(
            lambda call: call.connection.transport.abort(), None
        )
        with pytest.raises(ConnectFailed, match="before the first answer") as no:
            await ask(pool)
        assert no.value.reason == "unanswered"
        assert pool._counters.connect_failures["unanswered"] >= 1
        assert pool._counters.connects == 0


async def test_a_connection_without_an_answer_in_time_is_a_failed_attempt(
    lenient_http2_server,
):
    async with make_unspread(
        lenient_http2_server, max_retries=0, connection_timeout=0.2
    ) as pool:
        lenient_http2_server.hold()
        with pytest.raises(ConnectFailed, match=r"did not answer.*0\.2 s") as no:
            await ask(pool)
        assert no.value.reason == "timeout"
        lenient_http2_server.let_go()


async def test_closing_the_pool_closes_a_connection_in_its_first_probe(
    lenient_http2_server,
):
    pool = make_unspread(lenient_http2_server)
    async with anyio.create_task_group() as tasks:
        lenient_http2_server.hold()

        async def caller():
            with pytest.raises(Exception, match="closed"):
                await ask(pool)

        tasks.start_soon(caller)
        await eventually(lambda: lenient_http2_server.in_flight == 1, PATIENCE)
        await pool.close()
    await eventually(lambda: lenient_http2_server.open == 0, PATIENCE)


# -- calls that were certainly not processed ------------------------------------------


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("how", ["REFUSED_STREAM", "GOAWAY"])
async def test_an_unprocessed_check_is_resent_without_using_its_retry(
    lenient_http2_server, times, how
):
    async with make_unspread(lenient_http2_server, max_connections=2) as pool:
        await ask(pool)
        before, turn = lenient_http2_server.calls["Is"], itertools.count(1)

        def unwilling(call):
            if call.method == "Is" and next(turn) <= times:
                goaway(call) if how == "GOAWAY" else call.reset(7)
            else:
                call.reply()

        lenient_http2_server._script(unwilling, None)
        with anyio.fail_after(PATIENCE):
            assert await patient_config(pool).is_allowed(REQUEST, POLICY)
        assert lenient_http2_server.calls["Is"] == before + times + 1
        assert pool._counters.connect_failures == {}


async def test_free_resends_slow_down_and_end_with_the_budget(lenient_http2_server):
    async with make_unspread(lenient_http2_server, max_connections=1) as pool:
        await ask(pool)
        before = lenient_http2_server.calls["Is"]
        lenient_http2_server.refuse_streams()
        config = patient_config(pool, check_timeout=0.5)
        with anyio.fail_after(PATIENCE), pytest.raises(grpc.aio.AioRpcError) as no:
            await config.is_allowed(REQUEST, POLICY)
        assert is_unprocessed(no.value)
        # Two at once, then after 0.01, 0.02, 0.04, 0.08 and 0.16 s.
        assert 3 <= lenient_http2_server.calls["Is"] - before <= 8


def test_only_a_grpc_error_counts_as_unprocessed():
    assert not is_unprocessed(ConnectFailed("GOAWAY received"))
