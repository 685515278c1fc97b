from __future__ import annotations

import asyncio
import math
import socket
import threading
import time

import grpc
import pytest
from aserto.authorizer.v2 import (
    AuthorizerStub,
    InfoRequest,
    IsRequest,
    ListPoliciesRequest,
)
from aserto.authorizer.v2.api import IdentityContext, PolicyContext

from fastapi_topaz.testing import EmbeddedAuthorizer
from fastapi_topaz.testing._relay import Relay, _Pair
from kit.embedded import OWN_SOCKET, is_allowed
from kit.waiting import until


pytestmark = pytest.mark.real_clock

REQUEST = IsRequest(
    policy_context=PolicyContext(path="app.x", decisions=["allowed"]),
    identity_context=IdentityContext(type=1),  # type: ignore[arg-type]
)
# The first bytes of an HTTP/2 client: the preface and an empty SETTINGS frame.
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def code_of(call, request=REQUEST, timeout=10.0):
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=timeout)
    return caught.value.code().name


@pytest.fixture
def authorizer():
    with EmbeddedAuthorizer({"app.x": True}) as running:
        yield running


@pytest.fixture
def stub(authorizer):
    with grpc.insecure_channel(authorizer.url, OWN_SOCKET) as channel:
        connected = AuthorizerStub(channel)
        connected.Info(InfoRequest(), timeout=10)
        yield connected


def dial(authorizer):
    before = authorizer.connections_accepted
    client = socket.create_connection(("127.0.0.1", authorizer.port), timeout=10)
    until(lambda: authorizer.connections_accepted == before + 1)
    return client


def is_silent(client, seconds=0.1):
    client.settimeout(seconds)
    try:
        client.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        client.settimeout(10)
    return False


def read_to_the_end(client):
    while client.recv(4096):
        pass


# -- delay


def test_delay_delays_every_answer(authorizer, stub):
    authorizer.delay = 0.2
    for call, request in ((stub.Is, REQUEST), (stub.Info, InfoRequest())):
        began = time.monotonic()
        call(request, timeout=10)
        assert time.monotonic() - began >= 0.19
    authorizer.heal()
    assert authorizer.delay == 0.0


@pytest.mark.parametrize("delay", [-1, math.nan])
def test_a_delay_must_be_a_valid_duration(authorizer, delay):
    with pytest.raises(ValueError, match="delay"):
        authorizer.delay = delay
    with pytest.raises(TypeError, match="delay"):
        authorizer.delay = "1"


def test_streams_are_the_calls_being_handled(authorizer, stub):
    authorizer.delay = math.inf
    pending = [stub.Is.future(REQUEST, timeout=20) for _ in range(3)]
    until(lambda: authorizer.streams == 3)
    for call in pending:
        call.cancel()
    until(lambda: authorizer.streams == 0)


# -- fail and heal


def test_fail_answers_with_the_status_until_healed(authorizer, stub):
    authorizer.fail(grpc.StatusCode.UNAVAILABLE, "gone fishing")
    with pytest.raises(grpc.RpcError) as caught:
        stub.Is(REQUEST, timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "gone fishing"
    assert code_of(stub.Info, InfoRequest()) == "UNAVAILABLE"
    authorizer.heal()
    assert is_allowed(stub.Is(REQUEST, timeout=10))


def test_fail_can_be_limited_to_a_number_of_calls(authorizer, stub):
    authorizer.fail("resource_exhausted", times=2)
    assert code_of(stub.Is) == "RESOURCE_EXHAUSTED"
    assert code_of(stub.Is) == "RESOURCE_EXHAUSTED"
    assert is_allowed(stub.Is(REQUEST, timeout=10))


def test_fail_can_be_limited_to_some_methods(authorizer, stub):
    authorizer.fail("UNIMPLEMENTED", times=1, methods=["Info"])
    assert is_allowed(stub.Is(REQUEST, timeout=10))
    assert code_of(stub.Info, InfoRequest()) == "UNIMPLEMENTED"
    assert stub.Info(InfoRequest(), timeout=10)


def test_the_last_fail_applies_and_survives_a_restart(authorizer):
    authorizer.fail("UNAVAILABLE")
    authorizer.fail("ABORTED")
    authorizer.stop()
    authorizer.start()
    with grpc.insecure_channel(authorizer.url, OWN_SOCKET) as channel:
        assert code_of(AuthorizerStub(channel).Is) == "ABORTED"


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"code": "NOPE"}, "gRPC status"),
        ({"code": "OK"}, "not a failure"),
        ({"code": grpc.StatusCode.OK}, "not a failure"),
        ({"code": "ABORTED", "times": 0}, "times"),
        ({"code": "ABORTED", "methods": ["is"]}, "methods"),
    ],
)
def test_fail_rejects_an_invalid_failure(arguments, text):
    with pytest.raises(ValueError, match=text):
        EmbeddedAuthorizer().fail(**arguments)


# -- freeze and thaw


def test_frozen_calls_get_no_answer_and_finish_after_the_thaw(authorizer, stub):
    authorizer.freeze()
    assert code_of(stub.Is, timeout=0.2) == "DEADLINE_EXCEEDED"
    pending = stub.Is.future(REQUEST, timeout=20)
    with pytest.raises(grpc.FutureTimeoutError):
        pending.result(timeout=0.2)
    assert authorizer.calls == {"Info": 1}
    assert authorizer.connections_open == 1
    authorizer.thaw()
    assert is_allowed(pending.result(timeout=10))
    assert authorizer.connections_accepted == 1


def test_freeze_holds_a_finished_answer_too(authorizer, stub):
    authorizer.delay = 0.3
    pending = stub.Is.future(REQUEST, timeout=20)
    until(lambda: authorizer.streams == 1)
    authorizer.freeze()
    until(lambda: authorizer.streams == 0)
    with pytest.raises(grpc.FutureTimeoutError):
        pending.result(timeout=0.2)
    authorizer.heal()
    assert is_allowed(pending.result(timeout=10))


def test_new_connections_to_a_frozen_server_are_accepted_and_silent(authorizer):
    authorizer.freeze()
    with dial(authorizer) as client:
        client.sendall(HELLO)
        assert is_silent(client)
        assert authorizer.connections_open == 1
        authorizer.thaw()
        # A frame header of SETTINGS: type 4, stream 0.
        assert client.recv(9)[3:] == bytes([4, 0, 0, 0, 0, 0])


def test_a_client_that_leaves_a_frozen_server_is_noticed(authorizer):
    authorizer.freeze()
    client = dial(authorizer)
    client.sendall(HELLO)
    client.close()
    until(lambda: authorizer.connections_open == 0)


def test_freeze_before_the_start_and_stop_while_frozen():
    authorizer = EmbeddedAuthorizer()
    authorizer.freeze()
    for grace in (0.0, 0.5):
        with authorizer, dial(authorizer) as client:
            client.sendall(HELLO)
            assert is_silent(client)
            began = time.monotonic()
            authorizer.stop(grace)
            assert time.monotonic() - began < 5
            assert authorizer.connections_open == 0
    authorizer.thaw()
    with authorizer.start(), dial(authorizer) as client:
        client.sendall(HELLO)
        assert not is_silent(client, seconds=10)


# -- drop


def test_drop_resets_the_oldest_connections(authorizer):
    clients = [dial(authorizer) for _ in range(3)]
    for client in clients:
        assert len(client.recv(9)) == 9
    assert authorizer.drop_connections(2) == 2
    assert authorizer.connections_open == 1
    for client in clients[:2]:
        with pytest.raises(ConnectionResetError):
            read_to_the_end(client)
    clients[2].sendall(HELLO)
    assert len(clients[2].recv(1)) == 1
    assert authorizer.drop_connections(0) == 0
    assert authorizer.drop_connections() == 1
    assert authorizer.drop_connections() == 0
    for client in clients:
        client.close()


def test_drop_fails_calls_and_clients_come_back(authorizer, stub):
    authorizer.delay = math.inf
    pending = stub.Is.future(REQUEST, timeout=20)
    until(lambda: authorizer.streams == 1)
    assert authorizer.drop_connections() == 1
    assert pending.exception(timeout=10).code() is grpc.StatusCode.UNAVAILABLE
    until(lambda: authorizer.cancelled == 1)
    authorizer.heal()

    def comes_back():
        try:
            return is_allowed(stub.Is(REQUEST, timeout=20, wait_for_ready=True))
        except grpc.RpcError as error:
            # The call went to the old connection: gRPC has not noticed its end yet.
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False

    until(comes_back)
    assert authorizer.connections_accepted == 2


def test_drop_rejects_a_negative_number(authorizer):
    with pytest.raises(ValueError, match="count"):
        authorizer.drop_connections(-1)


def test_dropping_on_a_stopped_server_does_nothing():
    assert EmbeddedAuthorizer().drop_connections() == 0


# -- limits, cancellation, stop


@pytest.mark.parametrize("limit, peak", [(2, 2), (None, 6)])
def test_max_concurrent_streams_limits_concurrent_calls(limit, peak):
    running = 0
    most = 0
    gate = threading.Event()

    async def policy(_check):
        nonlocal running, most
        running += 1
        most = max(most, running)
        while not gate.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        running -= 1
        return True

    authorizer = EmbeddedAuthorizer(policy, max_concurrent_streams=limit)
    with authorizer, grpc.insecure_channel(authorizer.url, OWN_SOCKET) as channel:
        stub = AuthorizerStub(channel)
        stub.Info(InfoRequest(), timeout=10)
        calls = [stub.Is.future(REQUEST, timeout=20) for _ in range(6)]
        until(lambda: authorizer.streams == peak)
        gate.set()
        # gRPC fails calls that exceed the limit in a race instead of queueing them.
        codes = [call.code() for call in calls]
    assert most == peak
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert codes.count(grpc.StatusCode.OK) >= peak


def test_calls_cancelled_by_the_client_are_counted(authorizer, stub):
    authorizer.delay = math.inf
    pending = stub.Is.future(REQUEST, timeout=20)
    until(lambda: authorizer.streams == 1)
    assert authorizer.cancelled == 0
    pending.cancel()
    until(lambda: authorizer.cancelled == 1)
    # Long enough to reach the server on a busy machine, too.
    assert code_of(stub.Is, timeout=0.5) == "DEADLINE_EXCEEDED"
    until(lambda: authorizer.cancelled == 2)
    assert authorizer.calls["Is"] == 2
    authorizer.reset_counters()
    assert authorizer.cancelled == 0


def test_a_hard_stop_ends_calls_without_counting_cancellations(authorizer, stub):
    authorizer.delay = math.inf
    pending = stub.Is.future(REQUEST, timeout=20)
    until(lambda: authorizer.streams == 1)
    authorizer.stop()
    assert pending.exception(timeout=10).code() is grpc.StatusCode.UNAVAILABLE
    assert authorizer.streams == authorizer.cancelled == 0


def test_a_graceful_stop_ends_as_soon_as_its_calls_finish(authorizer, stub):
    authorizer.delay = 0.5
    pending = stub.Is.future(REQUEST, timeout=20)
    until(lambda: authorizer.streams == 1)
    began = time.monotonic()
    authorizer.stop(grace=20)
    assert 0.1 < time.monotonic() - began < 10
    assert is_allowed(pending.result(timeout=10))
    assert authorizer.connections_open == 0


def test_a_graceful_stop_ends_calls_that_exceed_the_grace(authorizer, stub):
    authorizer.delay = math.inf
    pending = stub.Is.future(REQUEST, timeout=20)
    until(lambda: authorizer.streams == 1)
    authorizer.stop(grace=0.1)
    assert pending.exception(timeout=10).code() is grpc.StatusCode.UNAVAILABLE


async def calls_over_restarts(authorizer, restarts):
    over = False
    answers = []

    async def ask(stub):
        while not over:
            # The client waits for a server, but would not repeat a lost call.
            answer = await stub.Is(REQUEST, timeout=20, wait_for_ready=True)
            answers.append(is_allowed(answer))

    options = [*OWN_SOCKET, ("grpc.initial_reconnect_backoff_ms", 100)]
    async with grpc.aio.insecure_channel(authorizer.url, options) as channel:
        stub = AuthorizerStub(channel)
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(ask(stub))
            for _ in range(restarts):
                enough = len(answers) + 100
                while len(answers) < enough:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                await asyncio.to_thread(authorizer.stop, grace=5)
                authorizer.start()
            over = True
    return answers


def test_a_graceful_restart_loses_no_call(authorizer):
    answers = asyncio.run(calls_over_restarts(authorizer, restarts=3))
    assert len(answers) >= 300
    assert set(answers) == {True}
    assert authorizer.connections_accepted >= 4


@pytest.mark.parametrize("grace", [-1, math.inf, math.nan])
def test_grace_must_be_finite(authorizer, grace):
    with pytest.raises(ValueError, match="grace"):
        authorizer.stop(grace)


def test_a_policy_may_use_the_controls_except_stop(authorizer, stub):
    def stopping(_check):
        authorizer.stop()

    def failing(_check):
        authorizer.start().reset_counters()
        authorizer.fail("ABORTED")
        return True

    authorizer.policies = stopping
    with pytest.raises(grpc.RpcError) as caught:
        stub.Is(REQUEST, timeout=10)
    assert "a policy cannot stop" in caught.value.details()
    authorizer.policies = failing
    assert is_allowed(stub.Is(REQUEST, timeout=10))
    assert code_of(stub.ListPolicies, ListPoliciesRequest()) == "ABORTED"
    assert authorizer.calls == {"ListPolicies": 1}


# -- the relay by itself


async def relay_to_a_slow_reader(size, *, hang_up):
    """Send *size* bytes. Return the bytes kept by the relay, left over, and arrived."""
    opened = asyncio.get_running_loop().create_future()

    async def keep(reader, writer):
        opened.set_result((reader, writer))

    # Small buffers outside of the relay, so that it has to apply backpressure.
    target = await asyncio.start_server(keep, "127.0.0.1", 0, limit=1024)
    relay = Relay()
    port = relay.open(0)
    relay.serve(target.sockets[0].getsockname()[1])
    _, client = await asyncio.open_connection("127.0.0.1", port)
    reader, writer = await opened
    (pair,) = relay.pairs
    client.write(bytes(size))
    kept = 0
    # Wait until nothing moves any more: all buffers are full.
    before = -1
    while before != (before := client.transport.get_write_buffer_size()):
        await asyncio.sleep(0.1)
        kept = max(kept, pair.server.transport.get_write_buffer_size())
    if hang_up:
        client.transport.abort()
    else:
        client.write_eof()
    arrived = 0
    while data := await reader.read(65536):
        arrived += len(data)
    client.close()
    await relay.empty()
    writer.close()
    relay.abort()
    target.close()
    await target.wait_closed()
    return kept, before, arrived


def test_the_relay_applies_backpressure_to_a_fast_client():
    size = 64 * 1024 * 1024
    kept, left, arrived = asyncio.run(relay_to_a_slow_reader(size, hang_up=False))
    assert 0 < kept < 1024 * 1024
    assert 0 < left < size
    assert arrived == size


def test_data_sent_before_a_client_closed_still_arrives():
    size = 64 * 1024 * 1024
    kept, left, arrived = asyncio.run(relay_to_a_slow_reader(size, hang_up=True))
    assert kept < arrived < size
    assert left > 0


def test_a_frozen_relay_buffers_a_bounded_amount(authorizer):
    authorizer.freeze()
    with dial(authorizer) as client:
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(64 * 1024 * 1024))
        (pair,) = authorizer._relay.pairs
        assert 1024 * 1024 <= len(pair.client.held) < 2 * 1024 * 1024


async def relay_to_nobody(*, frozen):
    with socket.socket() as silent:
        # Bound, so that no other process gets the port, but not listening.
        silent.bind(("127.0.0.1", 0))
        relay = Relay()
        relay.set_frozen(frozen)
        port = relay.open(0)
        relay.serve(silent.getsockname()[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        if frozen:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(), 0.2)
            relay.abort()
        rest = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        await relay.empty()
        relay.abort()
        return rest, relay.accepted


@pytest.mark.parametrize("frozen", [False, True])
def test_a_relay_without_a_server_closes_unless_frozen(frozen):
    assert asyncio.run(relay_to_nobody(frozen=frozen)) == (b"", 1)


class SlowRelay(Relay):
    """A relay that connects to the server only when the test allows it."""

    def __init__(self):
        super().__init__()
        self.may_connect = asyncio.Event()
        self.connected = asyncio.Event()

    async def connect(self, side):
        await self.may_connect.wait()
        await super().connect(side)
        self.connected.set()


async def relay_to_a_client_that_left():
    left = asyncio.get_running_loop().create_future()

    async def server(reader, writer):
        left.set_result(await reader.read())
        writer.close()

    target = await asyncio.start_server(server, "127.0.0.1", 0)
    relay = SlowRelay()
    port = relay.open(0)
    relay.serve(target.sockets[0].getsockname()[1])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    await writer.wait_closed()
    while not relay.accepted:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await relay.empty()
    relay.may_connect.set()
    await relay.connected.wait()
    received = await asyncio.wait_for(left, 10)
    relay.abort()
    target.close()
    await target.wait_closed()
    return received


def test_a_client_that_closes_during_the_relay_connect_leaks_no_socket():
    assert asyncio.run(relay_to_a_client_that_left()) == b""


async def relay_that_is_closed():
    async def hang_up(_reader, writer):
        writer.close()

    loop = asyncio.get_running_loop()
    relay = Relay()
    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        address = server.sockets[0].getsockname()
        transport, _ = await loop.create_connection(
            lambda: _Pair(relay).client, *address
        )
        return transport.is_closing(), relay.accepted, len(relay.pairs)


def test_a_client_accepted_while_the_relay_closes_is_disconnected():
    assert asyncio.run(relay_that_is_closed()) == (True, 0, 0)
