"""
gRPC's negative tests of HTTP/2, with a server that does what each of them says.

The names and the sizes are those of `doc/negative-http2-interop-test-descriptions.md`
in the repository grpc/grpc. There, the server is written with another library.
"""

from __future__ import annotations

import socket
import threading

import anyio
import grpc
import h2.events
import pytest
from h2.settings import SettingCodes

from fastapi_topaz import ConnectionPool, GrpcConnector, Target
from fastapi_topaz._http2.errors import ErrorCode
from fastapi_topaz._rpc.statuses import Ending, ending
from kit.h2peer import HEAD, METHOD, TAIL, SocketServer, call, message, opened


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]

REQUEST, ANSWER = b"q" * 271_828, b"a" * 314_159
PROBE = "/test.Service/Probe"


def is_probe(server, number):
    return dict(server.headers[number])[":path"] == PROBE


def goaway(server, last):
    """Send GOAWAY by hand: the library `h2` cannot go on after its own."""
    frame = bytes.fromhex("000008 07 00 00000000") + last.to_bytes(4) + bytes(4)
    server.sock.sendall(server.output() + frame)


def pool_to(server):
    target = Target(url=server.url, insecure=True, probe=PROBE)
    connector = GrpcConnector(target, transport="native")
    return ConnectionPool(
        connector=connector,
        min_connections=0,
        max_connections=1,
        streams_per_connection=50,
    )


async def asked(pool, request=REQUEST):
    async with pool.acquire() as conn:
        return await conn.call(METHOD, request, timeout=20)


# -- goaway ----------------------------------------------------------------------------


async def test_goaway():
    def leave(server, number, _data):
        # The rest of the answer comes after GOAWAY, as the description wants it.
        server.h2.send_headers(number, HEAD)
        server.h2.send_data(number, message(ANSWER)[:1000])
        if not is_probe(server, number) and not server.left:
            server.left = True
            goaway(server, number)
        server._unsent[number] = message(ANSWER)[1000:], None, 16_384, TAIL
        server.pump()

    with SocketServer(leave) as server:
        async with pool_to(server) as pool:
            for accepted in (1, 2, 3):
                assert await asked(pool) == ANSWER
                assert server.accepted == accepted


# -- rst_after_header, rst_during_data, rst_after_data ---------------------------------


def reset_after(part, code):
    """Return a script that sends *part* of the answer's bytes, and resets it."""

    def script(server, number, _data):
        if is_probe(server, number):
            server.answer(number, b"")
            return
        server.h2.send_headers(number, HEAD)
        data = message(ANSWER)
        for at in range(0, int(part * len(data)), 16_384):
            server.h2.send_data(number, data[at : at + 16_384])
        server.h2.reset_stream(number, code)

    return script


@pytest.mark.parametrize("code", [ErrorCode.NO_ERROR, ErrorCode.INTERNAL_ERROR])
@pytest.mark.parametrize(
    "part",
    [
        pytest.param(0, id="rst_after_header"),
        pytest.param(0.5, id="rst_during_data"),
        # All data, but no trailers: a unary call has not ended well.
        pytest.param(1, id="rst_after_data"),
    ],
)
async def test_rst(part, code):
    with SocketServer(reset_after(part, code)) as server:
        async with pool_to(server) as pool:
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError) as no:
                    await asked(pool)
                assert ending(no.value) is Ending.RESET
                assert no.value.code() is grpc.StatusCode.INTERNAL
            # A reset stream leaves the connection as it is.
            assert server.accepted == 1


# -- ping ------------------------------------------------------------------------------


async def test_ping():
    def ping_between(server, number, _data):
        def ping():
            server.h2.ping(b"%08d" % server.sent_pings)
            server.sent_pings += 1

        server.sent_pings = getattr(server, "sent_pings", 0)
        ping()
        server.h2.send_headers(number, HEAD)
        ping()
        data = message(ANSWER)
        for at in range(0, len(data), 16_384):
            server.h2.send_data(number, data[at : at + 16_384])
            ping()
        server.h2.send_headers(number, TAIL, end_stream=True)
        ping()

    with SocketServer(ping_between) as server:
        async with opened(server) as connection:
            for _ in range(3):
                assert await call(connection, REQUEST, 20) == ANSWER
            # Its request comes after all the answers to PING.
            assert await call(connection, b"", 20) == ANSWER
        (peer,) = server.servers
        acks = [e for e in peer.events if isinstance(e, h2.events.PingAckReceived)]
        expected = [b"%08d" % number for number in range(peer.sent_pings)]
        seen = [e.ping_data for e in acks]
        assert seen == expected[: len(seen)]
        assert len(seen) >= 3 * len(expected) // 4


# -- max_streams -----------------------------------------------------------------------


async def test_max_streams():
    most = []

    def count(server, number, _data):
        most.append(server.h2.open_inbound_streams)
        server.answer(number, ANSWER)

    with SocketServer(
        count, settings={SettingCodes.MAX_CONCURRENT_STREAMS: 1}
    ) as server:
        async with pool_to(server) as pool:
            assert await asked(pool) == ANSWER
            async with anyio.create_task_group() as tasks:
                for _ in range(15):
                    tasks.start_soon(asked, pool)
        assert server.accepted == 1
    # One is the probe. A stream whose answer waits for a window is open, too.
    assert len(most) == 17
    assert max(most) == 1


async def test_max_streams_without_a_pool():
    # As `grpcio` does it: calls above the limit wait on the connection itself.
    with SocketServer(settings={SettingCodes.MAX_CONCURRENT_STREAMS: 1}) as server:
        async with opened(server) as connection, anyio.create_task_group() as tasks:

            async def ask(number):
                question = bytes([number]) * 20_000
                assert await call(connection, question, 20) == question

            for number in range(15):
                tasks.start_soon(ask, number)


# -- data_frame_padding, no_df_padding_sanity ------------------------------------------


@pytest.mark.costly
@pytest.mark.parametrize(
    "padding", [None, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 5)), 255]
)
async def test_data_frame_padding(padding):
    # Small frames: with 255 bytes of padding, an answer takes more than a window.
    answer = b"a" * 800_000

    def padded(server, number, _data):
        server.answer(number, answer, padding=padding, frame=300)

    with SocketServer(padded) as server:
        async with opened(server) as connection:
            for _ in range(1 if padding else 3):
                assert await call(connection, REQUEST, 60) == answer


# -- beyond the list -------------------------------------------------------------------


async def test_goaway_loses_no_call_that_was_not_processed():
    """The first connection processes five calls of 50, and no call is made twice."""
    processed = []
    lock = threading.Lock()

    def leave(server, number, data):
        if server.left:
            return
        with lock:
            if not is_probe(server, number):
                processed.append(data)
            server.answer(number, data)
        if number == 11 and server is peers.servers[0]:
            server.left = True
            goaway(server, number)
            server.sock.shutdown(socket.SHUT_WR)

    with SocketServer(leave) as peers:
        async with pool_to(peers) as pool:
            answers = []

            async def ask(number):
                answers.append(await asked(pool, b"%d" % number))

            async with anyio.create_task_group() as tasks:
                for number in range(50):
                    tasks.start_soon(ask, number)
        assert peers.accepted >= 2
    assert sorted(answers) == sorted(processed)
    assert len(set(answers)) == 50
