"""
Test that calls end as anyio promises, and that trio never blocks.

grpc.aio breaks these promises. The controls run the same code against bare grpc.aio. If
a control fails, gRPC was repaired, and the workaround in `_grpcio` can go.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest
import trio

from fastapi_topaz import ConnectFailed
from fastapi_topaz._authorizer.messages import is_request
from fastapi_topaz.connector import GrpcConnector, chosen_transport
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.channels import NEVER, PATIENCE, ask, bare, connected
from kit.waiting import eventually


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]

IS = "/aserto.authorizer.v2.Authorizer/Is"


def on_asyncio(test):
    """Run a coroutine function as a test on asyncio only, with and without uvloop."""

    @pytest.mark.parametrize("use_uvloop", [False, True], ids=["asyncio", "uvloop"])
    @functools.wraps(test)
    def run(authorizer, use_uvloop):
        anyio.run(
            test,
            authorizer,
            use_uvloop,
            backend="asyncio",
            backend_options={"use_uvloop": use_uvloop},
        )

    return run


# -- A: cancel scopes work as anyio promises


async def move_on(call, in_flight):
    with anyio.move_on_after(0.1) as scope:
        await call()
    assert scope.cancelled_caught


async def fail(call, in_flight):
    with pytest.raises(TimeoutError), anyio.fail_after(0.1):
        await call()


async def inner_scope(call, in_flight):
    with anyio.move_on_after(NEVER) as outer:
        with anyio.move_on_after(0.1) as inner:
            await call()
        # The outer scope continues.
        await anyio.lowlevel.checkpoint()
    assert inner.cancelled_caught
    assert not outer.cancelled_caught


async def outer_scope(call, in_flight):
    with anyio.move_on_after(0.1) as outer:
        with anyio.move_on_after(NEVER) as inner:
            await call()
        pytest.fail("the outer scope was not left")
    assert outer.cancelled_caught
    assert not inner.cancelled_caught


async def scope_in_a_shield(call, in_flight):
    with anyio.CancelScope() as outer:
        outer.cancel()
        with anyio.move_on_after(0.1, shield=True) as inner:
            await call()
        assert inner.cancelled_caught
    assert not outer.cancelled_caught


async def task_group(call, in_flight):
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        await in_flight()
        tasks.cancel_scope.cancel()
    assert tasks.cancel_scope.cancelled_caught or tasks.cancel_scope.cancel_called


async def one_task_of_a_group(call, in_flight):
    ended = []
    scope = anyio.CancelScope()

    async def cancellable():
        with scope:
            await call()
        ended.append(scope.cancelled_caught)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cancellable)
        await in_flight()
        scope.cancel()
    # The caller did not vanish: it ran to its end.
    assert ended == [True]


PROMISES = [
    move_on,
    fail,
    inner_scope,
    outer_scope,
    scope_in_a_shield,
    task_group,
    one_task_of_a_group,
]
# Cancelling the whole group works, because the group ignores how its tasks end.
BROKEN = [promise for promise in PROMISES if promise is not task_group]


def name(promise):
    return promise.__name__


@pytest.mark.parametrize("promise", PROMISES, ids=name)
async def test_a_cancelled_call_ends_as_anyio_promises(authorizer, call, promise):
    authorizer.delay = NEVER

    async def in_flight():
        await eventually(lambda: authorizer.streams == 1)

    with anyio.fail_after(PATIENCE):
        await promise(call, in_flight)
    # The server gets the cancellation if the call arrived in time, and the connection
    # stays good.
    await eventually(lambda: authorizer.cancelled == authorizer.calls["Info"])
    await eventually(lambda: authorizer.streams == 0)
    authorizer.heal()
    assert b"embedded" in await call()
    assert authorizer.connections_accepted == 1


@pytest.mark.grpcio
@pytest.mark.parametrize("promise", BROKEN, ids=name)
def test_a_cancelled_call_of_bare_grpc_breaks_the_promise_of_anyio(authorizer, promise):
    authorizer.delay = NEVER

    async def in_flight():
        await eventually(lambda: authorizer.streams == 1)

    async def main():
        async with bare(authorizer) as call:
            task = asyncio.ensure_future(promise(call, in_flight))
            await asyncio.wait([task], timeout=PATIENCE)
            return task

    task = anyio.run(main, backend="asyncio")
    # The task was not cancelled, and still ended as cancelled. If a task group
    # swallowed that, the task ended without its work done.
    assert task.done()
    assert task.cancelled() or isinstance(task.exception(), AssertionError)


async def test_a_scope_that_ends_before_the_call_begins_sends_nothing(authorizer, call):
    # On asyncio, an answer that is there already would end the call first.
    authorizer.delay = NEVER
    with anyio.CancelScope() as scope:
        scope.cancel()
        await call()
    assert scope.cancelled_caught
    authorizer.delay = 0
    await call()
    # On asyncio the request may already be on its way. It is then cancelled.
    await eventually(lambda: authorizer.streams == 0)
    assert authorizer.calls["Info"] - authorizer.cancelled <= 2


async def test_a_shielded_call_is_not_cancelled(authorizer, call):
    authorizer.delay = 0.2
    answers = []
    with anyio.fail_after(PATIENCE), anyio.CancelScope() as outer:
        outer.cancel()
        with anyio.CancelScope(shield=True):
            answers.append(await call())
    assert b"embedded" in answers[0]
    assert authorizer.cancelled == 0


async def test_cancelling_some_calls_does_not_affect_others_on_the_connection(
    authorizer, connection
):
    answers, ended, scopes, decided = [], [], [], []

    async def decide(_check):
        # In the loop of the server, which this thread cannot wake.
        while not decided:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        return True

    authorizer.policies = {"app": decide}
    request = is_request("app", ("allowed",), None, None, None, None)
    call = functools.partial(connection.call, IS, request, timeout=NEVER, metadata=())

    async def kept():
        answers.append(await call())

    async def given_up():
        with anyio.CancelScope() as own:
            scopes.append(own)
            await call()
        ended.append(own.cancelled_caught)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(kept)
                tasks.start_soon(given_up)
            await eventually(lambda: authorizer.streams == 40)
            for own in scopes:
                own.cancel()
            await eventually(lambda: authorizer.cancelled == 20)
            decided.append(True)
    assert ended == [True] * 20
    assert len(answers) == 20
    assert authorizer.connections_accepted == 1


async def test_a_call_is_cancelled_at_any_moment_in_many_tries(authorizer, call):
    authorizer.delay = NEVER
    with anyio.fail_after(PATIENCE):
        for step in range(50):
            # Cancel before, while and after the request is sent.
            with anyio.move_on_after(step * 0.0001) as scope:
                await call()
            assert scope.cancelled_caught
    await eventually(lambda: authorizer.streams == 0)


async def test_an_answer_racing_with_a_cancellation_ends_as_one_of_the_two(
    authorizer, call
):
    outcomes = set()
    for step in range(150):
        answer = None
        with anyio.move_on_after(step * 0.00002) as scope:
            answer = await call()
        assert (answer is not None) or scope.cancelled_caught
        outcomes.add(answer is not None)
    await eventually(lambda: authorizer.streams == 0)
    assert b"embedded" in await call()


@on_asyncio
async def test_a_native_cancellation_is_a_cancellation(authorizer, use_uvloop):
    authorizer.delay = NEVER
    async with connected(authorizer.options) as connection:
        task = asyncio.ensure_future(ask(connection))
        await eventually(lambda: authorizer.streams == 1)
        assert task.cancel("enough")
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert caught.value.args == ("enough",)
        assert task.cancelled()
        await eventually(lambda: authorizer.cancelled == 1)


@on_asyncio
async def test_wait_for_and_timeout_of_asyncio_end_a_call(authorizer, use_uvloop):
    authorizer.delay = NEVER
    async with connected(authorizer.options) as connection:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask(connection), 0.1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await ask(connection)
        assert asyncio.current_task().cancelling() == 0
        await eventually(lambda: authorizer.cancelled == authorizer.calls["Info"])
        await eventually(lambda: authorizer.streams == 0)


@on_asyncio
async def test_a_native_task_group_sees_its_calls_cancelled(authorizer, use_uvloop):
    authorizer.delay = NEVER
    async with connected(authorizer.options) as connection:

        async def fails():
            await eventually(lambda: authorizer.streams == 2)
            raise KeyError("the reason")

        async def group():
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(ask(connection))
                tasks.create_task(ask(connection))
                tasks.create_task(fails())

        with pytest.raises(ExceptionGroup) as caught:
            await group()
        assert [type(error) for error in caught.value.exceptions] == [KeyError]
        await eventually(lambda: authorizer.cancelled == 2)


# -- statuses and details of the server


async def test_a_cancelled_status_of_the_server_is_an_answer(authorizer, call):
    authorizer.fail("CANCELLED", "the policy engine gave up")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call()
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert caught.value.details() == "the policy engine gave up"


@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
)
async def test_every_status_arrives_with_code_and_details(authorizer, call, code):
    authorizer.fail(code, f"because of {code.name}")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call()
    assert caught.value.code() is code
    assert caught.value.details() == f"because of {code.name}"
    authorizer.heal()
    assert b"embedded" in await call()


async def test_a_deadline_applies_on_the_server_too(authorizer, call):
    authorizer.delay = NEVER
    with anyio.fail_after(PATIENCE), pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: authorizer.cancelled == 1)


# -- on trio


class LongestStep(trio.abc.Instrument):
    """Measures the longest time that one task blocked the loop."""

    def __init__(self):
        self.longest = 0.0
        self._began = None

    def before_task_step(self, task):
        self._began = time.perf_counter()

    def after_task_step(self, task):
        if self._began is not None:
            self.longest = max(self.longest, time.perf_counter() - self._began)


@pytest.mark.native
def test_the_trio_loop_never_blocks_on_the_server(authorizer):
    authorizer.delay = 1.0
    answers, ticks = [], []

    async def use():
        async with connected(authorizer.options) as connection:
            answers.append(await ask(connection))

    async def tick():
        while True:
            await trio.sleep(0.01)
            ticks.append(True)

    async def silent(frozen):
        with pytest.raises(ConnectFailed):
            await GrpcConnector(frozen.options.target).connect(1)

    async def main():
        step = LongestStep()
        trio.lowlevel.add_instrument(step)
        with trio.fail_after(30):
            async with trio.open_nursery() as ticking:
                ticking.start_soon(tick)
                async with trio.open_nursery() as nursery:
                    for _ in range(50):
                        nursery.start_soon(use)
                    nursery.start_soon(silent, frozen)
                ticking.cancel_scope.cancel()
        return step.longest

    with EmbeddedAuthorizer() as frozen:
        frozen.freeze()
        longest = trio.run(main)
    assert len(answers) == 50
    assert authorizer.connections_accepted == 50
    # The server took a second for each answer. The loop was never blocked that long,
    # even on a busy machine.
    assert longest < 0.9
    assert len(ticks) > 20


@pytest.mark.native
def test_connections_on_trio_start_no_thread(authorizer):
    async def main():
        before = set(threading.enumerate())
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(5):
                connection = connected(authorizer.options)
                connection = await stack.enter_async_context(connection)
                assert b"embedded" in await ask(connection)
            return set(threading.enumerate()) - before

    assert trio.run(main) == set()


def test_an_unclosed_connection_does_not_keep_python_alive(authorizer, run_program):
    program = f"""
        import sys
        import anyio
        from fastapi_topaz import AuthorizerOptions
        from fastapi_topaz.connector import GrpcConnector

        async def main():
            options = AuthorizerOptions(url={authorizer.url!r}, insecure=True)
            await GrpcConnector(options.target).connect(10)

        anyio.run(main, backend=sys.argv[1])
        print("done")
    """
    is_native = chosen_transport(None) == "native"
    for backend in ("asyncio", "trio") if is_native else ("asyncio",):
        ended = run_program(program, backend, strict=False)
        assert (ended.code, ended.out) == (0, "done\n"), ended.err
