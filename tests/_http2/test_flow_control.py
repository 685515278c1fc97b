"""The windows of both directions, and the back-pressure of the socket."""

from __future__ import annotations

import grpc
import pytest
from h2.settings import SettingCodes

from fastapi_topaz._http2.limits import CONNECTION_WINDOW, QUEUE_LIMIT
from fastapi_topaz._rpc.statuses import Ending, ending
from kit.h2frames import data_frame, window_update, window_updates
from kit.h2peer import HEAD, Call, connected, exchange, message


Code = grpc.StatusCode


# -- flow control ---------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100, 16_379, 16_380, 60_000])
def test_the_largest_window_is_given_back_without_an_overflow(size):
    connection, server = connected({SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1})
    call = Call(connection, b"q" * size)
    exchange(connection, server)
    assert call.stream.send_window == 2**31 - 1 - size - 5
    # `h2` gives back only large parts of a window.
    connection.receive(window_update(1, size + 5), 0)
    assert call.stream.send_window == 2**31 - 1
    connection.receive(window_update(1, 1), 0)
    assert "FLOW_CONTROL_ERROR" in call.outcome.details()


@pytest.mark.parametrize("padding", [None, 0, 100, 255])
def test_the_window_of_the_connection_is_given_back_also_for_a_cancelled_call(padding):
    connection, server = connected()
    call = Call(connection)
    exchange(connection, server)
    connection.cancel(call.stream)
    connection.take_output()
    part = data_frame(b"x" * 16_000, padding)
    sent = returned = 0
    for _ in range(2000):
        connection.receive(part, 0)
        sent += len(part) - 9
        for stream_id, increment in window_updates(connection.take_output()):
            assert stream_id == 0
            returned += increment
        # The server can always send the largest response.
        assert 0 <= sent - returned <= CONNECTION_WINDOW // 2
    assert connection.failure is None
    assert returned > CONNECTION_WINDOW  # more than one WINDOW_UPDATE


@pytest.mark.parametrize("padding", [0, 1, 100, 255])
def test_the_window_of_a_stream_is_given_back_for_padding(padding):
    connection, server = connected()
    call = Call(connection)
    exchange(connection, server)
    server.h2.send_headers(1, HEAD)
    connection.receive(server.output(), 0)
    connection.receive(data_frame(message(b"x" * 4_000_000)[:5], None), 0)
    part = data_frame(b"x" * 100, padding)
    padded = returned = 0
    for _ in range(39_000):
        connection.receive(part, 0)
        padded += padding + 1
        for stream_id, increment in window_updates(connection.take_output()):
            if stream_id:
                returned += increment
        assert 0 <= padded - returned < 16_384
    assert returned > 16_384
    assert call.outcome is None
    assert connection.failure is None


# -- back-pressure --------------------------------------------------------


def test_calls_wait_while_the_socket_takes_nothing():
    connection, server = connected()
    server.h2.increment_flow_control_window(2**30)
    exchange(connection, server)
    # The window of each stream is 65,535 bytes, which are kept.
    calls = [Call(connection, b"q" * 60_000) for _ in range(100)]
    queued = sum(map(len, connection._out))
    assert queued <= QUEUE_LIMIT + 65_536
    for call in calls[50:]:
        connection.cancel(call.stream)
    assert sum(map(len, connection._out)) == queued
    exchange(connection, server)
    assert sorted(server.complete) == [2 * n + 1 for n in range(50)]


def test_a_large_request_is_not_queued_at_once():
    connection, server = connected({SettingCodes.INITIAL_WINDOW_SIZE: 2**30})
    server.h2.increment_flow_control_window(2**30)
    exchange(connection, server)
    call = Call(connection, b"q" * 4_000_000)
    while output := connection.take_output():
        assert len(output) <= QUEUE_LIMIT + 2 * 16_384
        server.receive(output)
    assert len(server.requests[1]) == 4_000_005
    assert call.stream.unsent is None


def test_an_answer_that_comes_before_the_request_is_sent_ends_both():
    connection, server = connected()
    call = Call(connection, b"q" * 200_000)
    server.h2.receive_data(connection.take_output())
    server.h2.send_headers(1, [*HEAD, ("grpc-status", "8")], end_stream=True)
    connection.receive(server.output(), 0)
    assert call.outcome.code() is Code.RESOURCE_EXHAUSTED
    sent = connection.take_output()
    assert sent == bytes.fromhex("000004 03 00 00000001 00000000")
    assert not connection._blocked


def test_a_malformed_response_before_the_end_of_the_request_has_its_code():
    connection, server = connected({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    call = Call(connection, b"question")
    exchange(connection, server)
    connection.receive(data_frame(b"x", None), 0)  # before the headers
    assert ending(call.outcome) is Ending.NO_STATUS
    assert connection.take_output() == bytes.fromhex("000004 03 00 00000001 00000001")


def test_a_shrunk_window_may_be_negative():
    connection, server = connected()
    call = Call(connection, b"q" * 100_000)
    server.h2.receive_data(connection.take_output())
    server.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 10})
    connection.receive(server.output(), 0)
    assert call.stream.send_window == 10 - 65_535
    server.h2.increment_flow_control_window(100_000)
    server.h2.increment_flow_control_window(65_525 + 7, 1)
    connection.receive(server.output(), 0)
    sent = connection.take_output()
    assert sent[-7 - 9 :][:9] == bytes.fromhex("000007 00 00 00000001")
