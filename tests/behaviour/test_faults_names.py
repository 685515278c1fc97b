"""DNS names that are unknown, change, have many addresses, or get no DNS answer."""

from __future__ import annotations

import socket
from collections import Counter
from contextlib import ExitStack, asynccontextmanager

import anyio
import pytest
from anyio.to_thread import run_sync

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectFailed,
    ConnectionPool,
)
from kit.configs import REQUEST, config_of
from kit.faultkit.http2 import Http2Server
from kit.faultkit.names import Names
from kit.pools import fill
from kit.waiting import eventually


pytestmark = pytest.mark.real_clock

# Far longer than a test takes. A caller that waits this long got no answer.
PATIENCE = 20.0
NAME = "topaz.test"


@pytest.fixture
def others(http2_server):
    """Two more servers, on the same port of other addresses."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(Http2Server(host=host, port=http2_server.port))
            for host in ("127.0.0.2", "127.0.0.3")
        ]


@pytest.fixture
def names(http2_server, transport, monkeypatch):
    """
    Answers for the name: those of a name server to gRPC, which can ask any server.

    The native transport asks the system, so for that one they are the system's.
    """
    with Names({NAME: [http2_server.host]}) as running:
        running.transport = transport
        if transport == "native":
            resolver = running.resolver(socket.getaddrinfo)
            monkeypatch.setattr(socket, "getaddrinfo", resolver)
        yield running


@asynccontextmanager
async def opened(names, http2_server, **options):
    """Open a pool to the name; no connection is opened before its first use."""
    defaults = {"min_connections": 0, "acquire_timeout": PATIENCE}
    pool = ConnectionPool(transport=names.transport, **(defaults | options))
    target = f"{NAME}:{http2_server.port}"
    if names.transport == "grpcio":
        target = names.target(NAME, http2_server.port)
    pool.configure(AuthorizerOptions(url=target, insecure=True))
    with anyio.fail_after(PATIENCE):
        async with pool:
            yield pool


async def check(pool):
    """Send one check, as an application does."""
    return await config_of(pool, check_timeout=PATIENCE).is_allowed(
        REQUEST, "app.GET.documents"
    )


@asynccontextmanager
async def users(pool, count):
    """Run *count* users that send one check after the other, and yield the answers."""
    answers = []
    stopped = False

    async def user():
        while not stopped:
            answers.append(await check(pool))

    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(user)
        yield answers
        stopped = True


async def more(answers, count=20):
    """Wait for *count* more answers."""
    goal = len(answers) + count
    await eventually(lambda: len(answers) >= goal, PATIENCE)


def address(http2_server):
    return f"ipv4:{http2_server.host}:{http2_server.port}"


def peers(pool):
    """Count the connections by address."""
    return Counter(connection.peer for connection in pool.connections())


def are_at(pool, *servers):
    """Return whether all connections lead to these servers. grpcio does not tell it."""
    expected = {address(server) for server in servers}
    return set(peers(pool)) in (expected, {None})


# -- no address ----------------------------------------------------------------------


@pytest.mark.parametrize("addresses", [None, []], ids=["unknown", "empty"])
async def test_a_host_name_without_an_address_fails_after_a_few_attempts(
    http2_server, names, addresses
):
    # The caller and the metrics both get the reason.
    names.set(NAME, addresses)
    async with opened(names, http2_server, max_retries=2) as pool:
        with pytest.raises(ConnectFailed, match="name cannot be resolved") as caught:
            await pool.acquire()
        assert (caught.value.reason, caught.value.permanent) == ("resolve", False)
        assert pool._counters.connect_failures == {"resolve": 3}
        assert names.queries[NAME] >= 3, "each attempt sends a new query"
        assert not pool.status().healthy


async def test_many_callers_cause_no_more_lookups_than_one_caller(http2_server, names):
    # Two attempts start at once. After the first failure, one follows each pause.
    names.set(NAME, None)
    reasons = []

    async def caller(pool):
        with pytest.raises(ConnectFailed) as caught:
            await check(pool)
        reasons.append(caught.value.reason)

    async with opened(names, http2_server, max_retries=2) as pool:
        async with anyio.create_task_group() as tasks:
            for _ in range(50):
                tasks.start_soon(caller, pool)
        assert reasons == ["resolve"] * 50
        failures = pool._counters.connect_failures
        assert set(failures) == {"resolve"}
        assert 3 <= failures["resolve"] <= 4


@pytest.mark.parametrize("addresses", [None, []], ids=["unknown", "empty"])
async def test_the_pool_recovers_without_callers_once_the_name_resolves(
    http2_server, names, addresses
):
    # No caller has to ask again: attempts continue after callers got their errors.
    names.set(NAME, addresses)
    async with opened(names, http2_server, min_connections=1, max_retries=0) as pool:
        with pytest.raises(ConnectFailed):
            await check(pool)
        failures = pool._counters.connect_failures
        await eventually(lambda: failures["resolve"] >= 3, PATIENCE)
        names.set(NAME, [http2_server.host])
        await eventually(lambda: pool.status().healthy_connections == 1, PATIENCE)
        assert await check(pool)
        assert not pool.status().failing


async def test_a_waiting_caller_is_served_if_the_name_resolves_in_time(
    http2_server, names
):
    # It took several attempts, and the caller sees none of the failures.
    names.set(NAME, None)
    answers = []

    async def caller(pool):
        answers.append(await check(pool))

    async with (
        opened(names, http2_server, max_retries=50) as pool,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(caller, pool)
        failures = pool._counters.connect_failures
        await eventually(lambda: failures.get("resolve", 0) >= 2, PATIENCE)
        names.set(NAME, [http2_server.host])
        await eventually(lambda: answers == [True], PATIENCE)


async def test_a_silent_name_server_makes_an_attempt_time_out(http2_server, names):
    """
    The reason is then "timeout", and not "resolve".

    gRPC gives up on a silent name server after 12 seconds. This is later than the
    default `connection_timeout` of 10, so the pool has not received a reason by then.
    """
    names.silent()
    options = {"connection_timeout": 0.2, "min_connections": 1, "max_retries": 1}
    async with opened(names, http2_server, **options) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await check(pool)
        assert (caught.value.reason, caught.value.permanent) == ("timeout", False)
        assert set(pool._counters.connect_failures) == {"timeout"}
        names.heal()
        await eventually(lambda: pool.status().healthy_connections == 1, PATIENCE)
        assert await check(pool)


@pytest.mark.costly
@pytest.mark.parametrize("end", ["unknown", "empty", "silent"])
async def test_a_removed_name_does_not_close_open_connections(http2_server, names, end):
    # Connections to be replaced serve until a better one is open, if they are within
    # the minimum and there is room for another connection.
    options = {"min_connections": 2, "connection_timeout": 0.5}
    async with opened(names, http2_server, **options) as pool:
        await fill(pool, 2)
        if end == "silent":
            names.silent()
        else:
            names.set(NAME, None if end == "unknown" else [])
        pool.drain()
        async with users(pool, 2) as answers:
            await eventually(lambda: pool._counters.connect_failures, PATIENCE)
            await more(answers)
            assert (pool.status().total, pool._counters.closes) == (2, {})
            names.heal()
            names.set(NAME, [http2_server.host])
            await eventually(lambda: pool._counters.closes == {"drain": 2}, PATIENCE)
            await more(answers)
        assert all(answers)


# -- another address -----------------------------------------------------------------


async def test_a_drained_pool_reconnects_to_the_new_address_of_its_name(
    http2_server, names, others
):
    # Without the drain, connections stay where they are. No check fails meanwhile.
    other, _ = others
    async with opened(names, http2_server, max_connections=4) as pool:
        await fill(pool, 4)
        async with users(pool, 4) as answers:
            names.set(NAME, [other.host])
            await more(answers)
            assert (http2_server.accepted, other.accepted) == (4, 0)
            pool.drain()
            await eventually(lambda: http2_server.open == 0, PATIENCE)
            await more(answers)
            assert are_at(pool, other)
            assert other.open == 4
        assert all(answers)
        assert pool._counters.closes == {"drain": 4}
        assert (http2_server.accepted, pool._counters.failed) == (4, 0)


async def test_a_lost_connection_is_replaced_at_the_current_address(
    http2_server, names, others
):
    # The old server closes with GOAWAY, and no check fails meanwhile.
    other, _ = others
    async with opened(names, http2_server, max_connections=4) as pool:
        await fill(pool, 4)
        async with users(pool, 4) as answers:
            names.set(NAME, [other.host])
            # In a thread: it waits until the client has noticed.
            await run_sync(http2_server.goaway)
            await eventually(lambda: http2_server.open == 0, PATIENCE)
            await more(answers)
            await eventually(lambda: are_at(pool, other), PATIENCE)
            await eventually(lambda: other.open == pool.status().total, PATIENCE)
        assert all(answers)
        assert pool._counters.failed == 0


# -- several addresses ---------------------------------------------------------------


async def test_connections_spread_over_all_addresses_of_the_name(
    http2_server, names, others
):
    # `connections()` reports the address of each connection.
    servers = [http2_server, *others]
    names.set(NAME, [each.host for each in servers])
    for _ in range(5):  # 20 random choices miss one address once in a thousand times
        async with opened(names, http2_server, max_connections=20) as pool:
            leases = [await pool.acquire() for _ in range(20)]
            await eventually(lambda: sum(each.open for each in servers) == 20, PATIENCE)
            landed = Counter({address(each): each.open for each in servers})
            assert len(pool.connections()) == 20
            assert peers(pool) in (+landed, Counter({None: 20}))
            for conn in leases:
                await pool.release(conn)
        await eventually(lambda: not any(each.open for each in servers), PATIENCE)
        if len(+landed) == 3:
            break
    assert len(+landed) == 3


async def test_addresses_that_refuse_connections_are_skipped(http2_server, names):
    # This is not a failed attempt, and no caller notices it.
    names.set(NAME, ["127.0.0.2", http2_server.host, "127.0.0.3"])
    async with opened(names, http2_server, max_connections=20) as pool:
        await fill(pool, 20)
        assert are_at(pool, http2_server)
        assert await check(pool)
        assert http2_server.accepted == 20
        assert pool._counters.connect_failures == {}
