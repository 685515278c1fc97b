"""Equal questions at the same time share one call, however that call ends."""

from __future__ import annotations

import gc
import weakref

import anyio
import grpc
import pytest

from fastapi_topaz import (
    CircuitOpen,
    ConnectFailed,
    ConnectionLost,
    CredentialsFailed,
    Decision,
    DecisionCache,
    PoolTimeout,
    TopazError,
)
from fastapi_topaz._decisions.cache import Cached
from fastapi_topaz._rpc.statuses import EndedCall, Ending, LateCredentials, NotSent
from kit.decisions import HeldAuthorizer, OpenHere, Subject


ALICE = Subject(resource={"id": "1"})


def layer_of(ask):
    layer = Cached(ask, DecisionCache(), OpenHere())
    layer.freshness.clock = anyio.current_time
    return layer


def status(code=grpc.StatusCode.UNAVAILABLE):
    metadata = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, metadata, metadata, "details")


def text_of(error):
    return error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)


class Callers:
    """Callers of one layer; `ends` has what each got."""

    def __init__(self, ask=None):
        self.server = HeldAuthorizer()
        self.layer = layer_of(ask or self.server)
        self.ends, self.scopes = [], []

    def start(self, tasks, count=1, **options):
        for _ in range(count):
            scope = anyio.CancelScope()
            self.scopes.append(scope)
            tasks.start_soon(self._ask, scope, options)

    async def lead(self, tasks, followers):
        """Start one caller, and then *followers* more, which join its call."""
        self.start(tasks)
        await anyio.sleep(0.1)
        self.start(tasks, followers)
        await anyio.sleep(0.1)

    async def _ask(self, scope, options):
        with scope:
            try:
                self.ends.append(await self.layer(ALICE.question(**options)))
            except Exception as error:  # noqa: BLE001
                self.ends.append(error)

    def assert_nothing_is_left(self):
        assert not self.layer._openings.current().flights
        assert not self.server.open


async def test_200_equal_questions_make_one_call():
    callers = Callers()
    async with anyio.create_task_group() as tasks:
        callers.start(tasks, 200)
        await anyio.sleep(0.5)
        (call,) = callers.server.calls
        call.answer(allowed=True)
    assert len(callers.ends) == 200
    assert all(end.allowed is True for end in callers.ends)
    origins = [end.origin for end in callers.ends]
    assert (origins.count("authorizer"), origins.count("shared")) == (1, 199)
    assert len({end.id for end in callers.ends}) == 1
    callers.assert_nothing_is_left()


async def test_if_the_first_caller_is_cancelled_another_one_asks_for_all():
    callers = Callers()
    async with anyio.create_task_group() as tasks:
        await callers.lead(tasks, 199)
        callers.scopes[0].cancel()
        await anyio.sleep(0.1)
        _, second = callers.server.calls
        second.answer(allowed=True)
    assert len(callers.ends) == 199
    assert all(end.allowed is True for end in callers.ends)
    callers.assert_nothing_is_left()


async def test_a_cancelled_follower_changes_nothing():
    callers = Callers()
    async with anyio.create_task_group() as tasks:
        await callers.lead(tasks, 2)
        callers.scopes[1].cancel()
        await anyio.sleep(0.1)
        callers.server.calls[0].answer(allowed=False)
    assert [end.allowed for end in callers.ends] == [False, False]
    callers.assert_nothing_is_left()


ERRORS = [
    status,
    lambda: status(grpc.StatusCode.INVALID_ARGUMENT),
    lambda: EndedCall(Ending.RESET, grpc.StatusCode.INTERNAL, "x", (("a", "b"),)),
    lambda: NotSent("/a", "b", "c"),
    lambda: LateCredentials(Ending.STATUS, grpc.StatusCode.DEADLINE_EXCEEDED, "x"),
    lambda: ConnectFailed("x", reason="tls", permanent=True),
    lambda: CircuitOpen("x", retry_after=3.0),
    lambda: ConnectionLost("x"),
    lambda: CredentialsFailed("x"),
    lambda: PoolTimeout("x"),
    lambda: ValueError("x", 1),
]


@pytest.mark.parametrize("number", range(len(ERRORS)))
async def test_each_follower_gets_an_error_of_its_own(number):
    error = ERRORS[number]()
    callers = Callers()
    async with anyio.create_task_group() as tasks:
        await callers.lead(tasks, 3)
        callers.server.calls[0].fail(error)
    assert len(callers.server.calls) == 1
    assert len({id(end) for end in callers.ends}) == 4
    for end in callers.ends:
        assert isinstance(error, type(end))
        assert text_of(end) == text_of(error)
        for name in ("reason", "permanent", "retry_after", "how"):
            assert getattr(end, name, None) == getattr(error, name, None)
        assert end is error or end.__cause__ is error
    assert callers.layer._cache.status().size == 0
    callers.assert_nothing_is_left()


class Unfriendly(Exception):  # noqa: N818
    """Its copy fails, because it needs two arguments."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


async def test_an_error_that_cannot_be_copied_is_an_error_for_the_followers():
    callers = Callers()
    async with anyio.create_task_group() as tasks:
        await callers.lead(tasks, 2)
        callers.server.calls[0].fail(Unfriendly("a", "b"))
    kinds = sorted(type(end).__name__ for end in callers.ends)
    assert kinds == ["TopazError", "TopazError", "Unfriendly"]
    assert issubclass(TopazError, Exception)
    assert all("a b" in str(end) for end in callers.ends)


async def test_a_follower_waits_no_longer_than_its_own_budget():
    callers = Callers()
    began = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        callers.start(tasks, seconds=60)
        await anyio.sleep(1)
        callers.start(tasks, seconds=5)
        await anyio.sleep(5.5)
        (end,) = callers.ends
        assert end.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "5 s" in end.details()
        callers.server.calls[0].answer(allowed=True)
    assert anyio.current_time() - began == pytest.approx(6.5)


async def test_a_caller_that_takes_over_late_does_not_fail_the_others():
    """Its time was nearly over, so its timeout says nothing about the authorizer."""
    callers = Callers()
    async with anyio.create_task_group() as tasks:
        callers.start(tasks, seconds=60)
        await anyio.sleep(0.1)
        callers.start(tasks, seconds=5)
        await anyio.sleep(4.8)
        callers.start(tasks, seconds=5)
        await anyio.sleep(0.1)
        # On each backend the callers wake in the order in which they wait.
        callers.scopes[0].cancel()
        await anyio.sleep(1)
        errors = [end for end in callers.ends if isinstance(end, Exception)]
        assert len(errors) == 1
        callers.server.open[0].answer(allowed=True)
    assert [end.allowed for end in callers.ends if isinstance(end, Decision)] == [True]
    callers.assert_nothing_is_left()


async def test_followers_of_a_slow_answer_ask_once_more_and_then_share():
    """The answer is older than denials may be. They do not ask one after the other."""
    callers = Callers()
    async with anyio.create_task_group() as tasks:
        callers.start(tasks, seconds=60)
        await anyio.sleep(0.1)
        callers.start(tasks, 10, seconds=60)
        await anyio.sleep(6)
        callers.server.calls[0].answer(allowed=False)
        await anyio.sleep(6)
        assert len(callers.server.calls) == 2
        callers.server.calls[1].answer(allowed=False)
    assert [end.allowed for end in callers.ends] == [False] * 11


async def test_an_error_keeps_nothing_alive():
    callers = Callers()
    error = ConnectionLost("x")
    seen = weakref.ref(error)
    gc.collect()
    gc.disable()
    try:
        async with anyio.create_task_group() as tasks:
            callers.start(tasks)
            await anyio.sleep(0.1)
            callers.start(tasks, 3)
            await anyio.sleep(0.1)
            callers.server.calls[0].fail(error)
            del error
        callers.server.calls.clear()
        callers.ends.clear()
        await anyio.sleep(0.1)
        assert seen() is None, gc.get_referrers(seen())
    finally:
        gc.enable()
