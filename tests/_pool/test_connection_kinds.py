"""Test that an unusable connection is rejected by name as soon as it is made."""

from __future__ import annotations

import contextlib
import functools
import types
from unittest.mock import AsyncMock, Mock

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import ConnectFailed
from fastapi_topaz._pool.conformity import defect_of
from fastapi_topaz.testing import FakeConnection, FakeConnector
from kit.pools import make_pool
from kit.threads import in_a_thread


class Right:
    """A connection with the minimal interface."""

    closed = 0

    async def probe(self, timeout, /):
        pass

    async def close(self, grace, /):
        self.closed += 1
        self.grace = grace


class NoProbe:
    async def close(self, grace):
        pass


class NoClose:
    async def probe(self, timeout):
        pass


class PlainProbe(Right):
    def probe(self, timeout):
        pass


class ConstantProbe(Right):
    def probe(self, timeout):
        if timeout > 1:
            self.closed += 1
            return False
        return True


class GeneratorProbe(Right):
    def probe(self, timeout):
        yield


class AsyncGeneratorProbe(Right):
    async def probe(self, timeout):
        yield


class ProbeWithoutTimeout(Right):
    async def probe(self):
        pass


class ProbeByKeyword(Right):
    async def probe(self, *, timeout):
        pass


class ProbeIsNoMethod(Right):
    probe = True


class ProbeRaises(Right):
    @property
    def probe(self):
        raise OSError("no such socket")


class PlainClose(Right):
    def close(self, grace):
        self.closed += 1
        self.grace = grace


class CloseByKeyword(Right):
    async def close(self, *, timeout=None):
        self.closed += 1


class CloseWithoutGrace(Right):
    async def close(self):
        self.closed += 1


class PartialPlainProbe(Right):
    def __init__(self):
        self.probe = functools.partial(self.plain, True)

    def plain(self, _flag, _timeout):
        pass


class Answer:
    def __call__(self, _argument):
        return True


class PlainObjectProbe(Right):
    probe = Answer()


class GeneratorProbeWithResult(Right):
    def probe(self, timeout):
        yield
        return timeout


class CallRaisesAndLostTakesMore(Right):
    @property
    def call(self):
        raise OSError("no such socket")

    def is_lost(self, timeout):
        return False


class MockedAsyncJudge(Right):
    judge = AsyncMock()


class PlainCall(Right):
    def call(self, method, request, *, timeout, metadata):
        return b""


class CallWithoutMetadata(Right):
    async def call(self, method, request, timeout):
        return b""


class AsyncIsLost(Right):
    async def is_lost(self):
        return False


class WrappedAsyncIsLost(Right):
    def is_lost(self):
        return self.later()

    async def later(self):
        return False


class IsLostIsNoMethod(Right):
    is_lost = False


class IsLostTakesMore(Right):
    def is_lost(self, timeout):
        return False


class JudgeIsNoMethod(Right):
    judge = "broken"


class AsyncJudge(Right):
    async def judge(self, error):
        return None


class IsLostReturnsAnObject(Right):
    def is_lost(self):
        return object()


class JudgeWithoutError(Right):
    def judge(self):
        return None


class AsyncLook(Right):
    async def refresh_liveness(self):
        pass


WRONG = {
    NoProbe: "no method probe; write: async def probe(self, timeout)",
    NoClose: "no method close; write: async def close(self, grace)",
    PlainProbe: "its probe is not an `async def`",
    ConstantProbe: "its probe is not an `async def`",
    GeneratorProbe: "its probe is not an `async def`",
    AsyncGeneratorProbe: "its probe is an asynchronous generator",
    ProbeWithoutTimeout: "its probe has the parameters ()",
    ProbeByKeyword: "its probe has the parameters (*, timeout)",
    ProbeIsNoMethod: "its probe is bool, which cannot be called",
    ProbeRaises: "its attribute probe raises OSError",
    PlainClose: "its close is not an `async def`",
    CloseByKeyword: "its close has the parameters (*, timeout=None)",
    CloseWithoutGrace: "its close has the parameters ()",
    PartialPlainProbe: "its probe is not an `async def`",
    PlainObjectProbe: "its probe is not an `async def`",
    GeneratorProbeWithResult: "its probe is not an `async def`",
    CallRaisesAndLostTakesMore: "its is_lost has the parameters (timeout)",
    MockedAsyncJudge: "its judge is a coroutine function and must not be one",
    PlainCall: "its call is not an `async def`",
    CallWithoutMetadata: "its call has the parameters (method, request, timeout)",
    AsyncIsLost: "its is_lost is a coroutine function and must not be one",
    WrappedAsyncIsLost: "its is_lost returns an awaitable, which is always true",
    IsLostReturnsAnObject: "its is_lost returns an object of the class object",
    IsLostIsNoMethod: "its is_lost is bool, which cannot be called",
    IsLostTakesMore: "its is_lost has the parameters (timeout)",
    JudgeIsNoMethod: "its judge is str, which cannot be called",
    AsyncJudge: "its judge is a coroutine function and must not be one",
    JudgeWithoutError: "its judge has the parameters ()",
    AsyncLook: "its refresh_liveness is a coroutine function and must not be one",
}


class Shop:
    """A connector that makes connections of one class."""

    target = "the shop"

    def __init__(self, kind):
        self.kind = kind
        self.made = []

    async def connect(self, timeout, /):
        await anyio.lowlevel.checkpoint()
        self.made.append(self.kind())
        return self.made[-1]


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
async def test_an_unusable_connection_is_rejected_by_name(kind):
    shop = Shop(kind)
    began = anyio.current_time()
    async with make_pool(shop) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire()
        assert caught.value.permanent
        told = str(caught.value)
        for name in ("the shop", "Shop.connect()", f"class {kind.__name__}"):
            assert name in told
        assert f"; it has {WRONG[kind]}" in told or f"; {WRONG[kind]}" in told
        assert "def " in told
        assert anyio.current_time() == began
        assert pool.status().total == 0
        assert pool._counters.connects == 0


@pytest.mark.parametrize("kind", [PlainProbe, PlainClose, AsyncIsLost])
async def test_a_rejected_connection_is_closed(kind):
    shop = Shop(kind)
    async with make_pool(shop) as pool:
        with pytest.raises(ConnectFailed):
            await pool.acquire()
    assert {(made.closed, made.grace) for made in shop.made} == {(1, 0.0)}


# -- valid connections are not rejected -----------------------------------------------


async def probe(_timeout):
    await anyio.lowlevel.checkpoint()


class Callable:
    async def __call__(self, _argument):
        await anyio.lowlevel.checkpoint()


class Delegating:
    """Returns the awaitables of another connection."""

    def __init__(self):
        self.inner = Right()

    def probe(self, timeout):
        return self.inner.probe(timeout)

    def close(self, grace):
        return self.inner.close(grace)


class Native:
    @types.coroutine
    def probe(self, _timeout):
        yield from anyio.lowlevel.checkpoint().__await__()

    @staticmethod
    async def close(grace=0.0, **_more):
        await anyio.lowlevel.checkpoint()


class Decorated(Right):
    def logged(function):  # noqa: N805
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs)

        return wrapper

    probe = logged(Right.probe)
    close = logged(Right.close)


def mocked():
    return Mock(spec=["probe", "close"], probe=AsyncMock(), close=AsyncMock())


def specified():
    made = AsyncMock(spec=FakeConnection)
    made.is_lost = Mock(return_value=False)
    return made


def assembled():
    return types.SimpleNamespace(
        probe=functools.partial(probe), close=Callable(), judge=None, is_lost=None
    )


GOOD = [Right, Delegating, Native, Decorated, mocked, specified, assembled]


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
async def test_wrappers_of_any_kind_are_accepted_and_used(kind):
    shop = Shop(kind)
    async with make_pool(shop, health_check_interval=10, min_connections=1) as pool:
        async with pool.acquire() as conn:
            assert conn.connection is shop.made[0]
        await anyio.sleep(50)
        assert pool._counters.probe_failures == 0
        assert len(shop.made) == 1


def test_a_connection_of_this_package_is_accepted():
    assert defect_of(FakeConnection(FakeConnector(), 1)) is None


async def test_a_defect_visible_only_in_a_call_is_logged_at_the_call(caplog):
    class Odd(Right):
        def probe(self, timeout):
            return self.closed

    async with make_pool(
        Shop(Odd), health_check_interval=10, min_connections=1
    ) as pool:
        async with pool.acquire():
            pass
        await anyio.sleep(15)
    assert "Odd.probe must be an `async def`" in caplog.text


async def test_a_connect_that_is_not_async_is_rejected_at_once():
    class Plain:
        def connect(self, timeout):
            return Right()

    async with make_pool(Plain()) as pool:
        with pytest.raises(ConnectFailed, match="connect must be an `async def`") as e:
            await pool.acquire()
        assert e.value.permanent


async def test_a_connect_without_a_name_that_is_not_async_is_shown_by_its_repr():
    connector = types.SimpleNamespace(connect=functools.partial(int))
    async with make_pool(connector) as pool:
        error = r"partial\(<class 'int'>\) must be an `async def`"
        with pytest.raises(ConnectFailed, match=error):
            await pool.acquire()


# -- connections that the application discards ----------------------------------------


async def test_a_discarded_connection_is_closed_and_never_leased_again():
    connector = FakeConnector()
    async with make_pool(connector, max_connections=1) as pool:
        conn = await pool.acquire()
        await pool.release(conn, discard=True)
        async with pool.acquire() as other:
            assert other.connection.number == 2
        assert connector.connections[0].closed == 1
        assert pool._counters.closes == {"discarded": 1}


async def test_a_discarded_connection_serves_its_other_leases_to_their_end():
    connector = FakeConnector()
    options = {"max_connections": 1, "streams_per_connection": 3}
    async with make_pool(connector, **options) as pool:
        first, second = await pool.acquire(), await pool.acquire()
        await pool.release(first, discard=True)
        assert pool.status().leaving == 1
        assert second.connection.number == 1
        assert not connector.connections[0].closed
        await pool.release(second)
        async with pool.acquire() as third:
            assert third.connection.number == 2


async def test_discarding_is_not_an_outage_and_delays_nothing():
    connector = FakeConnector()
    async with make_pool(connector, max_connections=1) as pool:
        began = anyio.current_time()
        for _ in range(20):
            async with pool.acquire() as conn:
                conn.connection.hung_up = True  # the connection has ended by itself
                await pool.release(conn, discard=True)
        assert anyio.current_time() == began
        assert pool.status().healthy
    assert pool._counters.closes == {"discarded": 20}


async def test_a_discarded_connection_makes_room_for_a_waiting_caller():
    async with make_pool(max_connections=1) as pool:
        conn = await pool.acquire()
        async with anyio.create_task_group() as tasks:

            async def wait():
                async with pool.acquire(timeout=1) as other:
                    assert other.connection.number == 2

            tasks.start_soon(wait)
            await anyio.sleep(0.1)
            await pool.release(conn, discard=True)


@pytest.mark.parametrize("value", [1, None, "yes"])
async def test_discard_must_be_a_bool(value):
    async with make_pool() as pool, pool.acquire() as conn:
        with pytest.raises(TypeError, match="discard must be True or False"):
            await pool.release(conn, discard=value)
        assert pool.status().streams_in_use == 1


# -- asynchronous generators ----------------------------------------------------------


async def lent(pool):
    async with pool.acquire() as conn:
        yield conn


async def lent_by_a_manager(pool):
    async with contextlib.asynccontextmanager(lent)(pool) as conn:
        yield conn


async def lent_by_a_stack(pool):
    async with contextlib.AsyncExitStack() as stack:
        yield await stack.enter_async_context(pool.acquire())


@pytest.mark.parametrize("lender", [lent, lent_by_a_manager, lent_by_a_stack])
async def test_a_closed_generator_returns_its_lease_at_once(lender):
    async with make_pool(max_connections=1) as pool:
        for _ in range(3):
            generator = lender(pool)
            await anext(generator)
            assert pool.status().streams_in_use == 1
            await generator.aclose()
            assert pool.status().streams_in_use == 0
        assert pool._counters.reclaimed == 0


async def test_a_generator_that_ends_during_a_change_returns_its_lease_later():
    """
    A generator closed by garbage collection: here inside judge(), called by the pool.
    """
    generators, in_use = [], []

    class Ending(FakeConnection):
        def judge(self, error, /):
            closing = generators.pop().aclose()
            with contextlib.suppress(StopIteration):
                closing.send(None)
            # No assert here: the pool catches what judge() raises.
            in_use.append(pool.status().streams_in_use)
            return super().judge(error)

    connector = FakeConnector()
    pool = make_pool(connector)
    async with pool:
        generators.append(lent(pool))
        await anext(generators[0])
        connector.connections[0].__class__ = Ending
        async with pool.acquire() as conn:
            conn.connection.__class__ = Ending
            conn.connection.alive = False
            with pytest.raises(Exception, match="is dead"):
                await conn.call("/a/b", b"")
            assert in_use == [2]
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        assert pool.status().streams_in_use == 0


async def test_a_generator_closed_in_another_thread_returns_its_lease_on_the_loop():
    async with make_pool(max_connections=1) as pool:
        generator = lent(pool)
        await anext(generator)

        def close():
            with contextlib.suppress(StopIteration):
                generator.aclose().send(None)

        assert in_a_thread(close) is None
        assert pool.status().streams_in_use == 1
        async with pool.acquire(timeout=1):
            assert pool.status().streams_in_use == 1
        assert pool._counters.reclaimed == 0


@pytest.mark.parametrize("answer", [True, False, None, 0])
def test_an_is_lost_that_is_a_bool_or_returns_false_is_accepted(answer):
    class Sound:
        async def probe(self, timeout):
            pass

        async def close(self, grace):
            pass

        def is_lost(self):
            return answer

    assert defect_of(Sound()) is None
