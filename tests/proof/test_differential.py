"""
The native transport against the library `h2` as its server, over a real socket.

Each example draws calls, and how each of them ends. The server answers in frames of
random sizes, mixes the frames of its answers, and cuts its bytes at random places. The
client reads a random number of bytes at a time. The end of each call is then compared
with what was sent. `--hypothesis-profile=deep` runs a hundred times as many examples.
"""

from __future__ import annotations

import base64
import random
import select
import socket
import struct
import threading
from typing import Any

import anyio
import attrs
import grpc
import h2.events
import h2.exceptions
import pytest
from h2.settings import SettingCodes
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fastapi_topaz._http2 import rpc_connection
from fastapi_topaz._rpc.statuses import Ending, ending
from fastapi_topaz._rpc.target import Target
from kit.faultkit.tls import Certificate, tls
from kit.fuzzing import examples
from kit.h2peer import HEAD, H2Server, SocketServer, call, message, opened
from kit.waiting import eventually


pytestmark = pytest.mark.real_clock

Code = grpc.StatusCode
PATIENCE = 30.0
CA = Certificate("ca", ca=True)
TLS = tls(Certificate(issuer=CA))

OF_RESET = {
    1: Code.INTERNAL,
    2: Code.INTERNAL,
    8: Code.CANCELLED,
    11: Code.RESOURCE_EXHAUSTED,
    12: Code.PERMISSION_DENIED,
    99: Code.UNKNOWN,
}
OF_HTTP = {
    200: Code.UNKNOWN,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.UNIMPLEMENTED,
    502: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    599: Code.UNKNOWN,
}


# -- what is drawn ---------------------------------------------------------------------

sizes = st.sampled_from([0, 1, 5, 100, 16_384, 20_000, 70_000])
values = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20)
pairs = st.lists(
    st.tuples(st.sampled_from(["x-a", "x-b.c", "x_d", "authorization"]), values)
    | st.tuples(st.sampled_from(["x-a-bin", "x-b-bin"]), st.binary(max_size=20)),
    max_size=3,
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@attrs.frozen
class Plan:
    """One call, and what the server does with it."""

    end: str
    request: int  # bytes
    metadata: list[tuple[str, str | bytes]]
    body: int  # bytes
    initial: list[tuple[str, str | bytes]]
    trailing: list[tuple[str, str | bytes]]
    informational: list[int]
    length: bool  # whether content-length is sent
    code: int  # the grpc-status, if it is an error
    text: str
    reset: int
    http: int
    frame: int  # bytes of a frame at most
    padding: int | None
    continuation: int | None  # bytes of a header block in one frame


plans = st.builds(
    Plan,
    end=st.sampled_from(
        ["answer"] * 6
        + ["status"] * 2
        + ["trailers", "reset", "refuse", "http", "cancel", "deadline"]
    ),
    request=sizes,
    metadata=pairs,
    body=sizes,
    initial=pairs,
    trailing=pairs,
    informational=st.lists(st.sampled_from([100, 103]), max_size=2),
    length=st.booleans(),
    code=st.integers(1, 16),
    text=texts,
    reset=st.sampled_from(sorted(OF_RESET)),
    http=st.sampled_from(sorted(OF_HTTP)),
    frame=st.sampled_from([300, 1000, 16_384]),
    padding=st.none() | st.integers(0, 255),
    continuation=st.none() | st.integers(20, 60),
)


@attrs.frozen
class Example:
    """One connection: its calls, and the habits of the server."""

    plans: list[Plan]
    seed: int
    settings: dict[int, int]
    is_tls: bool
    leaves: int | None  # after how many requests it sends GOAWAY
    noise: bool  # whether it sends PING and SETTINGS at any time


any_example = st.builds(
    Example,
    plans=st.lists(plans, min_size=2, max_size=12),
    seed=st.integers(0, 2**32),
    settings=st.fixed_dictionaries(
        {},
        optional={
            # A smaller one takes seconds: each part of a request waits for the server.
            SettingCodes.INITIAL_WINDOW_SIZE: st.sampled_from([300, 65_535, 2**20]),
            SettingCodes.MAX_FRAME_SIZE: st.sampled_from([2**14, 2**24 - 1]),
            SettingCodes.MAX_CONCURRENT_STREAMS: st.sampled_from([1, 2, 5, 100]),
            SettingCodes.HEADER_TABLE_SIZE: st.sampled_from([0, 100, 65_536]),
        },
    ),
    is_tls=st.booleans(),
    leaves=st.none() | st.integers(1, 4),
    noise=st.booleans(),
)


def content(number, size):
    """Return bytes that no other call has, and whose order matters."""
    unit = struct.pack(">HL", number, size)
    return (unit + bytes(range(251))) * (size // 251 + 1) if size else b""


def request_of(number, plan):
    return content(number, plan.request)[: plan.request]


def body_of(number, plan):
    return content(~number & 0xFFFF, plan.body)[: plan.body]


# -- the server ------------------------------------------------------------------------


def encoded(pairs, rng):
    """Return metadata as it is in a header block (gRPC over HTTP/2, "Requests")."""
    fields = []
    for key, value in pairs:
        text = value
        if isinstance(value, bytes):
            text = base64.b64encode(value).decode()
            text = rng.choice([text, text.rstrip("=")])
        fields.append((key, text))
    return fields


def percent_encoded(text):
    """Return a `grpc-message`. Spaces at its ends would be stripped by `h2`."""
    return "".join(
        chr(byte) if 0x21 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}"
        for byte in text.encode()
    )


class Random(SocketServer):
    """Answers the calls of an `Example`, in random order and in random pieces."""

    def __init__(self, example):
        super().__init__(
            tls=TLS if example.is_tls else None, settings=example.settings or None
        )
        self.example = example
        self.received = {}
        self.errors = []
        self.left = threading.Event()
        self.is_over = False

    def __exit__(self, *error):
        self.is_over = True
        super().__exit__(*error)

    def _run(self, sock):
        try:
            self._serve_calls(sock)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001  (the test fails with it)
            # Once its TLS is shut down, a socket returns the bytes of TLS itself.
            if not self.is_over:
                self.errors.append(error)

    def _serve_calls(self, sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = H2Server(self.settings)
        server.changes = 0
        self.servers.append(server)
        rng = random.Random(self.example.seed + len(self.servers))
        answers = []  # generators; each step sends a frame
        seen, last = 0, 2**31
        while not _is_ended(server):
            _open_windows(server)
            self._send(sock, server.output(), rng)
            if not answers or (rng.random() < 0.5 and _is_readable(sock)):
                data = sock.recv(rng.choice([1, 10, 1000, 65_536]))
                if not data:
                    return
                server.receive(data)
                while seen < len(server.complete):
                    stream_id = server.complete[seen]
                    seen += 1
                    if stream_id <= last:
                        answers.append(self._answer(server, stream_id, rng))
                    if seen == self.example.leaves and not self.left.is_set():
                        self.left.set()
                        last = max(server.complete[:seen])
                        self._send(sock, server.output() + _goaway(last), rng)
            elif not _step(answers, rng):
                # All answers wait for a window.
                data = sock.recv(65_536)
                if not data:
                    return
                server.receive(data)
                continue
            if self.example.noise and rng.random() < 0.1 and not _is_ended(server):
                _make_noise(server, rng)

    def _send(self, sock, data, rng):
        while data:
            size = rng.choice([1, 2, 9, 10, 100, 5000, 100_000])
            sock.sendall(data[:size])
            data = data[size:]

    def _answer(self, server, stream_id, rng):
        """Yield after each frame: True, or False if a window is too small."""
        headers = server.headers[stream_id]
        (number,) = (int(value) for key, value in headers if key == "x-number")
        plan = self.example.plans[number]
        assert number not in self.received, "a call was made twice"
        self.received[number] = headers, server.requests[stream_id]
        if plan.end in {"cancel", "deadline"}:
            return
        # A server refuses a call before it has begun a response.
        if plan.end == "refuse" or (plan.end == "reset" and rng.random() < 0.5):
            server.h2.reset_stream(stream_id, _reset_of(plan))
            return
        for status in plan.informational:
            server.h2.send_headers(stream_id, [(":status", str(status)), ("x-i", "1")])
            yield True
        yield from _respond(server, stream_id, number, plan, rng)


def _goaway(last):
    """Return the frame. It is made by hand: `h2` itself cannot go on after GOAWAY."""
    return bytes.fromhex("000008 07 00 00000000") + last.to_bytes(4) + bytes(4)


def _reset_of(plan):
    return plan.reset if plan.end == "reset" else 7


def _respond(server, stream_id, number, plan, rng):
    status = [
        ("grpc-status", str(plan.code)),
        ("grpc-message", percent_encoded(plan.text)),
    ]
    initial = encoded(plan.initial, rng)
    trailing = encoded(plan.trailing, rng)
    if plan.end == "trailers":
        _send_headers(server, stream_id, plan, [*HEAD, *status, *trailing], end=True)
        return
    data = message(body_of(number, plan))
    head = [*HEAD, *initial]
    tail = [("grpc-status", "0"), *trailing]
    if plan.end == "status":
        tail = [*status, *trailing]
    elif plan.end == "http":
        head = [(":status", str(plan.http)), ("content-type", "text/html")]
    elif plan.length:
        head.append(("content-length", str(len(data))))
    _send_headers(server, stream_id, plan, head)
    yield True
    if plan.end == "reset":
        data = data[: rng.randrange(len(data) + 1)]
    yield from _send_data(server, stream_id, plan, data)
    if plan.end == "reset":
        server.h2.reset_stream(stream_id, _reset_of(plan))
    else:
        _send_headers(server, stream_id, plan, tail, end=True)


def _send_headers(server, stream_id, plan, headers, *, end=False):
    stream = server.h2._get_stream_by_id(stream_id)
    usual = stream.max_outbound_frame_size
    if plan.continuation is not None:
        stream.max_outbound_frame_size = plan.continuation
    server.h2.send_headers(stream_id, headers, end_stream=end)
    stream.max_outbound_frame_size = usual


def _send_data(server, stream_id, plan, data):
    pad = 0 if plan.padding is None else plan.padding + 1
    while data:
        window = server.h2.local_flow_control_window(stream_id)
        size = min(len(data), window - pad, plan.frame - pad)
        if size <= 0:
            yield False
            continue
        server.h2.send_data(stream_id, data[:size], pad_length=plan.padding)
        data = data[size:]
        yield True


def _step(answers, rng):
    """Send a frame of an answer; return whether there was one to send."""
    for answer in rng.sample(answers, len(answers)):
        try:
            if next(answer):
                return True
        except (StopIteration, h2.exceptions.StreamClosedError):
            answers.remove(answer)
            return True
    return False


def _open_windows(server):
    """Give streams a window where `h2` does not, after it changed the initial one."""
    for stream_id in server.requests.keys() - set(server.complete):
        stream = server.h2.streams.get(stream_id)
        if stream is not None and stream.open:
            window = stream.inbound_flow_control_window
            if window < 1:
                server.h2.increment_flow_control_window(1000 - window, stream_id)


def _is_readable(sock):
    if hasattr(sock, "pending") and sock.pending():
        return True
    return bool(select.select([sock], [], [], 0)[0])


def _is_ended(server):
    """Return whether the client has closed the connection."""
    return any(isinstance(e, h2.events.ConnectionTerminated) for e in server.events)


def _make_noise(server, rng):
    known = sum(isinstance(e, h2.events.SettingsAcknowledged) for e in server.events)
    if rng.random() < 0.5:
        server.h2.ping(rng.randbytes(8))
    elif known == server.changes + 1:
        # One at a time: with the first ACK, `h2` applies all that it has sent.
        server.changes += 1
        changes = {SettingCodes.INITIAL_WINDOW_SIZE: rng.choice([300, 65_535, 2**20])}
        server.h2.update_settings(rng.choice([changes, {0x77: rng.randrange(2**32)}]))


# -- the client ------------------------------------------------------------------------


class AnySize:
    """How many bytes the client reads: another number each time."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def __index__(self):
        return self.rng.choice([1, 3, 9, 10, 100, 5000, 65_536])


async def ends(connection, number, plan, server):
    """Make one call, and return how it ended."""
    metadata = [("x-number", str(number)), *plan.metadata]
    timeout = 0.02 if plan.end == "deadline" else PATIENCE
    if plan.end == "cancel":
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:

                async def cancel():
                    # Before the request is sent, or when the server has it.
                    if server.example.seed % 2:
                        await eventually(lambda: number in server.received, PATIENCE)
                    scope.cancel()

                tasks.start_soon(cancel)
                await call(connection, request_of(number, plan), timeout, metadata)
        return "cancelled"
    try:
        return await call(connection, request_of(number, plan), timeout, metadata)
    except grpc.aio.AioRpcError as error:
        return error


def assert_end(number, plan, end):
    """Compare the end of a call with what the server sent."""
    if plan.end == "answer":
        assert end == body_of(number, plan)
        return
    if plan.end == "cancel":
        assert end == "cancelled"
        return
    assert isinstance(end, grpc.aio.AioRpcError), end
    expected = {
        "status": (Code, Ending.STATUS),
        "trailers": (Code, Ending.STATUS),
        "reset": (OF_RESET[plan.reset], Ending.RESET),
        "refuse": (Code.UNAVAILABLE, Ending.REFUSED_STREAM),
        "http": (OF_HTTP[plan.http], Ending.NO_STATUS),
        "deadline": (Code.DEADLINE_EXCEEDED, Ending.TIMED_OUT),
    }[plan.end]
    code, how = expected
    assert ending(end) is how, end
    if plan.end not in {"status", "trailers"}:
        assert end.code() is code
        return
    assert end.code().value[0] == plan.code
    assert end.details() == plan.text
    assert end.trailing_metadata() == grpc.aio.Metadata(*plan.trailing)
    initial = plan.initial if plan.end == "status" else []
    assert end.initial_metadata() == grpc.aio.Metadata(*initial)


def assert_request(number, plan, headers, request):
    """Compare what the server received with what was sent."""
    assert request == message(request_of(number, plan))
    expected = [(":method", "POST"), ("te", "trailers")]
    expected += [("content-type", "application/grpc")]
    assert set(expected) <= set(headers)
    sent = [("x-number", str(number))]
    for key, value in plan.metadata:
        text = value
        if isinstance(value, bytes):
            text = base64.b64encode(value).decode().rstrip("=")
        sent.append((key, text))
    known = {key for key, _ in sent}
    assert [(key, value) for key, value in headers if key in known] == sent


def target_of(server, ca_file):
    url = f"localhost:{server.port}"
    if server.tls is None:
        return Target(url=url, insecure=True)
    return Target(url=url, cert_file_path=ca_file)


async def run(example, ca_file):
    found = {}
    with Random(example) as server:
        with anyio.fail_after(2 * PATIENCE):
            async with opened(target_of(server, ca_file)) as connection:
                # A small buffer, so that a large request is not sent at once.
                sock = connection._wire._sock
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

                async def ask(number, plan):
                    found[number] = await ends(connection, number, plan, server)

                async with anyio.create_task_group() as tasks:
                    for number, plan in enumerate(example.plans):
                        tasks.start_soon(ask, number, plan)
                assert not connection.has_calls
                # No answer has broken the connection.
                assert connection._core.failure is None or server.left.is_set()
                await eventually(lambda: connection.is_lost() == server.left.is_set())
    assert server.errors == []
    for number, plan in enumerate(example.plans):
        assert_end(number, plan, found[number])
        if number in server.received:
            assert_request(number, plan, *server.received[number])
        else:
            assert plan.end in {"cancel", "deadline"}


@pytest.fixture(scope="module")
def ca_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("differential") / "ca.pem"
    path.write_bytes(CA.pem)
    return str(path)


BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


# Without shrinking, which takes minutes: a failure may depend on when threads run.
@pytest.mark.parametrize("backend", BACKENDS)
@settings(examples(100, by_default=0.3), phases=[Phase.generate])
@given(example=any_example)
def test_any_calls_end_over_a_socket_as_the_server_says(backend, ca_file, example):
    name, options = BACKENDS[backend]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpc_connection, "_READ", AnySize(example.seed))
        anyio.run(run, example, ca_file, backend=name, backend_options=options)
