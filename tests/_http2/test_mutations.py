"""Streams of a server with faults at random: nothing escapes, and no call hangs."""

from __future__ import annotations

import os
import random

import pytest

from fastapi_topaz.exceptions import ConnectionLost
from kit.h2peer import HEAD, TAIL, Call, client, connected, message
from kit.sizes import at_night


COUNT = 6_000
NIGHTLY = at_night(1_000_000)
CALLS = 4


def recorded(rng):
    """Return what a server sends for four calls, of one shape of many."""
    connection, server = connected()
    for _ in range(CALLS):
        Call(connection, b"q" * rng.choice([0, 10, 1000]))
    server.receive(connection.take_output())
    for number in rng.sample(range(1, 2 * CALLS, 2), CALLS):
        match rng.randrange(6):
            case 0:
                server.h2.reset_stream(number, rng.randrange(14))
            case 1:
                server.h2.send_headers(
                    number, [*HEAD, ("grpc-status", "7")], end_stream=True
                )
            case 2:
                server.h2.send_headers(number, [(":status", "103")])
                server.answer(number, b"a" * rng.randrange(2000), padding=7)
            case 3:
                server.h2.ping(b"12345678")
                server.answer(number, b"", tail=[*TAIL, ("x-a", "b" * 100)])
            case _:
                server.answer(number, message(b"a" * 10), frame=rng.choice([9, 100]))
    if rng.random() < 0.3:
        server.h2.close_connection(last_stream_id=rng.choice([1, 3, 7]))
    return server.output()


def mutated(data, rng):
    out = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 5])):
        at = rng.randrange(len(out))
        match rng.randrange(6):
            case 0:
                out[at] = rng.randrange(256)
            case 1:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                del out[at : at + rng.randrange(1, 20)]
            case 3:
                out[at:at] = rng.randbytes(rng.randrange(1, 20))
            case 4:
                end = at + rng.randrange(1, 60)
                out[at:at] = out[at:end]
            case _:
                del out[at:]
        if not out:
            break
    return bytes(out)


def ended_by(data, cut, *, cancels=False):
    """Give a connection with calls *data* in two parts; return both, at their end."""
    connection = ready()
    calls = [Call(connection, b"question") for _ in range(CALLS)]
    connection.take_output()
    connection.receive(data[:cut], 0)
    if cancels:
        connection.cancel(calls[0].stream)
        calls[0].ends += calls[0].stream.outcome is None
    connection.receive(data[cut:], 0)
    is_violated = connection.failure is not None
    if is_violated:
        assert not connection.streams
    connection.take_output()
    connection.expire(1.0)
    connection.shut_down()
    assert all(call.ends == 1 for call in calls)
    for call in calls:
        outcome = call.stream.outcome
        assert isinstance(outcome, bytes | Exception | None)
        if isinstance(outcome, ConnectionLost):
            assert "closed" in str(outcome)
    assert not connection.streams
    assert not connection._waiting
    assert not connection._blocked
    return calls, is_violated


def run(seed, count):
    rng = random.Random(seed)
    streams = [recorded(rng) for _ in range(60)]
    ended = {"answers": 0, "errors": 0, "violations": 0}
    for _ in range(count):
        data = mutated(rng.choice(streams), rng)
        cut = rng.randrange(len(data) + 1)
        calls, is_violated = ended_by(data, cut, cancels=rng.random() < 0.1)
        ended["violations"] += is_violated
        for call in calls:
            ended["answers"] += isinstance(call.stream.outcome, bytes)
            ended["errors"] += isinstance(call.stream.outcome, Exception)
    return ended


def ready():
    """Return a connection that had the SETTINGS and the ACK of a server."""
    # Without a server, because to make one takes longer than the rest.
    connection = client()
    connection.receive(bytes.fromhex("000000040000000000 000000040100000000"), 0)
    assert connection.is_ready
    return connection


def test_mutated_streams_end_all_calls():
    ended = run(1, COUNT)
    # The mutations are neither all harmless nor all fatal.
    assert min(ended.values()) > COUNT // 10


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_many_more_mutated_streams_end_all_calls():
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")  # noqa: T201
    run(seed, NIGHTLY)
