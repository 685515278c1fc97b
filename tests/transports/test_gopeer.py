"""
Test the pool against a server on grpc-go, as Topaz is.

The other servers of these tests run on Python, with the HTTP/2 library of the client.
A Go server differs in how it sends GOAWAY, how it limits streams and sizes, and how it
treats clients that ping too often.
"""

from __future__ import annotations

import contextlib
import os
import signal
from contextlib import asynccontextmanager

import anyio
import attrs
import grpc
import pytest
import trustme
from anyio.to_thread import run_sync

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectFailed,
    ConnectionPool,
    PoolError,
)
from fastapi_topaz._authorizer.messages import IS, is_request
from fastapi_topaz._grpcio import channel as _channel
from kit.backends import asyncio_only
from kit.configs import REQUEST, config_of
from kit.gopeer.process import Gopeer
from kit.waiting import eventually


pytestmark = [
    pytest.mark.real_clock,
    pytest.mark.slow,
    pytest.mark.skipif(
        "GOPEER" not in os.environ,
        reason="GOPEER does not name the server of tests/kit/gopeer: `nox -s gopeer`",
    ),
]

# Far longer than a test takes: a caller that waits so long got no answer.
PATIENCE = 30.0
# Seconds, with a margin: the pool spreads its connections 40 seconds after a loss.
THIRD_SPREAD = 45.0
USERS = 200
CONNECTIONS, STREAMS = 20, 10
ALLOWED, DENIED, HELD = (f"myapp.documents.{end}" for end in ("get", "denied", "held"))
CALM = "sent GOAWAY ENHANCE_YOUR_CALM"


@pytest.fixture
def peers():
    """Start servers, and check that none of them was pinged too often."""
    with contextlib.ExitStack() as running:
        started = []

        def start(**flags):
            started.append(running.enter_context(Gopeer(**flags)))
            return started[-1]

        yield start
        for peer in started:
            if peer.is_running:
                peer.send(signal.SIGCONT)  # a process that a failed test left frozen
                assert peer.count("Frames", CALM) == 0


@asynccontextmanager
async def opened(options, *peers, **settings):
    """Open a pool, and check that it leaves no socket at the *peers*."""
    settings = {"min_connections": 0, "acquire_timeout": PATIENCE} | settings
    pool = ConnectionPool(**settings)
    pool.configure(options)
    with anyio.fail_after(3 * PATIENCE):
        async with pool:
            yield pool
        for peer in peers:
            await eventually(lambda peer=peer: peer.count("Open") == 0)


def peer_config(pool, check_timeout=PATIENCE):
    return config_of(pool, policy_path_root="myapp", check_timeout=check_timeout)


async def raw(pool, policy=ALLOWED, timeout=PATIENCE):
    """Make a call on an explicit lease, without a retry."""
    async with pool.acquire() as conn:
        return await conn.decisions(policy_path=policy, timeout=timeout)


def kind(error):
    """Return the kind of an error as a word."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code().name
    if isinstance(error, ConnectFailed):
        return error.reason
    return type(error).__name__ if isinstance(error, PoolError) else repr(error)


class Traffic:
    """Users who make one request after another, and their outcomes."""

    def __init__(self, pool, check_timeout):
        self.pool = pool
        self.config = peer_config(pool, check_timeout)
        self.answered = 0
        self.time = "before"
        # Failures of checks and of calls on leases, each with the time of its request.
        self.failures = []
        self.lost = []
        self.stopped = False

    async def check(self):
        assert await self.config.is_allowed(REQUEST, ALLOWED)

    async def call(self):
        assert await raw(self.pool) == {"allowed": True}

    async def user(self, ask, failures):
        while not self.stopped:
            asked = self.time
            try:
                await ask()
            except Exception as error:  # noqa: BLE001  (kept, whatever it is)
                failures.append((asked, kind(error)))
                await anyio.sleep(0.01)
            else:
                self.answered += 1

    async def flows(self, checks=2 * USERS):
        """Wait until *checks* more requests are answered."""
        goal = self.answered + checks
        await eventually(lambda: self.answered >= goal, PATIENCE)

    def failed(self, time):
        """Return how many of the checks made in that time failed."""
        return sum(asked == time for asked, _ in self.failures)


@asynccontextmanager
async def traffic(options, *peers, leases=0, check_timeout=PATIENCE, **settings):
    """Let users make requests, *leases* of them on explicit leases."""
    settings = {
        "max_connections": CONNECTIONS,
        "streams_per_connection": STREAMS,
        "health_check_timeout": 0.5,
    } | settings
    async with opened(options, *peers, **settings) as pool:
        flow = Traffic(pool, check_timeout)
        async with anyio.create_task_group() as tasks:
            for number in range(USERS):
                if number < leases:
                    tasks.start_soon(flow.user, flow.call, flow.lost)
                else:
                    tasks.start_soon(flow.user, flow.check, flow.failures)
            await flow.flows()
            yield flow
            flow.stopped = True


def kinds(failures):
    return {what for _, what in failures}


def assert_untouched(pool, peer, connections=1):
    """Assert that no connection was closed, made or suspected."""
    assert pool._counters.closes == {}
    assert pool.status().suspect == 0
    assert peer.count("Accepted") == peer.count("Open") == connections


# -- answers ---------------------------------------------------------------------------


@pytest.mark.uvloop
async def test_a_grpc_go_server_decides_and_returns_its_version(peers):
    peer = peers()
    async with opened(peer.options, peer) as pool, pool.acquire() as conn:
        assert await conn.decisions(policy_path=ALLOWED) == {"allowed": True}
        names = ("allowed", "visible")
        decisions = await conn.decisions(policy_path=DENIED, decisions=names)
        assert decisions == dict.fromkeys(names, False)
        assert (await conn.info()).version == f"grpc-go {peer.version}"
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await conn.list_policies()
        assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert_untouched(pool, peer)


@pytest.fixture
def authority(tmp_path):
    """Make a CA and a certificate for the server, and return their paths."""
    ca = trustme.CA()
    server = ca.issue_cert("127.0.0.1")
    server.private_key_pem.write_to_path(tmp_path / "key.pem")
    for blob in server.cert_chain_pems:
        blob.write_to_path(tmp_path / "cert.pem", append=True)
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    return tmp_path


@pytest.mark.uvloop
async def test_tls_of_go_is_trusted_only_with_the_right_ca(authority, peers):
    peer = peers(tls_cert=authority / "cert.pem", tls_key=authority / "key.pem")

    def options(ca):
        return AuthorizerOptions(url=peer.url, cert_file_path=str(authority / ca))

    async with opened(options("ca.pem"), peer) as pool:
        assert await raw(pool) == {"allowed": True}
    async with opened(options("other.pem"), peer) as pool:
        with pytest.raises(ConnectFailed) as wrong:
            await raw(pool)
        assert (wrong.value.reason, wrong.value.permanent) == ("tls", True)
    async with opened(peer.options, peer) as pool:
        with pytest.raises(ConnectFailed):
            await raw(pool)


# -- sizes and limits ------------------------------------------------------------------


async def test_a_request_too_large_for_go_is_reported_and_costs_no_connection(peers):
    peer = peers()
    large = {"text": "x" * 5 * 2**20}
    options = attrs.evolve(peer.options, max_message_bytes=16 * 2**20)
    async with opened(options, peer) as pool:
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await peer_config(pool).is_allowed(
                    REQUEST, ALLOWED, resource_context=large
                )
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "received message larger than max" in refused.value.details()
            assert await raw(pool) == {"allowed": True}
        fits = {"text": "x" * (2**22 - 1024)}
        assert await peer_config(pool).is_allowed(
            REQUEST, ALLOWED, resource_context=fits
        )
        assert_untouched(pool, peer)


@pytest.mark.grpcio
async def test_metadata_too_long_for_go_ends_the_call_or_the_connection(
    peers,
):
    # gRPC's core sends each message, even if the server has announced a limit.
    peer, usual = peers(max_header=8192), peers()
    request = is_request(ALLOWED, ("allowed",), None, None, None, None)

    async def status(pool, metadata):
        try:
            async with pool.acquire() as conn:
                await conn.call(IS, request, metadata=metadata, timeout=PATIENCE)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    async with opened(usual.options, usual) as pool:
        assert await status(pool, [("x", "y" * 2**20)]) == "OK"
        assert_untouched(pool, usual)
    async with opened(peer.options, peer) as pool:
        many = [(f"x{i}", "y" * 900) for i in range(10)]
        assert await status(pool, many[:4]) == "OK"
        assert await status(pool, many) == "INTERNAL"
        assert await raw(pool) == {"allowed": True}
        assert_untouched(pool, peer)
        # The server does not even read it to its end.
        assert await status(pool, [("x", "y" * 9000)]) == "UNAVAILABLE"
        assert await raw(pool) == {"allowed": True}
        # The channel noticed it, or the probe did not get through.
        await eventually(lambda: sum(pool._counters.closes.values()) == 1)
        assert set(pool._counters.closes) <= {"lost", "unhealthy"}
        await eventually(lambda: peer.count("Open") == 1)


@pytest.mark.grpcio
async def test_calls_beyond_the_stream_limit_of_go_wait_and_do_not_fail(peers):
    peer = peers(max_streams=5, delay="2ms")
    limits = {"max_connections": 2, "streams_per_connection": 120}
    async with traffic(peer.options, peer, leases=100, **limits) as flow:
        await flow.flows(5 * USERS)
        assert flow.pool.status().streams_in_use == USERS
        # A cancelled call leaves room, at the server or before it.
        for _ in range(10):
            with anyio.move_on_after(0.01):
                async with anyio.create_task_group() as tasks:
                    for _ in range(20):
                        tasks.start_soon(raw, flow.pool, HELD)
        await flow.flows()
        assert 5 < peer.count("MostCall") <= 10
        assert_untouched(flow.pool, peer, 2)
    assert flow.failures == flow.lost == []


# -- a server that sends GOAWAY --------------------------------------------------------


# The pool makes only a few connections at a time that live less than 2 seconds.
@pytest.mark.parametrize("age, rounds", [("2500ms", 3), ("1s", 1.5)])
async def test_connections_at_the_maximum_age_of_go_fail_no_check_and_no_call(
    age, rounds, peers
):
    # All users have a call in progress at the same time, which uses all connections.
    peer = peers(max_connection_age=age, delay="100ms")
    async with traffic(peer.options, peer, leases=100) as flow:
        await eventually(
            lambda: peer.count("Accepted") >= rounds * CONNECTIONS, PATIENCE
        )
        await flow.flows()
        # This excludes connections that got a GOAWAY and still have calls. The server
        # may accept a connection before it counts the end of the previous one.
        assert peer.count("Most") <= 1.25 * CONNECTIONS
    assert flow.failures == flow.lost == []


async def test_connections_closed_by_go_as_idle_fail_no_call(peers):
    peer = peers(max_connection_idle="1s", delay="20ms")
    async with opened(peer.options, peer, max_connections=CONNECTIONS) as pool:

        async def user(number):
            for step in range(3):
                assert await raw(pool) == {"allowed": True}
                # Around the time of the GOAWAY: before, after, and at the same moment.
                await anyio.sleep(0.99 + number / 1000 + step / 3000)

        async with anyio.create_task_group() as tasks:
            for number in range(CONNECTIONS):
                tasks.start_soon(user, number)
        await eventually(lambda: peer.count("Open") == 0)
        assert await raw(pool) == {"allowed": True}
        assert {"lost"} <= set(pool._counters.closes) <= {"lost", "spread"}


# -- a server that is restarted, killed or frozen --------------------------------------


async def recovers(flow):
    """Check that the first attempt after the return of the server succeeds."""
    failed_attempts = sum(flow.pool._counters.connect_failures.values())
    flow.time = "back"
    await flow.flows(1)
    flow.time = "after"
    # One attempt may have been in progress at the return. All waiting callers got its
    # error.
    assert sum(flow.pool._counters.connect_failures.values()) <= failed_attempts + 1
    # A refused user comes again at once, and may be refused several times.
    ends = [what for when, what in flow.failures if when == "back"]
    assert len(ends) - ends.count("PoolSaturated") <= USERS
    await flow.flows(5 * USERS)
    assert flow.failed("after") == 0


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_a_restarted_server_fails_checks_only_while_it_is_down(end, peers):
    peer = peers(delay="5ms")
    async with traffic(peer.options, peer, leases=100) as flow:
        flow.time = "ending"
        await run_sync(peer.end, end)
        flow.time = "away"
        await eventually(lambda: flow.failed("away") >= USERS, PATIENCE)
        await run_sync(peer.start)
        await recovers(flow)
        # Checks in flight were retried, and the retry found no server. If the server
        # was just about to exit, the error says that it closed the connection.
        assert {"refused"} <= kinds(flow.failures) <= {"refused", "other"}
    # A call on a lease is not retried. Even at a graceful shutdown such a call can
    # fail: it may begin just after the connection was closed.
    assert kinds(flow.lost) <= {"refused", "other", "UNAVAILABLE"}


@asynccontextmanager
async def two_replicas(peers, **settings):
    replicas = [peers(delay="5ms"), peers(delay="5ms")]
    url = "ipv4:" + ",".join(peer.url for peer in replicas)
    options = AuthorizerOptions(url=url, insecure=True)
    async with traffic(options, *replicas, **settings) as flow:
        assert all(peer.count("Calls", "Is") for peer in replicas)
        yield replicas, flow


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_a_rolling_restart_of_grpc_go_replicas_fails_no_check(end, peers):
    async with two_replicas(peers, leases=50) as (replicas, flow):
        for peer in replicas:
            await run_sync(peer.end, end)
            await flow.flows()
            await run_sync(peer.start)
            # Connections return to it at the latest with the third spread. The
            # transport `native` tries an address that failed last for 10 seconds.
            await eventually(lambda peer=peer: peer.count("Calls", "Is"), THIRD_SPREAD)
    assert flow.failures == []
    # Calls on leases are lost only with a server that drops them.
    lost = set() if end == signal.SIGTERM else {"UNAVAILABLE"}
    assert kinds(flow.lost) <= lost


async def test_on_native_a_frozen_replica_fails_no_check(peers):
    settings = {"check_timeout": 3, "transport": "native"}
    async with two_replicas(peers, **settings) as ((peer, _), flow):
        peer.send(signal.SIGSTOP)
        connections = flow.pool.connections
        await eventually(lambda: peer.url not in str(connections()), PATIENCE)
        await flow.flows(10 * USERS)
        peer.send(signal.SIGCONT)
        # It was silent, so new connections try it last for 10 seconds.
        await eventually(lambda: peer.url in str(connections()), THIRD_SPREAD)
        await flow.flows()
        assert flow.failures == []


@pytest.mark.grpcio
async def test_a_frozen_replica_fails_its_calls_and_few_others(peers):
    settings = {"check_timeout": 2, "transport": "grpcio"}
    async with two_replicas(peers, **settings) as ((peer, _), flow):
        held = peer.count("Serving")
        closes = flow.pool._counters.closes
        peer.send(signal.SIGSTOP)
        await eventually(lambda: closes.get("unhealthy", 0) > 0, PATIENCE)
        ends = [what for _, what in flow.failures]
        # Its streams are held for two seconds, so some checks are refused at once.
        assert set(ends) <= {"DEADLINE_EXCEEDED", "PoolTimeout", "PoolSaturated"}
        assert ends.count("DEADLINE_EXCEEDED") <= held * (STREAMS + 2)
        await flow.flows(10 * USERS)
        peer.send(signal.SIGCONT)
        answered = peer.count("Calls", "Is") + USERS
        await eventually(lambda: peer.count("Calls", "Is") > answered, THIRD_SPREAD)
        await flow.flows()
        failed = len(flow.failures)
        await flow.flows()
        assert len(flow.failures) == failed


@pytest.mark.grpcio
async def test_a_single_frozen_server_serves_as_before_when_it_thaws(peers):
    peer = peers(delay="5ms")
    settings = {"check_timeout": 2, "transport": "grpcio"}
    async with traffic(peer.options, peer, **settings) as flow:
        peer.send(signal.SIGSTOP)
        # Some users still have leases that they took just before.
        await eventually(
            lambda: all(c.condition == "leaving" for c in flow.pool.connections()),
            PATIENCE,
        )
        ends = [what for _, what in flow.failures]
        # The queue is longer than the budget, so some checks are refused at once.
        assert set(ends) <= {"DEADLINE_EXCEEDED", "PoolTimeout", "PoolSaturated"}
        assert ends.count("DEADLINE_EXCEEDED") <= CONNECTIONS * (STREAMS + 2)
        peer.send(signal.SIGCONT)
        await recovers(flow)


# -- cancelled calls, and pings --------------------------------------------------------


async def test_a_cancelled_check_is_cancelled_on_the_server(peers):
    peer = peers()
    async with opened(peer.options, peer, streams_per_connection=50) as pool:
        for calls in (100, 200, 300):
            async with anyio.create_task_group() as tasks:
                for _ in range(100):
                    tasks.start_soon(raw, pool, HELD)
                await eventually(lambda: peer.count("InFlight") == 100)
                tasks.cancel_scope.cancel()
            await eventually(
                lambda calls=calls: peer.count("Ended", "context canceled") == calls
            )
        assert await raw(pool) == {"allowed": True}
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await raw(pool, HELD, timeout=0.05)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: sum(peer.counts["Ended"].values()) == 301)
        assert peer.count("InFlight") == 0
        assert_untouched(pool, peer, 2)


def hasten(monkeypatch, milliseconds):
    """Let new connections ping at this interval, with this many pings without data."""
    usual = _channel._channel_options
    changes = {
        "grpc.keepalive_time_ms": milliseconds,
        # By default gRPC's core sends no third ping for a minute.
        "grpc.http2.max_pings_without_data": 0,
        # Disable the ping that measures the bandwidth after an answer too.
        "grpc.http2.bdp_probe": 0,
    }

    def options(timeout):
        return [*(dict(usual(timeout)) | changes).items()]

    monkeypatch.setattr(_channel, "_channel_options", options)


# The options are the same on all backends, and the test waits some seconds.
@asyncio_only
@pytest.mark.grpcio
async def test_pings_are_few_enough_for_go(monkeypatch, peers):
    options = dict(_channel._channel_options(10.0))
    assert options["grpc.keepalive_time_ms"] > 300_000, (
        "Go allows one ping in 5 minutes"
    )
    # Scaled down: 5 minutes become one second here.
    hasten(monkeypatch, 1300)
    idle, busy = peers(min_ping="1s"), peers(min_ping="1s")

    def pings(peer):
        return peer.count("Frames", "received PING")

    async with (
        opened(idle.options, idle) as other,
        opened(busy.options, busy) as pool,
        anyio.create_task_group() as tasks,
    ):
        assert await raw(other) == {"allowed": True}
        tasks.start_soon(raw, pool, HELD)
        await eventually(lambda: pings(busy) >= 1)
        # For a stricter server the fourth ping is the third one too many.
        with Gopeer(min_ping="1h") as strict:
            async with opened(strict.options, strict) as third:
                with pytest.raises(grpc.aio.AioRpcError) as calmed:
                    await raw(third, HELD)
                assert calmed.value.code() is grpc.StatusCode.UNAVAILABLE
                assert "too_many_pings" in calmed.value.details()
                assert strict.count("Frames", CALM) == 1
                assert await raw(third) == {"allowed": True}
        await eventually(lambda: pings(busy) >= 4)
        tasks.cancel_scope.cancel()
        assert pings(idle) == 0, "without calls there are no pings"
        assert await raw(pool) == await raw(other) == {"allowed": True}
        assert_untouched(pool, busy)
        assert_untouched(other, idle)
