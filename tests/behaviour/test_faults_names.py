"""What the pool makes of a name that is unknown, silent, moved, or many addresses."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, asynccontextmanager

import anyio
import pytest

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

# Far beyond what a test takes: who waits so long got no answer.
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
def names(http2_server):
    with Names({NAME: [http2_server.host]}) as running:
        yield running


@asynccontextmanager
async def opened(names, http2_server, **options):
    """Open a pool to the name, and make none of its connections before their use."""
    pool = ConnectionPool(
        **{"min_connections": 0, "acquire_timeout": PATIENCE, **options}
    )
    target = names.target(NAME, http2_server.port)
    pool.configure(AuthorizerOptions(url=target, insecure=True))
    with anyio.fail_after(PATIENCE):
        async with pool:
            yield pool


async def check(pool):
    """Make one check as an application does."""
    return await config_of(pool, check_timeout=PATIENCE).is_allowed(
        REQUEST, "app.GET.documents"
    )


@asynccontextmanager
async def users(pool, count):
    """Have *count* users make one check after the other, and yield the answers."""
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
    """Return how many connections lead where, of those that tell."""
    told = (connection.peer for connection in pool.connections())
    return Counter(peer for peer in told if peer is not None)


# -- no address ----------------------------------------------------------------------


@pytest.mark.parametrize("addresses", [None, []], ids=["unknown", "empty"])
async def test_a_name_without_an_address_fails_after_a_few_attempts(
    http2_server, names, addresses
):
    # The caller is told the reason, and so is whoever looks at the metrics.
    names.set(NAME, addresses)
    async with opened(names, http2_server, max_retries=2) as pool:
        with pytest.raises(ConnectFailed, match="name cannot be resolved") as caught:
            await pool.acquire()
        assert (caught.value.reason, caught.value.permanent) == ("resolve", False)
        assert pool._counters.connect_failures == {"resolve": 3}
        assert names.queries[NAME] >= 3, "each attempt asks anew"
        assert not pool.status().healthy


async def test_many_callers_make_no_more_attempts_to_resolve_than_one(
    http2_server, names
):
    # Two are begun at once, and after the first failure one follows each pause.
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
async def test_the_pool_recovers_by_itself_once_the_name_resolves(
    http2_server, names, addresses
):
    # Nobody has to ask again: attempts go on after the callers were sent away.
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


async def test_who_waits_is_served_when_the_name_resolves_in_time(http2_server, names):
    # It took more than one attempt, and the caller has seen none of that.
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


async def test_a_silent_name_server_costs_an_attempt_its_time(http2_server, names):
    """
    The reason is then "timeout", and not "resolve".

    gRPC gives up on a silent name server after 12 seconds, which is later than the
    default `connection_timeout` of 10: nobody has heard of a reason by then.
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


@pytest.mark.parametrize("end", ["unknown", "empty", "silent"])
async def test_a_name_that_is_lost_takes_no_open_connection_along(
    http2_server, names, end
):
    # Those that are to be replaced serve until there is something better, as long as
    # they are no more than the minimum and there is room for another one.
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


async def test_a_drained_pool_follows_its_name_to_another_address(
    http2_server, names, others
):
    # Without the drain it stays where it is, and no check fails on the way.
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
            assert set(peers(pool)) == {address(other)}
        assert all(answers)
        assert pool._counters.closes == {"drain": 4}
        assert (http2_server.accepted, pool._counters.failed) == (4, 0)


async def test_what_is_lost_is_replaced_at_the_address_the_name_has_then(
    http2_server, names, others
):
    # The old server says goodbye with GOAWAY, and no check fails on the way.
    other, _ = others
    async with opened(names, http2_server, max_connections=4) as pool:
        await fill(pool, 4)
        async with users(pool, 4) as answers:
            names.set(NAME, [other.host])
            http2_server.goaway()
            await eventually(lambda: http2_server.open == 0, PATIENCE)
            await more(answers)
            await eventually(lambda: set(peers(pool)) == {address(other)}, PATIENCE)
        assert all(answers)
        assert pool._counters.failed == 0


# -- several addresses ---------------------------------------------------------------


async def test_the_connections_of_a_pool_land_on_all_addresses_of_its_name(
    http2_server, names, others
):
    # Where each one landed is what `connections()` says.
    servers = [http2_server, *others]
    names.set(NAME, [each.host for each in servers])
    for _ in range(5):  # 20 random choices leave one out once in a thousand times
        async with opened(names, http2_server, max_connections=20) as pool:
            leases = [await pool.acquire() for _ in range(20)]
            await eventually(lambda: sum(each.open for each in servers) == 20, PATIENCE)
            landed = Counter({address(each): each.open for each in servers})
            assert len(pool.connections()) == 20
            assert set(peers(pool)) == set(+landed)
            assert peers(pool) <= landed
            for conn in leases:
                await pool.release(conn)
        await eventually(lambda: not any(each.open for each in servers), PATIENCE)
        if len(+landed) == 3:
            break
    assert len(+landed) == 3


async def test_addresses_where_nobody_listens_are_passed_over(http2_server, names):
    # That is no failed attempt, and no caller notices.
    names.set(NAME, ["127.0.0.2", http2_server.host, "127.0.0.3"])
    async with opened(names, http2_server, max_connections=20) as pool:
        await fill(pool, 20)
        assert set(peers(pool)) == {address(http2_server)}
        assert await check(pool)
        assert http2_server.accepted == 20
        assert pool._counters.connect_failures == {}
