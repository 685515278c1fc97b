"""The scripted HTTP/2 server and name server, and how gRPC reacts to their faults."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
import hpack
import pytest
from aserto.authorizer.v2 import AuthorizerStub, InfoRequest, IsRequest
from hyperframe import frame as frames

from kit.embedded import OWN_SOCKET, is_allowed
from kit.faultkit.http2 import Http2Server
from kit.faultkit.names import Names
from kit.waiting import eventually, until


pytestmark = pytest.mark.real_clock

MIB = 2**20
# Far longer than a test takes. A caller that waits this long got no answer.
PATIENCE = 20.0
IS = "/aserto.authorizer.v2.Authorizer/Is"


@contextlib.contextmanager
def client(target):
    with grpc.insecure_channel(target, OWN_SOCKET) as channel:
        yield AuthorizerStub(channel)


def ask(stub):
    return stub.Is(IsRequest(), timeout=PATIENCE)


def begin(stub, number):
    return [stub.Is.future(IsRequest(), timeout=PATIENCE) for _ in range(number)]


def begin_held(http2_server, stub, number):
    http2_server.hold()
    calls = begin(stub, number)
    until(lambda: http2_server.in_flight == number)
    return calls


def failure(call, *arguments, **keywords):
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **keywords)
    return caught.value.code().name, caught.value.details()


@pytest.fixture
def stub(http2_server):
    with client(http2_server.url) as connected:
        connected.Info(InfoRequest(), timeout=PATIENCE)
        yield connected


class Wire:
    """A client that sends and receives single frames."""

    def __init__(self, http2_server):
        self.socket = socket.create_connection(
            (http2_server.host, http2_server.port), PATIENCE
        )
        self.headers = hpack.Encoder()
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.say(frames.SettingsFrame(0))
        self.read(frames.SettingsFrame)
        self.say(frames.SettingsFrame(0, flags=["ACK"]))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def say(self, frame):
        self.socket.sendall(frame.serialize())

    def ask(self, stream):
        names = {":method": "POST", ":scheme": "http", ":path": "/x.Y/Z"}
        data = self.headers.encode({**names, ":authority": "x", "te": "trailers"})
        self.say(frames.HeadersFrame(stream, data, flags=["END_HEADERS", "END_STREAM"]))

    def next(self):
        """Return the next frame, None at the end."""
        head = self._exactly(9)
        if not head:
            return None
        frame, length = frames.Frame.parse_frame_header(memoryview(head))
        frame.parse_body(memoryview(self._exactly(length)))
        return frame

    def read(self, kind):
        """Skip to the next frame of this type."""
        while (frame := self.next()) is not None:
            if isinstance(frame, kind):
                return frame
        raise AssertionError(f"no {kind.__name__}")

    def round_trip(self):
        """Return the names of the frames before the answer to a PING."""
        self.say(frames.PingFrame(0, b"question"))
        before = []
        while (frame := self.next()).__class__ is not frames.PingFrame:
            before.append(type(frame).__name__)
        return before

    def _exactly(self, size):
        data = b""
        while len(data) < size and (more := self.socket.recv(size - len(data))):
            data += more
        return data


@pytest.fixture
def wire(http2_server):
    with Wire(http2_server) as connected:
        connected.round_trip()
        yield connected


@pytest.fixture
def aside():
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit


# -- answers


def test_every_method_is_answered_and_counted_by_its_short_name(http2_server):
    with grpc.insecure_channel(http2_server.options.url, OWN_SOCKET) as channel:
        stub = AuthorizerStub(channel)
        assert is_allowed(ask(stub))
        assert stub.Info(InfoRequest(), timeout=PATIENCE).ByteSize() == 0
        anything = channel.unary_unary("/no.such.Service/Thing")
        assert anything(b"?", timeout=PATIENCE) == b""
    assert http2_server.calls == {"Is": 1, "Info": 1, "Thing": 1}
    assert http2_server.options.insecure
    assert (http2_server.accepted, http2_server.max_concurrent_seen) == (1, 1)
    until(lambda: http2_server.open == 0)


def test_control_methods_do_not_need_the_event_loop_of_the_caller():
    async def main():
        with Http2Server() as http2_server:
            async with grpc.aio.insecure_channel(
                http2_server.url, OWN_SOCKET
            ) as channel:
                http2_server.hold()
                call = channel.unary_unary(IS)(b"", timeout=PATIENCE)
                await eventually(lambda: http2_server.in_flight == 1, PATIENCE)
                http2_server.set_max_concurrent_streams(1)
                http2_server.goaway()
                http2_server.let_go()
                assert await call

    asyncio.run(main())


def answers(stub):
    """Return whether a call is answered; the next one may still use the dead socket."""
    try:
        return is_allowed(ask(stub))
    except grpc.RpcError:
        return False


def test_leaving_resets_calls_in_flight_and_leaves_no_thread():
    before = threading.active_count()
    with Http2Server() as http2_server, client(http2_server.url) as stub:
        calls = begin_held(http2_server, stub, 2)
        http2_server.__exit__(None)
        assert {failure(call.result)[0] for call in calls} == {"UNAVAILABLE"}
        http2_server.__enter__()
        http2_server.let_go()
        until(lambda: answers(stub))
    until(lambda: threading.active_count() <= before)


def test_two_servers_share_a_port_number_on_two_addresses(http2_server, stub):
    with Http2Server(host="127.0.0.2", port=http2_server.port) as other:
        assert other.port == http2_server.port
        with client(other.url) as elsewhere:
            assert is_allowed(ask(elsewhere))
        assert (http2_server.calls["Is"], other.calls["Is"]) == (0, 1)


def test_a_client_that_breaks_the_protocol_is_recorded_and_disconnected():
    with Http2Server() as http2_server:
        with Wire(http2_server) as wire:
            wire.ask(2)  # an even number is a stream of the server
            assert wire.read(frames.GoAwayFrame).error_code == 1
            assert wire.next() is None
        assert len(http2_server.errors) == 1
        assert http2_server.calls == {}


# -- hold and let go


def test_held_calls_are_answered_once_they_are_let_go(http2_server, stub):
    calls = begin_held(http2_server, stub, 3)
    assert http2_server.max_concurrent_seen == 3
    http2_server.let_go()
    assert all(is_allowed(call.result()) for call in calls)
    assert http2_server.in_flight == 0
    assert is_allowed(ask(stub))


def test_a_cancelled_call_is_no_longer_held(http2_server, stub):
    kept, cancelled = begin_held(http2_server, stub, 2)
    cancelled.cancel()
    until(lambda: http2_server.in_flight == 1)
    http2_server.heal()
    assert is_allowed(kept.result())
    assert http2_server.calls["Is"] == 2


def test_the_fault_of_a_held_call_is_chosen_when_it_is_let_go(http2_server, stub):
    calls = begin_held(http2_server, stub, 2)
    http2_server.status(grpc.StatusCode.ABORTED, times=1)
    http2_server.let_go()
    assert sorted(call.code().name for call in calls) == ["ABORTED", "OK"]


# -- GOAWAY


@pytest.mark.parametrize("error_code", [0, 11])
def test_after_goaway_calls_in_flight_are_answered_and_new_ones_reconnect(
    http2_server, stub, error_code
):
    calls = begin_held(http2_server, stub, 3)
    http2_server.goaway(error_code)
    calls += begin(stub, 1)
    until(lambda: http2_server.in_flight == 4)
    assert (http2_server.accepted, http2_server.open) == (2, 2)
    http2_server.let_go()
    assert all(is_allowed(call.result()) for call in calls)
    until(lambda: http2_server.open == 1)
    assert http2_server.calls["Is"] == 4


def test_an_idle_connection_is_closed_after_goaway(http2_server, stub):
    http2_server.goaway()
    until(lambda: http2_server.open == 0)
    assert is_allowed(ask(stub))
    assert http2_server.accepted == 2


def test_goaway_names_the_last_stream_that_gets_an_answer(http2_server, wire, aside):
    http2_server.hold()
    wire.ask(1)
    until(lambda: http2_server.in_flight == 1)
    telling = aside(http2_server.goaway, 11, b"calm down", close=False)
    goaway = wire.read(frames.GoAwayFrame)
    assert (goaway.last_stream_id, goaway.error_code) == (1, 11)
    assert goaway.additional_data == b"calm down"
    assert not telling.done()
    ping = wire.read(frames.PingFrame)
    wire.say(frames.PingFrame(0, ping.opaque_data, flags=["ACK"]))
    telling.result(PATIENCE)
    wire.ask(3)
    wire.round_trip()
    http2_server.let_go()
    assert wire.round_trip() == ["HeadersFrame", "DataFrame", "HeadersFrame"]
    assert http2_server.calls == {"Z": 1}
    assert http2_server.open == 1


def test_goaway_with_close_waits_for_the_last_answer(http2_server, wire, aside):
    http2_server.hold()
    wire.ask(1)
    until(lambda: http2_server.in_flight == 1)
    telling = aside(http2_server.goaway)
    ping = wire.read(frames.PingFrame)
    wire.say(frames.PingFrame(0, ping.opaque_data, flags=["ACK"]))
    telling.result(PATIENCE)
    assert wire.round_trip() == []
    http2_server.let_go()
    received = [type(frame).__name__ for frame in iter(wire.next, None)]
    assert received == ["HeadersFrame", "DataFrame", "HeadersFrame"]


# -- streams reset, answers broken


def test_a_refused_stream_is_not_retried_and_the_connection_stays_open(
    http2_server, stub
):
    http2_server.refuse_streams(1)
    code, details = failure(ask, stub)
    assert code == "UNAVAILABLE"
    assert "RST_STREAM with error code 7" in details
    assert is_allowed(ask(stub))
    assert (http2_server.accepted, http2_server.resets, http2_server.calls["Is"]) == (
        1,
        1,
        2,
    )


@pytest.mark.parametrize(
    "error_code, status",
    [
        (0, "INTERNAL"),
        (2, "INTERNAL"),
        (8, "CANCELLED"),
        (11, "RESOURCE_EXHAUSTED"),
        (12, "PERMISSION_DENIED"),
    ],
)
def test_a_reset_stream_gives_the_grpc_status_of_its_error_code(
    http2_server, stub, error_code, status
):
    http2_server.reset_streams(2, error_code)
    assert [failure(ask, stub)[0] for _ in range(2)] == [status] * 2
    assert is_allowed(ask(stub))
    assert http2_server.accepted == 1


@pytest.mark.parametrize("method", ["Is", "Info"])
def test_a_truncated_answer_resets_the_connection(http2_server, stub, method):
    call = getattr(stub, method)
    request = IsRequest() if method == "Is" else InfoRequest()
    http2_server.truncate(1)
    assert failure(call, request, timeout=PATIENCE)[0] == "UNAVAILABLE"
    # gRPC may send a call or two on the dead connection before it opens a new one.
    until(lambda: call.future(request, timeout=PATIENCE).code().name == "OK")
    assert http2_server.accepted == 2


# -- statuses and sizes


def test_a_status_is_answered_until_heal(http2_server, stub):
    http2_server.status(grpc.StatusCode.ABORTED, "100 % ümlaut")
    assert [failure(ask, stub) for _ in range(3)] == [("ABORTED", "100 % ümlaut")] * 3
    http2_server.heal()
    assert is_allowed(ask(stub))


def test_the_last_fault_applies_to_the_given_number_of_calls(http2_server, stub):
    http2_server.refuse_streams()
    http2_server.status(99, times=2)
    assert [failure(ask, stub)[0] for _ in range(2)] == ["UNKNOWN"] * 2
    assert is_allowed(ask(stub))
    with pytest.raises(ValueError, match="times"):
        http2_server.truncate(0)


def test_ok_without_a_message_returns_none_to_the_client(http2_server, stub):
    http2_server.status(grpc.StatusCode.OK)
    assert ask(stub) is None


def test_a_large_answer_arrives_complete_and_is_still_an_allow(http2_server, stub):
    for size in (64, 100_000, 4 * MIB):
        http2_server.answer_size(size, times=1)
        answer = ask(stub)
        assert is_allowed(answer)
        assert answer.ByteSize() == size
    with pytest.raises(ValueError, match="size"):
        http2_server.answer_size(63)


def test_an_answer_that_is_too_large_leaves_the_connection_open(http2_server, stub):
    http2_server.answer_size(5 * MIB, times=1)
    code, details = failure(ask, stub)
    assert code == "RESOURCE_EXHAUSTED"
    assert "larger than max (5242880 vs. 4194304)" in details
    assert is_allowed(ask(stub))
    assert http2_server.accepted == 1


def test_the_server_sends_no_more_than_flow_control_allows(http2_server, wire):
    http2_server.answer_size(100_000)
    wire.ask(1)
    received = 0
    while received < 65_535:
        received += len(wire.read(frames.DataFrame).data)
    assert received == 65_535
    assert wire.round_trip() == []
    wire.say(frames.WindowUpdateFrame(0, 50_000))
    wire.say(frames.WindowUpdateFrame(1, 50_000))
    while received < 100_005:
        received += len(wire.read(frames.DataFrame).data)
    assert received == 100_005
    assert wire.round_trip() == ["HeadersFrame"]


# -- the limit of streams


def test_calls_beyond_the_stream_limit_wait_in_the_client():
    with (
        Http2Server(max_concurrent_streams=1) as http2_server,
        client(http2_server.url) as stub,
    ):
        http2_server.hold()
        calls = begin(stub, 3)
        until(lambda: http2_server.in_flight == 1)
        http2_server.let_go()
        assert all(is_allowed(call.result()) for call in calls)
        assert (http2_server.max_concurrent_seen, http2_server.accepted) == (1, 1)
        assert http2_server.errors == []


def test_the_stream_limit_can_change_on_an_open_connection(http2_server, stub):
    http2_server.set_max_concurrent_streams(0)
    late = failure(stub.Is, IsRequest(), timeout=0.05)
    assert late[0] == "DEADLINE_EXCEEDED"
    http2_server.set_max_concurrent_streams(2)
    http2_server.hold()
    calls = begin(stub, 3)
    until(lambda: http2_server.in_flight == 2)
    http2_server.set_max_concurrent_streams(None)
    # gRPC 1.80 uses a raised limit only with the next call.
    calls += begin(stub, 1)
    until(lambda: http2_server.in_flight == 4)
    http2_server.let_go()
    assert all(is_allowed(call.result()) for call in calls)
    assert (http2_server.calls["Is"], http2_server.accepted) == (4, 1)


# -- names


@pytest.fixture
def names(http2_server):
    with Names({"topaz.test": [http2_server.host]}) as running:
        yield running


def ask_by_name(names, http2_server, name="topaz.test", timeout=PATIENCE):
    with client(names.target(name, http2_server.port)) as stub:
        return stub.Is(IsRequest(), timeout=timeout)


def query(name, kind=1, number=1):
    labels = b"".join(bytes([len(x)]) + x.encode() for x in name.split("."))
    return (
        struct.pack("!6H", number, 0x100, 1, 0, 0, 0)
        + labels
        + struct.pack("!BHH", 0, kind, 1)
    )


@pytest.fixture
def resolver(names):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connected:
        connected.settimeout(PATIENCE)
        connected.connect(("127.0.0.1", names.port))
        yield connected


def test_a_name_resolves_to_its_server(http2_server, names):
    assert is_allowed(ask_by_name(names, http2_server))
    assert list(names.queries) == ["topaz.test"]


def test_a_changed_name_resolves_to_its_new_address(http2_server, names):
    with Http2Server(host="127.0.0.2", port=http2_server.port) as other:
        names.set("topaz.test", [other.host])
        assert is_allowed(ask_by_name(names, http2_server))
        assert (http2_server.accepted, other.accepted) == (0, 1)


def test_a_client_tries_all_addresses_of_a_name(http2_server, names):
    names.set("topaz.test", ["127.0.0.3", http2_server.host])
    assert is_allowed(ask_by_name(names, http2_server))


@pytest.mark.parametrize("addresses", [None, []])
def test_a_name_without_an_address_is_unavailable(http2_server, names, addresses):
    names.set("topaz.test", addresses)
    code, details = failure(ask_by_name, names, http2_server)
    assert code == "UNAVAILABLE"
    assert "errors resolving topaz.test" in details
    assert http2_server.accepted == 0


def test_with_a_silent_name_server_a_call_ends_at_its_deadline(http2_server, names):
    names.silent()
    assert (
        failure(ask_by_name, names, http2_server, timeout=0.1)[0] == "DEADLINE_EXCEEDED"
    )
    names.heal()
    assert is_allowed(ask_by_name(names, http2_server))


def test_a_query_sent_during_silence_stays_unanswered(names, resolver):
    names.silent()
    resolver.send(query("topaz.test", number=7))
    until(lambda: names.queries["topaz.test"] == 1)
    names.heal()
    resolver.send(query("topaz.test", number=8))
    assert resolver.recv(512)[:2] == b"\0\x08"


def test_an_answer_echoes_the_question_and_has_ttl_0(names, resolver):
    names.set("topaz.test", ["127.0.0.1", "127.0.0.2"])
    asked = query("Topaz.TEST")
    resolver.send(asked)
    answer = resolver.recv(512)
    assert struct.unpack("!6H", answer[:12]) == (1, 0x8100, 1, 2, 0, 0)
    records = answer[12:].removeprefix(asked[12:])
    assert list(struct.iter_unpack("!HHHIH4s", records)) == [
        (0xC00C, 1, 1, 0, 4, bytes([127, 0, 0, 1])),
        (0xC00C, 1, 1, 0, 4, bytes([127, 0, 0, 2])),
    ]


@pytest.mark.parametrize(
    "name, kind, code", [("topaz.test", 28, 0), ("a.test", 1, 3), ("a.test", 28, 3)]
)
def test_other_types_have_no_records_and_unknown_names_do_not_exist(
    names, resolver, name, kind, code
):
    resolver.send(query(name, kind))
    flags, _, records = struct.unpack_from("!HHH", resolver.recv(512), 2)
    assert (flags & 15, records) == (code, 0)
    assert names.queries == ({name: 1} if kind == 1 else {})
