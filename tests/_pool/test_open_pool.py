"""Test how an open pool assigns its streams."""

from __future__ import annotations

import logging

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import PoolTimeout
from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz.testing import FakeConnection, FakeConnector, hang
from kit.autojump import jump
from kit.pools import Making, MakingAny, fill, make_pool, queued


async def test_a_free_stream_beyond_the_limit_is_not_leased():
    pool = make_pool(max_connections=2, streams_per_connection=2)
    async with pool:
        first, second, third = [await pool.acquire() for _ in range(3)]
        assert first.connection is second.connection is not third.connection
        pool.resize(0, 1)
        await pool.release(first)
        # Two of two streams are leased, and one of them belongs to a leaving
        # connection.
        assert (pool.status().streams_in_use, pool.status().leaving) == (2, 1)
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0)
        await pool.release(third)
        async with pool.acquire(timeout=0) as conn:
            assert conn.connection is second.connection
        await pool.release(second)


async def test_an_unknown_verdict_accuses_no_connection():
    class Vague(FakeConnection):
        def judge(self, error):
            return "so so"

    def answer(_method, _request):
        raise OSError("no answer")

    async with make_pool(Making(Vague, answer=answer)) as pool:
        async with pool.acquire() as conn:
            with pytest.raises(OSError, match="no answer"):
                await conn.call("/a/b", b"")
        (told,) = pool.connections()
        assert (told.condition, told.last_error) == ("idle", "no answer")


async def test_the_repr_of_an_open_pool_identifies_it():
    async with make_pool(name="main") as pool:
        assert repr(pool._open_pool).startswith("<OpenPool of pool 'main' total=0 ")


async def test_a_second_resize_skips_leaving_connections():
    pool = make_pool(max_connections=3)
    async with pool:
        leases = [await pool.acquire() for _ in range(3)]
        pool.resize(0, 2)
        assert pool.status().leaving == 1
        pool.resize(0, 1)
        assert pool.status().leaving == 2
        for lease in leases:
            await pool.release(lease)
        await anyio.sleep(1)
        assert (pool.status().total, pool.status().leaving) == (1, 0)


class Observer:
    """Records the durations of waits and leases."""

    def __init__(self, observed):
        self.observed = observed

    def acquired(self, waited):
        self.observed.append(("waited", waited))

    def released(self, held):
        self.observed.append(("held", held))


async def test_the_lease_and_wait_durations_are_recorded():
    observed = []
    async with make_pool(max_connections=1) as pool:
        async with pool.acquire():
            pass
        await anyio.sleep(50)
        pool._open_pool.observer = Observer(observed)
        async with pool.acquire():
            await anyio.sleep(3)
        assert observed == [("waited", 0.0), ("held", pytest.approx(3))]
        observed.clear()

        async def caller():
            async with pool.acquire():
                await anyio.sleep(2)

        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(caller)
        assert sorted(observed) == [
            *(("held", pytest.approx(2)), ("held", pytest.approx(2))),
            *(("waited", pytest.approx(0)), ("waited", pytest.approx(2))),
        ]


async def test_the_failure_of_an_unanswered_connection_names_the_server():
    async with make_pool(FakeConnector()) as pool:
        conn = await pool.acquire()
        open_pool = pool._open_pool
        (slot,) = open_pool.state.open
        open_pool.state.lost(slot, "lost", open_pool.now())
        error = str(open_pool.state.attempts.error)
        assert error.startswith("cannot connect to fake: the server accepted the ")
        await pool.release(conn)


async def test_a_pool_whose_connector_has_no_readable_target_says_which_pool(caplog):
    class Odd(MakingAny):
        @property
        def target(self):
            raise ZeroDivisionError

    caplog.set_level(logging.DEBUG, "fastapi_topaz.pool")
    async with make_pool(Odd(FakeConnection), name="main"):
        assert "pool 'main': cannot read the attribute `target`" in caplog.text


async def test_a_limit_raised_for_checks_that_do_not_end_serves_the_waiting_one(caplog):
    caplog.set_level(logging.DEBUG, "fastapi_topaz.pool")
    options = {"max_connections": 1, "streams_per_connection": 50, "name": "main"}
    async with make_pool(**options) as pool:
        leases = [await pool.acquire(budget=60) for _ in range(17)]
        status = pool.status()
        assert (status.limit, status.limit_reason) == (32, "trial")
        assert pool._counters.limit_changes == {"trial": 1}
        assert "pool 'main': its limit of leases is 32 now, and was 16" in caplog.text
        for conn in leases:
            await pool.release(conn)


async def test_the_wait_ends_and_the_lease_begins_at_the_hand_over():
    observed = []
    async with make_pool(max_connections=1) as pool:
        first = await pool.acquire()
        pool._open_pool.observer = Observer(observed)

        async def caller():
            async with pool.acquire() as conn:
                assert conn.waited == pytest.approx(2)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller)
            await anyio.sleep(2)
            await pool.release(first)
            jump(5)  # before the task of the caller runs
    assert observed == [
        ("held", pytest.approx(2)),
        ("waited", pytest.approx(2)),
        ("held", pytest.approx(5)),
    ]


async def test_leases_have_the_times_of_the_pool_after_a_clock_went_back():
    async with make_pool() as pool:
        async with pool.acquire():
            pass
        open_pool = pool._open_pool
        jump(-0.01)
        open_pool.now()
        await anyio.sleep(0.3)
        async with pool.acquire() as conn:
            assert conn._claim.acquired_at == open_pool.now()
            await anyio.sleep(0.3)
        (slot,) = open_pool.state.open
        assert slot.last_used_at == open_pool.now()


async def test_a_caller_is_not_served_while_all_tokens_are_lent():
    async with make_pool(max_connections=1) as pool:
        async with pool.acquire():
            pass
        limiter, dismissed = pool._open_pool.limiter, object()
        # A dismissed caller keeps its token until its task runs.
        limiter.acquire_on_behalf_of_nowait(dismissed)
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0)
        assert pool.status().streams_in_use == 0
        limiter.release_on_behalf_of(dismissed)
        async with pool.acquire(timeout=0):
            assert pool.status().streams_in_use == 1


async def test_an_explicit_lease_beyond_the_limit_needs_no_wait():
    async with make_pool(max_connections=1, streams_per_connection=50) as pool:
        # The first one waited for the connection, so there is room for it.
        leases = [await pool.acquire() for _ in range(17)]
        assert pool.status().limit == 17
        leases.append(await pool.acquire(timeout=0))
        assert pool.status().streams_in_use == 18
        for conn in leases:
            await pool.release(conn)


async def test_a_short_wait_of_a_check_shows_that_the_queue_is_short():
    async def check():
        async with pool.acquire(budget=5) as conn:
            assert admission.stands_since == conn._claim.acquired_at

    async with make_pool(max_connections=1) as pool:
        admission = pool._open_pool.overload.admission
        held = await pool.acquire()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(check)
            await anyio.sleep(0.1)
            began = admission.stands_since
            await pool.release(held)
        assert admission.stands_since == pytest.approx(began + 0.1)


async def test_a_lease_counts_although_its_connection_had_an_error_before():
    async with make_pool(max_connections=1) as pool:
        admission = pool._open_pool.overload.admission
        for _ in range(2):
            async with pool.acquire() as conn:
                await anyio.sleep(3)
                conn._claim.slot.last_error = "no luck"
        assert (admission.ended, admission.held) == (2, pytest.approx(6))


async def test_the_tokens_of_dismissed_callers_serve_no_other_caller():
    async def caller():
        async with pool.acquire():
            pass

    async with make_pool(max_connections=1, streams_per_connection=2) as pool:
        await caller()
        open_pool = pool._open_pool
        dismissed = [object(), object()]
        for borrower in dismissed:
            open_pool.limiter.acquire_on_behalf_of_nowait(borrower)
        open_pool.state.dismissed = 2
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller)
            await queued(pool, 1)
            assert open_pool.tokens() == 0
            open_pool.after_change()
            assert pool.status().streams_in_use == 0
            open_pool.state.dismissed = 0
            for borrower in dismissed:
                open_pool.limiter.release_on_behalf_of(borrower)


async def test_a_connection_that_a_release_finds_too_old_is_probed_at_once():
    async def caller():
        async with pool.acquire(budget=60):
            await anyio.sleep(1)

    async with make_pool(max_connections=2, streams_per_connection=1) as pool:
        await fill(pool, 2)
        open_pool = pool._open_pool
        held = await pool.acquire(budget=60)
        (old,) = (slot for slot in open_pool.state.open if not slot.leases)
        open_pool.state.limit = open_pool.limiter.total_tokens = 1
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller)
            await queued(pool, 1)
            old.proven_at -= 1000
            await pool.release(held)
            assert old.suspect
            await anyio.wait_all_tasks_blocked()
            assert not old.suspect
            assert pool.status().streams_in_use == 1


FLAGS = {
    Verdict.ANSWERED: "answered",
    Verdict.BROKEN: "cut_off",
    Verdict.SILENT: "unanswered",
    Verdict.UNAVAILABLE: "cut_off",
}


def failing(_method, _request):
    raise OSError("no luck")


@pytest.mark.parametrize("verdict", FLAGS)
async def test_a_lease_knows_how_its_last_call_ended(verdict):
    class Judging(FakeConnection):
        def judge(self, _error):
            return verdict

    connector = Making(Judging, answer=failing)
    async with make_pool(connector) as pool, pool.acquire() as conn:
        with pytest.raises(OSError, match="no luck"):
            await conn.call("/a/b", b"")
        ends = {name: getattr(conn._claim, name) for name in set(FLAGS.values())}
        assert ends == {name: name == FLAGS[verdict] for name in ends}
        assert conn._claim.slot.answered is (verdict is Verdict.ANSWERED)


async def test_a_judge_that_fails_is_a_warning_with_its_traceback(caplog):
    class Judging(FakeConnection):
        def judge(self, _error):
            raise ZeroDivisionError

    connector = Making(Judging, answer=failing)
    async with make_pool(connector, name="main") as pool, pool.acquire() as conn:
        with pytest.raises(OSError, match="no luck"):
            await conn.call("/a/b", b"")
    (record,) = (x for x in caplog.records if "judge()" in x.getMessage())
    assert record.getMessage() == "pool 'main': judge() of a connection failed"
    assert record.levelno == logging.WARNING
    assert record.exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize(
    "reasons, levels",
    [
        (["lost", "lost"], [logging.WARNING, logging.DEBUG]),
        # A health check that failed was logged already.
        (["unhealthy"], [logging.DEBUG]),
    ],
)
async def test_only_the_first_unanswered_end_in_a_row_is_a_warning(
    caplog, reasons, levels
):
    caplog.set_level(logging.DEBUG, "fastapi_topaz.pool")
    async with make_pool(max_connections=1) as pool:
        open_pool = pool._open_pool
        for reason in reasons:
            conn = await pool.acquire(timeout=100)
            open_pool.state.lost(conn._claim.slot, reason, open_pool.now())
            open_pool.after_change()
            await pool.release(conn)
    text = "cannot connect to fake: the server accepted"
    told = [x.levelno for x in caplog.records if text in x.getMessage()]
    assert told == levels


async def test_a_start_ends_early_if_the_pool_closes():
    connector = FakeConnector(default=hang())
    options = {"min_connections": 1, "connection_timeout": 60, "eager_init": True}
    pool = make_pool(connector, **options)
    began = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.initialize)
        await anyio.sleep(1)
        await pool.close()
    assert anyio.current_time() - began < 5


async def test_a_refused_connection_does_not_end_the_start():
    connector = FakeConnector()
    async with make_pool(connector, max_connections=1) as pool:
        await fill(pool, 1)
        connector.connections[0].frozen = True
        open_pool = pool._open_pool
        pool.resize(1, 1)
        (slot,) = open_pool.state.open
        open_pool.state.refused(slot, open_pool.now())
        began = anyio.current_time()
        await open_pool.warm_up()
        # Its probe ended first.
        assert anyio.current_time() - began >= pool.options.health_check_timeout
        assert open_pool.state.outage.refused == {}
