"""The client's connection, with the library `h2` as its server, in memory."""

from __future__ import annotations

import math
import random

import grpc
import h2.events
import h2.exceptions
import pytest
from h2.settings import SettingCodes
from hypothesis import given
from hypothesis import strategies as st

from fastapi_topaz._http2.errors import ErrorCode
from fastapi_topaz._http2.limits import MAX_MESSAGE, QUEUE_LIMIT
from fastapi_topaz._http2.requests import RequestBlocks
from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz._rpc.statuses import (
    EndedCall,
    Ending,
    ending,
    is_unprocessed,
    verdict,
)
from fastapi_topaz.exceptions import ConnectionLost
from kit.h2peer import HEAD, METHOD, Call, client, connected, exchange


Code = grpc.StatusCode


def resets(server):
    """Return the codes of the RST_STREAM frames that *server* got."""
    return {
        event.stream_id: event.error_code
        for event in server.events
        if isinstance(event, h2.events.StreamReset)
    }


def pings(server):
    return sum(isinstance(e, h2.events.PingReceived) for e in server.events)


# -- calls ----------------------------------------------------------------


def test_a_call_is_answered():
    connection, server = connected()
    call = Call(connection, b"question")
    exchange(connection, server)
    assert server.requests == {1: b"\0\0\0\0\x08question"}
    assert server.complete == [1]
    assert (":path", METHOD) in server.headers[1]
    server.answer(1, b"answer")
    exchange(connection, server)
    assert call.outcome == b"answer"
    assert not connection.streams


def test_no_call_is_ready_before_both_sides_know_the_settings():
    connection = client()
    assert not connection.is_ready
    settings, acknowledged = b"\0\0\0\4\0\0\0\0\0", b"\0\0\0\4\1\0\0\0\0"
    connection.receive(settings, 0)
    assert not connection.is_ready
    connection.receive(acknowledged, 0)
    assert connection.is_ready


def cuts(rng):
    """Return a function that cuts bytes into parts at random places."""

    def split(data):
        at = 0
        while at < len(data):
            size = rng.choice([1, 1, 2, 5, 9, 10, 100, 5000, 100_000])
            yield data[at : at + size]
            at += size

    return split


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        SettingCodes.INITIAL_WINDOW_SIZE: st.sampled_from([1, 7, 100, 65_535, 2**20]),
        SettingCodes.MAX_FRAME_SIZE: st.sampled_from([2**14, 2**15, 2**24 - 1]),
        SettingCodes.MAX_CONCURRENT_STREAMS: st.sampled_from([1, 2, 5, 100]),
        SettingCodes.HEADER_TABLE_SIZE: st.sampled_from([0, 100, 65_536]),
    },
)


@given(
    SETTINGS,
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 100, 20_000, 70_000]),  # bytes of the request
            st.sampled_from([0, 1, 100, 20_000, 70_000]),  # bytes of the answer
            st.none() | st.integers(0, 255),  # its padding
            st.sampled_from([300, 1000, 16_384]),  # the size of its frames
            st.sampled_from(["answer"] * 4 + ["reset", "refuse", "cancel", "status"]),
        ),
        min_size=1,
        max_size=12,
    ),
    st.randoms(use_true_random=False),
)
def test_any_calls_end_as_the_server_says(settings, plans, rng):
    connection, server = connected(settings)
    split = cuts(rng)
    answers = {}
    calls = []
    for number, (size, *plan) in enumerate(plans):
        request = bytes([number]) * size
        calls.append((Call(connection, request), plan))
    for _ in range(10 * len(plans)):
        exchange(connection, server, split=split)
        open_calls = {
            call.stream.id: (call, plan)
            for call, plan in calls
            if call.stream.id in server.complete and call.outcome is None
        }
        limit = server.h2.local_settings.max_concurrent_streams
        assert len(connection.streams) <= limit
        if not open_calls:
            break
        number = rng.choice(list(open_calls))
        call, (size, padding, frame, end) = open_calls[number]
        assert server.requests[number][5:] == call.stream.message
        if number in answers:
            continue
        answers[number] = end
        _act(connection, server, call, size, padding, frame, end)
    assert connection.failure is None
    for call, (size, _, _, end) in calls:
        _assert_end(call, size, end)
    assert not connection.streams


def _act(connection, server, call, size, padding, frame, end):
    number = call.stream.id
    match end:
        case "answer":
            server.answer(number, b"a" * size, padding=padding, frame=frame)
        case "status":
            server.h2.send_headers(
                number, [*HEAD, ("grpc-status", "7")], end_stream=True
            )
        case "reset":
            server.h2.reset_stream(number, ErrorCode.INTERNAL_ERROR)
        case "refuse":
            server.h2.reset_stream(number, ErrorCode.REFUSED_STREAM)
        case "cancel":
            connection.cancel(call.stream)
            call.stream.outcome = b"cancelled"
            call.ends = 1


def _assert_end(call, size, end):
    match end:
        case "answer":
            assert call.outcome == b"a" * size
        case "cancel":
            assert call.outcome == b"cancelled"
        case _:
            code, how = {
                "status": (Code.PERMISSION_DENIED, Ending.STATUS),
                "reset": (Code.INTERNAL, Ending.RESET),
                "refuse": (Code.UNAVAILABLE, Ending.REFUSED_STREAM),
            }[end]
            assert (call.outcome.code(), ending(call.outcome)) == (code, how)


def test_the_largest_answer_and_request_pass():
    connection, server = connected()
    call = Call(connection, b"q" * 1_000_000)
    exchange(connection, server)
    assert len(server.requests[1]) == 1_000_005
    # Nearly as much padding as there are data.
    server.answer(1, b"a" * MAX_MESSAGE, padding=255, frame=3000)
    exchange(connection, server)
    assert call.outcome == b"a" * MAX_MESSAGE
    assert connection.failure is None


def test_a_long_header_block_goes_on_in_continuations():
    connection, server = connected()
    secret = "s" * 40_000
    blocks = RequestBlocks("test:1", [("x-a", secret)], is_tls=False)
    call = Call(connection, b"", blocks=blocks)
    exchange(connection, server)
    assert ("x-a", secret) in server.headers[1]
    server.answer(1, b"ok")
    exchange(connection, server)
    assert call.outcome == b"ok"


def test_headers_that_the_server_does_not_allow_are_not_sent():
    connection, _ = connected({SettingCodes.MAX_HEADER_LIST_SIZE: 1000})
    blocks = RequestBlocks("test:1", [("x-a", "s" * 1000)], is_tls=False)
    with pytest.raises(grpc.aio.AioRpcError) as no:
        Call(connection, blocks=blocks)
    assert no.value.code() is Code.RESOURCE_EXHAUSTED
    assert "allows 1000" in no.value.details()
    assert not connection.has_output
    Call(connection)


def test_calls_above_the_stream_limit_wait_for_a_stream():
    connection, server = connected({SettingCodes.MAX_CONCURRENT_STREAMS: 2})
    assert connection.max_concurrent_streams == 2
    calls = [Call(connection, bytes([n])) for n in range(5)]
    done = []
    while len(done) < 5:
        exchange(connection, server)
        assert len(server.complete) <= len(done) + 2
        number = next(n for n in server.complete if n not in done)
        done.append(number)
        server.answer(number, b"")
    exchange(connection, server)
    assert [call.outcome for call in calls] == [b""] * 5
    assert [server.requests[n][5] for n in done] == [0, 1, 2, 3, 4]


def test_a_raised_stream_limit_lets_waiting_calls_go():
    connection, server = connected({SettingCodes.MAX_CONCURRENT_STREAMS: 0})
    Call(connection)
    assert not connection.has_output
    server.h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 1})
    exchange(connection, server)
    assert server.complete == [1]


def test_a_call_that_ended_before_it_was_sent_is_not_sent():
    connection, server = connected({SettingCodes.MAX_CONCURRENT_STREAMS: 1})
    first, second, third = (Call(connection, bytes([n])) for n in range(3))
    connection.cancel(second.stream)
    exchange(connection, server)
    server.answer(1, b"")
    exchange(connection, server)
    assert first.outcome == b""
    assert server.requests[3][5] == 2
    assert not resets(server)
    assert third.outcome is None


# -- cancellation and deadlines -------------------------------------------


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
    connection, server = connected()
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
    call = Call(connection, deadline=1.0)
    connection.expire(1.0)
    assert ending(call.outcome) is Ending.TIMED_OUT
    # The peer was asked nothing, so it was not silent.
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


# -- PING -----------------------------------------------------------------


def test_a_dead_peer_is_found_by_a_ping_after_a_silent_call():
    connection, server = connected(ping_timeout=2.0)
    Call(connection, deadline=1.0)
    other = Call(connection, deadline=100.0)
    exchange(connection, server)
    connection.expire(1.0)
    assert connection.has_output
    assert connection.next_deadline == 3.0
    connection.expire(3.0)
    assert connection.failure == "the server did not answer a PING within 2 s"
    assert ending(other.outcome) is Ending.CUT_OFF
    assert other.outcome.code() is Code.UNAVAILABLE
    assert verdict(other.outcome, lambda: True) is Verdict.BROKEN


def test_an_answered_ping_proves_the_peer():
    connection, server = connected(ping_timeout=2.0)
    Call(connection, deadline=1.0)
    exchange(connection, server)
    connection.expire(1.0)
    exchange(connection, server)
    assert pings(server) == 1
    connection.expire(3.0)
    assert connection.failure is None
    assert connection.next_deadline == math.inf


def test_at_most_two_pings_come_between_answers():
    connection, server = connected(ping_timeout=0.5)
    for expected in (2, 4):
        for _ in range(5):
            now = max(0.0, connection._now) + 1.0
            Call(connection, deadline=now)
            exchange(connection, server, now)
            connection.expire(now)
            exchange(connection, server, now)
            connection.expire(now + 0.5)
        assert pings(server) == expected
        answered = Call(connection)
        exchange(connection, server, now)
        server.answer(answered.stream.id, b"")
        exchange(connection, server, now)
        assert answered.outcome == b""


def test_pings_of_the_server_are_answered():
    connection, server = connected()
    server.h2.ping(b"12345678")
    exchange(connection, server)
    (acknowledged,) = [
        e for e in server.events if isinstance(e, h2.events.PingAckReceived)
    ]
    assert acknowledged.ping_data == b"12345678"


# -- the end of a connection ----------------------------------------------


def test_goaway_ends_what_the_server_will_not_process_and_nothing_else():
    connection, server = connected({SettingCodes.MAX_CONCURRENT_STREAMS: 3})
    calls = [Call(connection) for _ in range(4)]
    exchange(connection, server)
    server.h2.close_connection(last_stream_id=3, additional_data=b"bye")
    goaway = server.output()
    connection.receive(goaway, 0)
    assert not connection.takes_calls
    assert connection.failure is None
    assert [call.ends for call in calls] == [0, 0, 1, 1]
    for call in calls[2:]:
        assert is_unprocessed(call.outcome)
        assert verdict(call.outcome, lambda: True) is Verdict.UNAVAILABLE
        assert call.outcome.details() == "GOAWAY received; NO_ERROR: bye"
    with pytest.raises(EndedCall) as no:
        Call(connection)
    assert is_unprocessed(no.value)
    # The library cannot go on after GOAWAY, so the rest is by hand.
    answer = (
        b"\0\0\x01\x01\x04\0\0\0\x03\x88"  # no content-type
        b"\0\0\0\x01\x05\0\0\0\x01"
    )
    connection.receive(answer, 0)
    assert [call.ends for call in calls] == [1, 1, 1, 1]


def test_a_graceful_goaway_comes_in_two_steps():
    connection, server = connected()
    calls = [Call(connection) for _ in range(2)]
    exchange(connection, server)
    goaway = "000008 07 00 00000000 {:08x} 00000000"
    connection.receive(bytes.fromhex(goaway.format(2**31 - 1)), 0)
    assert [call.ends for call in calls] == [0, 0]
    assert not connection.takes_calls
    connection.receive(bytes.fromhex(goaway.format(1)), 0)
    assert [call.ends for call in calls] == [0, 1]


def test_the_end_of_the_socket_ends_all_calls():
    connection, _ = connected({SettingCodes.MAX_CONCURRENT_STREAMS: 1})
    calls = [Call(connection) for _ in range(2)]
    connection.lose("the server closed the socket")
    connection.lose("again")
    for call in calls:
        assert ending(call.outcome) is Ending.CUT_OFF
        assert "the server closed the socket" in call.outcome.details()
    with pytest.raises(EndedCall) as no:
        Call(connection)
    assert no.value.how is Ending.NOT_SENT
    connection.receive(b"\0\0\0\4\0\0\0\0\0", 0)
    connection.expire(math.inf)


def test_closing_says_goaway_and_ends_calls_as_lost():
    connection, server = connected()
    call = Call(connection)
    exchange(connection, server)
    connection.shut_down()
    exchange(connection, server)
    assert isinstance(call.outcome, ConnectionLost)
    (end,) = [e for e in server.events if isinstance(e, h2.events.ConnectionTerminated)]
    assert end.error_code == ErrorCode.NO_ERROR
    connection.shut_down()
    assert not connection.has_output


def test_a_connection_whose_ids_are_used_up_takes_no_more_calls():
    connection, _ = connected()
    connection._next_id = 2**31 - 1
    call = Call(connection)
    assert call.stream.id == 2**31 - 1
    assert not connection.takes_calls
    with pytest.raises(EndedCall) as no:
        Call(connection)
    assert no.value.how is Ending.NOT_SENT
    connection.lose("")


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


# -- memory ---------------------------------------------------------------


def test_many_cancelled_calls_leave_nothing():
    connection, _ = connected()
    rng = random.Random(1)
    for _ in range(2000):
        call = Call(connection)
        if rng.random() < 0.5:
            connection.take_output()
        connection.cancel(call.stream)
    connection.take_output()
    assert not connection.streams
    assert not connection._waiting
    assert not connection._blocked
    assert not connection._out
