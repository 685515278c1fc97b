"""
Cancelling an operation at each of its await points.

The points are found at run time. A wrapper drives the coroutine of the operation, sees
each of its suspensions, and cancels at the n-th. This repeats for every n until a run
has no n-th point. The number of points differs between the two backends. On trio it
also differs from run to run, because an event may be set before a task waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import types

import anyio
import anyio.lowlevel
import attrs
import pytest
import sniffio
import trio
import trio.testing

from fastapi_topaz import ConnectionLost, ConnectionPool, PoolError, PoolTimeout
from fastapi_topaz._pool.connector import Verdict
from kit.autojump import AutojumpLoop


SCOPE = ["scope", "scope, late"]
TASK = ["task", "task, late", "task, again"]
ON_ASYNCIO = pytest.mark.parametrize(
    "anyio_backend",
    ["asyncio"] + ["asyncio+eager"] * (sys.version_info >= (3, 12)),
    indirect=True,
)


def on_asyncio():
    return sniffio.current_async_library() == "asyncio"


@attrs.define
class Strike:
    """
    A cancellation at one await point of an operation.

    Attributes:
        how: The target, `scope` or `task`, and the moment. A `task` can only be
            cancelled on asyncio. By default, cancel when the operation goes to sleep.
            `late`: when the awaited event has happened and the operation has not run
            since. `both`: while it sleeps, and then the event happens before it runs.
            `again`: also at each later point.
        point: The index of the await point, counted from 0.
        points: The number of await points.
        times: How often the operation was cancelled.
        ended: Whether the operation ended by itself.
        result: What it returned then.
        error: What it raised then.
        trigger: Makes the awaited event happen.
    """

    how: str = "scope"
    point: float = float("inf")
    points: int = 0
    times: int = 0
    ended: bool = False
    result: object = None
    error: Exception | None = None
    trigger: object = None

    @types.coroutine
    def watch(self, awaitable, cancel):
        """Await *awaitable*, and cancel when the strike is due."""
        who, _, when = self.how.partition(", ")

        def strike(*_):
            self.times += 1
            cancel()

        def strike_and_trigger():
            strike()
            self.trigger()

        inner = awaitable.__await__()
        resume, argument = inner.send, None
        while True:
            try:
                waits_for = resume(argument)
            except StopIteration as stop:
                return stop.value
            due = self.points == self.point
            due = due or (self.points > self.point and when == "again")
            self.points += 1
            on_resumption = due and when == "late" and who == "scope"
            if due and when == "both":
                soon(strike_and_trigger)
            elif due and when == "late" and who == "task" and waits_for is not None:
                # Before the task adds its own callback, which wakes it.
                waits_for.add_done_callback(strike)
            elif due and not on_resumption:
                strike()
            try:
                argument = yield waits_for
                resume = inner.send
            except BaseException as error:  # noqa: BLE001  (raised inside)
                resume, argument = inner.throw, error
            if on_resumption:
                # A scope cannot cancel a task that is already awake, on either backend.
                strike()

    async def hit(self, operation):
        """Run *operation* in its own task, and cancel it at the point."""
        if self.how.startswith("task"):
            task = asyncio.create_task(self._in_task(operation))
            await asyncio.wait([task])
            if not self.times:
                task.result()
            # The cancellation reached the caller, and no code undid it with
            # `uncancel()`.
            assert task.cancelled() == (self.times > 0)
            assert task.cancelling() == self.times
        else:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._in_scope, operation)
        return self.result

    async def _in_task(self, operation):
        await self._run(operation, asyncio.current_task().cancel)

    async def _in_scope(self, operation):
        with anyio.CancelScope() as scope:
            await self._run(operation, scope.cancel)
            # If the operation did not use the cancellation, it must not have swallowed
            # it.
            await anyio.lowlevel.checkpoint()
        assert scope.cancelled_caught == (self.times > 0)
        if on_asyncio():
            assert not asyncio.current_task().cancelling()

    async def _run(self, operation, cancel):
        try:
            self.result = await self.watch(operation(), cancel)
        except (PoolError, ConnectionLost, TimeoutError) as error:
            self.error = error
        self.ended = True


def soon(function):
    """Call *function* once the running task sleeps."""
    if on_asyncio():
        asyncio.get_running_loop().call_soon(function)
    else:
        trio.lowlevel.current_trio_token().run_sync_soon(function)


async def sweep(scenario, how, *arguments):
    """
    Run *scenario* with a cancellation at each of its points, and return their number.
    """
    for point in itertools.count():
        strike = Strike(how, point)
        before = left_over()
        try:
            await scenario(strike, *arguments)
            assert left_over() == before
        except BaseException as error:
            error.add_note(f"cancelled by {how!r} at point {point}")
            raise
        if not strike.times:
            # Each earlier point was hit. This run had no such point, and nothing was
            # hit.
            assert strike.points <= point
            assert strike.ended
            return point
    raise AssertionError


def left_over():
    """Return the number of tasks, and in virtual time also a measure of the timers."""
    tasks = len(anyio.get_running_tasks())
    if on_asyncio():
        loop = asyncio.get_running_loop()
        virtual = isinstance(loop, AutojumpLoop)
        return tasks, virtual and sum(
            not timer.cancelled() for timer in loop._scheduled
        )
    virtual = isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock)
    statistics = trio.lowlevel.current_statistics()
    return tasks, virtual and statistics.seconds_to_next_deadline


# -- a scripted connector, and a pool that is checked ---------------------------------


async def play(outcome):
    await anyio.lowlevel.checkpoint()
    if outcome == "never":
        await anyio.sleep_forever()
    elif outcome == "slow":
        await anyio.sleep(0.5)
    elif outcome == "error":
        raise ConnectionLost("as the script says")


@attrs.define(eq=False)
class Playing:
    """A connector, with the outcome of each of its asynchronous steps."""

    connect_: str = "ok"
    probe: str = "ok"
    call: str = "ok"
    close: str = "ok"
    connections: list = attrs.Factory(list)
    connecting: int = 0

    async def connect(self, _timeout):
        self.connecting += 1
        try:
            await play(self.connect_)
        finally:
            self.connecting -= 1
        self.connections.append(PlayingConnection(self))
        return self.connections[-1]

    def mend(self):
        self.connect_ = self.probe = self.call = self.close = "ok"


@attrs.define(eq=False)
class PlayingConnection:
    script: Playing
    closed: int = 0
    closing: bool = False

    async def probe(self, _timeout):
        await play(self.script.probe)

    async def call(self, _method, request, *, timeout=None, metadata=()):
        with anyio.fail_after(timeout):
            await play(self.script.call)
        return request

    def judge(self, error):
        return Verdict.BROKEN if isinstance(error, ConnectionLost) else Verdict.SILENT

    async def close(self, _grace):
        self.closed += 1
        self.closing = self.script.close != "never"
        with contextlib.suppress(ConnectionLost):
            await play(self.script.close)
        self.closing = False
        if self.script.close == "error":
            raise OSError("as the script says")


class Pool(ConnectionPool):
    """A pool that counts calls of acquire(), and remembers where it was open."""

    asked = 0
    opened = None

    def acquire(self, **options):
        self.asked += 1
        return super().acquire(**options)

    def _open(self, **options):
        self.opened = super()._open(**options)
        return self.opened


def make_small(connector=None, **options):
    """Return a pool with at most two connections; none of its times is above 5 s."""
    options = {"min_connections": 0, "max_connections": 2, **options}
    options = {"connection_timeout": 2, "health_check_timeout": 1, **options}
    return Pool(connector=connector or Playing("slow"), **options)


def assert_unused(pool, cut=0):
    """No caller waits, no token is in use, and each acquire() is counted once."""
    open_pool, counts = pool.opened, pool._counters
    state = open_pool.state
    assert state.in_use == open_pool.limiter.borrowed_tokens == cut
    left = [*state.waiting, open_pool.initializing, state.dismissed]
    assert not any(left)
    outcomes = [counts.acquisitions, counts.timeouts, counts.rejected]
    outcomes += [counts.failed, counts.closed, counts.cancelled]
    assert sum(outcomes) == pool.asked


async def call(conn):
    await conn.call("/a/b", b"", timeout=5)


async def assert_serves_all(pool, call=call):
    """The full capacity is available: this many leases at once and not more."""
    assert_unused(pool)
    capacity = pool.status().streams_max
    leases = [await pool.acquire(timeout=30) for _ in range(capacity)]
    with pytest.raises(PoolTimeout):
        await pool.acquire(timeout=0)
    for conn in leases:
        await call(conn)
        await pool.release(conn)
    assert_unused(pool)


def assert_closed(pool, cut=0):
    """Only *cut* leases are left, and every opened connection was closed once."""
    assert repr(pool).split()[1] in {"closed", "new"}
    assert_unused(pool, cut)
    open_pool, counts, connector = pool.opened, pool._counters, pool._connector
    state = open_pool.state
    left = [*state.open, *state.connecting, *state.closing, *open_pool.attempts]
    assert not left
    assert not connector.connecting
    assert all(conn.closed == 1 for conn in connector.connections)
    assert not any(conn.closing for conn in connector.connections), (
        "a lease that close() cut short"
    )
    assert counts.connects == sum(counts.closes.values()) == len(connector.connections)


@contextlib.asynccontextmanager
async def whole_after(pool):
    """Open *pool*, and close it again after checking its capacity."""
    await pool.initialize()
    yield pool
    await assert_serves_all(pool)
    await pool.close()
    assert_closed(pool)
