"""Test the reasons why a channel does not become ready."""

from __future__ import annotations

import asyncio

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest

from fastapi_topaz import ConnectFailed
from fastapi_topaz._grpcio import channel as _channel
from fastapi_topaz._grpcio import connection as _connection
from fastapi_topaz._grpcio import failures as _failures
from fastapi_topaz.connector import GrpcConnector
from kit.channels import INFO
from kit.configs import TOPAZ


# Far longer than a test takes.
PATIENCE = 20.0


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_channel_that_connects_while_its_error_is_read_is_ready(
    monkeypatch,
):
    states = [grpc.ChannelConnectivity.TRANSIENT_FAILURE]
    asked = []

    class Channel:
        def get_state(self, *, try_to_connect):
            return states[-1]

        async def wait_for_state_change(self, state):
            assert state is not states[-1]

    class Answered:
        def __init__(self, channel, method, request, timeout, metadata, on_end):
            asked.append(method)
            states.append(grpc.ChannelConnectivity.READY)
            on_end(self)

        def outcome(self):
            return b"an answer"

    monkeypatch.setattr(_channel, "call_class", lambda: Answered)
    await _channel.until_ready(Channel(), TOPAZ.target)
    assert asked == [INFO]


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


def test_an_unknown_reason_is_passed_on_unchanged():
    failed = _failures.connect_failed("the moon is full", TOPAZ.target)
    assert str(failed) == "cannot connect to topaz.test:8282: the moon is full"
    assert (failed.reason, failed.permanent) == ("other", False)
