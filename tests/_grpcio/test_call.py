"""Test calls on the core of grpc.aio."""

from __future__ import annotations

import asyncio

import pytest
from grpc._cython import cygrpc

from fastapi_topaz._grpcio import call as _call
from kit.channels import INFO


class Core:
    """A stub of the grpc.aio core for `DirectCall`, as far as a test defines it."""

    def __init__(self, work, status=None):
        self.work = work
        self.status = status

    # The channel of the core, and the channel of grpc.aio around it.
    @property
    def _channel(self):
        return self

    def call(self, *_args):
        return self

    def unary_unary(self, *_args):
        return self.work()

    def is_ok(self):
        return False

    is_locally_cancelled = is_ok


def begun(core):
    ended = []
    call = _call.DirectCall(core, INFO, b"", None, (), ended.append)
    return call, ended


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_call_may_wait_more_than_once():
    first, second = asyncio.Future(), asyncio.Future()

    async def work():
        return await first + await second

    call, ended = begun(Core(work))
    first.set_result(b"an ")
    await asyncio.sleep(0)
    assert ended == []
    second.set_result(b"answer")
    await asyncio.sleep(0)
    assert ended == [call]
    assert call.outcome() == b"an answer"


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_an_error_of_the_core_is_the_outcome_without_its_frames():
    waits = asyncio.Future()

    async def work():
        await waits
        raise cygrpc.InternalError("a batch failed")

    call, ended = begun(Core(work))
    waits.set_result(None)
    await asyncio.sleep(0)
    assert ended == [call]
    outcome = call.outcome()
    assert isinstance(outcome, cygrpc.InternalError)
    assert outcome.__traceback__ is None


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_false_end_of_a_running_call_is_detected():
    waits = asyncio.Future()

    async def goes_on():
        await waits

    call, ended = begun(Core(goes_on, status=goes_on))
    waits.set_result(None)
    await asyncio.sleep(0)
    waits = asyncio.Future()
    assert ended == [call]
    with pytest.raises(RuntimeError, match="of a call that has not ended"):
        call.outcome()


@pytest.mark.parametrize("odd", [asyncio.CancelledError(), KeyError(99)])
async def test_a_grpc_call_that_ends_abnormally_has_no_answer(odd):
    """A call on a closed channel, and a status that gRPC does not know."""

    class Begun:
        _interceptors = ("somebody's",)

        def __call__(self, request, *, timeout, metadata):
            assert self._interceptors == ()
            return self

        class _call_response:  # noqa: N801
            @staticmethod
            def add_done_callback(callback):
                pass

        def __await__(self):
            raise odd
            yield

    class Channel:
        @staticmethod
        def unary_unary(method):
            return Begun()

    call = _call.TaskCall(Channel(), INFO, b"", None, (), lambda _: None)
    assert call.outcome() is None
