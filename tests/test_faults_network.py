"""
What a pool does when the network, a server, a clock or somebody's callback fails.

Over real sockets where the network takes part, else in virtual time.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import functools
import gc
import itertools
import logging
import random
import socket
import sys
import time
import types

import anyio
import anyio.lowlevel
import grpc
import grpc.aio._utils
import pytest
import trustme
import waiting
from aserto.authorizer.v2 import Decision, IsResponse
from faultkit.proxy import Proxy
from faultkit.replicas import Replicas
from opentelemetry.metrics import NoOpHistogram, NoOpMeter, NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from starlette.requests import Request

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectFailed,
    ConnectionLost,
    ConnectionPool,
    Identity,
    IdentityType,
    PoolClosed,
    PoolError,
    PoolSaturated,
    PoolTimeout,
    TopazConfig,
)
from fastapi_topaz._grpcio import call as _call
from fastapi_topaz._pool.state.backoff import FLOOR
from fastapi_topaz.testing import EmbeddedAuthorizer, FakeConnector, slow
from fastapi_topaz.testing._certs import Certificates


sockets = pytest.mark.real_clock

PATH = "myapp.GET.documents"
ASK = {"policy_path": PATH}
# Seconds that anything may take on a machine in trouble.
PATIENCE = 20
HOURS = 10_000.0

soon = functools.partial(waiting.eventually, timeout=PATIENCE)


class Gate:
    """A policy that allows once it is open, and holds all who ask before."""

    def __init__(self):
        self.is_open = False
        self.held = 0

    async def __call__(self, _check):
        self.held += 1
        try:
            # It is opened by another thread, whose loop may not even be of asyncio.
            while not self.is_open:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        finally:
            self.held -= 1
        return True


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def authorizer():
    with EmbeddedAuthorizer({PATH: True}) as running:
        yield running


@pytest.fixture
def proxy(authorizer):
    with Proxy([authorizer.port]) as running:
        yield running


@pytest.fixture
def replicas():
    with Replicas(3, policies={PATH: True}) as running:
        yield running


def via(proxy, ca=None):
    return AuthorizerOptions(url=proxy.url, cert_file_path=ca, insecure=ca is None)


def pool_to(options, **parameters):
    pool = ConnectionPool(**{"min_connections": 0, **parameters})
    pool.configure(options)
    return pool


def config_of(pool, options, **settings):
    return TopazConfig(
        **{
            "authorizer_options": options,
            "policy_path_root": "myapp",
            "identity_provider": lambda _request: Identity(IdentityType.NONE),
            "connection_pool": pool,
            "check_timeout": PATIENCE,
            **settings,
        }
    )


def a_request():
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    return Request({**scope, "path_params": {}})


async def checked(config):
    return await config.is_allowed(a_request(), PATH)


class Outcomes(list):
    """How calls ended. What was cancelled is missing: nobody may vanish."""

    async def of(self, function, *args, **kwargs):
        try:
            self.append(await function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001  (looked at by the test)
            self.append(error)

    @property
    def errors(self):
        return [outcome for outcome in self if isinstance(outcome, Exception)]


def is_a_lost_connection(error):
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code() is grpc.StatusCode.UNAVAILABLE
    return isinstance(error, ConnectionLost)


async def served(pool):
    """Ask until there is an answer; return the connection that it came from."""
    with anyio.fail_after(PATIENCE):
        while True:
            try:
                async with pool.acquire() as conn:
                    assert await conn.decisions(**ASK) == {"allowed": True}
                    return conn.connection
            except (PoolError, grpc.aio.AioRpcError):
                await anyio.sleep(0.01)


async def queued(pool, count):
    while pool.status().waiting < count:
        await anyio.lowlevel.checkpoint()


async def assert_whole(pool):
    """All capacity is there: as many leases as it has, at once and no more."""
    status = pool.status()
    assert (status.waiting, status.streams_in_use) == (0, 0)
    assert pool._open_pool.limiter.borrowed_tokens == 0
    leases = [await pool.acquire(timeout=10) for _ in range(status.streams_max)]
    with pytest.raises(PoolTimeout):
        await pool.acquire(timeout=0)
    for conn in leases:
        await pool.release(conn)
    for conn in [await pool.acquire(timeout=0) for _ in leases]:
        await pool.release(conn)


def lines(caplog, level=logging.WARNING):
    return [r.getMessage() for r in caplog.records if r.levelno >= level]


@contextlib.contextmanager
def paced(pool):
    """No more attempts fail than may be made in the time; a slow machine makes less."""
    failures = pool._counters.connect_failures
    began, before = anyio.current_time(), sum(failures.values())
    yield
    took = anyio.current_time() - began
    # The first two are made at once.
    assert sum(failures.values()) - before <= 3 + took / FLOOR


def forget_errors(caplog):
    """Let go of those in the log: one may keep the socket of its attempt open."""
    caplog.clear()
    gc.collect()


# -- F1: the server is killed ---------------------------------------------------------


@sockets
@pytest.mark.parametrize("end", ["RST", "FIN"])
async def test_calls_in_flight_on_a_killed_server_end_with_an_error_of_their_own(
    end, authorizer, proxy, gate
):
    authorizer.policies = {PATH: gate}
    options = {"min_connections": 3, "eager_init": True, "max_retries": 0}
    async with pool_to(via(proxy), **options) as pool:
        leases = [await pool.acquire() for _ in range(3)]
        outcomes = Outcomes()
        async with anyio.create_task_group() as tasks:
            for conn in leases:
                tasks.start_soon(functools.partial(outcomes.of, conn.decisions, **ASK))
            await soon(lambda: gate.held == 3)
            proxy.refuse()
            assert (proxy.cut() == 3) if end == "RST" else (authorizer.stop() is None)
        assert len(outcomes) == 3
        assert all(is_a_lost_connection(error) for error in outcomes)
        assert pool.status().healthy_connections == 0
        await soon(lambda: pool.status().leaving == 3)
        for conn in leases:
            await pool.release(conn)
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire(timeout=PATIENCE)
        assert caught.value.reason == "refused"
        await soon(lambda: sum(pool._counters.closes.values()) == 3)
        assert pool.status().total == 0
        # The first one by itself, the others by that or by their probe.
        assert set(pool._counters.closes) <= {"lost", "unhealthy"}

        gate.is_open = True
        authorizer.start()
        proxy.listen()
        await soon(lambda: pool.status().total == 3)
        assert await served(pool)


@sockets
async def test_cut_connections_have_their_siblings_probed_and_are_replaced(
    replicas, gate
):
    replicas[0].policies[PATH] = gate
    options = {"min_connections": 9, "max_connections": 9, "eager_init": True}
    async with pool_to(replicas.options, **options) as pool:
        outcomes = Outcomes()
        leases = [await pool.acquire() for _ in range(9)]
        async with anyio.create_task_group() as tasks:
            for conn in leases:
                tasks.start_soon(functools.partial(outcomes.of, conn.decisions, **ASK))
            await soon(lambda: gate.held == 9)
            assert replicas.proxy.cut(backend=replicas[1].port) == 3
            await soon(lambda: len(outcomes) == 3)
            assert all(is_a_lost_connection(error) for error in outcomes)
            await soon(lambda: all(replicas.calls(i)["Info"] >= 3 for i in (0, 2)))
            gate.is_open = True
        assert outcomes.count({"allowed": True}) == 6, "they were probed, and no more"
        for conn in leases:
            await pool.release(conn)
        await soon(lambda: replicas.proxy.accepted >= 12)
        await soon(lambda: pool.status().healthy_connections == 9)


@sockets
async def test_a_check_whose_connection_is_cut_is_asked_again_on_another(
    replicas, gate
):
    replicas[0].policies[PATH] = gate
    async with pool_to(replicas.options, min_connections=3, eager_init=True) as pool:
        config = config_of(pool, replicas.options)
        outcomes = Outcomes()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(outcomes.of, checked, config)
            await soon(lambda: gate.held == 1)
            (hit,) = [i for i in range(3) if replicas[i].streams]
            assert replicas.proxy.cut(backend=replicas[hit].port) == 1
            gate.is_open = True
        assert outcomes == [True]
        assert sum(replicas.calls(i)["Is"] for i in range(3)) == 2


@sockets
async def test_checks_survive_that_all_connections_are_cut_at_once(
    authorizer, proxy, gate
):
    authorizer.policies = {PATH: gate}
    async with pool_to(via(proxy), max_connections=5) as pool:
        config = config_of(pool, via(proxy))
        outcomes = Outcomes()
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(outcomes.of, checked, config)
            await soon(lambda: gate.held == 5)
            assert proxy.cut() == 5
            gate.is_open = True
        assert outcomes == [True] * 5
        assert proxy.accepted > 5


@sockets
async def test_a_check_that_is_lost_with_its_server_fails_with_the_reason(
    authorizer, proxy, gate
):
    authorizer.policies = {PATH: gate}
    async with pool_to(via(proxy), max_retries=0) as pool:
        config = config_of(pool, via(proxy))
        outcomes = Outcomes()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(outcomes.of, checked, config)
            await soon(lambda: gate.held == 1)
            proxy.refuse()
            proxy.cut()
        (error,) = outcomes
        assert isinstance(error, ConnectFailed)
        assert error.reason == "refused"


# -- F2: the server is down at startup ------------------------------------------------


@sockets
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "lazy"])
async def test_a_pool_that_starts_before_its_server_says_why_and_recovers(
    eager, proxy, caplog
):
    proxy.refuse()
    pool = pool_to(
        via(proxy),
        min_connections=2,
        eager_init=eager,
        connection_timeout=1,
        max_retries=1_000_000,
        acquire_timeout=HOURS,
    )
    async with pool:
        if eager:
            (line,) = [line for line in lines(caplog) if "at startup" in line]
            assert "connection refused" in line
        else:
            assert not lines(caplog)
            assert not pool._counters.connect_failures
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout=0)
        await soon(lambda: "refused" in pool._counters.connect_failures)
        with pytest.raises(PoolTimeout, match="connection refused") as caught:
            await pool.acquire(timeout=0.1)
        assert isinstance(caught.value.__cause__, ConnectFailed)
        assert not pool.status().healthy
        proxy.listen()
        async with pool.acquire(timeout=PATIENCE) as conn:
            assert await conn.decisions(**ASK) == {"allowed": True}
        await soon(lambda: pool.status().total == 2)
        assert pool.status().healthy


# -- F3: refused for a while ----------------------------------------------------------


@sockets
async def test_refused_callers_fail_with_each_attempt_and_add_none_of_their_own(proxy):
    proxy.refuse()
    async with pool_to(via(proxy)) as pool:

        async def caller():
            for _ in range(3):
                with pytest.raises(ConnectFailed) as caught:
                    await pool.acquire(timeout=PATIENCE)
                assert caught.value.reason == "refused"

        with paced(pool):
            async with anyio.create_task_group() as tasks:
                for _ in range(50):
                    tasks.start_soon(caller)
        assert pool._counters.failed == 150
        # Two at once, then three retries, then one for each time they asked again.
        assert pool._counters.connect_failures["refused"] <= 15
        proxy.listen()
        assert await served(pool)


@sockets
async def test_who_waits_when_the_server_is_back_is_served_in_order_by_the_next_attempt(
    proxy,
):
    proxy.refuse()
    options = {"max_connections": 1, "max_retries": 1_000_000}
    async with pool_to(via(proxy), **options, acquire_timeout=HOURS) as pool:
        failures = pool._counters.connect_failures
        order = []

        async def caller(number):
            async with pool.acquire() as conn:
                order.append(number)
                assert await conn.decisions(**ASK) == {"allowed": True}

        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(caller, number)
                await queued(pool, number + 1)
            with paced(pool):
                await soon(lambda: failures.get("refused", 0) >= 7)
            proxy.listen()
            # One may have been under way while the door opened.
            before = failures["refused"]
        assert failures["refused"] <= before + 1
        assert order == list(range(10))
        assert proxy.accepted == 1
        assert not pool.status().failing, "one success resets all backoff"


# -- F4: the server accepts and stays silent ------------------------------------------


@sockets
@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "tls"])
async def test_a_server_that_accepts_and_hangs_costs_an_attempt_its_time(tls, caplog):
    with (
        EmbeddedAuthorizer({PATH: True}, tls=tls) as authorizer,
        Proxy([authorizer.port]) as proxy,
    ):
        proxy.hang()
        options = {"connection_timeout": 0.5, "max_retries": 0}
        async with pool_to(via(proxy, authorizer.ca_cert_path), **options) as pool:
            with pytest.raises(ConnectFailed) as caught:
                await pool.acquire(timeout=PATIENCE)
            assert (caught.value.reason, caught.value.permanent) == ("timeout", False)
            assert set(pool._counters.connect_failures) == {"timeout"}
            assert pool.status().connecting == 0
            proxy.heal()
            assert await served(pool)
            del caught
            forget_errors(caplog)
            await soon(lambda: proxy.open == 1)


@sockets
async def test_while_one_backend_hangs_the_others_serve_all_who_wait(
    authorizer, caplog
):
    # Nobody accepts: the kernel does, and stays silent. gRPC tries again by itself
    # before it is told to stop: of two in turn, each attempt might begin at this one.
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        Proxy([silent.getsockname()[1], *[authorizer.port] * 2]) as proxy,
    ):
        options = {"max_connections": 4, "connection_timeout": 0.5}
        pool = pool_to(via(proxy), **options, max_retries=1_000, acquire_timeout=HOURS)
        async with pool:
            leases = []

            async def caller():
                leases.append(conn := await pool.acquire())
                assert await conn.decisions(**ASK) == {"allowed": True}
                # Nobody takes the connection of another.
                await soon(lambda: len(leases) == 4)
                await pool.release(conn)

            async with anyio.create_task_group() as tasks:
                for _ in range(4):
                    tasks.start_soon(caller)
            # At times gRPC has tried again in the last moment of an attempt.
            assert pool._counters.connect_failures.keys() <= {"timeout"}
            assert pool.status().total == 4
            forget_errors(caplog)
            await soon(lambda: authorizer.connections_open == 4)
            assert proxy.accepted > authorizer.connections_accepted, "the silent one"


# -- F5: the TLS handshake is slow ----------------------------------------------------


@pytest.fixture
def tls():
    with EmbeddedAuthorizer({PATH: True}, tls=True) as authorizer:
        yield authorizer


@pytest.fixture
def tls_proxy(tls):
    with Proxy([tls.port]) as running:
        yield running


@sockets
async def test_a_slow_tls_handshake_within_the_limit_counts_as_time_to_connect(
    tls, tls_proxy
):
    tls_proxy.slow_handshake(0.5)
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    options = {"connection_timeout": PATIENCE, "meter_provider": provider}
    async with pool_to(via(tls_proxy, tls.ca_cert_path), **options) as pool:
        async with pool.acquire(timeout=PATIENCE) as conn:
            assert await conn.decisions(**ASK) == {"allowed": True}
        assert not pool._counters.connect_failures
        (scope,) = reader.get_metrics_data().resource_metrics[0].scope_metrics
        points = {metric.name: metric.data.data_points for metric in scope.metrics}
        (took,) = points["topaz_pool_connect_time"]
        assert took.count == 1
        assert took.sum >= 0.5
    provider.shutdown()


@sockets
async def test_a_tls_handshake_over_the_limit_is_a_failed_attempt(
    tls, tls_proxy, caplog
):
    tls_proxy.slow_handshake(HOURS)
    options = {"connection_timeout": 1, "max_retries": 0}
    async with pool_to(via(tls_proxy, tls.ca_cert_path), **options) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire(timeout=PATIENCE)
        assert (caught.value.reason, caught.value.permanent) == ("timeout", False)
        assert set(pool._counters.connect_failures) == {"timeout"}
        tls_proxy.heal()
        assert await served(pool)
        del caught
        forget_errors(caplog)
        await soon(lambda: tls_proxy.open == 1)


@sockets
async def test_a_slow_tls_handshake_keeps_nobody_from_a_connection_that_is_there(
    tls, tls_proxy
):
    options = {"max_connections": 2, "connection_timeout": HOURS}
    async with pool_to(via(tls_proxy, tls.ca_cert_path), **options) as pool:
        outcomes = Outcomes()

        async def caller():
            async with pool.acquire(timeout=PATIENCE) as conn:
                return await conn.decisions(**ASK)

        first = await pool.acquire()
        tls_proxy.slow_handshake(HOURS)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(outcomes.of, caller)
            await soon(lambda: tls_proxy.accepted == 2)
            assert pool.status().connecting == 1
            assert await first.decisions(**ASK) == {"allowed": True}
            await pool.release(first)
        for _ in range(10):
            async with pool.acquire(timeout=0) as conn:
                assert await conn.decisions(**ASK) == {"allowed": True}
        assert outcomes == [{"allowed": True}]
        assert pool.status().connecting == 1, "and its attempt goes on"
        tls_proxy.heal()
        await soon(lambda: pool.status().total == 2)
        assert not pool._counters.connect_failures


# -- F6: TLS fails --------------------------------------------------------------------


LONG_AGO = dt.datetime(2001, 1, 1, tzinfo=dt.UTC)


def certified(authority, *names, **dates):
    leaf = authority.issue_cert(*names, **dates)
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    return Certificates("", leaf.private_key_pem.bytes(), chain)


def expired(authority):
    return certified(authority, "127.0.0.1", not_after=LONG_AGO)


def for_another_name(authority):
    return certified(authority, "topaz.example")


def of_an_unknown_ca(_authority):
    return certified(trustme.CA(), "127.0.0.1")


def plaintext(_authority):
    return None


@sockets
@pytest.mark.parametrize(
    "wrong",
    [expired, for_another_name, of_an_unknown_ca, plaintext],
    ids=lambda function: function.__name__,
)
async def test_what_tls_refuses_is_permanent_until_the_server_is_put_right(
    wrong, tmp_path
):
    authority = trustme.CA()
    path = str(tmp_path / "ca.pem")
    authority.cert_pem.write_to_path(path)
    authorizer = EmbeddedAuthorizer({PATH: True})
    authorizer._certificates = wrong(authority)
    with authorizer:
        options = AuthorizerOptions(url=authorizer.url, cert_file_path=path)
        # It is no matter of retries: there would be enough of them.
        endless = {"max_retries": 1_000_000, "acquire_timeout": HOURS}
        async with pool_to(options, **endless) as pool:

            async def caller():
                for _ in range(3):
                    with pytest.raises(ConnectFailed) as caught:
                        await pool.acquire(timeout=PATIENCE)
                    assert caught.value.reason == "tls"
                    assert caught.value.permanent

            with paced(pool):
                async with anyio.create_task_group() as tasks:
                    for _ in range(50):
                        tasks.start_soon(caller)
            assert pool._counters.failed == 150
            # Two at once, then one for each time they asked again.
            assert set(pool._counters.connect_failures) == {"tls"}
            assert pool._counters.connect_failures["tls"] <= 12
            assert authorizer.connections_accepted <= 24
            authorizer.stop()
            authorizer._certificates = certified(authority, "127.0.0.1")
            authorizer.start()
            assert await served(pool)


# -- F8 and F9: the network loses everything, or the server is frozen -----------------


silences = pytest.mark.parametrize("silence", ["half_open", "freeze"])


@sockets
@silences
async def test_two_calls_without_an_answer_have_all_silent_connections_evicted(
    silence, proxy
):
    options = {"health_check_timeout": 0.3, "connection_timeout": 1, "max_retries": 0}
    pool = pool_to(via(proxy), min_connections=2, eager_init=True, **options)
    async with pool:
        leases = [await pool.acquire() for _ in range(2)]
        old = {conn.connection for conn in leases}
        getattr(proxy, silence)()
        for suspects in (0, 1):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await leases[0].decisions(**ASK, timeout=0.1)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert pool.status().suspect == suspects
        await soon(lambda: pool.status().leaving == 2)
        for conn in leases:
            await pool.release(conn)
        await soon(lambda: pool._counters.closes == {"unhealthy": 2})
        # A channel says READY for ever; nobody gets one of them again.
        with pytest.raises(ConnectFailed) as refused:
            await pool.acquire(timeout=PATIENCE)
        assert refused.value.reason == "timeout"
        proxy.heal()
        assert await served(pool) not in old


@sockets
async def test_silent_connections_that_nobody_uses_are_evicted_by_the_health_check(
    proxy,
):
    pool = pool_to(
        via(proxy),
        min_connections=2,
        eager_init=True,
        health_check_interval=0.1,
        health_check_timeout=0.3,
        connection_timeout=1,
    )
    async with pool:
        old = [entry.connection for entry in pool._open_pool.state.open]
        proxy.half_open()
        await soon(lambda: not pool.status().healthy)
        assert pool._counters.closes["unhealthy"] >= 2
        proxy.heal()
        assert await served(pool) not in old
        await soon(lambda: pool.status().healthy_connections == 2)


@sockets
@silences
async def test_of_three_replicas_a_silent_one_fails_only_the_checks_it_holds(
    silence, replicas
):
    pool = pool_to(
        replicas.options,
        min_connections=6,
        max_connections=6,
        streams_per_connection=4,
        eager_init=True,
        health_check_timeout=0.3,
        connection_timeout=1,
        max_retries=1_000,
    )
    config = config_of(pool, replicas.options, check_timeout=0.5)
    failures = []

    async def user():
        while True:
            try:
                assert await checked(config)
            except Exception as error:  # noqa: BLE001  (looked at below)
                failures.append(error)

    async with pool:
        await soon(lambda: replicas.serving() == {0, 1, 2})
        async with anyio.create_task_group() as tasks:
            for _ in range(24):
                tasks.start_soon(user)
            await soon(lambda: all(replicas.calls(i)["Is"] for i in range(3)))
            getattr(replicas.proxy, silence)(replicas[1].port)
            await soon(lambda: failures)
            # Whatever was sent before the fault has arrived by now.
            since = anyio.current_time()
            await soon(
                lambda: all(e.proven_at > since for e in pool._open_pool.state.open)
            )
            tasks.cancel_scope.cancel()
        for error in failures:
            # Their own deadline: it ended while they asked, or while they waited.
            assert isinstance(error, PoolTimeout | grpc.aio.AioRpcError)
            if isinstance(error, grpc.aio.AioRpcError):
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert pool._counters.closes["unhealthy"]

        config.check_timeout = PATIENCE
        outcomes = Outcomes()
        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(outcomes.of, checked, config)
        assert outcomes == [True] * 100


# -- F10: a response breaks off -------------------------------------------------------


@contextlib.contextmanager
def one_proxy_each(replicas):
    """One proxy before each replica, and one before them all: to hit only one."""
    with contextlib.ExitStack() as stack:
        each = [
            stack.enter_context(Proxy([replicas[index].port])) for index in range(3)
        ]
        whole = stack.enter_context(Proxy([proxy.port for proxy in each]))
        yield whole, each


breaks = pytest.mark.parametrize(
    "fault", ["reset_mid_response", "truncate_mid_response"]
)


@sockets
@breaks
async def test_a_response_that_breaks_off_fails_its_caller_and_nobody_else(
    fault, replicas, gate
):
    replicas[0].policies[PATH] = gate
    with one_proxy_each(replicas) as (proxy, each):
        options = {"min_connections": 3, "eager_init": True}
        async with pool_to(via(proxy), **options) as pool:
            leases = [await pool.acquire() for _ in range(3)]
            outcomes = Outcomes()
            async with anyio.create_task_group() as tasks:
                for conn in leases:
                    call = functools.partial(outcomes.of, conn.decisions, **ASK)
                    tasks.start_soon(call)
                await soon(lambda: gate.held == 3)
                getattr(each[1], fault)(20)
                gate.is_open = True
            (error,) = outcomes.errors
            assert is_a_lost_connection(error)
            assert outcomes.count({"allowed": True}) == 2
            assert replicas.calls(1)["Is"] == 1, "it was answered, but not heard"
            for conn in leases:
                await pool.release(conn)
            closes = pool._counters.closes
            await soon(lambda: closes.get("lost", 0) + closes.get("unhealthy", 0))
            await soon(lambda: pool.status().healthy_connections == 3)


@sockets
@breaks
async def test_a_check_whose_response_breaks_off_is_answered_by_another_replica(
    fault, replicas, gate
):
    replicas[0].policies[PATH] = gate
    with one_proxy_each(replicas) as (proxy, each):
        options = {"min_connections": 3, "eager_init": True}
        async with pool_to(via(proxy), **options) as pool:
            config = config_of(pool, via(proxy))
            outcomes = Outcomes()
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(outcomes.of, checked, config)
                await soon(lambda: gate.held == 3)
                getattr(each[1], fault)(20)
                gate.is_open = True
            assert outcomes == [True] * 3
            assert replicas.calls(1)["Is"] == 1
            assert sum(replicas.calls(i)["Is"] for i in range(3)) == 4


# -- F17: the server is slow ----------------------------------------------------------


@sockets
async def test_a_slow_server_makes_the_queue_shed_load_and_no_new_connections(
    authorizer,
):
    pace = 0.002

    async def decide(_check):
        await asyncio.sleep(pace)
        return True

    authorizer.policies = {PATH: decide}
    options = {"min_connections": 3, "max_connections": 3, "max_waiting": 5}
    pool = pool_to(authorizer.options, **options, acquire_timeout=0.1)
    config = config_of(pool, authorizer.options)
    answered, waiting = itertools.count(), set()
    done = 0

    async def user():
        nonlocal done
        while True:
            waiting.add(pool.status().waiting)
            try:
                assert await checked(config)
                done = next(answered)
            except (PoolSaturated, PoolTimeout):
                await anyio.sleep(0.01)

    async with pool:
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(user)
            await soon(lambda: done > 50)
            pace *= 100
            counters = pool._counters
            rejected, timeouts = counters.rejected, counters.timeouts
            await soon(lambda: counters.rejected > rejected + 20)
            await soon(lambda: counters.timeouts > timeouts + 5)
            pace /= 100
            before = done
            await soon(lambda: done > before + 100)
            tasks.cancel_scope.cancel()
        # Those that wait for capacity, and those that are about to be served.
        assert 5 <= max(waiting) <= 5 + 3
        assert authorizer.connections_accepted == 3, "neither then nor afterwards"
        assert not counters.closes
        assert not counters.connect_failures
        await assert_whole(pool)


# -- F25: the wall clock jumps --------------------------------------------------------


@pytest.fixture
def jump(monkeypatch):
    """Set the wall clock to another time."""
    real = time.time
    # The core of gRPC reads the clock itself, and what drives it must read the same.
    for module in (grpc.aio._utils, _call):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(time=real))

    def jump(seconds):
        monkeypatch.setattr(time, "time", lambda: real() + seconds)

    return jump


@pytest.mark.parametrize("seconds", [3600, -3600])
async def test_a_jump_of_the_wall_clock_ends_no_life_and_changes_no_turn(jump, seconds):
    connector = FakeConnector()
    pool = ConnectionPool(
        connector=connector, min_connections=2, eager_init=True, idle_check_interval=1
    )
    async with pool:
        began = anyio.current_time()
        probed = {}
        while (now := anyio.current_time() - began) < 100:
            if now > 40:
                jump(seconds * (-1) ** int(now))
            for conn in connector.connections:
                probed.setdefault(conn.probes, round(now))
            await anyio.sleep(1)
        assert probed == {0: 0, 1: 31, 2: 61, 3: 91}
        assert connector.attempts == 2
        assert not pool._counters.closes
        leases = [await pool.acquire() for _ in range(10)]
        began = anyio.current_time()
        jump(-seconds)
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=3)
        assert anyio.current_time() - began == pytest.approx(3)
        for conn in leases:
            await pool.release(conn)


@sockets
@pytest.mark.parametrize("seconds", [3600, -3600])
async def test_a_jump_of_the_wall_clock_is_not_noticed_by_real_connections(
    jump, seconds, authorizer
):
    options = {"min_connections": 2, "eager_init": True, "idle_check_interval": 0.01}
    async with pool_to(authorizer.options, **options) as pool:
        config = config_of(pool, authorizer.options)
        reap, reaped = pool._open_pool.state.reap, []
        pool._open_pool.state.reap = lambda now: (reaped.append(now), reap(now))
        assert await checked(config)
        for offset in (seconds, 0, seconds):
            jump(offset)
            rounds = len(reaped)
            assert await checked(config)
            await soon(lambda rounds=rounds: len(reaped) > rounds + 3)
        # One more makes the pool look at all lifetimes.
        async with pool.acquire(), pool.acquire(), pool.acquire():
            assert pool.status().total == 3
        assert authorizer.connections_accepted == 3
        assert authorizer.calls == {"Is": 4, "Info": 3}, "no probe but the first ones"
        assert not pool._counters.closes


# -- F26: somebody else's code --------------------------------------------------------


PROVIDERS = ("identity_provider", "resource_context_provider")


def allowing(**options):
    """A connector whose every check is allowed."""
    allowed = IsResponse(decisions=[Decision(decision="allowed", **{"is": True})])
    answer = allowed.SerializeToString()
    return FakeConnector(answer=lambda _method, _request: answer, **options)


def virtual(connector=None, **parameters):
    return ConnectionPool(
        connector=connector or allowing(),
        **{"min_connections": 0, "max_connections": 3, **parameters},
    )


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "error", [ZeroDivisionError("mine"), ConnectionLost("mine")], ids=repr
)
async def test_what_a_provider_raises_reaches_the_caller_and_costs_nothing(
    name, is_async, error
):
    calls = []

    def broken(request):
        calls.append(request)
        raise error

    async def broken_later(request):
        broken(request)

    pool = virtual()
    provider = broken_later if is_async else broken
    config = config_of(pool, AuthorizerOptions(), **{name: provider})
    async with pool:
        for _ in range(5):
            with pytest.raises(type(error), match="mine"):
                await checked(config)
        assert len(calls) == 5, "its errors are not retried"
        assert pool._counters.acquisitions == 0
        await assert_whole(pool)


@pytest.mark.parametrize("name", PROVIDERS)
async def test_a_provider_that_hangs_holds_no_connection_and_can_be_cancelled(name):
    async def hang(_request):
        await anyio.sleep_forever()

    pool = virtual(max_connections=1)
    config = config_of(pool, AuthorizerOptions(), **{name: hang})
    async with pool, anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(checked, config)
        await anyio.sleep(10)
        assert pool._counters.acquisitions == 0
        assert await checked(config_of(pool, AuthorizerOptions()))
        tasks.cancel_scope.cancel()


async def test_metrics_that_raise_are_logged_once_and_stop_nobody(caplog):
    class Histogram(NoOpHistogram):
        def record(self, *_args, **_kwargs):
            raise OSError("no collector")

    class Meter(NoOpMeter):
        def create_histogram(self, name, *_args, **_kwargs):
            return Histogram(name)

    class Provider(NoOpMeterProvider):
        def get_meter(self, name, *_args, **_kwargs):
            return Meter(name)

    pool = virtual(meter_provider=Provider())
    config = config_of(pool, AuthorizerOptions())
    async with pool:
        for _ in range(20):
            assert await checked(config)
        await assert_whole(pool)
    assert sum("metric" in line for line in lines(caplog)) == 1


async def test_a_connection_whose_probe_and_close_raise_is_replaced_all_the_same(
    caplog,
):
    async def broken(_seconds):
        raise KeyError("not my key")

    connector = allowing()
    pool = virtual(connector, min_connections=2, health_check_interval=10)
    config = config_of(pool, AuthorizerOptions())
    async with pool:
        await assert_whole(pool)
        victim = connector.connections[1]
        victim.probe = victim.close = broken
        await anyio.sleep(10.01)
        assert pool._counters.closes == {"unhealthy": 1}
        assert pool._counters.probe_failures == 2
        evicted, closing = lines(caplog)
        assert "not my key" in evicted
        assert "failed" in closing
        assert "not my key" in caplog.text
        assert await checked(config)
        await assert_whole(pool)
    assert [conn.closed for conn in connector.connections] == [1, 0, 1, 1]


async def test_a_connection_whose_probe_and_close_hang_is_given_up_on(caplog):
    async def hang(_seconds):
        await anyio.sleep_forever()

    connector = allowing()
    options = {"health_check_interval": 10, "health_check_timeout": 3}
    pool = virtual(connector, **options)
    config = config_of(pool, AuthorizerOptions())
    async with pool:
        await assert_whole(pool)
        victim = connector.connections[1]
        victim.probe = victim.close = hang
        # A round, 3 s for each of two probes, 5 s for the close.
        for _ in range(22):
            await anyio.sleep(1)
            assert await checked(config), "the others serve meanwhile"
        assert pool._counters.closes == {"unhealthy": 1}
        assert sum("given up" in line for line in lines(caplog)) == 1
        await assert_whole(pool)


# -- F18, F19 and F20: cancellation ---------------------------------------------------


STEPS = range(15)


async def cancelled_after(steps, function):
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(function)
        for _ in range(steps):
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("state", ["cold", "warm", "busy", "lost"])
async def test_a_check_cancelled_at_each_of_its_steps_leaves_a_whole_pool(steps, state):
    connector = allowing(default=slow(0.0))
    pool = virtual(connector, max_connections=2)
    config = config_of(pool, AuthorizerOptions())
    async with pool:
        if state != "cold":
            await assert_whole(pool)
        await anyio.sleep(1)
        held = [await pool.acquire() for _ in range(2 * (state == "busy"))]
        for conn in connector.connections:
            # Its first call is lost, and asked again on a new connection.
            conn.alive = state != "lost"

        async def check():
            await checked(config)

        await cancelled_after(steps, check)
        for conn in held:
            await pool.release(conn)
        await anyio.sleep(1)
        for conn in connector.connections:
            conn.alive = True
        await assert_whole(pool)
        assert await checked(config)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("method", ["initialize", "close"])
async def test_opening_and_closing_can_be_cancelled_at_each_step(steps, method):
    connector = allowing(default=slow(0.0))
    pool = virtual(connector, min_connections=2, eager_init=True)
    if method == "close":
        await pool.initialize()
        _held = await pool.acquire()
    await cancelled_after(steps, getattr(pool, method))
    if method == "close":
        await anyio.sleep(0.01)
        # Cancelled before it began, it did nothing; else all of it.
        assert (not connector.open) == ("closed" in repr(pool))
        await pool.close(grace=0)
        assert not connector.open
    await pool.initialize()
    await assert_whole(pool)
    await pool.close()
    assert all(conn.closed == 1 for conn in connector.connections)


async def test_a_timeout_around_close_ends_it_though_a_connection_will_not_close():
    connector = allowing()
    pool = virtual(connector)
    await pool.initialize()
    await assert_whole(pool)

    async def hang(_seconds):
        await anyio.sleep_forever()

    connector.connections[1].close = hang
    lease = await pool.acquire()
    began = anyio.current_time()
    with pytest.raises(TimeoutError), anyio.fail_after(1):
        await pool.close(grace=100)
    # What closing one connection may take, beginning with the idle ones at once.
    assert anyio.current_time() - began == pytest.approx(5)
    assert [conn.closed for conn in connector.connections] == [1, 0, 1]
    assert repr(pool).startswith("<ConnectionPool closed total=0")
    await pool.release(lease)
    with pytest.raises(PoolClosed):
        await pool.acquire()


async def waiters_cancelled(count):
    """Cancel *count* waiters in any order, while connections go round among them."""
    rng = random.Random(count)
    pool = virtual(max_connections=10, acquire_timeout=HOURS)
    ended = 0

    async def wait(scope):
        nonlocal ended
        with scope:
            async with pool.acquire():
                await anyio.lowlevel.checkpoint()
        ended += 1

    async with pool:
        held = [await pool.acquire() for _ in range(10)]
        scopes = [anyio.CancelScope() for _ in range(count)]
        async with anyio.create_task_group() as tasks:
            for scope in scopes:
                tasks.start_soon(wait, scope)
            await queued(pool, count)
            rng.shuffle(scopes)
            for number, scope in enumerate(scopes):
                scope.cancel()
                if number % (count // 10) == 0:
                    await pool.release(held.pop())
                if number % 100 == 0:
                    await anyio.lowlevel.checkpoint()
        assert ended == count
        assert pool._counters.acquisitions + pool._counters.cancelled == count + 10
        assert pool._counters.acquisitions > 10, "some were served in between"
        await assert_whole(pool)


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_waiters_cancelled_among_returned_connections_lose_no_capacity(count):
    await waiters_cancelled(count)


async def test_the_work_for_a_cancelled_waiter_does_not_grow_with_their_number():
    async def calls(count):
        made = 0

        def profile(_frame, event, _argument):
            nonlocal made
            made += event in {"call", "c_call"}

        sys.setprofile(profile)
        try:
            await waiters_cancelled(count)
        finally:
            sys.setprofile(None)
        return made / count

    few, many = await calls(250), await calls(1_250)
    assert many < 1.5 * few
