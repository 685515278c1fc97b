"""
gRPC's interoperability tests against the server of grpc-go, over both transports.

The cases and their names are those of `doc/interop-test-descriptions.md` in the
repository grpc/grpc, as far as they are about unary calls.
"""

from __future__ import annotations

import contextlib
import os

import anyio
import grpc
import pytest

from fastapi_topaz import ConnectionPool, GrpcConnector, Target
from kit.gopeer.process import Gopeer
from kit.waiting import eventually


pytestmark = [
    pytest.mark.real_clock,
    pytest.mark.uvloop,
    pytest.mark.slow,
    pytest.mark.skipif(
        "GOPEER" not in os.environ,
        reason="GOPEER does not name the server of tests/kit/gopeer: `nox -s gopeer`",
    ),
]

Code = grpc.StatusCode
SERVICE = "/grpc.testing.TestService"
EMPTY, UNARY, STREAM = (
    f"{SERVICE}/{name}" for name in ("EmptyCall", "UnaryCall", "StreamingOutputCall")
)
INITIAL = "x-grpc-test-echo-initial", "test_initial_metadata_value"
TRAILING = "x-grpc-test-echo-trailing-bin", b"\xab\xab\xab"


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number, value):
    """Return a field of a message of protobuf."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def body(size):
    """Return a response whose payload has that many zeros."""
    return field(1, field(2, bytes(size)))


def status(code, text=""):
    """Return a SimpleRequest that is answered with this status."""
    return field(7, field(1, code) + field(2, text.encode()))


@pytest.fixture(scope="module")
def server():
    with Gopeer(interop=True) as running:
        yield running


@pytest.fixture(params=["native", "grpcio"])
def transport(request):
    return request.param


@contextlib.asynccontextmanager
async def lease(server, transport):
    """Yield a lease, and check that all its calls used one connection."""
    target = Target(url=server.url, insecure=True, probe=EMPTY)
    connector = GrpcConnector(target, transport)
    pool = ConnectionPool(connector=connector, min_connections=0, max_connections=1)
    accepted = server.count("Accepted")
    async with pool:
        async with pool.acquire() as conn:
            yield conn
            assert await ask(conn, EMPTY) == b""
        assert server.count("Accepted") == accepted + 1
    await eventually(lambda: server.count("Open") == 0)


async def ask(conn, method, request=b"", metadata=(), timeout=20.0):
    return await conn.call(method, request, timeout=timeout, metadata=metadata)


async def failure(conn, method, request=b"", metadata=(), timeout=20.0):
    with pytest.raises(grpc.aio.AioRpcError) as no:
        await ask(conn, method, request, metadata, timeout)
    return no.value


async def test_empty_unary(server, transport):
    async with lease(server, transport) as conn:
        assert await ask(conn, EMPTY) == b""


@pytest.mark.parametrize("sizes", [(271_828, 314_159), (0, 0), (4_000_000, 4_000_000)])
async def test_large_unary(server, transport, sizes):
    sent, wanted = sizes
    request = field(2, wanted) + field(3, field(2, bytes(sent)))
    async with lease(server, transport) as conn:
        expected = body(wanted) if wanted else field(1, b"")
        assert await ask(conn, UNARY, request) == expected


async def test_status_code_and_message(server, transport):
    async with lease(server, transport) as conn:
        for code in Code:
            if code is Code.OK:
                continue
            error = await failure(conn, UNARY, status(code.value[0], "test status"))
            assert (error.code(), error.details()) == (code, "test status")


async def test_special_status_message(server, transport):
    text = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n"
    async with lease(server, transport) as conn:
        error = await failure(conn, UNARY, status(2, text))
        assert (error.code(), error.details()) == (Code.UNKNOWN, text)


@pytest.mark.parametrize(
    "method",
    [
        f"{SERVICE}/UnimplementedCall",
        "/grpc.testing.UnimplementedService/UnimplementedCall",
        "/grpc.testing.NoService/Call",
    ],
)
async def test_unimplemented_method_and_service(server, transport, method):
    async with lease(server, transport) as conn:
        error = await failure(conn, method)
        assert error.code() is Code.UNIMPLEMENTED


async def test_custom_metadata(server, transport):
    async with lease(server, transport) as conn:
        assert await ask(conn, UNARY, field(2, 1), [INITIAL, TRAILING]) == body(1)
        # Only an error shows the metadata of its response to the caller.
        error = await failure(conn, UNARY, status(13), [INITIAL, TRAILING])
        assert error.code() is Code.INTERNAL
        assert INITIAL in [*error.initial_metadata()]
        assert TRAILING in [*error.trailing_metadata()]


async def test_timeout_on_sleeping_server(server, transport):
    # The only call that sleeps may answer with several messages, but need not.
    one = field(2, field(1, 10) + field(2, 100_000))
    async with lease(server, transport) as conn:
        assert await ask(conn, STREAM, one) == body(10)
        error = await failure(conn, STREAM, one, timeout=0.001)
        assert error.code() is Code.DEADLINE_EXCEEDED


async def test_cancel_after_begin(server, transport):
    one = field(2, field(1, 10) + field(2, 500_000))
    async with lease(server, transport) as conn:

        def resets():
            return server.count("Frames", "received RST_STREAM")

        before = resets()
        with anyio.move_on_after(0.1) as scope:
            await ask(conn, STREAM, one)
        assert scope.cancelled_caught
        await eventually(lambda: resets() == before + 1)


@pytest.mark.parametrize("count", [0, 2])
async def test_a_stream_of_messages_is_no_answer_to_a_unary_call(server, count):
    # Not with grpcio: gRPC's core waits until the deadline.
    async with lease(server, "native") as conn:
        error = await failure(conn, STREAM, field(2, field(1, 10)) * count)
        assert error.code() is Code.INTERNAL


async def test_many_calls_at_once(server, transport):
    async with (
        lease(server, transport) as conn,
        anyio.create_task_group() as tasks,
    ):

        async def large(number):
            size = 1 + 5000 * number
            request = field(2, size) + field(3, field(2, bytes(10_000)))
            assert await ask(conn, UNARY, request) == body(size)

        for number in range(50):
            tasks.start_soon(large, number)
