"""What a server may not do: each violation ends the stream, or the connection."""

from __future__ import annotations

import grpc
import pytest

from fastapi_topaz._http2.errors import ErrorCode
from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz._rpc.statuses import Ending, ending, verdict
from kit.h2frames import (
    ACK,
    ANSWER,
    BODY,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENDING,
    GO,
    GOAWAY,
    HEAD_BLOCK,
    HEADERS,
    OPENING,
    PADDED,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RESET,
    RST_STREAM,
    SETTINGS,
    TAIL_BLOCK,
    WINDOW,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    block,
    frame,
    opened,
    setting,
    word,
)
from kit.h2peer import HEAD, client, message


CONNECTION_ERRORS = {
    # Section 4.
    "a frame above the largest size": (
        frame(DATA, 0, 1, bytes(2**14 + 1)),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "a header of a frame above the largest size": (
        b"\xff\xff\xff\0\0\0\0\0\1",
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "a block that cannot be decoded": (
        frame(HEADERS, END_HEADERS, 1, b"\xff" * 9),
        ErrorCode.COMPRESSION_ERROR,
    ),
    "a table above what is allowed": (
        frame(HEADERS, END_HEADERS, 1, b"\x3f\xe1\x1f" + HEAD_BLOCK),
        ErrorCode.COMPRESSION_ERROR,
    ),
    "a table of one byte": (
        frame(HEADERS, END_HEADERS, 1, b"\x21" + HEAD_BLOCK),
        ErrorCode.COMPRESSION_ERROR,
    ),
    "a size of the table after a field": (
        frame(HEADERS, END_HEADERS, 1, HEAD_BLOCK + b"\x20"),
        ErrorCode.COMPRESSION_ERROR,
    ),
    "HEADERS cut by DATA": (
        frame(HEADERS, 0, 1, HEAD_BLOCK) + BODY,
        ErrorCode.PROTOCOL_ERROR,
    ),
    "HEADERS cut by an unknown frame": (
        frame(HEADERS, 0, 1, HEAD_BLOCK) + frame(0xBE, 0, 1),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "HEADERS that go on, on another stream": (
        frame(HEADERS, 0, 1, HEAD_BLOCK) + frame(CONTINUATION, END_HEADERS, 3),
        ErrorCode.PROTOCOL_ERROR,
    ),
    # Sections 5.1 and 6.
    **{
        f"{name} on stream {number}": (
            frame(kind, flags, number, payload),
            ErrorCode.PROTOCOL_ERROR,
        )
        for number in (0, 2, 5, GO)
        for name, kind, flags, payload in (
            ("DATA", DATA, 0, b"x"),
            ("HEADERS", HEADERS, END_HEADERS, HEAD_BLOCK),
            ("RST_STREAM", RST_STREAM, 0, word(0)),
            ("CONTINUATION", CONTINUATION, END_HEADERS, b""),
        )
    },
    **{
        f"{name} on stream 1": (frame(kind, 0, 1, payload), ErrorCode.PROTOCOL_ERROR)
        for name, kind, payload in (
            ("SETTINGS", SETTINGS, b""),
            ("PING", PING, bytes(8)),
            ("GOAWAY", GOAWAY, bytes(8)),
        )
    },
    "PRIORITY on stream 0": (frame(PRIORITY, 0, 0, bytes(5)), ErrorCode.PROTOCOL_ERROR),
    "PRIORITY of 4 bytes on stream 0": (
        frame(PRIORITY, 0, 0, bytes(4)),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "WINDOW_UPDATE on an idle stream": (
        frame(WINDOW_UPDATE, 0, 5, word(1)),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "WINDOW_UPDATE on a stream of the server": (
        frame(WINDOW_UPDATE, 0, 2, word(1)),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "too much padding of DATA": (
        OPENING + frame(DATA, PADDED, 1, b"\x08" + message(b"yes")[:7]),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "padding of DATA without its length": (
        OPENING + frame(DATA, PADDED, 1),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "too much padding of HEADERS": (
        frame(HEADERS, END_HEADERS | PADDED, 1, b"\xff" + HEAD_BLOCK),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "HEADERS without their priority": (
        frame(HEADERS, END_HEADERS | WITH_PRIORITY, 1, b"1234"),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "RST_STREAM of 3 bytes": (
        frame(RST_STREAM, 0, 1, b"123"),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "SETTINGS of 5 bytes": (
        frame(SETTINGS, 0, 0, b"12345"),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "an ACK with a payload": (
        frame(SETTINGS, ACK, 0, bytes(6)),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "push enabled": (setting(2, 1), ErrorCode.PROTOCOL_ERROR),
    "push neither enabled nor disabled": (setting(2, 2), ErrorCode.PROTOCOL_ERROR),
    "an initial window above the largest": (
        setting(4, 2**31),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "a frame size below the least": (setting(5, 2**14 - 1), ErrorCode.PROTOCOL_ERROR),
    "a frame size above the largest": (setting(5, 2**24), ErrorCode.PROTOCOL_ERROR),
    "an overflow by SETTINGS": (
        frame(WINDOW_UPDATE, 0, 1, word(100_000)) + setting(4, GO),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "PUSH_PROMISE": (
        frame(PUSH_PROMISE, END_HEADERS, 1, word(2) + HEAD_BLOCK),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "PING of 7 bytes": (frame(PING, 0, 0, bytes(7)), ErrorCode.FRAME_SIZE_ERROR),
    "an ACK of PING of 9 bytes": (
        frame(PING, ACK, 0, bytes(9)),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "GOAWAY of 7 bytes": (frame(GOAWAY, 0, 0, bytes(7)), ErrorCode.FRAME_SIZE_ERROR),
    "GOAWAY going up": (
        frame(GOAWAY, 0, 0, word(1) + word(0)) + frame(GOAWAY, 0, 0, word(3) + word(0)),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "WINDOW_UPDATE of 3 bytes": (
        frame(WINDOW_UPDATE, 0, 0, b"123"),
        ErrorCode.FRAME_SIZE_ERROR,
    ),
    "WINDOW_UPDATE by 0": (
        frame(WINDOW_UPDATE, 0, 0, word(0)),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "an overflow of the connection's window": (
        frame(WINDOW_UPDATE, 0, 0, word(GO)),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "an overflow of the connection's window by one": (
        # Two requests were sent.
        frame(WINDOW_UPDATE, 0, 0, word(GO - WINDOW + 5 + 1)),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "a lone CONTINUATION": (
        frame(CONTINUATION, END_HEADERS, 1, HEAD_BLOCK),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "CONTINUATION after the end of HEADERS": (
        OPENING + frame(CONTINUATION, END_HEADERS, 1),
        ErrorCode.PROTOCOL_ERROR,
    ),
}


@pytest.mark.parametrize(
    "data, code", CONNECTION_ERRORS.values(), ids=CONNECTION_ERRORS
)
def test_it_ends_the_connection(data, code):
    connection, calls = opened()
    connection.receive(data, 0)
    assert not connection.takes_calls
    assert code.name in connection.failure
    assert not connection.streams
    for call in calls:
        if ending(call.outcome) is not Ending.GOAWAY:
            assert ending(call.outcome) is Ending.CUT_OFF
            assert call.outcome.code() is grpc.StatusCode.UNAVAILABLE
            assert verdict(call.outcome, lambda: True) is Verdict.BROKEN
    sent = connection.take_output()
    at = sent.index(b"\x07\0\0\0\0\0\0\0\0\0")
    assert sent[at + 10 : at + 14] == word(code)
    connection.receive(ANSWER, 0)
    assert not connection.has_output


STREAM_ERRORS = {
    "WINDOW_UPDATE by 0": (
        frame(WINDOW_UPDATE, 0, 1, word(0)),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "an overflow of the window by one": (
        frame(WINDOW_UPDATE, 0, 1, word(GO - WINDOW + 1)),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "an overflow of the window": (
        frame(WINDOW_UPDATE, 0, 1, word(GO)),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "PRIORITY of 4 bytes": (frame(PRIORITY, 0, 1, b"1234"), ErrorCode.FRAME_SIZE_ERROR),
    "DATA before HEADERS": (BODY, ErrorCode.PROTOCOL_ERROR),
    "empty DATA before HEADERS": (frame(DATA, 0, 1), ErrorCode.PROTOCOL_ERROR),
    "padding before HEADERS": (
        frame(DATA, PADDED, 1, b"\x02\0\0"),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "DATA before the final HEADERS": (
        frame(HEADERS, END_HEADERS, 1, block([(":status", "103")])) + BODY,
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a pseudo-header field in headers without the end": (
        # The same block twice: the decoder returns the same object for both.
        OPENING * 2,
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a malformed field": (
        frame(HEADERS, END_HEADERS, 1, block([*HEAD, ("connection", "close")])),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a field of the dynamic table that is no more": (
        # Allowed with a table of 0 bytes: it is forgotten at once.
        OPENING + frame(HEADERS, END_HEADERS, 1, b"\x40\x01a\x01b"),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a header list above the limit": (
        frame(HEADERS, END_HEADERS, 1, block([*HEAD, ("x-a", "a" * 16_384)])[:16_384]),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "trailers without the end": (
        OPENING + frame(HEADERS, END_HEADERS, 1, TAIL_BLOCK),
        ErrorCode.PROTOCOL_ERROR,
    ),
}


ENDED_STREAM_ERRORS = {
    "END_STREAM before HEADERS": frame(DATA, END_STREAM, 1),
    "the headers again as trailers": OPENING
    + BODY
    + frame(HEADERS, END_HEADERS | END_STREAM, 1, HEAD_BLOCK),
}


@pytest.mark.parametrize("data", ENDED_STREAM_ERRORS.values(), ids=ENDED_STREAM_ERRORS)
def test_a_malformed_response_that_ended_is_an_error_of_http2(data):
    connection, (broken, other) = opened()
    connection.receive(data, 0)
    assert "violates HTTP/2 (PROTOCOL_ERROR)" in broken.outcome.details()
    assert connection.failure is None
    assert other.outcome is None


@pytest.mark.parametrize(
    "data, sent",
    [
        (OPENING + frame(DATA, END_STREAM, 1, message(b"yes")), b""),
        (OPENING + frame(DATA, END_STREAM, 1, message(b"yes") * 2), b""),
        (OPENING + BODY + ENDING, b""),
        (frame(HEADERS, END_HEADERS | END_STREAM, 1, block([(":status", "404")])), b""),
        (frame(HEADERS, END_HEADERS, 1, block([(":status", "404")])), RESET),
        (OPENING + BODY + BODY, RESET),
    ],
    ids=["no trailers", "two", "good", "a proxy", "a body of a proxy", "goes on"],
)
def test_only_a_stream_that_is_open_is_reset(data, sent):
    connection, (call, _) = opened()
    connection.receive(data, 0)
    assert call.ends == 1
    assert connection.take_output() == sent


def test_a_server_is_told_that_http1_is_a_protocol_error():
    connection = client()
    connection.take_output()
    connection.receive(b"HTTP/1.1 400 Bad Request\r\n\r\n", 0)
    assert connection.take_output()[13:17] == word(ErrorCode.PROTOCOL_ERROR)


@pytest.mark.parametrize("data, code", STREAM_ERRORS.values(), ids=STREAM_ERRORS)
def test_it_ends_the_stream_alone(data, code):
    if code is ErrorCode.ENHANCE_YOUR_CALM:  # longer than a frame
        whole = block([*HEAD, *[("x-a", "a" * 4000)] * 6])
        data = frame(HEADERS, 0, 1, whole[:16_000])
        data += frame(CONTINUATION, END_HEADERS, 1, whole[16_000:])
    connection, (broken, other) = opened()
    connection.receive(data, 0)
    assert connection.failure is None
    assert broken.outcome.code() is grpc.StatusCode.INTERNAL
    assert ending(broken.outcome) is Ending.NO_STATUS
    assert connection.take_output() == frame(RST_STREAM, 0, 1, word(code))
    assert other.outcome is None
    # What the server sent before it knows is ignored.
    connection.receive(ANSWER + ANSWER.replace(b"\0\0\0\x01", b"\0\0\0\x03"), 0)
    assert other.ends == 0 or other.outcome


ALLOWED = {
    "unknown frames": frame(0xBE, 0xFF, 1, b"?") + frame(0xBE, 0, 0) + ANSWER,
    "unknown settings": setting(0xBEEF, 1) + ANSWER,
    "unknown flags": frame(PING, 0xFE, 0, bytes(8)) + ANSWER,
    "the reserved bit": ANSWER.replace(b"\0\0\0\x01", b"\x80\0\0\x01", 1),
    "the reserved bit of GOAWAY": frame(GOAWAY, 0, 0, word(2**31 + 1) + word(0))
    + ANSWER,
    "the reserved bit of WINDOW_UPDATE": frame(WINDOW_UPDATE, 0, 0, word(2**31 + 1))
    + frame(WINDOW_UPDATE, 0, 1, word(2**31 + 1))
    + ANSWER,
    "push disabled": setting(2, 0) + ANSWER,
    "the largest windows": frame(WINDOW_UPDATE, 0, 0, word(GO - WINDOW + 5))
    + frame(WINDOW_UPDATE, 0, 1, word(GO - WINDOW))
    + ANSWER,
    "the end of the stream before the end of the headers": OPENING
    + BODY
    + frame(HEADERS, END_STREAM, 1, TAIL_BLOCK[:3])
    + frame(CONTINUATION, 0, 1, TAIL_BLOCK[3:4])
    + frame(CONTINUATION, END_HEADERS, 1, TAIL_BLOCK[4:]),
    "the largest settings": setting(3, 2**32 - 1)
    + setting(4, GO)
    + setting(5, 2**24 - 1)
    + setting(6, 2**32 - 1)
    + ANSWER,
    "the smallest settings": setting(1, 0)
    + setting(3, 0)
    + setting(4, 0)
    + setting(5, 2**14)
    + setting(6, 0)
    + ANSWER,
    "HEADERS with a priority": frame(
        HEADERS, END_HEADERS | WITH_PRIORITY, 1, bytes(5) + HEAD_BLOCK
    )
    + BODY
    + ENDING,
    "HEADERS with padding and priority": frame(
        HEADERS,
        END_HEADERS | WITH_PRIORITY | PADDED,
        1,
        b"\x03" + bytes(5) + HEAD_BLOCK + bytes(3),
    )
    + BODY
    + ENDING,
    "PRIORITY on any stream": b"".join(
        frame(PRIORITY, 0, number, bytes(5)) for number in (1, 2, 999)
    )
    + ANSWER,
    "padding alone": OPENING
    + frame(DATA, PADDED, 1, b"\x05" + bytes(5))
    + BODY
    + ENDING,
    "an empty DATA": OPENING + frame(DATA, 0, 1) + BODY + ENDING,
    "HEADERS without a byte, then CONTINUATION": frame(HEADERS, 0, 1)
    + frame(CONTINUATION, 0, 1)
    + frame(CONTINUATION, END_HEADERS, 1, HEAD_BLOCK)
    + BODY
    + ENDING,
    "a table of size 0": frame(HEADERS, END_HEADERS, 1, b"\x20" + HEAD_BLOCK)
    + BODY
    + ENDING,
    "frames on a stream that ended": ANSWER
    + frame(RST_STREAM, 0, 1, word(0))
    + frame(WINDOW_UPDATE, 0, 1, word(1))
    + ANSWER,
    "an ACK of no PING": frame(PING, ACK, 0, bytes(8)) + ANSWER,
    "GOAWAY, and the answer": frame(GOAWAY, 0, 0, word(1) + word(0)) + ANSWER,
}


@pytest.mark.parametrize("data", ALLOWED.values(), ids=ALLOWED)
def test_it_is_allowed(data):
    connection, (call, _) = opened()
    connection.receive(data, 0)
    assert connection.failure is None
    assert call.outcome == b"yes"


@pytest.mark.parametrize(
    "data, text",
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "HTTP/1"),
        (frame(PING, 0, 0, bytes(8)), "not SETTINGS"),
        (frame(SETTINGS, ACK), "acknowledges"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "FRAME_SIZE_ERROR"),
    ],
)
def test_what_does_not_begin_with_settings_is_not_http2(data, text):
    connection = client()
    connection.receive(data, 0)
    assert text in connection.failure
