"""Frames of a server, built by hand: also those that no library sends."""

from __future__ import annotations

import struct

import h2.events
import hpack

from fastapi_topaz._http2.errors import ErrorCode
from kit.h2peer import HEAD, TAIL, Call, connected, message


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
RESET = frame(RST_STREAM, 0, 1, word(ErrorCode.CANCEL))
GO = 2**31 - 1
# What is left of a window of the server after an empty request.
WINDOW = 65_535 - len(message(b""))


def opened():
    """Return a connection with the streams 1 and 3."""
    connection, _ = connected()
    calls = Call(connection), Call(connection)
    connection.take_output()
    return connection, calls


def window_update(stream_id, increment):
    return struct.pack(">HBBBLL", 0, 4, 8, 0, stream_id, increment)


def data_frame(data, padding):
    """Return a DATA frame of the stream 1."""
    if padding is not None:
        data = bytes([padding]) + data + bytes(padding)
    flags = 0 if padding is None else 8
    return struct.pack(">HBBBL", len(data) >> 8, len(data) & 255, 0, flags, 1) + data


def window_updates(sent):
    """Yield stream and increment of the WINDOW_UPDATE frames, which all *sent* are."""
    for at in range(0, len(sent), 13):
        assert sent[at : at + 5] == b"\0\0\4\x08\0"
        yield struct.unpack_from(">LL", sent, at + 5)


def resets(server):
    """Return the codes of the RST_STREAM frames that *server* got."""
    return {
        event.stream_id: event.error_code
        for event in server.events
        if isinstance(event, h2.events.StreamReset)
    }


def pings(server):
    return sum(isinstance(e, h2.events.PingReceived) for e in server.events)
