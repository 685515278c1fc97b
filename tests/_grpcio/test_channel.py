"""Test when a channel is ready, and the reasons why it is not."""

from __future__ import annotations

import asyncio

import anyio
import grpc
import grpc.aio
import pytest

from fastapi_topaz import ConnectFailed
from fastapi_topaz._grpcio import channel as _channel
from fastapi_topaz._grpcio import connection as _connection
from fastapi_topaz.connector import GrpcConnector
from kit.backends import asyncio_only
from kit.channels import INFO
from kit.configs import TOPAZ


# Far longer than a test takes.
PATIENCE = 20.0

State = grpc.ChannelConnectivity


class Call:
    """A call that ends at once."""

    def __init__(self, end):
        self.end = end

    def __await__(self):
        if isinstance(self.end, Exception):
            raise self.end
        return self.end
        yield

    async def initial_metadata(self):
        return grpc.aio.Metadata()

    trailing_metadata = initial_metadata


class Channel:
    """A channel that shows these states, and then the last one."""

    def __init__(self, *states, end=b"an answer", after_call=None):
        self.states = [*states]
        self.asked = []
        self.connects = 0
        self.end, self.after_call = end, after_call

    def get_state(self, try_to_connect=False):
        self.connects += try_to_connect
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def unary_unary(self, method):
        self.asked.append(method)
        if self.after_call is not None:
            self.states = [self.after_call]
        return lambda _request, **_options: Call(self.end)


def unavailable(details):
    none = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, none, none, details)


@asyncio_only
async def test_a_channel_is_ready_after_its_attempt():
    channel = Channel(State.IDLE, State.IDLE, State.CONNECTING, State.READY)
    await _channel.until_ready(channel, TOPAZ.target)
    assert (channel.asked, channel.connects) == ([], 1)


@asyncio_only
async def test_a_channel_that_connects_while_its_error_is_read_is_ready():
    channel = Channel(State.TRANSIENT_FAILURE, after_call=State.READY)
    await _channel.until_ready(channel, TOPAZ.target)
    assert channel.asked == [INFO]


@asyncio_only
async def test_a_failed_attempt_is_not_repeated():
    refused = unavailable("Connection refused")
    channel = Channel(State.CONNECTING, State.TRANSIENT_FAILURE, end=refused)
    with pytest.raises(ConnectFailed, match="nothing listens there"):
        await _channel.until_ready(channel, TOPAZ.target)
    assert (channel.asked, channel.connects) == ([INFO], 1)


@asyncio_only
@pytest.mark.parametrize(
    "states",
    [
        [State.CONNECTING, State.IDLE],
        [State.CONNECTING, State.SHUTDOWN],
        # The server hung up before the first look.
        [State.IDLE],
    ],
    ids=str,
)
async def test_a_server_that_hangs_up_gets_one_connect(states):
    channel = Channel(*states)
    began = anyio.current_time()
    with pytest.raises(ConnectFailed, match="ended the connection as soon as it was"):
        await _channel.until_ready(channel, TOPAZ.target)
    assert channel.connects == 1
    assert anyio.current_time() - began < 1


@pytest.mark.grpcio
@pytest.mark.real_clock
async def test_an_attempt_without_a_reason_in_time_reports_that(monkeypatch):
    async def never(_channel, _options):
        await asyncio.sleep(PATIENCE)

    monkeypatch.setattr(_connection, "until_ready", never)
    with anyio.fail_after(PATIENCE), pytest.raises(ConnectFailed) as caught:
        await GrpcConnector(TOPAZ.target).connect(0.05)
    assert caught.value.reason == "timeout"
    assert not caught.value.permanent
    assert "not ready within connection_timeout=0.05 s" in str(caught.value)


def test_the_largest_connection_timeout_gives_valid_channel_options():
    assert _channel._channel_options(1.7e308)


# gRPC's core may end a call before the state of its channel.
@asyncio_only
@pytest.mark.parametrize("text", ["Socket closed", "GOAWAY received"])
async def test_a_cut_off_call_ends_only_once_its_channel_knows(text):
    late = [*[State.READY] * 4, State.IDLE]
    channel = Channel(*late, end=unavailable(text))
    connection = _connection.GrpcConnection(channel, TOPAZ.target)
    with pytest.raises(grpc.aio.AioRpcError):
        await connection.call("/a.B/C", b"", timeout=9, metadata=(), resent=True)
    # The pool reads the state next: a probe would make the channel connect again.
    assert channel.states == [State.IDLE]
    assert connection.is_lost()


@asyncio_only
async def test_a_cut_off_call_ends_at_its_deadline_if_its_channel_does_not_know():
    channel = Channel(*[State.READY] * 9, State.IDLE, end=unavailable("Socket closed"))
    connection = _connection.GrpcConnection(channel, TOPAZ.target)
    with pytest.raises(grpc.aio.AioRpcError):
        await connection.call("/a.B/C", b"", timeout=0, metadata=())
    assert len(channel.states) > 5


@asyncio_only
async def test_a_status_of_the_server_is_not_delayed():
    channel = Channel(*[State.READY] * 4, State.IDLE, end=unavailable("no backend"))
    connection = _connection.GrpcConnection(channel, TOPAZ.target)
    with pytest.raises(grpc.aio.AioRpcError):
        await connection.call("/a.B/C", b"", timeout=9, metadata=())
    assert len(channel.states) > 1
