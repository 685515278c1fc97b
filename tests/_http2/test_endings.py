"""Cancelled calls, deadlines, and the PING after a call without a response."""

from __future__ import annotations

import math

import grpc
import h2.events
import pytest
from h2.settings import SettingCodes

from fastapi_topaz._http2.errors import ErrorCode
from fastapi_topaz._rpc.statuses import Ending, ending, is_unprocessed
from kit.h2frames import pings, resets, window_update
from kit.h2peer import HEAD, Call, connected, exchange, message


Code = grpc.StatusCode


# -- cancellation and deadlines -------------------------------------------


@pytest.mark.parametrize("end", ["cancel", "expire"])
def test_a_call_that_ends_here_lets_a_waiting_one_go_in_the_same_write(end):
    connection, server = connected({SettingCodes.MAX_CONCURRENT_STREAMS: 1})
    first, second = Call(connection, deadline=1.0), Call(connection)
    exchange(connection, server)
    if end == "cancel":
        connection.cancel(first.stream)
    else:
        connection.expire(1.0)
    server.receive(connection.take_output())
    assert resets(server) == {1: ErrorCode.CANCEL}
    assert server.complete == [1, 3]
    assert second.outcome is None


def test_a_waiting_call_is_not_sent_at_its_deadline():
    connection, server = connected({SettingCodes.MAX_CONCURRENT_STREAMS: 1})
    first, second, third = (Call(connection, deadline=end) for end in (1.0, 1.0, 9.0))
    exchange(connection, server)
    connection.expire(1.0)
    exchange(connection, server)
    for call in (first, second):
        assert ending(call.outcome) is Ending.TIMED_OUT
    assert third.outcome is None
    assert server.complete == [1, 3]
    assert resets(server) == {1: ErrorCode.CANCEL}


@pytest.mark.parametrize("end", ["cancel", "expire"])
def test_a_call_that_ends_while_it_waits_for_a_window_sends_no_more(end):
    connection, server = connected({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    call = Call(connection, b"question", deadline=1.0)
    exchange(connection, server)
    if end == "cancel":
        connection.cancel(call.stream)
    else:
        connection.expire(1.0)
    exchange(connection, server)
    assert not connection._blocked
    connection.receive(window_update(1, 100), 0)
    connection.receive(window_update(0, 100), 0)
    assert not connection.has_output
    assert resets(server) == {1: ErrorCode.CANCEL}


def test_a_cancelled_call_is_reset_and_its_late_answer_ignored():
    connection, server = connected()
    call = Call(connection)
    exchange(connection, server)
    server.answer(1, b"late")
    late = server.output()
    connection.cancel(call.stream)
    connection.cancel(call.stream)
    connection.receive(late, 0)
    assert connection.take_output() == bytes.fromhex("000004 03 00 00000001 00000008")
    assert call.ends == 0
    assert connection.failure is None


def test_a_call_ends_at_its_deadline():
    connection, server = connected(silence=math.inf)
    early, late = Call(connection, deadline=10.0), Call(connection, deadline=20.0)
    assert connection.next_deadline == 10.0
    exchange(connection, server)
    connection.expire(9.9)
    assert early.outcome is None
    connection.expire(10.0)
    assert early.outcome.code() is Code.DEADLINE_EXCEEDED
    assert ending(early.outcome) is Ending.TIMED_OUT
    assert late.outcome is None
    exchange(connection, server)
    assert resets(server) == {1: ErrorCode.CANCEL}


def test_a_call_that_waits_for_a_stream_ends_at_its_deadline_unsent():
    connection, _ = connected({SettingCodes.MAX_CONCURRENT_STREAMS: 0})
    call = Call(connection, deadline=0.9)
    connection.expire(0.9)
    assert ending(call.outcome) is Ending.TIMED_OUT
    assert not connection.has_output
    assert connection.next_deadline == math.inf


def test_a_reset_at_the_deadline_is_the_deadline():
    # As grpc-go does, which has the same deadline.
    connection, server = connected()
    for now, how in ((0.9, Ending.RESET), (0.995, Ending.TIMED_OUT)):
        call = Call(connection, deadline=1.0)
        exchange(connection, server)
        server.h2.reset_stream(call.stream.id, ErrorCode.CANCEL)
        exchange(connection, server, now)
        assert ending(call.outcome) is how


@pytest.mark.parametrize("code", [c for c in ErrorCode if c != ErrorCode.CANCEL])
def test_a_reset_at_the_deadline_with_another_code_is_a_reset(code):
    connection, server = connected()
    call = Call(connection, deadline=1.0)
    exchange(connection, server)
    server.h2.reset_stream(1, code)
    exchange(connection, server, 1.0)
    assert ending(call.outcome) is not Ending.TIMED_OUT


def test_a_reset_is_not_answered_with_a_reset():
    # RFC 9113, section 5.4.2.
    connection, server = connected({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    call = Call(connection, b"question")
    exchange(connection, server)
    server.h2.reset_stream(1, ErrorCode.INTERNAL_ERROR)
    connection.receive(server.output(), 0)
    assert ending(call.outcome) is Ending.RESET
    assert not connection.has_output
    assert not connection._blocked


# -- PING -----------------------------------------------------------------


def test_a_silent_call_does_not_postpone_the_end_of_a_dead_peer():
    connection, server = connected(ping_timeout=2.0)
    for deadline in (1.0, 2.0):
        Call(connection, deadline=deadline)
    exchange(connection, server)
    connection.expire(1.0)
    server.receive(connection.take_output())
    connection.expire(2.0)
    server.receive(connection.take_output())
    assert pings(server) == 1
    assert connection.next_deadline == 3.0
    connection.expire(3.0)
    assert connection.failure is not None


def exhaust_pings(connection, server, now):
    """Let calls be silent until no PING is sent any more."""
    before = pings(server)
    for step in range(4):
        Call(connection, deadline=now + step)
        exchange(connection, server, now + step)
        connection.expire(now + step)
        exchange(connection, server, now + step)
        connection.expire(now + step + 0.5)
    return pings(server) - before


def test_each_part_of_a_response_allows_two_more_pings():
    connection, server = connected(ping_timeout=0.5)
    call = Call(connection)
    exchange(connection, server)
    assert exhaust_pings(connection, server, 10.0) == 2
    server.h2.send_headers(1, HEAD)
    exchange(connection, server, 20.0)
    assert exhaust_pings(connection, server, 20.0) == 2
    server.h2.send_data(1, message(b"yes"))
    exchange(connection, server, 30.0)
    assert exhaust_pings(connection, server, 30.0) == 2
    assert call.outcome is None


def test_pings_of_the_server_are_answered():
    connection, server = connected()
    server.h2.ping(b"12345678")
    exchange(connection, server)
    (acknowledged,) = [
        e for e in server.events if isinstance(e, h2.events.PingAckReceived)
    ]
    assert acknowledged.ping_data == b"12345678"


# -- responses that were begun --------------------------------------------


def test_a_call_whose_response_has_begun_is_not_unprocessed():
    # RFC 9113, sections 6.8 and 8.7: the server says that it did not process the call.
    refused, goaway = (
        "000004 03 00 00000001 00000007",
        "000008 07 00 00000000 00000000 00000000",
    )
    for end in (refused, goaway):
        connection, server = connected()
        call = Call(connection)
        exchange(connection, server)
        server.h2.send_headers(1, HEAD)
        exchange(connection, server)
        connection.receive(bytes.fromhex(end), 0)
        assert call.outcome.code() is Code.UNAVAILABLE
        assert not is_unprocessed(call.outcome)
