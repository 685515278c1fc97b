"""The client's connection, with the library `h2` as its server, in memory."""

from __future__ import annotations

import math
import random

import grpc
import h2.events
import hpack
import pytest
from h2.settings import SettingCodes
from hypothesis import given
from hypothesis import strategies as st

from fastapi_topaz._http2 import frames
from fastapi_topaz._http2.errors import ErrorCode
from fastapi_topaz._http2.limits import (
    CONNECTION_WINDOW,
    MAX_HEADER_LIST_SIZE,
    MAX_MESSAGE,
    STREAM_WINDOW,
)
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
from kit.fuzzing import examples
from kit.h2frames import resets, window_update
from kit.h2peer import BLOCKS, HEAD, METHOD, Call, H2Server, client, connected, exchange


Code = grpc.StatusCode


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


def test_the_client_announces_its_settings():
    server = H2Server()
    server.receive(client().take_output())
    (settings,) = [
        e for e in server.events if isinstance(e, h2.events.RemoteSettingsChanged)
    ]
    changed = {key: each.new_value for key, each in settings.changed_settings.items()}
    assert changed == {
        SettingCodes.HEADER_TABLE_SIZE: 0,
        SettingCodes.ENABLE_PUSH: 0,
        SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
        SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST_SIZE,
    }
    assert server.h2.outbound_flow_control_window == CONNECTION_WINDOW


def test_the_first_block_tells_a_server_without_a_table_that_ours_is_empty():
    connection, _ = connected({SettingCodes.HEADER_TABLE_SIZE: 0})
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = 0
    for _ in range(3):
        Call(connection)
        sent = connection.take_output()
        block = sent[9 : 9 + int.from_bytes(sent[:3])]
        # The library refuses it if its table of 4,096 bytes was not shrunk before.
        assert (":path", METHOD) in decoder.decode(block)
        assert decoder.header_table_size == 0


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


@examples(100, by_default=0.6)
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


def test_headers_of_the_largest_size_that_the_server_allows_are_sent():
    size = BLOCKS.block(METHOD, None, ())[1]
    connection, server = connected({SettingCodes.MAX_HEADER_LIST_SIZE: size})
    Call(connection)
    exchange(connection, server)
    assert server.complete == [1]
    connection, _ = connected({SettingCodes.MAX_HEADER_LIST_SIZE: size - 1})
    with pytest.raises(EndedCall):
        Call(connection)


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


def test_goaway_ends_a_call_whose_request_waits_for_a_window():
    connection, server = connected({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    call = Call(connection, b"question")
    server.h2.receive_data(connection.take_output())
    server.h2.close_connection(last_stream_id=0)
    connection.receive(server.output(), 0)
    assert is_unprocessed(call.outcome)
    assert not connection._blocked
    connection.receive(window_update(0, 1), 0)
    assert not connection.has_output


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
    connection, _ = connected()
    calls = [Call(connection) for _ in range(2)]
    connection.take_output()
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


def test_the_end_of_a_connection_frees_what_was_received_in_part():
    for part in (b"\0\x40\0" + b"?" * 10_000, b"\0\0\1\1\0\0\0\0\1\x88"):
        connection, _ = connected()
        Call(connection)
        connection.receive(part, 0)
        assert connection._rest or connection._open_block
        connection.lose("the server closed the socket")
        assert not connection._rest
        assert connection._open_block is None


@pytest.mark.parametrize("limit", [1, 100])
@pytest.mark.parametrize("end", ["lost", "violation"])
def test_a_call_of_which_nothing_was_sent_ends_as_not_sent(limit, end):
    # It may be sent on another connection. So it must not be written to this one.
    connection, _ = connected({SettingCodes.MAX_CONCURRENT_STREAMS: limit})
    sent = Call(connection)
    connection.take_output()
    unsent = [Call(connection) for _ in range(3)]
    if end == "lost":
        connection.lose("the server closed the socket")
    else:
        connection.receive(frames.window_update(0, 0), 0)
    assert ending(sent.outcome) is Ending.CUT_OFF
    for call in unsent:
        assert ending(call.outcome) is Ending.NOT_SENT
        assert connection.failure in call.outcome.details()
    rest = connection.take_output()
    if end == "lost":
        assert rest == b""
    else:
        assert (rest[3], len(rest)) == (frames.GOAWAY, 9 + int.from_bytes(rest[:3]))


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
    connection._next_id = 2**31 - 3
    Call(connection)
    assert connection.takes_calls
    call = Call(connection)
    assert call.stream.id == 2**31 - 1
    assert not connection.takes_calls
    with pytest.raises(EndedCall) as no:
        Call(connection)
    assert no.value.how is Ending.NOT_SENT
    connection.lose("")


def test_calls_that_wait_when_the_ids_are_used_up_end_as_not_sent():
    connection, server = connected({SettingCodes.MAX_CONCURRENT_STREAMS: 0})
    connection._next_id = 2**31 - 1
    last, *waiting = (Call(connection) for _ in range(3))
    server.h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 5})
    exchange(connection, server)
    assert last.stream.id == 2**31 - 1
    assert last.outcome is None
    for call in waiting:
        assert ending(call.outcome) is Ending.NOT_SENT
        assert is_unprocessed(call.outcome)
        assert "no stream ids left" in call.outcome.details()
    assert [*connection.streams.values()] == [last.stream]


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
