"""Test how calls of grpc.aio end."""

from __future__ import annotations

import asyncio
import gc

import anyio
import grpc
import grpc.aio
import pytest

from fastapi_topaz import ConnectionLost
from fastapi_topaz._grpcio.calls import Calls
from kit.backends import asyncio_only
from kit.channels import ask, connected
from kit.waiting import eventually


class Call:
    """A call that ends with *end*, an error or a response, when it is allowed to."""

    def __init__(self, end=b"", trailing=()):
        self.end, self.trailing = end, trailing
        self.may_end = asyncio.Event()
        self.cancels = 0

    def __await__(self):
        yield from self.may_end.wait().__await__()
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end

    async def initial_metadata(self):
        return grpc.aio.Metadata()

    async def trailing_metadata(self):
        return grpc.aio.Metadata(*self.trailing)

    def cancel(self):
        self.cancels += 1
        self.end = asyncio.CancelledError()
        self.may_end.set()


def ended(*args):
    call = Call(*args)
    call.may_end.set()
    return call


@asyncio_only
async def test_the_response_of_a_call_is_its_outcome():
    calls = Calls()
    assert await calls.outcome(ended(b"an answer")) == b"an answer"
    assert len(calls) == 0


# OK without a message, a closed channel, and a status that gRPC 1.80 has no name for.
@asyncio_only
@pytest.mark.parametrize(
    "end", [None, asyncio.CancelledError(), KeyError(99)], ids=repr
)
async def test_a_call_that_ends_abnormally_has_no_answer(end):
    assert await Calls().outcome(ended(end)) is None


@asyncio_only
async def test_an_error_has_no_frames_which_would_keep_the_call():
    none = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, none, none)
    outcome = await Calls().outcome(ended(error))
    assert outcome is error
    assert outcome.__traceback__ is None


@asyncio_only
async def test_a_response_that_violates_the_protocol_is_an_error():
    outcome = await Calls().outcome(ended(b"yes", [("connection", "close")]))
    assert outcome.code() is grpc.StatusCode.INTERNAL
    assert "does not exist in HTTP/2" in outcome.details()


@asyncio_only
async def test_a_cancelled_caller_cancels_its_call_and_gets_its_own_cancellation():
    calls, call = Calls(), Call()
    task = asyncio.create_task(calls.outcome(call))
    await asyncio.sleep(0)
    assert len(calls) == 1
    task.cancel("enough")
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert caught.value.args == ("enough",)
    assert call.cancels == 1
    await asyncio.sleep(0.01)
    assert len(calls) == 0


@asyncio_only
async def test_calls_that_are_cut_off_have_no_answer_and_cancel_nobody():
    calls, outcomes = Calls(), []
    async with anyio.create_task_group() as tasks:

        async def caller():
            outcomes.append(await calls.outcome(Call()))

        for _ in range(3):
            tasks.start_soon(caller)
        await anyio.wait_all_tasks_blocked()
        calls.cut_off()
        began = anyio.current_time()
        await calls.until_reported()
        assert anyio.current_time() - began == pytest.approx(0.1)
    assert outcomes == [None] * 3


@asyncio_only
async def test_without_a_cancelled_call_there_is_no_report_to_wait_for():
    calls = Calls()
    await calls.outcome(ended())
    began = anyio.current_time()
    await calls.until_reported()
    assert anyio.current_time() == began


@pytest.mark.grpcio
@pytest.mark.real_clock
async def test_the_frames_of_a_lost_call_keep_no_socket(embedded_authorizer):
    embedded_authorizer.delay = 60.0
    kept = []
    gc.collect()
    gc.disable()
    try:
        async with (
            connected(embedded_authorizer.options) as connection,
            anyio.create_task_group() as tasks,
        ):

            async def caller():
                try:
                    await ask(connection)
                except ConnectionLost as error:
                    kept.append(error)

            for _ in range(3):
                tasks.start_soon(caller)
            await eventually(lambda: embedded_authorizer.streams == 3)
            await connection.close(0)
        assert len(kept) == 3
        await eventually(lambda: embedded_authorizer.connections_open == 0)
    finally:
        gc.enable()


class Traced(grpc.aio.UnaryUnaryClientInterceptor):
    """Sees each call, as a library for tracing does."""

    def __init__(self):
        self.methods = []

    async def intercept_unary_unary(self, continuation, details, request):
        self.methods.append(details.method)
        return await continuation(details, request)


@pytest.mark.grpcio
@pytest.mark.real_clock
async def test_interceptors_that_are_added_to_all_channels_work(
    embedded_authorizer, monkeypatch
):
    traced, plain = Traced(), grpc.aio.insecure_channel
    monkeypatch.setattr(
        grpc.aio,
        "insecure_channel",
        lambda target, options: plain(target, options=options, interceptors=[traced]),
    )
    async with connected(embedded_authorizer.options) as connection:
        assert await ask(connection)
        embedded_authorizer.fail("NOT_FOUND", "nothing there")
        with pytest.raises(grpc.aio.AioRpcError, match="nothing there"):
            await ask(connection)
    assert len(traced.methods) == 2


class Loopless(Call):
    """A call whose event loop is closed, as grpc.aio cancels it."""

    def cancel(self):
        self.cancels += 1
        raise RuntimeError("Event loop is closed")


@asyncio_only
async def test_calls_of_a_closed_loop_are_all_cancelled():
    calls, running = Calls(), [Loopless(), Loopless()]
    tasks = [asyncio.create_task(calls.outcome(call)) for call in running]
    await asyncio.sleep(0)
    calls.abandon()
    assert [call.cancels for call in running] == [1, 1]
    assert len(calls) == 0
    for call in running:
        call.may_end.set()
    assert await asyncio.gather(*tasks) == [b"", b""]


@asyncio_only
async def test_waiting_for_quiet_ends_with_the_last_call_or_its_time():
    calls, call = Calls(), Call()
    began = anyio.current_time()
    await calls.until_quiet(5)
    assert anyio.current_time() == began
    task = asyncio.create_task(calls.outcome(call))
    await asyncio.sleep(0)
    await calls.until_quiet(5)
    assert anyio.current_time() - began == pytest.approx(5)
    call.may_end.set()
    await calls.until_quiet(5)
    assert anyio.current_time() - began == pytest.approx(5)
    assert await task == b""
