"""
The pool behind nginx and HAProxy, which answer for a server that is down.

A proxy keeps the connection of the client open while the connection to the server
comes and goes. It limits rates. It closes connections after a number of calls, or when
they are idle. It replaces its own processes under load.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple

import anyio
import grpc
import pytest
from anyio.to_thread import run_sync

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectFailed,
    ConnectionPool,
    Identity,
    IdentityType,
    PoolError,
    TopazConfig,
)
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.configs import REQUEST
from kit.faultkit.proxy import Proxy
from kit.logs import lines
from kit.proxies.process import Haproxy, Nginx
from kit.waiting import eventually


pytestmark = [pytest.mark.real_clock, pytest.mark.slow]


def needs(kind):
    """Return the kind of proxy as a parameter, skipped if its binary is missing."""
    reason = f"{kind.variable} does not name the binary: `nox -s proxies`"
    absent = pytest.mark.skipif(kind.variable not in os.environ, reason=reason)
    return pytest.param(kind, id=kind.variable.lower(), marks=absent)


nginx = pytest.mark.parametrize("kind", [needs(Nginx)])
each_kind = pytest.mark.parametrize("kind", [needs(Nginx), needs(Haproxy)])

# Far longer than a test takes. A caller that waits this long got no answer.
PATIENCE = 30.0
# The pool promises 0.5 s, but the machine may be busy. If the pool does not detect the
# outage, a caller waits for PATIENCE.
SOON = 5.0
CALLERS, CONNECTIONS = 20, 10
ALLOWED = "myapp.documents.get"


@pytest.fixture
def authorizers():
    """Start authorizers that allow only the policy of these tests."""
    with contextlib.ExitStack() as running:
        yield lambda: running.enter_context(EmbeddedAuthorizer({ALLOWED: True}))


@pytest.fixture
def doors(authorizers):
    """Start TCP proxies that can make the authorizer behind them unreachable."""
    # If an authorizer stops during calls, grpc.aio calls its loop after the loop is
    # closed.
    with contextlib.ExitStack() as running:
        yield lambda: running.enter_context(Proxy([authorizers().port]))


def shut(door):
    """Refuse connections and reset open ones, like a server that was killed."""
    door.refuse()
    door.cut()


@pytest.fixture
def proxies():
    """Start proxies. If the test fails, pytest shows their logs."""
    started = []
    with contextlib.ExitStack() as running:

        def start(kind, *behind, **settings):
            ports = [one.port for one in behind]
            started.append(running.enter_context(kind(ports, **settings)))
            return started[-1]

        yield start
        for proxy in started:
            print(f"{proxy.variable} on {proxy.url}:\n{proxy.log}")  # noqa: T201


class Check(NamedTuple):
    began: float
    took: float
    error: Exception | None


class Traffic:
    """Callers that send one check after the other, with the result of each check."""

    def __init__(self, pool):
        self.pool = pool
        self.config = TopazConfig(
            authorizer_options=pool.authorizer_options,
            policy_path_root="myapp",
            identity_provider=lambda _request: Identity(IdentityType.NONE),
            connection_pool=pool,
            check_timeout=PATIENCE,
        )
        self.checks = []
        # At the end of each check: how many connections had leases, and whether the
        # pool was healthy.
        self.busy, self.healthy = [], []
        self.stopped = False

    async def check(self):
        began, error = anyio.current_time(), None
        try:
            assert await self.config.is_allowed(REQUEST, ALLOWED)
        except (PoolError, grpc.aio.AioRpcError) as caught:
            error = caught
        self.checks.append(Check(began, anyio.current_time() - began, error))
        status = self.pool.status()
        self.busy.append(status.busy)
        self.healthy.append(status.healthy)
        return error

    async def caller(self, pause):
        while not self.stopped:
            error = await self.check()
            await anyio.sleep(0.02 if error else pause)

    def since(self, moment):
        """Return the checks that began at or after this time."""
        return [check for check in self.checks if check.began >= moment]

    def answered(self, moment=0.0):
        return [check for check in self.since(moment) if check.error is None]

    def failed(self, moment=0.0):
        return [check for check in self.since(moment) if check.error is not None]

    async def flows(self, count=5 * CALLERS):
        """Wait until *count* more checks are answered."""
        goal = len(self.answered()) + count
        await eventually(lambda: len(self.answered()) >= goal, PATIENCE)


@asynccontextmanager
async def opened(options, **settings):
    usual = {
        "min_connections": 0,
        "max_connections": CONNECTIONS,
        "acquire_timeout": PATIENCE,
    }
    pool = ConnectionPool(**usual | settings)
    pool.configure(options)
    with anyio.fail_after(3 * PATIENCE):
        async with pool:
            yield pool


@asynccontextmanager
async def traffic(options, callers=CALLERS, pause=0.0, **settings):
    """Open a pool, and run callers that send checks until the block ends."""
    async with opened(options, **settings) as pool, anyio.create_task_group() as tasks:
        flow = Traffic(pool)
        for _ in range(callers):
            tasks.start_soon(flow.caller, pause)
        await flow.flows()
        yield flow
        flow.stopped = True


def ports(proxy, method=None):
    """Return the connections that carried a call, or a call of this method."""
    return {call.port for call in proxy.calls if method in {None, call.method}}


def count(proxy, method):
    return sum(call.method == method for call in proxy.calls)


def assert_untouched(pool, proxy):
    """Check that all connections that the pool has made are open."""
    assert pool._counters.closes == {}
    assert pool._counters.connect_failures == {}
    assert pool._counters.connects == pool.status().total <= CONNECTIONS
    assert len(ports(proxy)) <= pool.status().total


# -- a server that is down -------------------------------------------------------------


async def assert_an_outage(proxy, begin, end, text, caplog):
    """Check that all callers get the proxy's text, and that no connection ends."""
    async with traffic(proxy.options) as flow:
        status = flow.pool.status
        await eventually(lambda: status().total == CONNECTIONS)
        began = anyio.current_time()
        await run_sync(begin)
        await eventually(lambda: not status().healthy, PATIENCE)
        noticed = anyio.current_time()
        probes = count(proxy, "Info")
        await eventually(lambda: len(flow.failed(noticed)) > 10 * CALLERS, PATIENCE)
        assert not status().healthy
        # A slower machine probes less often, never more. One probe runs at the start.
        probes = count(proxy, "Info") - probes
        assert probes <= 4 * (anyio.current_time() - noticed) + 2
        for check in flow.since(noticed):
            assert isinstance(check.error, ConnectFailed)
            assert not check.error.permanent
            assert text in str(check.error)
            assert text in str(check.error.__cause__)
        assert max(check.took for check in flow.since(began)) < SOON
        (warning,) = lines(caplog, logger="fastapi_topaz.pool")
        assert f"{proxy.url} answers that its server is not available" in warning

        await run_sync(end)
        back = anyio.current_time()
        await eventually(lambda: flow.answered(noticed), PATIENCE)
        again = anyio.current_time()
        assert again - back < SOON
        assert status().healthy
        await flow.flows()
        assert flow.failed(again) == []
        await eventually(lambda: status().healthy_connections == CONNECTIONS)
        assert len(lines(caplog, logger="fastapi_topaz.pool")) == 1
        assert_untouched(flow.pool, proxy)


@each_kind
async def test_a_dead_server_behind_a_proxy_is_an_outage(kind, doors, proxies, caplog):
    door = doors()
    proxy = proxies(kind, door)
    text = {Nginx: "502", Haproxy: "503"}[kind]
    await assert_an_outage(proxy, partial(shut, door), door.listen, text, caplog)


@nginx
async def test_a_dead_server_is_an_outage_if_nginx_answers_with_a_grpc_status(
    kind, doors, proxies, caplog
):
    door = doors()
    # As in nginx's own example of a gRPC gateway.
    server = """
        error_page 502 = @unavailable;
        location @unavailable {
            default_type application/grpc;
            add_header grpc-status 14;
            add_header grpc-message "no healthy upstream";
            return 204;
        }
    """
    proxy = proxies(kind, door, server=server)
    outage = (partial(shut, door), door.listen)
    await assert_an_outage(proxy, *outage, "no healthy upstream", caplog)


@nginx
@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_a_proxy_that_refuses_all_calls_is_an_outage(
    status, kind, authorizers, proxies, caplog
):
    proxy = proxies(kind, authorizers())
    outage = (partial(proxy.refuse, status), proxy.forward)
    await assert_an_outage(proxy, *outage, str(status), caplog)


# grpcio does not tell which proxy a connection leads to.
@pytest.mark.native
@nginx
async def test_if_one_proxy_of_several_refuses_only_its_connections_are_avoided(
    kind, doors, authorizers, proxies
):
    door = doors()
    cut_off, well = proxies(kind, door), proxies(kind, authorizers())
    options = AuthorizerOptions(url=f"ipv4:{cut_off.url},{well.url}", insecure=True)
    # Each connection goes to a random address. So many do not all choose the same.
    size = {"min_connections": 16, "max_connections": 16}
    async with traffic(options, **size) as flow:

        def conditions(proxy):
            connections = flow.pool.connections()
            return {c.condition for c in connections if proxy.url in c.peer}

        while not (conditions(cut_off) and conditions(well)):
            # A busy proxy looks silent, and a silent address is tried last.
            flow.pool.drain()
            await flow.flows(20 * CALLERS)
        closes = dict(flow.pool._counters.closes)
        await run_sync(shut, door)
        await eventually(lambda: conditions(cut_off) == {"suspect"}, PATIENCE)
        # The proxy logs a call after it has answered it.
        await flow.flows()
        lent, moment = count(cut_off, "Is"), anyio.current_time()
        await flow.flows(50 * CALLERS)
        assert count(cut_off, "Is") == lent
        assert conditions(cut_off) == {"suspect"}
        assert "suspect" not in conditions(well)
        assert flow.failed(moment) == []
        # A check fails only if two connections in a row refuse it.
        assert len(flow.failed()) <= flow.pool.status().total
        assert all(flow.healthy)

        await run_sync(door.listen)
        moment = anyio.current_time()
        await eventually(lambda: count(cut_off, "Is") > lent + CALLERS, PATIENCE)
        assert flow.failed(moment) == []
        assert flow.pool._counters.closes == closes
        open_now = flow.pool._counters.connects - sum(closes.values())
        assert open_now == flow.pool.status().total


# -- a proxy with limits ---------------------------------------------------------------


@nginx
@pytest.mark.parametrize("status", [429, 503])
async def test_a_rate_limit_closes_no_connection_and_the_pool_stays_healthy(
    status, kind, authorizers, proxies, caplog
):
    http = f"""
        limit_req_zone $server_port zone=calls:1m rate=400r/s;
        limit_req_status {status};
    """
    limit = {"http": http, "location": "limit_req zone=calls burst=4 nodelay;"}
    proxy = proxies(kind, authorizers(), **limit)
    async with traffic(proxy.options, pause=0.01) as flow:
        await flow.flows(50 * CALLERS)
        refused = sum(call.status == status for call in proxy.calls)
        assert refused > CALLERS
        assert all(flow.healthy)
        for check in flow.failed():
            assert isinstance(check.error, grpc.aio.AioRpcError), check.error
            assert str(status) in check.error.details()
        assert max(check.took for check in flow.checks) < SOON
        assert lines(caplog, logger="fastapi_topaz.pool") == []
        assert_untouched(flow.pool, proxy)


@nginx
@pytest.mark.parametrize(
    "requests, streams", [(10, 1), (10, 5), (100, 1), (100, 5), (1000, 5)]
)
async def test_connections_closed_after_n_requests_are_replaced_without_a_pause(
    requests, streams, kind, authorizers, proxies, caplog
):
    authorizer = authorizers()
    # Opening a connection takes less time than the calls that it carries.
    authorizer.delay = 0.005 if requests == 10 else 0.0
    proxy = proxies(kind, authorizer, server=f"keepalive_requests {requests};")
    async with traffic(proxy.options, streams_per_connection=streams) as flow:
        counters = flow.pool._counters
        needed = min(CONNECTIONS, CALLERS // streams)
        await eventually(lambda: counters.closes.get("lost", 0) >= needed, PATIENCE)
        await flow.flows(1000)
        assert flow.failed() == []
        # After some seconds the pool spreads new connections over the addresses.
        assert {"lost"} <= set(counters.closes) <= {"lost", "spread"}
        assert counters.connect_failures == {}
        assert counters.connect_retries == 0
        # Connections that are being replaced are missing. If the pool paused before
        # each new connection, two of ten would be missing.
        used = sum(flow.busy) / len(flow.busy)
        assert used > 0.6 * needed, f"{used:.1f} of {needed} connections in use"
        assert lines(caplog, logger="fastapi_topaz.pool") == []
        assert all(flow.healthy)


@each_kind
async def test_proxy_reloads_under_100_callers_fail_no_check(
    kind, authorizers, proxies
):
    proxy = proxies(kind, authorizers(), authorizers())
    async with traffic(proxy.options, 100, streams_per_connection=10) as flow:
        for _ in range(10):
            await run_sync(proxy.reload)
            await flow.flows(200)
    assert flow.failed() == []


IDLE = {
    Nginx: {"http": "keepalive_timeout 1s;"},
    Haproxy: {"defaults": "timeout client 1s\ntimeout http-keep-alive 1s"},
}


@each_kind
async def test_idle_timeouts_of_a_second_fail_no_check_and_cause_no_outage(
    kind, authorizers, proxies, caplog
):
    authorizer = authorizers()
    together = asyncio.Barrier(CONNECTIONS)

    async def answer_together(_check):
        # So that each connection carries a call before it becomes idle.
        await together.wait()
        return True

    authorizer.policies = answer_together
    proxy = proxies(kind, authorizer, **IDLE[kind])
    async with opened(proxy.options) as pool:
        flow = Traffic(pool)

        async def caller(number):
            for step in range(5):
                await flow.check()
                # Around the time when the proxy closes the connection: before, after,
                # or exactly then.
                await anyio.sleep(0.98 + number / 300 + step / 1000)

        async with anyio.create_task_group() as tasks:
            for number in range(CONNECTIONS):
                tasks.start_soon(caller, number)
        assert flow.failed() == []
        # A call on a connection that is ending makes it suspect, and a probe closes it.
        assert "lost" in pool._counters.closes
        assert pool._counters.closes.keys() <= {"lost", "spread", "unhealthy"}
        assert pool._counters.connect_failures == {}
        assert pool._counters.connect_retries == 0
        assert lines(caplog, logger="fastapi_topaz.pool") == []
        assert all(flow.healthy)


# -- a proxy that stops ----------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_a_proxy_restart_fails_checks_only_while_the_proxy_is_down(
    end, kind, authorizers, proxies
):
    proxy = proxies(kind, authorizers())
    async with traffic(proxy.options) as flow:
        await run_sync(proxy.end, end)
        away = anyio.current_time()
        await eventually(lambda: len(flow.failed(away)) > CALLERS, PATIENCE)
        assert not flow.pool.status().healthy
        await run_sync(proxy.start)
        moment = anyio.current_time()
        await eventually(lambda: flow.answered(moment), PATIENCE)
        again = anyio.current_time()
        assert again - moment < SOON
        await flow.flows()
        assert flow.failed(again) == []
