"""Test when a pool reports ready, and the cost of `is_ready()`, in virtual time."""

from __future__ import annotations

import itertools
import logging
import math
from types import SimpleNamespace

import anyio
import pytest

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
    Verdict,
)
from fastapi_topaz._pool.readiness import _is_answered
from fastapi_topaz._pool.state.slot import Claim
from fastapi_topaz.testing import FakeConnector, fail, hang, ok
from kit.autojump import jump
from kit.configs import config_of
from kit.pools import make_pool
from kit.states import ERROR, make_state, open_one


def open_answered(state, *, answered=True):
    slot = open_one(state)
    if answered:
        state.answered(slot, 0.0)
    return slot


def unprobed_config(connector, **options):
    return config_of(make_pool(connector, **{"health_check_interval": 0, **options}))


def total(connector, name="probes"):
    return sum(getattr(each, name) for each in connector.connections)


# -- the last answer and the last failure ---------------------------------------------

# All events happen at time 0, so only their order decides.
FAILURES = {
    "an attempt to connect fails": (
        lambda s, _: s.connect_failed(s.begin(0.0), ERROR, 0.0)
    ),
    "a call is refused": lambda s, e: s.refused(e, 0.0),
    "a probe is refused": lambda s, e: s.probe_refused(e, ERROR, 0.0, 0.0),
    "a call gets no answer": lambda s, e: s.timed_out(e, 0.0),
    "a probe gets no answer": lambda s, e: s.unanswered(e, 0.0),
    "a call is cut off": lambda s, e: s.broke(e, 0.0),
    "the other side cannot be had": lambda s, e: s.unavailable(e, 0.0),
}


@pytest.mark.parametrize("name", FAILURES)
def test_after_a_failure_the_pool_is_not_ready_until_the_next_answer(name):
    state = make_state()
    slot, other = open_answered(state), open_answered(state)
    assert state.status().ready
    FAILURES[name](state, slot)
    assert not state.status().ready
    assert slot.answered, "the pool knows that the connection answered at some time"
    state.answered(other, 0.0)
    assert state.status().ready
    FAILURES[name](state, slot)
    other.answered = True  # as each answered call stores it
    assert state.status().ready
    assert state.failures == 2


def test_an_unanswered_connection_is_not_ready_and_its_end_is_a_failure():
    state = make_state()
    slot = open_answered(state, answered=False)
    assert not state.status().ready
    state.answered(open_answered(state), 0.0)
    assert state.status().ready
    state.lost(slot, "lost", 1.0)
    assert not state.status().ready


@pytest.mark.parametrize("under_call", [False, True])
def test_an_orderly_end_of_an_answered_connection_is_not_a_failure(under_call):
    state = make_state()
    slot = open_answered(state)
    slot.connection.lost = True
    if under_call:
        state.unavailable(slot, 1.0)  # as after a call that GOAWAY excluded
    else:
        assert state.retire_if_lost(slot, 1.0)
    assert state.status().total == 0
    assert state.status().ready
    state.connect_failed(state.begin(1.0), ERROR, 1.0)
    assert not state.status().ready


@pytest.mark.parametrize("reason", ["idle", "drain", "discarded", "resize"])
def test_the_pool_stays_ready_after_it_closes_a_connection(reason):
    state = make_state()
    state.retire(open_answered(state), reason)
    assert (state.status().total, state.status().ready) == (0, True)


def test_closing_a_connection_answered_before_a_failure_changes_nothing():
    state = make_state()
    slot = open_answered(state)
    claim = Claim()
    assert state.take(claim, 0.0)
    state.timed_out(slot, 0.0)
    state.retire(slot, "drain")
    state.give_back(claim, 0.0)
    assert (state.status().total, state.status().ready) == (0, False)


def test_an_answer_counts_even_if_two_connections_close_afterwards():
    state = make_state()
    silent, answering = open_answered(state, answered=False), open_answered(state)
    state.retire(answering, "drain")
    state.retire(silent, "drain")
    assert (state.status().total, state.status().ready) == (0, True)


def test_the_connection_with_the_latest_answer_is_probed():
    state = make_state()
    old, last, new = (open_answered(state) for _ in range(3))
    old.proven_at, last.proven_at, new.proven_at = 1.0, 3.0, 2.0
    assert state.newest_proof(set(), 4.0) is last
    assert state.newest_proof({last}, 4.0) is new
    assert state.newest_proof({last, new}, 4.0) is old
    assert state.newest_proof({last, new, old}, 4.0) is None


def test_suspect_leaving_and_lost_connections_are_not_probed():
    state = make_state()
    leaving, suspect, lost, well = (
        open_answered(state, answered=False) for _ in range(4)
    )
    while not leaving.leases:
        assert state.take(Claim(), 0.0)
    state.retire(leaving, "drain")
    state.suspect(suspect, 0.0)
    lost.connection.lost = True
    for slot in (leaving, suspect, lost):
        slot.proven_at = 1.0
    assert state.newest_proof(set(), 1.0) is well
    assert lost.retired == "lost"
    assert state.newest_proof({well}, 1.0) is None


def test_a_closing_pool_is_not_ready():
    state = make_state()
    open_answered(state)
    state.shut_down()
    assert not state.status().ready


async def test_a_pool_is_ready_from_its_first_answer_until_close():
    pool = ConnectionPool(connector=FakeConnector(), min_connections=0)
    assert not pool.status().ready
    async with pool:
        assert not pool.status().ready
        async with pool.acquire() as conn:
            assert not pool.status().ready, "a connect is not an answer yet"
            await conn.call("/a/b", b"?")
            assert pool.status().ready
            assert pool.status().as_dict()["ready"] is True
            conn.connection.frozen = True
            with pytest.raises(TimeoutError):
                await conn.call("/a/b", b"?", timeout=0.1)
            assert not pool.status().ready
            conn.connection.frozen = False
            await conn.call("/a/b", b"?")
            assert pool.status().ready
            # A call that its caller cancels is no evidence.
            conn.connection.frozen = True
            with anyio.move_on_after(0.1):
                await conn.call("/a/b", b"?")
            assert pool.status().ready
    assert not pool.status().ready


# -- probing --------------------------------------------------------------------------


async def test_is_ready_opens_the_pool_and_probes_at_most_once_a_second():
    connector = FakeConnector()
    config = unprobed_config(connector)
    pool = config.connection_pool
    async with anyio.create_task_group() as tasks:
        assert await config.is_ready() is True
        assert (connector.attempts, total(connector)) == (1, 1)
        await anyio.sleep(0.9)
        assert await config.is_ready()
        assert total(connector) == 1
        await anyio.sleep(0.2)
        assert await config.is_ready()
        assert total(connector) == 2
        async with pool.acquire() as conn:
            await anyio.sleep(0.9)
            await conn.call("/a/b", b"?")
        await anyio.sleep(0.9)
        assert await config.is_ready()
        assert total(connector) == 2, "a call is an answer too"
        await pool.close()
        tasks.cancel_scope.cancel()
    assert connector.open == []


async def test_a_hundred_concurrent_calls_share_one_connection_and_one_probe():
    connector = FakeConnector()
    config, answers = unprobed_config(connector), []

    async def ask():
        answers.append(await config.is_ready())

    async with config.connection_pool:
        for probes in (1, 2):
            async with anyio.create_task_group() as tasks:
                for _ in range(100):
                    tasks.start_soon(ask)
            assert answers == [True] * 100 * probes
            assert (connector.attempts, total(connector)) == (1, probes)
            await anyio.sleep(2)


async def test_a_hundred_concurrent_calls_fail_together():
    connector = FakeConnector(default=fail("down"))
    config, answers = unprobed_config(connector), []

    async def ask():
        answers.append(await config.is_ready(timeout=60))

    async with config.connection_pool:
        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(ask)
        assert answers == [False] * 100
        assert connector.attempts <= 5


@pytest.mark.parametrize("timeout", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("open_before", [False, True])
async def test_a_missing_answer_ends_at_the_timeout(timeout, open_before):
    connector = FakeConnector(default=ok() if open_before else hang())
    config = unprobed_config(
        connector, health_check_timeout=100.0, connection_timeout=100.0
    )
    async with config.connection_pool as pool:
        if open_before:
            assert await config.is_ready()
            connector.connections[0].frozen = True
            await anyio.sleep(1)
        before = anyio.current_time()
        assert await config.is_ready(timeout) is False
        assert anyio.current_time() - before == pytest.approx(timeout, abs=0.001)
        assert not pool.status().ready
        assert pool.status().streams_in_use == pool.status().waiting == 0


async def test_a_probe_outlives_its_caller_and_its_late_answer_counts():
    connector = FakeConnector()
    config = unprobed_config(connector)
    async with config.connection_pool as pool:
        assert await config.is_ready()
        (connection,) = connector.connections
        thawed = anyio.Event()

        async def probe(timeout):
            connection.probes += 1
            await thawed.wait()

        connection.probe = probe
        await anyio.sleep(1)
        assert not await config.is_ready(0.1)
        assert not await config.is_ready(0.1)
        assert connection.probes == 2, "the second call waits for the same probe"
        assert not pool.status().ready
        thawed.set()
        assert await config.is_ready(0.1)
        assert connection.probes == 2
        assert pool.status().ready


@pytest.mark.parametrize("fault", ["alive", "refuses"])
async def test_the_pool_is_not_ready_if_probes_fail_on_all_connections(fault):
    connector = FakeConnector()
    config = unprobed_config(connector, max_connections=3)
    async with config.connection_pool as pool:
        leases = [await pool.acquire() for _ in range(3)]
        for conn in leases:
            await pool.release(conn)
        for connection in connector.connections:
            setattr(connection, fault, "503" if fault == "refuses" else False)
        connector.default = fail("down")
        assert await config.is_ready() is False
        assert not pool.status().ready
        assert total(connector) <= 9


async def test_one_bad_connection_among_several_keeps_the_pool_ready():
    connector = FakeConnector()
    config = unprobed_config(connector)
    async with config.connection_pool as pool:
        leases = [await pool.acquire() for _ in range(3)]
        for conn in leases:
            await conn.call("/a/b", b"?")
            await pool.release(conn)
        await anyio.sleep(1)
        connector.connections[-1].refuses = connector.connections[0].refuses = "503"
        assert await config.is_ready()


async def test_a_saturated_pool_is_probed_on_a_leased_connection():
    connector = FakeConnector()
    config = unprobed_config(connector, max_connections=1, max_waiting=0)
    async with config.connection_pool as pool, pool.acquire():
        assert await config.is_ready()
        assert (connector.attempts, total(connector)) == (1, 1)


async def test_a_saturated_pool_of_suspects_is_not_ready_at_the_timeout():
    connector = FakeConnector()
    config = unprobed_config(connector, max_connections=1)
    async with config.connection_pool as pool, pool.acquire() as conn:
        conn.connection.frozen = True
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await conn.call("/a/b", b"?", timeout=0.1)
        before = anyio.current_time()
        assert not await config.is_ready(0.5)
        assert anyio.current_time() - before == pytest.approx(0.5, abs=0.001)


async def test_an_answered_call_suffices_if_no_connection_can_be_probed():
    connector = FakeConnector()
    config, answers = unprobed_config(connector, max_connections=1), []

    async def ask():
        answers.append(await config.is_ready(1))

    async with config.connection_pool as pool, pool.acquire() as conn:
        conn.connection.frozen = True
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await conn.call("/a/b", b"?", timeout=0.1)
        await anyio.wait_all_tasks_blocked()  # its probe has begun and will not end
        conn.connection.frozen = False
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await anyio.sleep(0.5)
            await conn.call("/a/b", b"?")
        assert answers == [True]
        assert pool.status().ready


@pytest.mark.parametrize("late", [False, True])
async def test_a_probe_that_ends_too_late_is_repeated(late):
    """The process was stopped meanwhile, so the elapsed time is no measure."""
    connector = FakeConnector()
    config = unprobed_config(connector)
    async with config.connection_pool as pool:
        assert await config.is_ready()
        (connection,) = connector.connections
        probe = connection.probe
        await anyio.sleep(1)

        async def interrupted(timeout):
            connection.probe = probe
            jump(timeout + 2 * late)
            raise TimeoutError

        connection.probe = interrupted
        with anyio.move_on_after(60) as scope:
            await config.is_ready(30)
        assert not scope.cancelled_caught
        assert await config.is_ready()
        assert pool.status().ready


async def test_after_a_failure_it_probes_even_if_the_last_answer_is_recent():
    connector = FakeConnector()
    config = unprobed_config(connector)
    async with config.connection_pool as pool:
        assert await config.is_ready()
        async with pool.acquire() as conn:
            conn.connection.frozen = True
            with pytest.raises(TimeoutError):
                await conn.call("/a/b", b"?", timeout=0.1)
            assert await config.is_ready(0.1) is False
            conn.connection.frozen = False


async def test_a_connection_lost_before_any_answer_is_replaced_and_probed():
    connector = FakeConnector()
    config = unprobed_config(connector)
    async with config.connection_pool as pool:
        async with pool.acquire():
            pass
        connector.connections[0].hung_up = True
        assert await config.is_ready()
        assert connector.attempts == 2


def test_an_answered_probe_counts_if_another_connection_fails_at_once():
    state = make_state()
    open_answered(state)
    state.failed()
    open_pool = SimpleNamespace(state=state, answered_probes=1, now=lambda: 0.0)
    assert not _is_answered(open_pool, 1)
    assert _is_answered(open_pool, 0)
    state.shut_down()
    assert not _is_answered(open_pool, 0)


async def test_is_ready_counts_as_a_user_of_the_pool_like_a_check():
    """A cancelled initialize() closes a pool without other users."""
    connector = FakeConnector([ok()], default=hang())
    config = unprobed_config(connector, eager_init=True, min_connections=2)
    pool = config.connection_pool
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.initialize)
        await anyio.wait_all_tasks_blocked()
        assert await config.is_ready()
        tasks.cancel_scope.cancel()
    assert repr(pool).startswith("<ConnectionPool open")
    await pool.close()


async def test_a_cancelled_caller_leaves_no_state_and_the_next_call_probes():
    connector = FakeConnector()
    config, answers = unprobed_config(connector), []
    async with config.connection_pool as pool:
        assert await config.is_ready()
        (connection,) = connector.connections
        await anyio.sleep(1)
        connection.frozen = True

        async def ask():
            answers.append(await config.is_ready(10))

        with anyio.CancelScope() as first:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(config.is_ready, 10)
                await anyio.wait_all_tasks_blocked()
                first.cancel()
        assert pool.status().ready, "a cancelled call is not a failure"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await anyio.sleep(4.5)  # the probe is lost after 5 s
            connection.frozen = False
        assert answers == [True]
        assert pool.status().streams_in_use == pool.status().waiting == 0


async def test_ready_follows_an_outage_and_the_recovery():
    connector = FakeConnector(default=fail("down"))
    config = unprobed_config(connector)
    async with config.connection_pool as pool:
        for _ in range(20):
            assert not await config.is_ready()
            assert not pool.status().ready
            await anyio.sleep(10)
        connector.default = ok()
        assert await config.is_ready()
        assert pool.status().ready


async def test_is_ready_does_not_reopen_a_closed_pool():
    connector = FakeConnector()
    config = unprobed_config(connector)
    async with config.connection_pool as pool:
        assert await config.is_ready()
    assert await config.is_ready() is False
    assert repr(pool).startswith("<ConnectionPool closed")
    assert connector.open == []


async def test_a_pool_that_closes_during_the_call_is_not_ready():
    connector = FakeConnector()
    config, answers = unprobed_config(connector), []

    async def ask():
        answers.append(await config.is_ready(60))

    async with config.connection_pool as pool:
        assert await config.is_ready()
        connector.connections[0].frozen = True
        await anyio.sleep(1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await anyio.sleep(0.1)
            before = anyio.current_time()
            await pool.close()
        assert answers == [False]
        assert anyio.current_time() - before < 6


class Odd(FakeConnector):
    """A connector whose connections raise any given error in probes."""

    def __init__(self, error, verdict):
        super().__init__()
        self.error, self.verdict = error, verdict

    async def connect(self, timeout, /):
        connection = await super().connect(timeout)

        async def probe(timeout):
            connection.probes += 1
            raise self.error

        connection.probe = probe
        connection.judge = lambda _error: self.verdict
        return connection


ODD_ERRORS = [ValueError("odd"), TimeoutError(), RuntimeError(), KeyError("k")]


@pytest.mark.parametrize(
    "verdict, error",
    [
        # By default, each error and each verdict once.
        *((None, error) for error in ODD_ERRORS),
        *((verdict, ODD_ERRORS[0]) for verdict in Verdict),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in itertools.product(Verdict, ODD_ERRORS[1:])
        ),
    ],
)
async def test_any_probe_error_means_not_ready(error, verdict):
    config = unprobed_config(Odd(error, verdict))
    async with config.connection_pool as pool:
        for _ in range(2):
            assert await config.is_ready(5) is False
            assert not pool.status().ready
            await anyio.sleep(1)


async def test_a_usage_error_is_logged_with_its_remedy_and_is_not_ready(caplog):
    config = TopazConfig(
        authorizer_options=AuthorizerOptions(insecure=True),
        policy_path_root="app",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
    )
    config.connection_pool._connector = None
    assert await config.is_ready() is False
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.levelno == logging.ERROR
    assert "configure(AuthorizerOptions(...))" in record.getMessage()


@pytest.mark.parametrize(
    "timeout, error",
    [
        (0, ValueError),
        (-1.0, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (10**400, ValueError),
        (None, TypeError),
        (True, TypeError),
        ("1", TypeError),
    ],
)
async def test_a_timeout_that_is_not_a_number_of_seconds_is_rejected(timeout, error):
    connector = FakeConnector()
    config = unprobed_config(connector)
    with pytest.raises(error, match="timeout"):
        await config.is_ready(timeout)
    assert connector.attempts == 0
