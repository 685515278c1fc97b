"""A silent server, in memory: when it is pinged, and when it is lost."""

from __future__ import annotations

import math

import grpc
import h2.events
from h2.settings import SettingCodes

from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz._rpc.statuses import Ending, ending, is_worth_a_retry, verdict
from kit.h2frames import pings
from kit.h2peer import Call, connected, exchange


Code = grpc.StatusCode


def acknowledged(server):
    """Return how often *server* got SETTINGS, which it acknowledges."""
    return sum(isinstance(e, h2.events.RemoteSettingsChanged) for e in server.events)


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


def asked(connection, now):
    """Return whether, at *now*, the peer is asked for a sign of life."""
    connection.expire(now)
    return connection.has_output


def test_a_peer_that_is_silent_during_a_call_is_pinged():
    connection, server = connected()
    call = Call(connection, began=10.0)
    assert connection.next_deadline == 11.0
    exchange(connection, server, 10.0)
    assert not asked(connection, 10.9)
    assert connection.next_deadline == 11.0
    assert asked(connection, 11.0)
    assert connection.next_deadline == 12.0
    connection.take_output()
    connection.expire(11.9)
    assert connection.failure is None
    lost = []
    connection.on_silence = lambda: lost.append(True)
    connection.expire(12.0)
    assert connection.failure == "the server did not answer a PING within 1 s"
    assert lost == [True]
    assert ending(call.outcome) is Ending.CUT_OFF
    assert is_worth_a_retry(call.outcome)
    assert verdict(call.outcome, lambda: True) is Verdict.BROKEN


def test_any_byte_proves_the_peer():
    connection, server = connected()
    Call(connection, began=10.0)
    Call(connection, began=10.5)
    exchange(connection, server, 10.5)
    # Half a frame, before the PING and after it.
    connection.receive(b"\0", 10.8)
    assert not asked(connection, 11.0)
    assert connection.next_deadline == 11.8
    assert asked(connection, 11.8)
    connection.receive(b"\0", 12.0)
    connection.take_output()
    connection.expire(12.8)
    assert connection.failure is None


def test_silence_counts_from_the_first_call_after_a_pause():
    connection, server = connected()
    for began in (10.0, 500.0):
        call = Call(connection, began=began)
        exchange(connection, server, began)
        assert not asked(connection, began + 0.9)
        server.answer(call.stream.id, b"")
        exchange(connection, server, began + 0.9)
        assert not asked(connection, began + 50.0)
        assert connection.next_deadline == math.inf


def test_a_peer_that_is_silent_while_calls_wait_for_a_stream_is_pinged():
    # Otherwise a call without a deadline would wait without end for a frozen peer.
    connection, server = connected({SettingCodes.MAX_CONCURRENT_STREAMS: 0})
    call = Call(connection, began=10.0)
    for now in (11.0, 12.0, 13.0):
        # More calls do not postpone the PING.
        Call(connection, began=now - 0.1)
        assert asked(connection, now)
        exchange(connection, server, now)
    assert pings(server) == 2
    assert asked(connection, 14.0)
    connection.expire(15.0)
    assert connection.failure == "the server did not answer SETTINGS within 1 s"
    assert ending(call.outcome) is Ending.NOT_SENT


def test_a_peer_that_is_silent_while_calls_wait_for_the_socket_is_pinged():
    connection, server = connected({SettingCodes.INITIAL_WINDOW_SIZE: 2**30})
    server.h2.increment_flow_control_window(2**30)
    exchange(connection, server)
    large = Call(connection, b"q" * 4_000_000)
    connection.take_output()  # the socket takes no more than this
    connection.cancel(large.stream)
    call = Call(connection, began=10.0)
    assert not connection.streams
    assert connection.next_deadline <= 11.0
    connection.expire(11.0)
    connection.expire(12.0)
    assert connection.failure == "the server did not answer a PING within 1 s"
    assert ending(call.outcome) is Ending.NOT_SENT


def test_a_peer_that_reads_slowly_is_not_silent():
    connection, server = connected({SettingCodes.INITIAL_WINDOW_SIZE: 2**30})
    Call(connection, b"q" * 4_000_000, began=10.0)
    exchange(connection, server, 10.0)
    for now in (10.9, 11.8, 12.7):
        connection.sent_some(now)
        assert not asked(connection, now + 0.8)
    assert asked(connection, 13.7)
    # The PING waits behind the request.
    connection.take_output()
    connection.sent_some(14.6)
    assert not asked(connection, 14.7)
    assert connection.failure is None
    # It freezes.
    assert asked(connection, 15.6)
    connection.expire(16.6)
    assert connection.failure == "the server did not answer a PING within 1 s"


def test_a_slow_peer_is_asked_by_two_pings_and_then_by_settings():
    connection, server = connected()
    before = acknowledged(server)
    call = Call(connection, began=0.0)
    exchange(connection, server)
    for second in range(1, 11):
        assert asked(connection, float(second))
        exchange(connection, server, float(second))
    assert pings(server) == 2
    assert acknowledged(server) == before + 8
    server.answer(call.stream.id, b"late")
    exchange(connection, server, 10.5)
    assert call.outcome == b"late"
    # If it freezes by then, that is found.
    Call(connection, began=20.0)
    exchange(connection, server, 20.0)
    for second in (21.0, 22.0, 23.0):
        assert asked(connection, second)
        exchange(connection, server, second)
    connection.expire(24.0)
    connection.expire(25.0)
    assert connection.failure == "the server did not answer SETTINGS within 1 s"


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
