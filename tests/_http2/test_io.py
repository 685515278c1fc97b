"""The HTTP/2 client on real sockets, on asyncio, uvloop and trio."""

from __future__ import annotations

import contextlib
import gc
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref

import anyio
import anyio.to_thread
import grpc
import pytest
from h2.events import SettingsAcknowledged
from h2.settings import SettingCodes

from fastapi_topaz._http2.errors import ErrorCode
from fastapi_topaz._http2.limits import QUEUE_LIMIT
from fastapi_topaz._http2.opening import NativeOpener
from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz._rpc.statuses import Ending, ending
from fastapi_topaz._rpc.target import Target
from fastapi_topaz.exceptions import ConnectFailed, ConnectionLost
from kit.h2peer import (
    HEAD,
    METHOD,
    H2Server,
    SocketServer,
    call,
    descriptors,
    opened,
)
from kit.waiting import eventually


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]

Code = grpc.StatusCode


def silent(_server, _number, _data):
    """Answer nothing."""


@contextlib.contextmanager
def holding():
    """Yield a server that answers when told, and what tells it."""
    go = threading.Event()

    def script(server, number, data):
        go.wait(10)
        server.answer(number, data)

    with SocketServer(script) as server:
        try:
            yield server, go
        finally:
            go.set()


async def test_a_call_is_answered():
    with SocketServer() as server:
        async with opened(server) as connection:
            assert await call(connection, b"question") == b"question"
            assert connection.peer == f"ipv4:{server.url}"
            assert not connection.is_lost()
            assert "open" in repr(connection)
        assert "closed" in repr(connection)


@pytest.mark.costly
async def test_many_calls_at_once_are_answered():
    with SocketServer() as server:
        async with opened(server) as connection, anyio.create_task_group() as tasks:

            async def ask(number):
                for turn in range(20):
                    question = f"{number} {turn}".encode() * (1 + number * 10)
                    assert await call(connection, question) == question

            for number in range(50):
                tasks.start_soon(ask, number)


async def test_more_bytes_than_the_socket_takes_go_both_ways():
    with SocketServer() as server:
        async with opened(server) as connection, anyio.create_task_group() as tasks:

            async def ask(number):
                question = bytes([number]) * 2_000_000
                assert await call(connection, question, 60) == question

            for number in range(4):
                tasks.start_soon(ask, number)


LARGE = 20_000_000


class SlowReader:
    """A server that allows large requests, and reads a part of one when told."""

    def __init__(self):
        self.listener = socket.socket()
        # A small buffer, inherited by the socket of the connection.
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.url = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.sock = None

    async def accept(self):
        """Take the connection and exchange SETTINGS."""
        self.sock, _ = await anyio.to_thread.run_sync(self.listener.accept)
        server = H2Server({SettingCodes.INITIAL_WINDOW_SIZE: 2**30})
        server.h2.increment_flow_control_window(2**30)
        self.sock.sendall(server.output())
        while not any(isinstance(e, SettingsAcknowledged) for e in server.events):
            data = await anyio.to_thread.run_sync(self.sock.recv, 65_536)
            server.receive(data)
            self.sock.sendall(server.output())

    def read(self):
        """Read a part, if there is any."""
        with contextlib.suppress(BlockingIOError):
            self.sock.recv(65_536, socket.MSG_DONTWAIT)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()
        if self.sock is not None:
            self.sock.close()


@contextlib.asynccontextmanager
async def blocked_by(server):
    """Yield a connection to *server* whose socket is full of a request."""
    target = Target(url=server.url, insecure=True, max_message_bytes=LARGE)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.accept)
        async with opened(target) as connection:

            async def ask():
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await call(connection, b"q" * LARGE, timeout=60)

            tasks.start_soon(ask)
            await eventually(lambda: connection._wire._unsent is not None)
            yield connection
            tasks.cancel_scope.cancel()


async def test_a_server_that_reads_slowly_is_not_silent():
    # Otherwise a large request over a slow link ends after two seconds, because the
    # PING waits behind it.
    with SlowReader() as server:
        async with blocked_by(server) as connection:
            core = connection._core
            for _ in range(3):
                core._heard = False

                def progress():
                    server.read()
                    return core._heard

                await eventually(progress)


@pytest.mark.skipif(
    not hasattr(socket, "TCP_NOTSENT_LOWAT"),
    reason="the system does not limit what it buffers",
)
async def test_the_system_buffers_little_of_a_large_request():
    # A PING waits behind what it has buffered.
    with SlowReader() as server:
        async with blocked_by(server) as connection:
            (stream,) = connection._core.streams.values()
            taken = LARGE - len(stream.unsent)
            # The core and the wire each hold `QUEUE_LIMIT` bytes of it.
            assert taken < 2 * QUEUE_LIMIT + 500_000


async def test_a_server_that_stops_reading_a_request_is_found():
    with SlowReader() as server:
        async with blocked_by(server) as connection:
            core = connection._core
            # The timer is armed for the usual silence.
            core._silence = core._ping_timeout = 0.2
            core.next_deadline = 0.0
            connection._arm()
            await eventually(connection.is_lost)
            assert "did not answer a PING" in core.failure


async def test_a_call_ends_at_its_deadline_and_a_cancelled_one_at_once():
    with SocketServer(silent) as server:
        async with opened(server) as connection:
            with pytest.raises(grpc.aio.AioRpcError) as no:
                await call(connection, timeout=0.05)
            assert ending(no.value) is Ending.TIMED_OUT
            assert connection.judge(no.value) is Verdict.SILENT
            with anyio.move_on_after(0.05) as scope:
                await call(connection)
            assert scope.cancelled_caught
            # Both were reset, and the connection is well.
            server.script = lambda server, number, data: server.answer(number, data)
            assert await call(connection, b"x") == b"x"
            resets = [e for e in server.servers[0].events if hasattr(e, "error_code")]
            assert [e.error_code for e in resets] == [ErrorCode.CANCEL] * 2


async def test_a_call_in_a_cancelled_scope_ends():
    with SocketServer(silent) as server:
        async with opened(server) as connection:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await call(connection, b"never")
            assert scope.cancelled_caught
            assert not connection._core.has_calls


async def test_deadlines_of_many_calls_are_kept_in_any_order():
    with SocketServer(silent) as server:
        async with opened(server) as connection, anyio.create_task_group() as tasks:
            ended = []

            async def ask(timeout):
                began = anyio.current_time()
                with pytest.raises(grpc.aio.AioRpcError) as no:
                    await call(connection, timeout=timeout)
                assert no.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                # Not their order: on a busy machine two end in one turn of the loop.
                assert anyio.current_time() - began >= timeout - 0.001
                ended.append(timeout)

            for timeout in (0.3, 0.1, 0.5, 0.2, 0.4):
                tasks.start_soon(ask, timeout)
        assert len(ended) == 5


async def test_the_end_of_the_socket_is_a_loss_at_once():
    with SocketServer(silent) as server:
        async with opened(server) as connection:
            server.servers[0].sock.shutdown(socket.SHUT_RDWR)
            await eventually(connection.is_lost)


async def test_calls_end_with_the_socket():
    def hang_up(server, _number, _data):
        server.sock.shutdown(socket.SHUT_RDWR)

    with SocketServer(hang_up) as server:
        async with opened(server) as connection:
            with pytest.raises(grpc.aio.AioRpcError) as no:
                await call(connection, timeout=None)
            assert ending(no.value) is Ending.CUT_OFF
            assert connection.judge(no.value) is Verdict.BROKEN


async def test_goaway_is_seen_at_once_and_running_calls_end_well():
    def leave(server, number, data):
        server.answer(number, data)
        server.sock.sendall(server.output() + bytes.fromhex("000008 07 00 00000000"))
        server.sock.sendall(number.to_bytes(4) + bytes(4))

    with SocketServer(leave) as server:
        async with opened(server) as connection:
            assert await call(connection, b"x") == b"x"
            await eventually(connection.is_lost)


async def test_what_came_before_the_end_counts_if_a_write_fails_first():
    go, gone = threading.Event(), threading.Event()

    def answer_and_reset(server, number, data):
        server.answer(number, data)
        if server is not accepting.servers[0]:
            return
        go.wait(10)
        goaway = bytes.fromhex("000008 07 00 00000000") + number.to_bytes(4) + bytes(4)
        server.sock.sendall(server.output() + goaway)
        linger = struct.pack("ii", 1, 0)
        server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        server.sock.close()
        gone.set()

    with SocketServer(answer_and_reset) as accepting:
        async with opened(accepting) as connection:
            answers = []

            async def ask(question):
                answers.append(await call(connection, question))

            async def block_until_gone():
                go.set()
                assert gone.wait(10)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask, b"first")
                await eventually(lambda: accepting.servers[0].complete)
                tasks.start_soon(ask, b"second")
                # After the second call has begun, and before it is written.
                tasks.start_soon(block_until_gone)
        # The answer counts. The other call was not processed, and was sent again.
        assert sorted(answers) == [b"first", b"second"]
        assert accepting.accepted == 2


async def test_close_ends_calls_as_lost():
    with SocketServer(silent) as server:
        async with opened(server) as connection:
            async with anyio.create_task_group() as tasks:

                async def ask():
                    with pytest.raises(ConnectionLost):
                        await call(connection)

                tasks.start_soon(ask)
                await eventually(lambda: server.servers[0].complete)
                await connection.close(0.0)
            with pytest.raises(ConnectionLost):
                await call(connection)
            assert connection.is_lost()


async def test_close_lets_calls_end_in_their_grace():
    with holding() as (server, go):
        async with opened(server) as connection, anyio.create_task_group() as tasks:
            answers = []

            async def ask():
                answers.append(await call(connection, b"x"))

            tasks.start_soon(ask)
            await eventually(lambda: server.servers[0].complete)
            tasks.start_soon(connection.close, 10.0)
            await eventually(lambda: connection._closed)
            with pytest.raises(ConnectionLost):
                await call(connection)
            go.set()
        assert answers == [b"x"]


async def test_a_peer_that_reads_nothing_delays_no_close():
    ready = bytes.fromhex("000000040000000000 000000040100000000 000004 08 00 00000000")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"127.0.0.1:{listener.getsockname()[1]}"
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:

                def accept():
                    sock, _ = listener.accept()
                    sock.sendall(ready + (2**30).to_bytes(4))
                    return sock

                opening = opened(Target(url=url, insecure=True))
                held = []

                async def hold():
                    held.append(await anyio.to_thread.run_sync(accept))

                tasks.start_soon(hold)
                async with opening as connection:

                    async def ask():
                        with pytest.raises((ConnectionLost, grpc.aio.AioRpcError)):
                            await call(connection, b"q" * 65_000, 60)

                    async with anyio.create_task_group() as callers:
                        for _ in range(200):
                            callers.start_soon(ask)
                        await eventually(lambda: connection._wire._unsent is not None)
                        await connection.close(0.0)
            # After the task that holds the socket: it may run later than the close.
            held[0].close()


async def test_probes_take_any_status_of_the_service():
    def no(server, number, _data):
        server.h2.send_headers(number, [*HEAD, ("grpc-status", "16")], end_stream=True)

    with SocketServer(no) as server:
        async with opened(server) as connection:
            await connection.probe(5.0)
            await connection.greet(5.0)


async def test_a_server_without_the_probe_is_refused_at_the_first_one():
    def unknown(server, number, _data):
        server.h2.send_headers(number, [*HEAD, ("grpc-status", "12")], end_stream=True)

    with SocketServer(unknown) as server:
        async with opened(server) as connection:
            await connection.probe(5.0)
            with pytest.raises(ConnectFailed, match=r"does not serve grpc\.health"):
                await connection.greet(5.0)


async def test_a_page_of_a_proxy_is_no_answer_to_a_probe():
    def page(server, number, _data):
        server.h2.send_headers(number, [(":status", "502")], end_stream=True)

    with SocketServer(page) as server:
        async with opened(server) as connection:
            with pytest.raises(
                grpc.aio.AioRpcError, match="without a gRPC status"
            ) as no:
                await connection.probe(5.0)
            assert connection.judge(no.value) is Verdict.REFUSED


async def test_a_frozen_server_is_found_by_a_ping():
    with SocketServer() as server:
        code = (
            "import socket, sys, time\n"
            "s = socket.create_server(('127.0.0.1', 0))\n"
            "print(s.getsockname()[1], flush=True)\n"
            "c, _ = s.accept()\n"
            "c.sendall(bytes.fromhex('000000040000000000000000040100000000'))\n"
            "while c.recv(65536): pass\n"
        )
        frozen = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
        )
        with frozen:
            try:
                url = f"127.0.0.1:{frozen.stdout.readline().strip()}"
                async with opened(Target(url=url, insecure=True)) as connection:
                    connection._core._ping_timeout = 0.2
                    frozen.send_signal(signal.SIGSTOP)
                    with pytest.raises(grpc.aio.AioRpcError):
                        await call(connection, timeout=0.1)
                    assert not connection.is_lost()
                    await eventually(connection.is_lost)
                    assert "PING" in connection._core.failure
            finally:
                frozen.kill()
        assert server.accepted == 0


async def test_an_error_keeps_neither_its_call_nor_its_connection():
    with SocketServer(silent) as server:
        gc.collect()
        gc.disable()
        try:
            async with opened(server) as connection:
                with pytest.raises(grpc.aio.AioRpcError) as no:
                    await call(connection, timeout=0.01)
                stream = weakref.ref(no.value)
                del no
                await anyio.lowlevel.checkpoint()
                assert stream() is None
        finally:
            gc.enable()


async def test_no_thread_is_left_and_no_descriptor():
    with SocketServer() as server:
        async with opened(server) as connection:
            await call(connection)
        before = descriptors()
        names = {thread.name for thread in threading.enumerate()}
        for _ in range(5):
            async with opened(server) as connection:
                await call(connection)
        own = {thread.name for thread in threading.enumerate()} - names
        assert not [name for name in own if "_serve" not in name]
        # The server keeps its own sockets until its end.
        assert descriptors() <= before + 5


async def test_a_closed_loop_is_no_trouble():
    with SocketServer() as server:
        connection = await NativeOpener(Target(url=server.url, insecure=True)).open(5.0)
        connection.abandon()
        connection.abandon()
        assert connection.is_lost()
        with pytest.raises(ConnectionLost):
            await connection.call(METHOD, b"", timeout=1.0, metadata=())
        await connection.close(0.0)


@pytest.mark.parametrize("anyio_backend", ["trio"], indirect=True)
async def test_a_call_without_the_task_of_its_connection_is_an_error():
    with SocketServer() as server:
        target = Target(url=server.url, insecure=True)
        connection = await NativeOpener(target).open(5.0)
        with pytest.raises(RuntimeError, match="while its run"):
            await call(connection)
        await connection.close(0.0)


@pytest.mark.parametrize("anyio_backend", ["trio"], indirect=True)
async def test_a_call_is_lost_if_the_task_of_its_connection_is_cancelled():
    # The pool cancels it when it closes. The server may have processed the call.
    with SocketServer(silent) as server:
        target = Target(url=server.url, insecure=True)
        connection = await NativeOpener(target).open(5.0)
        async with anyio.create_task_group() as tasks:

            async def ask():
                with pytest.raises(ConnectionLost):
                    await call(connection)

            async with anyio.create_task_group() as of_the_pool:
                of_the_pool.start_soon(connection.run)
                tasks.start_soon(ask)
                await eventually(lambda: server.servers and server.servers[0].complete)
                of_the_pool.cancel_scope.cancel()
        assert not connection._wire.is_open
