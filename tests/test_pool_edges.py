"""The edges of the pool: what mutants of it would have survived without these."""

from __future__ import annotations

import itertools
import math
import re

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import (
    ConnectFailed,
    ConnectionPool,
    PoolClosed,
    PoolSaturated,
    PoolTimeout,
)
from fastapi_topaz._pool import leaks as _leaks
from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz._pool.leaks import STACK_DEPTH, Leaks, _Holder
from fastapi_topaz._pool.state.slot import Claim
from fastapi_topaz._pool.state.status import PoolCounters
from fastapi_topaz.testing import FakeConnector, fail, hang, slow


def make(connector=None, **options):
    options.setdefault("min_connections", 0)
    return ConnectionPool(connector=connector or FakeConnector(), **options)


async def queued(pool, count):
    """Return once *count* callers wait; no time passes."""
    while pool.status().waiting < count:
        await anyio.lowlevel.checkpoint()


# -- what is counted ----------------------------------------------------------------


async def test_each_caller_who_is_served_is_counted_once_whether_it_waited_or_not():
    async with make(max_connections=1) as pool:
        for _ in range(3):
            async with pool.acquire():
                pass
        assert pool._counters.acquisitions == 3
        async with anyio.create_task_group() as tasks:

            async def caller():
                async with pool.acquire():
                    await anyio.sleep(1)

            for _ in range(3):
                tasks.start_soon(caller)
        assert pool._counters.acquisitions == 6


async def test_each_caller_whose_time_is_over_is_counted_once():
    async with make(max_connections=1) as pool, pool.acquire():
        for timeout in (0, 0, 1, 1):
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout=timeout)
        assert pool._counters.timeouts == 4
        assert pool._counters.acquisitions == 1


async def test_each_caller_who_is_refused_is_counted_once():
    async with make(max_connections=1, max_waiting=0) as pool, pool.acquire():
        for _ in range(3):
            with pytest.raises(PoolSaturated):
                await pool.acquire()
        assert pool._counters.rejected == 3


async def test_each_caller_who_fails_is_counted_once():
    connector = FakeConnector(default=fail())
    async with make(connector, max_retries=0) as pool:
        for count in (1, 2, 3):
            with pytest.raises(ConnectFailed):
                await pool.acquire()
            assert pool._counters.failed == count


async def test_each_caller_who_is_cancelled_is_counted_once():
    async with make(max_connections=1) as pool, pool.acquire():
        for _ in range(3):
            with anyio.move_on_after(1):
                await pool.acquire()
        assert pool._counters.cancelled == 3


async def test_each_caller_who_meets_a_closed_pool_is_counted_once():
    pool = make(max_connections=1)
    held = await pool.acquire()
    async with anyio.create_task_group() as tasks:

        async def caller():
            with pytest.raises(PoolClosed):
                await pool.acquire()

        for _ in range(3):
            tasks.start_soon(caller)
        await queued(pool, 3)
        await pool.close(0)
    await pool.release(held)
    assert pool._counters.closed == 3
    for _ in range(2):
        with pytest.raises(PoolClosed):
            await pool.acquire()
    assert pool._counters.closed == 5


async def test_each_lease_that_is_late_is_counted_once():
    async with make(leak_threshold=1) as pool:
        leases = [await pool.acquire() for _ in range(3)]
        await anyio.sleep(5)
        assert pool._counters.leaked == 3
        for conn in leases:
            await pool.release(conn)


# -- what is told -------------------------------------------------------------------


async def test_whose_time_is_over_is_told_of_the_last_failure():
    connector = FakeConnector(default=fail("nobody there"))
    async with make(connector, acquire_timeout=0) as pool:
        with pytest.raises(PoolTimeout) as caught:
            await pool.acquire()
        assert caught.value.__cause__ is None
        assert "failed" not in str(caught.value)
        await anyio.sleep(0.01)
        with pytest.raises(PoolTimeout, match="nobody there") as caught:
            await pool.acquire()
        assert str(caught.value.__cause__) == "nobody there"


async def test_whose_time_is_over_is_told_if_all_leases_are_out_and_only_then():
    connector = FakeConnector(default=slow(2))
    async with make(connector, max_connections=2) as pool, pool.acquire():
        with pytest.raises(PoolTimeout) as caught:
            await pool.acquire(timeout=1)
        assert "leases are out" not in str(caught.value)
        async with pool.acquire():
            with pytest.raises(PoolTimeout, match="all 2 leases are out"):
                await pool.acquire(timeout=1)


async def test_who_fails_is_told_what_the_attempt_said():
    error = ConnectFailed("no", reason="tls", permanent=True)
    async with make(FakeConnector(default=fail(error))) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire()
        assert (caught.value.reason, caught.value.permanent) == ("tls", True)
        assert caught.value.__cause__ is error


async def test_an_attempt_that_ended_otherwise_is_not_permanent():
    connector = FakeConnector(default=hang())
    async with make(connector, max_retries=0, connection_timeout=1) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire()
        assert (caught.value.reason, caught.value.permanent) == ("timeout", False)


async def test_what_is_told_ends_with_the_counts():
    async with make(max_connections=2, connector=FakeConnector([slow(2)])) as pool:
        with pytest.raises(PoolTimeout) as caught:
            await pool.acquire(timeout=1)
        assert str(caught.value).endswith("connecting=1)")
    connector = FakeConnector(default=fail("no"))
    async with make(connector, max_retries=0) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire()
        assert re.search(r": no \(total=0 .*\)$", str(caught.value))
    async with make(max_connections=1) as pool, anyio.create_task_group() as tasks:
        held = await pool.acquire()

        async def caller():
            with pytest.raises(PoolClosed) as caught:
                await pool.acquire()
            assert "closed while waiting (total=" in str(caught.value)

        tasks.start_soon(caller)
        await queued(pool, 1)
        await pool.close(0)
        await pool.release(held)


async def test_a_failure_that_tells_nothing_of_itself_is_not_permanent():
    async with make() as pool:
        error = pool._open_pool._refusals.failed(OSError("no"))
        assert (error.reason, error.permanent) == ("other", False)


class Nameless:
    """A connector that does not say where it connects to."""

    async def connect(self, timeout, /):
        return await FakeConnector().connect(timeout)

    def __repr__(self):
        return "somewhere"


class Unspeakable(Nameless):
    def __repr__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "connector, target", [(Nameless(), "somewhere"), (Unspeakable(), "Unspeakable")]
)
async def test_a_connector_without_a_target_is_named_by_what_it_is(connector, target):
    async with make(connector) as pool, pool.acquire() as conn:
        assert repr(conn) == f"<PooledConnection to {target} leased>"


async def test_a_wrong_timeout_is_told_by_its_name():
    with pytest.raises(ValueError, match="timeout must be at least 0 seconds"):
        make().acquire(timeout=-1)


# -- leases -------------------------------------------------------------------------


async def test_an_acquire_that_failed_may_be_entered_again():
    async with make(max_connections=1) as pool:
        acquire = pool.acquire(timeout=0)
        async with pool.acquire():
            with pytest.raises(PoolTimeout):
                await acquire.__aenter__()
        async with acquire as conn:
            assert await conn.call("/a.B/C", b"works") == b"works"


def test_a_lease_of_a_closed_pool_goes_back_wherever_that_is_and_once():
    async def leave(pool):
        conn = await pool.acquire()
        await pool.close(0)
        return conn

    for first, second in itertools.product(["asyncio", "trio"], repeat=2):
        pool = make()
        conn = anyio.run(leave, pool, backend=first)
        anyio.run(pool.release, conn, backend=second)
        with pytest.raises(ValueError, match="was released to the pool before"):
            anyio.run(pool.release, conn, backend=second)


# -- who may wait -------------------------------------------------------------------


async def test_as_many_may_wait_as_max_waiting_says_besides_those_being_connected():
    connector = FakeConnector(default=slow(1))
    async with make(connector, max_connections=2, max_waiting=1) as pool:
        async with anyio.create_task_group() as tasks:
            served = []

            async def caller():
                async with pool.acquire():
                    served.append(anyio.current_time())
                    await anyio.sleep(1)

            for _ in range(3):
                tasks.start_soon(caller)
            await queued(pool, 3)
            with pytest.raises(PoolSaturated):
                await pool.acquire()
        assert len(served) == 3


async def test_after_a_resize_nobody_gets_a_stream_beyond_the_new_capacity():
    async with make(max_connections=2, streams_per_connection=2) as pool:
        first, second, third = [await pool.acquire() for _ in range(3)]
        assert first.connection is second.connection is not third.connection
        await pool.release(second)
        pool.resize(0, 1)
        # One of the two is on its way out, and the other one has a stream left.
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0)
        for conn in (first, third):
            await pool.release(conn)
        async with pool.acquire(timeout=0):
            pass


async def test_what_an_acquire_finds_lost_is_closed_though_another_one_serves():
    connector = FakeConnector()
    async with make(connector, max_connections=2) as pool:
        first, second = [await pool.acquire() for _ in range(2)]
        await pool.release(first)
        await pool.release(second)
        await anyio.sleep(0.1)  # nothing is left to be done
        connector.connections[1].hung_up = True
        async with pool.acquire() as conn:
            assert conn.connection.number == 1
            await anyio.sleep(0.1)
            assert connector.connections[1].closed == 1


async def test_a_lease_is_observed_for_as_long_as_it_was_out_and_waited_for():
    observed = []

    class Observer:
        def acquired(self, waited):
            observed.append(("waited", waited))

        def released(self, held):
            observed.append(("held", held))

    async with make(max_connections=1) as pool:
        async with pool.acquire():
            pass
        await anyio.sleep(50)
        pool._open_pool.observer = Observer()
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


async def test_a_stream_that_comes_to_who_was_just_cancelled_was_used_until_then():
    async with make(max_connections=1, max_idle_time=100) as pool:
        held = await pool.acquire()
        async with anyio.create_task_group() as tasks:

            async def caller():
                await pool.acquire()

            tasks.start_soon(caller)
            await queued(pool, 1)
            await anyio.sleep(1)
            tasks.cancel_scope.cancel()
            await pool.release(held)
        await anyio.sleep(2)
        (connection,) = pool.connections()
        assert connection.idle_for == pytest.approx(2)
        assert pool.status().idle == 1


async def test_sending_away_who_holds_a_token_lends_none_to_those_behind():
    connector = FakeConnector(default=hang())
    pool = make(connector, max_connections=1, connection_timeout=100)
    async with pool, anyio.create_task_group() as tasks:

        async def caller(timeout):
            with pytest.raises(PoolTimeout):
                await pool.acquire(timeout=timeout)

        for count, timeout in enumerate((1, 10, 10, 10), 1):
            tasks.start_soon(caller, timeout)
            await queued(pool, count)
        await anyio.sleep(1.5)
        assert pool.status().waiting == 3
        assert pool._open_pool.limiter.borrowed_tokens == 1


async def test_those_with_one_deadline_are_all_watched_by_the_timekeeper():
    async with make(max_connections=1) as pool:
        held = await pool.acquire()
        async with anyio.create_task_group() as tasks:

            async def caller():
                with pytest.raises(PoolTimeout):
                    await pool.acquire(timeout=5)

            tasks.start_soon(caller)
            await queued(pool, 1)
            open_pool = pool._open_pool
            (claim,) = open_pool.state.waiting
            assert open_pool.alarm == claim.deadline
            assert open_pool._watch(claim.deadline)
            assert not open_pool._watch(claim.deadline - 1)
        await pool.release(held)


# -- the start ----------------------------------------------------------------------


@pytest.mark.parametrize("minimum", [0, 2])
async def test_a_start_that_went_well_warns_of_nothing(caplog, minimum):
    async with make(min_connections=minimum, eager_init=True) as pool:
        assert pool.status().total == minimum
        assert not [r for r in caplog.records if r.levelname == "WARNING"]


async def test_a_start_that_no_retry_can_mend_ends_at_once_and_warns_of_it(caplog):
    connector = FakeConnector(default=fail(ConnectFailed("never", permanent=True)))
    async with make(connector, min_connections=1, eager_init=True) as pool:
        assert pool.status().total == 0
        assert [r for r in caplog.records if "at startup" in r.getMessage()]


# -- what becomes of a call that fails ----------------------------------------------


class Plain:
    """A connection that can be called and probed, and says nothing of itself."""

    probes = 0

    async def call(self, method, request, **options):
        raise ZeroDivisionError

    async def probe(self, timeout, /):
        self.probes += 1

    async def close(self, grace, /):
        pass


class Judging(Plain):
    def judge(self, error, /):
        return Verdict.UNAVAILABLE


class Making:
    target = "somewhere"

    def __init__(self, made):
        self.made = made

    async def connect(self, timeout, /):
        return self.made()


async def test_a_connection_that_judges_nothing_is_neither_blamed_nor_probed(caplog):
    async with make(Making(Plain)) as pool, pool.acquire() as conn:
        with pytest.raises(ZeroDivisionError):
            await conn.call("/a.B/C", b"")
        await anyio.sleep(0.1)
        assert conn.connection.probes == 0
        assert pool.connections()[0].last_error is None
        assert not [r for r in caplog.records if r.levelname == "WARNING"]


async def test_an_unavailable_connection_is_probed_at_once_and_no_other_one():
    async with make(Making(Judging), max_connections=2) as pool:
        first, second = [await pool.acquire() for _ in range(2)]
        await anyio.sleep(5)
        with pytest.raises(ZeroDivisionError):
            await first.call("/a.B/C", b"")
        slot = first._claim.slot
        assert slot.suspect
        assert slot.suspected_at == anyio.current_time()
        await anyio.sleep(0.1)
        assert not slot.suspect
        assert (first.connection.probes, second.connection.probes) == (1, 0)
        for conn in (first, second):
            await pool.release(conn)


# -- what a call carries --------------------------------------------------------------


class Recording(Plain):
    """A connection that answers each call with its request, and notes what it got."""

    async def call(self, method, request, **options):
        self.got = method, request, options
        return request


async def test_a_call_carries_what_it_is_given():
    metadata = (("x-tenant", "a b"), ["x-key-bin", b"\0\xff"])
    async with make(Making(Recording)) as pool, pool.acquire() as conn:
        answer = await conn.call(
            "/a.B/C",
            "text",
            request_serializer=str.encode,
            response_deserializer=bytes.upper,
            timeout=3,
            metadata=metadata,
        )
        assert answer == b"TEXT"
        options = {"timeout": 3, "metadata": metadata}
        assert conn.connection.got == ("/a.B/C", b"text", options)
        assert await conn.call("/a.B/D", b"bytes") == b"bytes"
        options = {"timeout": None, "metadata": ()}
        assert conn.connection.got == ("/a.B/D", b"bytes", options)


@pytest.mark.parametrize(
    "timeout, carried",
    [(0, 0), (0.0, 0.0), (0.25, 0.25), (7, 7), (10**12, None), (1e12, None)],
)
async def test_a_call_has_its_timeout_unless_that_is_for_ages(timeout, carried):
    async with make(Making(Recording)) as pool, pool.acquire() as conn:
        await conn.call("/a.B/C", b"", timeout=timeout)
        assert conn.connection.got[2]["timeout"] == carried


@pytest.mark.parametrize("timeout", [-1, -1.0, math.inf, math.nan])
async def test_a_call_refuses_a_timeout_that_is_no_time(timeout):
    async with make(Making(Recording)) as pool, pool.acquire() as conn:
        with pytest.raises(ValueError, match=r"^timeout must be "):
            await conn.call("/a.B/C", b"", timeout=timeout)


@pytest.mark.parametrize(
    "metadata, error",
    [
        (iter([("key", "value")]), TypeError),
        ({"key": "value"}, TypeError),
        ([("Key", "value")], ValueError),
        ([("key", 7)], TypeError),
        ([("key", b"value")], TypeError),
        ([("key-bin", "value")], TypeError),
        ([("key", "one\ntwo")], ValueError),
        ([("key", "\xe9")], ValueError),
    ],
)
async def test_a_call_refuses_metadata_that_grpc_would_not_carry(metadata, error):
    async with make(Making(Recording)) as pool, pool.acquire() as conn:
        with pytest.raises(error, match=r"^metadata "):
            await conn.call("/a.B/C", b"", metadata=metadata)
        assert not hasattr(conn.connection, "got")


async def test_a_lease_that_becomes_garbage_is_shown_with_its_warning():
    async with make() as pool:
        conn = await pool.acquire()
        with pytest.warns(ResourceWarning, match="garbage-collected") as caught:
            del conn
        (warning,) = caught
        assert repr(warning.source) == "<PooledConnection to fake released>"
        await anyio.sleep(0.1)
        assert pool.status().streams_in_use == 0


async def test_who_drops_a_lease_is_warned_in_that_line():
    async with make() as pool:
        conn = await pool.acquire()
        with pytest.warns(ResourceWarning, match="garbage-collected") as caught:
            del conn
        assert caught[0].filename == __file__


# -- late leases --------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, math.inf])
async def test_no_threshold_and_one_that_nothing_reaches_watch_no_lease(threshold):
    async with make(leak_threshold=threshold) as pool, pool.acquire():
        assert pool._open_pool.leaks is None


async def test_a_lease_is_late_exactly_at_the_threshold():
    async with make(leak_threshold=8) as pool:
        conn = await pool.acquire()
        claim, leaks = conn._claim, pool._open_pool.leaks
        assert leaks.look(claim.acquired_at + 7) == claim.acquired_at + 8
        assert pool._counters.leaked == 0
        leaks.look(claim.acquired_at + 8)
        assert pool._counters.leaked == 1
        await pool.release(conn)


def test_nothing_that_is_out_means_not_to_look_before_it_could_be_late():
    leaks = Leaks("pool", 8.0, PoolCounters())
    assert leaks.look(100.0) == 108.0


async def test_a_late_lease_that_becomes_garbage_is_still_known_by_its_holder(caplog):
    async with make(leak_threshold=1) as pool:
        conn = await pool.acquire()
        await anyio.sleep(2)
        caplog.clear()
        with pytest.warns(ResourceWarning):
            del conn
        await anyio.sleep(0.1)
        (line,) = (
            record.getMessage()
            for record in caplog.records
            if "garbage-collected" in record.getMessage()
        )
        assert "held by task" in line


def test_a_place_is_told_by_its_innermost_frames_and_no_more():
    # Two, because a line that repeats itself is shown three times only.
    def one(depth):
        return two(depth - 1) if depth else str(_Holder.here())

    def two(depth):
        return one(depth - 1) if depth else str(_Holder.here())

    head, *lines = one(2 * STACK_DEPTH).splitlines()
    assert head == "task 'unknown', which took it here:"
    assert sum(line.startswith('  File "') for line in lines) == STACK_DEPTH
    assert all(line.startswith("  ") for line in lines)


async def test_a_task_without_a_name_is_told_of_as_such(monkeypatch):
    class Task:
        name = None

    monkeypatch.setattr(_leaks.anyio, "get_current_task", Task)
    assert str(_Holder.here()).startswith("task 'without a name', which")


async def test_dismissed_callers_let_no_more_wait_than_max_waiting():
    options = {"max_connections": 1, "max_waiting": 1, "acquire_timeout": 50}
    async with make(FakeConnector(default=hang()), **options) as pool:

        async def dismissed():
            with pytest.raises(PoolTimeout):
                await pool.acquire()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(dismissed)
            await queued(pool, 1)
            open_pool = pool._open_pool
            (claim,) = open_pool.state.waiting
            claim.deadline = open_pool.now()
            # It holds the only token until it has had its turn.
            open_pool.expire()
            others = [Claim(), Claim()]
            for other in others:
                open_pool._refusals.check_saturation()
                open_pool.state.enqueue(other)
            # One waits for a connection and one for capacity, as many as may.
            with pytest.raises(PoolSaturated):
                open_pool._refusals.check_saturation()
            for other in others:
                open_pool.state.withdraw(other, open_pool.now())
