"""What a server may not do: each violation ends the stream, or the connection."""

from __future__ import annotations

import struct
import time
import tracemalloc

import grpc
import hpack
import pytest

from fastapi_topaz._http2 import limits
from fastapi_topaz._http2.errors import ErrorCode
from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz._rpc.statuses import Ending, ending, verdict
from kit.h2peer import HEAD, TAIL, Call, client, connected, message


DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = range(5)
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(5, 10)
END_STREAM = ACK = 1
END_HEADERS, PADDED, WITH_PRIORITY = 4, 8, 32


def frame(kind, flags=0, stream=0, payload=b""):
    length = struct.pack(">L", len(payload))[1:]
    return length + struct.pack(">BBL", kind, flags, stream) + payload


def word(number):
    return struct.pack(">L", number)


def setting(key, value):
    return frame(SETTINGS, payload=struct.pack(">HL", key, value))


def block(headers):
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    return encoder.encode(headers)


HEAD_BLOCK, TAIL_BLOCK = block(HEAD), block(TAIL)
OPENING = frame(HEADERS, END_HEADERS, 1, HEAD_BLOCK)
ENDING = frame(HEADERS, END_HEADERS | END_STREAM, 1, TAIL_BLOCK)
BODY = frame(DATA, 0, 1, message(b"yes"))
ANSWER = OPENING + BODY + ENDING
GO = 2**31 - 1


def opened():
    """Return a connection with the streams 1 and 3."""
    connection, _ = connected()
    calls = Call(connection), Call(connection)
    connection.take_output()
    return connection, calls


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
    "an overflow of the window": (
        frame(WINDOW_UPDATE, 0, 1, word(GO)),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "PRIORITY of 4 bytes": (frame(PRIORITY, 0, 1, b"1234"), ErrorCode.FRAME_SIZE_ERROR),
    "DATA before HEADERS": (BODY, ErrorCode.PROTOCOL_ERROR),
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


# -- floods ---------------------------------------------------------------

MANY = 200_000
FLOODS = {
    "PING": frame(PING, 0, 0, bytes(8)),
    "ACK of PING": frame(PING, ACK, 0, bytes(8)),
    "SETTINGS": frame(SETTINGS),
    "many settings": frame(SETTINGS, 0, 0, struct.pack(">HL", 4, 100) * 2000),
    "ACK of SETTINGS": frame(SETTINGS, ACK),
    "empty DATA": frame(DATA, 0, 1),
    "padding": frame(DATA, PADDED, 1, b"\xff" + bytes(255)),
    "DATA of a closed stream": frame(DATA, 0, 3, b"x" * 100),
    "HEADERS of a closed stream": frame(HEADERS, END_HEADERS, 3, HEAD_BLOCK),
    "RST_STREAM": frame(RST_STREAM, 0, 3, word(8)),
    "PRIORITY": frame(PRIORITY, 0, 1, bytes(5)),
    "WINDOW_UPDATE": frame(WINDOW_UPDATE, 0, 3, word(1)),
    "unknown frames": frame(0xBE),
    "GOAWAY": frame(GOAWAY, 0, 0, word(1) + word(0)),
    "CONTINUATION": None,
    "large CONTINUATION": None,
}


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_ends_the_connection(name, reads):
    connection, (call, other) = opened()
    connection.cancel(other.stream)
    connection.receive(OPENING, 0)
    connection.take_output()
    each = FLOODS[name]
    if each is None:
        connection.receive(frame(HEADERS, 0, 1), 0)
        each = frame(CONTINUATION, 0, 1, bytes(1000) if "large" in name else b"")
    sent = 0
    tracemalloc.start()
    try:
        while connection.failure is None and sent < MANY:
            connection.receive(each * 10, sent / 1e5)
            sent += 10
            if reads:
                connection.take_output()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "ENHANCE_YOUR_CALM" in connection.failure
    assert sent <= limits.MAX_OVERHEAD_FRAMES + limits.LATE_FRAMES + 10
    assert peak < 2**20
    assert ending(call.outcome) is Ending.CUT_OFF


def test_frames_that_come_slowly_are_no_flood():
    # As the PINGs of a server on a connection that nobody uses.
    connection, (call, _) = opened()
    for step in range(10_000):
        connection.receive(frame(PING, 0, 0, bytes(8)), step / 100)
        connection.take_output()
    connection.receive(ANSWER, 0)
    assert call.outcome == b"yes"


def test_frames_between_answers_are_no_flood():
    connection, _ = connected()
    for number in range(1, 2001, 2):
        call = Call(connection)
        connection.take_output()
        connection.receive(frame(PING, 0, 0, bytes(8)) * 10, 0)
        connection.receive(frame(WINDOW_UPDATE, 0, 0, word(50)), 0)
        connection.receive(ANSWER.replace(b"\0\0\0\x01", word(number)), 0)
        assert call.outcome == b"yes"


def test_answers_that_cross_with_cancellations_are_no_flood():
    # At once, and each with as many frames as an answer may have.
    connection, _ = connected()
    for number in range(1, 10_001, 2):
        call = Call(connection)
        connection.take_output()
        connection.cancel(call.stream)
        late = ANSWER if number > 100 else OPENING + BODY * 256 + ENDING
        connection.receive(late.replace(b"\0\0\0\x01", word(number)), 0)
    assert connection.failure is None
    last = Call(connection)
    connection.receive(ANSWER.replace(b"\0\0\0\x01", word(10_001)), 0)
    assert last.outcome == b"yes"


def test_a_flood_after_many_cancellations_ends_the_connection():
    connection, _ = opened()
    for _ in range(5000):
        call = Call(connection)
        connection.take_output()
        connection.cancel(call.stream)
    connection.take_output()
    sent = 0
    while connection.failure is None and sent < 10**6:
        connection.receive(frame(PING, ACK, 0, bytes(8)) * 1000, sent / 1e6)
        sent += 1000
    assert "ENHANCE_YOUR_CALM" in connection.failure


def test_the_time_and_memory_of_header_bombs_are_bounded():
    bombs = [
        bytes([0xBD]) * 16_384,  # the longest entries of the static table
        b"\x40\x01a\x00" * 4096,
        b"\x00\x81\xff\x00" * 4096,
        block([("x-a", "~" * 60_000)])[:16_384],
        block([(f"x-{n}", "") for n in range(2000)])[:16_384],
    ]
    for bomb in bombs:
        connection, _ = opened()
        began = time.process_time()
        tracemalloc.start()
        connection.receive(frame(HEADERS, END_HEADERS, 1, bomb), 0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * 2**20
        assert time.process_time() - began < 1
        assert connection.failure or connection.take_output()
