"""Floods of frames: each is bounded in memory and time, then the connection ends."""

from __future__ import annotations

import struct
import time
import tracemalloc

import pytest
from h2.settings import SettingCodes

from fastapi_topaz._http2 import limits
from fastapi_topaz._rpc.statuses import Ending, ending
from kit.h2frames import (
    ACK,
    ANSWER,
    BODY,
    CONTINUATION,
    DATA,
    END_HEADERS,
    ENDING,
    GOAWAY,
    HEAD_BLOCK,
    HEADERS,
    OPENING,
    PADDED,
    PING,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    block,
    frame,
    opened,
    word,
)
from kit.h2peer import Call, connected


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


@pytest.mark.parametrize(
    "stream, increment", [(0, 1), (1, 1), (3, 1)], ids=["connection", "own", "closed"]
)
def test_a_flood_of_window_updates_ends_the_connection_also_under_a_blocked_call(
    stream, increment
):
    # No DATA can be sent: one of the two windows stays closed.
    settings = {SettingCodes.INITIAL_WINDOW_SIZE: 0} if stream != 1 else {}
    connection, _ = connected(settings)
    blocked, closed = Call(connection, b"q" * 100_000), Call(connection)
    connection.cancel(closed.stream)
    connection.take_output()
    sent = 0
    while connection.failure is None and sent < MANY:
        connection.receive(frame(WINDOW_UPDATE, 0, stream, word(increment)) * 100, 0)
        connection.take_output()
        sent += 100
    assert "ENHANCE_YOUR_CALM" in connection.failure
    assert sent < 3000
    assert ending(blocked.outcome) is Ending.CUT_OFF


def test_window_updates_for_each_sent_frame_are_no_flood():
    settings = {SettingCodes.INITIAL_WINDOW_SIZE: 2**20}
    connection, _ = connected(settings, max_message=60_000_000)
    call = Call(connection, b"q" * 60_000_000)
    for _ in range(60_000_000 // 1000 + 100):
        # As a server that reads 1,000 bytes at a time.
        connection.receive(frame(WINDOW_UPDATE, 0, 0, word(1000)), 0)
        connection.receive(frame(WINDOW_UPDATE, 0, 1, word(1000)), 0)
        while connection.take_output():
            pass
    assert connection.failure is None
    assert call.stream.unsent is None


@pytest.mark.parametrize(
    "end",
    [
        BODY,  # DATA before HEADERS
        frame(HEADERS, END_HEADERS, 1, block([(":status", "404")])),
        OPENING + BODY + BODY,
    ],
    ids=["a violation", "a proxy", "two messages"],
)
def test_a_call_that_ends_among_many_pings_gets_its_outcome(end):
    # As many answers as may wait, and then a stream to reset.
    connection, (call, other) = opened()
    pings = frame(PING, 0, 0, bytes(8)) * limits.MAX_QUEUED_CONTROL
    connection.receive(pings + end, 0)
    assert call.ends == 1
    assert ending(call.outcome) is Ending.NO_STATUS
    assert other.outcome is None
    connection.receive(frame(PING, 0, 0, bytes(8)), 0)
    assert "ENHANCE_YOUR_CALM" in connection.failure
    assert ending(other.outcome) is Ending.CUT_OFF


def test_frames_that_come_slowly_are_no_flood():
    # As the PINGs of a server on an idle connection.
    connection, (call, _) = opened()
    for step in range(10_000):
        connection.receive(frame(PING, 0, 0, bytes(8)), step / 100)
        connection.take_output()
    connection.receive(ANSWER, 0)
    assert call.outcome == b"yes"


def test_a_flood_after_frames_that_came_slowly_ends_the_connection():
    connection, _ = opened()
    ping = frame(PING, ACK, 0, bytes(8))
    for step in range(2 * limits.MAX_OVERHEAD_FRAMES):
        connection.receive(ping, step / 100)
    assert connection.failure is None
    connection.receive(ping * (limits.MAX_OVERHEAD_FRAMES + 100), step / 100)
    assert "ENHANCE_YOUR_CALM" in connection.failure


def test_each_setting_counts_in_a_flood():
    connection, _ = opened()
    settings = struct.pack(">HL", 4, 100) * (limits.MAX_OVERHEAD_FRAMES // 2)
    connection.receive(frame(SETTINGS, 0, 0, settings), 0)
    assert connection.failure is None
    connection.receive(frame(SETTINGS, 0, 0, settings), 0)
    assert "ENHANCE_YOUR_CALM" in connection.failure


def test_an_acknowledgement_is_not_acknowledged():
    connection, _ = opened()
    connection.receive(frame(PING, ACK, 0, bytes(8)) + frame(SETTINGS, ACK), 0)
    assert not connection.has_output


def test_responses_that_cross_with_resets_are_no_flood():
    # Each response is malformed at its begin, and goes on.
    connection, _ = connected()
    calls = [Call(connection) for _ in range(100)]
    for part in (BODY, OPENING + BODY * 256 + ENDING):
        for call in calls:
            number = word(call.stream.id)
            connection.receive(part.replace(b"\0\0\0\x01", number), 0)
            assert call.ends == 1
    assert connection.failure is None


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
