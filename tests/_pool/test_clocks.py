"""Test that clocks that jump, stop or are coarse lengthen no wait of the pool."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import time

import anyio
import anyio.lowlevel
import grpc
import pytest
import trio
import trio.testing
import uvloop
from anyio._backends._asyncio import CancelScope
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectFailed,
    ConnectionPool,
    Identity,
    IdentityType,
    PoolTimeout,
    TopazConfig,
)
from fastapi_topaz._pool.clock import Clock, _Exact, clock_of, time_limit
from fastapi_topaz._pool.owner_loop import OwnerLoop
from fastapi_topaz.testing import FakeConnector, fail, hang
from kit.autojump import jump
from kit.backends import asyncio_only
from kit.configs import Requests
from kit.pools import make_pool


LONGEST_PAUSE = 2.0
"""The longest backoff of the pool, in seconds."""

BACK = [-0.4, -1000.0, -1e6]


async def wake(pool):
    """Use *pool* once. The pool notices a clock jump when it is used."""
    with contextlib.suppress(PoolTimeout):
        async with pool.acquire(timeout=0):
            pass


# -- the event loop's clock jumps -----------------------------------------------------


@pytest.mark.parametrize("seconds", [*BACK, 1000.0])
async def test_a_clock_jump_does_not_delay_the_attempt_after_a_failed_one(seconds):
    async with make_pool(FakeConnector([fail()]), max_retries=0) as pool:
        with pytest.raises(ConnectFailed):
            await pool.acquire()
        jump(seconds)
        began = anyio.current_time()
        async with pool.acquire(timeout=60):
            assert anyio.current_time() - began <= LONGEST_PAUSE


@pytest.mark.parametrize("seconds", BACK)
async def test_a_clock_jump_does_not_delay_the_attempt_after_brief_connections(seconds):
    connector = FakeConnector()
    async with make_pool(connector) as pool:
        for _ in range(4):
            async with pool.acquire():
                connector.connections[-1].hung_up = True
        jump(seconds)
        began = anyio.current_time()
        async with pool.acquire(timeout=60):
            assert anyio.current_time() - began <= LONGEST_PAUSE


async def test_a_clock_that_jumps_ahead_and_back_delays_nothing():
    connector = FakeConnector([fail()])
    async with make_pool(connector, max_retries=0) as pool:
        jump(1.7e6)
        with pytest.raises(ConnectFailed):
            await pool.acquire()
        jump(-1.7e6)
        began = anyio.current_time()
        async with pool.acquire(timeout=60):
            assert anyio.current_time() - began <= LONGEST_PAUSE


@pytest.mark.parametrize("seconds", BACK)
async def test_a_hanging_attempt_times_out_on_time_after_a_clock_jump(seconds):
    connector = FakeConnector([hang()])
    pool = make_pool(connector, max_connections=1, connection_timeout=10)
    async with pool:
        await wake(pool)
        await anyio.sleep(0.5)
        jump(seconds)
        began = anyio.current_time()
        with pytest.raises(ConnectFailed, match="connection_timeout=10"):
            await pool.acquire(timeout=60)
        assert anyio.current_time() - began <= 10 + 1e-5


@pytest.mark.parametrize("seconds", BACK)
@pytest.mark.parametrize(
    "timeouts", [(5, 5), (50, 5)], ids=["in order", "out of order"]
)
async def test_a_waiting_caller_times_out_on_time_after_a_clock_jump(seconds, timeouts):
    waited = {}

    async def wait(name, timeout):
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=timeout)
        waited[name] = anyio.current_time()

    async with make_pool(max_connections=1) as pool, pool.acquire():
        async with anyio.create_task_group() as tasks:
            for name, timeout in enumerate(timeouts):
                tasks.start_soon(wait, name, timeout)
                await anyio.sleep(0.5)
            jump(seconds)
            await wake(pool)
            began = anyio.current_time()
        for name, timeout in enumerate(timeouts):
            assert waited[name] - began <= timeout + 1e-5


@pytest.mark.parametrize("seconds", BACK)
@pytest.mark.parametrize("before", [False, True], ids=["under it", "before it"])
async def test_a_refused_connection_is_probed_on_time_after_a_clock_jump(
    seconds, before
):
    connector = FakeConnector(answer=lambda _method, request: request)
    async with make_pool(connector, max_connections=1) as pool:
        await wake(pool)
        await anyio.sleep(1)
        (connection,) = connector.connections
        connection.refuses, probe = "503", connection.probe

        async def refused_once(_timeout):
            connection.refuses, connection.probe = "", probe
            raise ConnectionRefusedError

        connection.probe = refused_once
        if before:
            jump(seconds)
        async with pool.acquire() as conn:
            with pytest.raises(ConnectionRefusedError):
                await conn.call("/a/b", b"?")
        if not before:
            jump(seconds)
        began = anyio.current_time()
        async with pool.acquire(timeout=60):
            assert anyio.current_time() - began <= LONGEST_PAUSE
            assert connection.probes == 1


@pytest.mark.parametrize("seconds", BACK)
async def test_idle_connections_are_reaped_on_time_after_a_clock_jump(seconds):
    connector = FakeConnector()
    async with make_pool(connector, max_idle_time=100, idle_check_interval=10) as pool:
        await wake(pool)
        await anyio.sleep(50)
        jump(seconds)
        async with pool.acquire(timeout=60):
            pass
        await anyio.sleep(111)
        assert not connector.open


@pytest.mark.parametrize("seconds", BACK)
async def test_connections_expire_and_are_probed_on_time_after_a_clock_jump(seconds):
    connector = FakeConnector()
    options = {"max_lifetime": 100, "health_check_interval": 10, "max_idle_time": 0}
    async with make_pool(connector, min_connections=1, **options) as pool:
        await wake(pool)
        await anyio.sleep(50)
        (connection,) = connector.open
        connection.probes = 0
        jump(seconds)
        async with pool.acquire(timeout=60):
            pass
        await anyio.sleep(21)
        assert connection.probes >= 1
        await anyio.sleep(81)
        assert connection not in connector.open


@pytest.mark.parametrize("seconds", BACK)
async def test_a_late_lease_is_reported_on_time_after_a_clock_jump(seconds, caplog):
    async with make_pool(leak_threshold=100, max_connections=2) as pool, pool.acquire():
        await anyio.sleep(50)
        jump(seconds)
        async with pool.acquire():
            pass
        await anyio.sleep(101)
        assert pool._counters.leaked == 1


@pytest.mark.parametrize("seconds", [*BACK, 1000.0])
async def test_a_clock_jump_during_a_lease_does_not_lengthen_a_check(seconds):
    timeouts = []

    class Slow(FakeConnector):
        async def connect(self, timeout, /):
            made = await super().connect(timeout)
            call = made.call

            async def jumping(*args, timeout, **options):
                timeouts.append(timeout)
                if len(timeouts) == 1:
                    jump(seconds)
                    raise grpc.aio.AioRpcError(
                        grpc.StatusCode.UNAVAILABLE,
                        grpc.aio.Metadata(),
                        grpc.aio.Metadata(),
                    )
                return await call(*args, timeout=timeout, **options)

            made.call = jumping
            return made

    connector = Slow(answer=lambda _method, _request: b"")
    config = TopazConfig(
        authorizer_options=AuthorizerOptions(url="unused:1"),
        policy_path_root="myapp",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
        connection_pool=make_pool(connector),
        check_timeout=3,
    )
    request = Requests({"type": "http", "path_params": {}, "headers": []})
    async with config.connection_pool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await config.is_allowed(request, "myapp.GET.a")
        assert all(timeout <= 3 for timeout in timeouts)
        assert len(timeouts) == (2 if seconds < 0 else 1)


@asyncio_only
@pytest.mark.parametrize("seconds", [1000.0, -1000.0, 1.7e6])
async def test_the_loop_clock_is_looked_up_at_each_read(seconds, monkeypatch):
    """
    freezegun with `real_asyncio=True` replaces the method of asyncio's loop in an open
    pool. It replaces no method of trio, only functions of the module `time`.
    """
    async with make_pool(max_connections=1) as pool, pool.acquire():
        await anyio.sleep(1)
        kind = type(asyncio.get_running_loop())
        before = kind.time
        monkeypatch.setattr(kind, "time", lambda self: before(self) + seconds)
        began = anyio.current_time()
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0.3)
        assert anyio.current_time() - began == pytest.approx(0.3, abs=1e-5)


# -- the clock itself -----------------------------------------------------------------


class Source:
    at = 100.0

    def time(self):
        return self.at


def test_the_clock_follows_the_loop_and_never_goes_back():
    source = Source()
    clock = Clock(source)
    seen = [clock.now()]
    assert seen == [source.at]
    for step in (5, -1000, 2, -0.5, 3, 1e9, -2e9, 1):
        source.at += step
        peeked = clock.peek()
        seen.append(clock.now())
        assert peeked == seen[-1]
    assert seen == sorted(seen)
    assert seen[1] - seen[0] == 5
    assert seen[3] - seen[2] == 2
    assert seen[-1] - seen[-2] == pytest.approx(1)


async def test_a_cancel_scope_keeps_its_remaining_time_after_a_clock_jump():
    clock = OwnerLoop().clock
    end = clock.now() + 5
    with clock.deadline(end) as scope:
        assert scope.deadline == end
        await anyio.sleep(2)
        clock.now()
        jump(-1000)
        clock.now()
        began = anyio.current_time()
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert anyio.current_time() - began == pytest.approx(3, abs=1e-5)
    with clock.deadline(math.inf), anyio.move_on_after(1):
        jump(-1000)
        clock.now()
        await anyio.sleep_forever()


@pytest.mark.parametrize("timeout, waited", [(5, 5), (None, 9)])
async def test_a_time_limit_ends_a_wait_unless_it_is_none(timeout, waited):
    began = anyio.current_time()
    with anyio.move_on_after(9), time_limit(timeout):
        await anyio.sleep_forever()
    assert anyio.current_time() - began == pytest.approx(waited)


# -- durations ------------------------------------------------------------------------


exact = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere, uvloop shows only milliseconds"
)


def wait_busily(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@exact
@pytest.mark.real_clock
@pytest.mark.uvloop
async def test_a_clock_shows_less_than_a_millisecond():
    """The own clock of uvloop does not."""
    clock = OwnerLoop().clock
    began = time.perf_counter()
    before = clock.now()
    wait_busily(0.0002)
    passed = clock.now() - before
    assert 0.0002 <= passed <= time.perf_counter() - began


@pytest.mark.real_clock
@pytest.mark.uvloop
async def test_a_deadline_costs_few_turns_of_the_loop_and_is_not_early(monkeypatch):
    turns = 0
    timeout = CancelScope._timeout

    def counted(scope):
        nonlocal turns
        turns += 1
        timeout(scope)

    monkeypatch.setattr(CancelScope, "_timeout", counted)
    clock = OwnerLoop().clock
    for delay in (0, 1e-5, 0.0004, 0.0011, 0.003, 0.0053):
        turns = 0
        end = clock.now() + delay
        with clock.deadline(end):
            await anyio.sleep_forever()
        assert clock.now() >= end
        # One at the start, and up to two because of rounding. Trio counts none.
        assert turns <= 4
    # The timers of uvloop take such a time, too.
    with clock.deadline(sys.float_info.max) as scope:
        assert scope.deadline == sys.float_info.max


@pytest.fixture
def loop():
    loop = uvloop.new_event_loop()
    yield loop
    loop.close()


def test_on_linux_the_clock_of_uvloop_is_the_one_behind_it(monkeypatch, loop):
    monkeypatch.setattr(sys, "platform", "linux")
    clock = clock_of(loop)
    assert clock.source is not loop
    before = time.perf_counter()
    assert before <= clock.now() <= time.perf_counter()


@pytest.mark.parametrize(
    "ahead, module",
    [
        # freezegun replaces the function, and shows the real time between two freezes.
        (0.0, "freezegun.api"),
        # A library may also change the function itself.
        *((ahead, "time") for ahead in (-1e9, 5.0, 1e9)),
    ],
)
def test_a_replaced_clock_is_not_used_for_uvloop(monkeypatch, loop, ahead, module):
    """If the package is imported under freezegun, it never gets the real clock."""
    real = time.perf_counter

    def replaced():
        return real() + ahead

    replaced.__module__ = module
    monkeypatch.setattr(_Exact, "time", staticmethod(replaced))
    assert clock_of(loop).source is loop


def test_elsewhere_than_on_linux_the_clock_of_uvloop_is_its_own(monkeypatch, loop):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert clock_of(loop).source is loop


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_deadlines_on_uvloop_are_rounded_up_to_its_steps(monkeypatch, loop, platform):
    monkeypatch.setattr(sys, "platform", platform)
    clock = clock_of(loop)
    assert clock._loop_time(7.0001) == 7.001
    for endless in (sys.float_info.max, math.inf):
        assert clock._loop_time(endless) == endless


class OwnTime(uvloop.Loop):
    """A loop whose clock is not that of uvloop, as in virtual time."""

    def time(self):
        return time.monotonic()


def test_a_loop_with_a_clock_of_its_own_keeps_it():
    loop = OwnTime()
    try:
        assert clock_of(loop).source is loop
    finally:
        loop.close()


def sums(reader):
    """Return the sum of each histogram, by name."""
    (resource,) = reader.get_metrics_data().resource_metrics
    (scope,) = resource.scope_metrics
    return {
        metric.name: metric.data.data_points[0].sum
        for metric in scope.metrics
        if hasattr(metric.data.data_points[0], "sum")
    }


@exact
@pytest.mark.real_clock
@pytest.mark.uvloop
async def test_durations_of_less_than_a_millisecond_are_exact():
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    busy = 0.0002

    class Working(FakeConnector):
        async def connect(self, timeout, /):
            wait_busily(busy)
            return await super().connect(timeout)

    began = time.perf_counter()
    pool = make_pool(Working(), meter_provider=provider, max_connections=1)
    async with pool, pool.acquire() as conn:
        assert conn.waited >= busy
        wait_busily(busy)
    found = sums(reader)
    took = time.perf_counter() - began
    provider.shutdown()
    for name in ("acquire_latency", "hold_time", "connect_time"):
        assert busy <= found[f"topaz_pool_{name}"] <= took


class JumpingLoop(asyncio.SelectorEventLoop):
    """A loop with a clock that can jump."""

    ahead = 0.0

    def time(self):
        return super().time() + self.ahead

    def jump(self, seconds):
        self.ahead += seconds


class JumpingClock(trio.abc.Clock):
    """A Trio clock that can jump."""

    def __init__(self):
        self.ahead = 0.0

    def start_clock(self):
        pass

    def current_time(self):
        return time.perf_counter() + self.ahead

    def deadline_to_sleep_time(self, deadline):
        return max(0, deadline - self.current_time())

    def jump(self, seconds):
        self.ahead += seconds


@pytest.mark.parametrize("during", [True, False], ids=["in a lease", "before it"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_no_duration_is_wrong_after_a_clock_went_back(backend, during):
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])

    async def main():
        clock = (
            trio.lowlevel.current_clock()
            if backend == "trio"
            else asyncio.get_running_loop()
        )
        pool = make_pool(FakeConnector(), meter_provider=provider, max_connections=1)
        async with pool:
            async with pool.acquire():
                pass
            if not during:
                clock.jump(-1000)
            async with pool.acquire():
                if during:
                    clock.jump(-1000)
            admission = pool._open_pool.overload.admission
            return sums(reader), admission.held

    began = time.perf_counter()
    options = {"clock": JumpingClock()} if backend == "trio" else {}
    options = options or {"loop_factory": JumpingLoop}
    found, held = anyio.run(main, backend=backend, backend_options=options)
    took = time.perf_counter() - began
    provider.shutdown()
    assert 0 <= found["topaz_pool_hold_time"] <= took
    assert 0 <= held <= took


# -- the wall clock -------------------------------------------------------------------


class WallClock:
    """A replacement for `time.time` that stands still and can be set."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture(params=[0.0, 1e9, 4e9], ids=["1970", "2001", "2096"])
def wall_clock(request, monkeypatch):
    clock = WallClock(request.param)
    monkeypatch.setattr(time, "time", clock)
    return clock


# grpc.aio takes deadlines from `time.time`.
@pytest.mark.native
@pytest.mark.real_clock
async def test_a_wrong_wall_clock_changes_no_deadline(embedded_authorizer, wall_clock):
    pool = ConnectionPool(min_connections=0)
    pool.configure(embedded_authorizer.options)
    async with pool, pool.acquire() as conn:
        assert (await conn.info(timeout=20)).version
        embedded_authorizer.freeze()
        began = time.monotonic()

        async def ask():
            with anyio.fail_after(20), pytest.raises(grpc.aio.AioRpcError) as caught:
                await conn.info(timeout=0.3)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            # The deadline on the wire is in milliseconds, so it may end a little early.
            assert time.monotonic() - began >= 0.29

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await anyio.sleep(0.1)
            wall_clock.now -= 86400
        embedded_authorizer.thaw()
