"""Calls that the server did not process are sent once more, on a new connection."""

from __future__ import annotations

import asyncio
import socket
import threading

import anyio
import anyio.to_thread
import grpc
import pytest
from h2.settings import SettingCodes

from fastapi_topaz._http2.addresses import parse
from fastapi_topaz._http2.opening import NativeOpener
from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz._rpc.statuses import Ending, NotSent, ending
from fastapi_topaz._rpc.target import Target
from fastapi_topaz.exceptions import ConnectionLost
from kit.backends import event_loops
from kit.h2peer import SocketServer, call, opened
from kit.waiting import eventually


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]

GOAWAY = "000008 07 00 00000000 {:08x} 00000000"


def say_goaway(server, last):
    server.sock.sendall(bytes.fromhex(GOAWAY.format(last)))


def hang_up(server):
    server.sock.shutdown(socket.SHUT_RDWR)


def reopens_at(connection, listener):
    """Let *connection* be succeeded by one to *listener*."""
    opener = connection.reopen.func.__self__
    opener._endpoint = parse(f"127.0.0.1:{listener.getsockname()[1]}")


class Leaving:
    """A script: the first *count* connections say GOAWAY and process no call."""

    def __init__(self, count):
        self.count = count
        self.left = []

    def __call__(self, server, number, data):
        if server not in self.left and len(self.left) < self.count:
            self.left.append(server)
            say_goaway(server, 0)
        if server not in self.left:
            server.answer(number, data)


async def lost(server, connection, end=hang_up):
    """Let the server end *connection* between the lease and the call."""
    await eventually(lambda: server.servers)
    end(server.servers[0])
    await eventually(connection.is_lost)


@pytest.mark.parametrize("end", [hang_up, lambda server: say_goaway(server, 0)])
async def test_a_call_after_the_end_of_its_connection_opens_another_one(end):
    with SocketServer() as server:
        async with opened(server) as connection:
            await lost(server, connection, end)
            for _ in range(5):
                assert await call(connection, b"x") == b"x"
            assert server.accepted == 2
            # The pool retires the connection after its lease.
            assert connection.is_lost()


async def test_a_call_that_meets_goaway_is_sent_once_more():
    with SocketServer(Leaving(1)) as server:
        async with opened(server) as connection:
            assert await call(connection, b"x") == b"x"
            assert server.accepted == 2
            assert connection.is_lost()


async def test_calls_that_meet_goaway_share_the_new_connection():
    with SocketServer(Leaving(1)) as server:
        async with opened(server) as connection:
            async with anyio.create_task_group() as tasks:

                async def ask(number):
                    question = str(number).encode()
                    assert await call(connection, question) == question

                for number in range(20):
                    tasks.start_soon(ask, number)
            assert server.accepted == 2


async def test_a_call_that_gets_no_stream_id_is_sent_on_a_new_connection():
    numbers = []

    def script(server, number, data):
        numbers.append(number)
        # The first call is answered with the second one, which uses the last id.
        if len(numbers) > 1 and server is peer.servers[0]:
            server.answer(numbers[0], b"first")
        if len(numbers) > 1:
            server.answer(number, data)

    settings = {SettingCodes.MAX_CONCURRENT_STREAMS: 2}
    with SocketServer(script, settings=settings) as peer:
        async with opened(peer) as connection:
            answers = []

            async def ask(request):
                answers.append(await call(connection, request))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask, b"first")
                await eventually(lambda: numbers)
                connection._core._next_id = 2**31 - 1
                # One takes the last id, and one waits for a stream until then.
                connection._core._peer.max_concurrent_streams = 1
                tasks.start_soon(ask, b"second")
                tasks.start_soon(ask, b"third")
                await eventually(lambda: len(connection._core._waiting) == 2)
                connection._core._peer.max_concurrent_streams = 2
                connection._core._resume_calls()
                connection._wire.write()
            assert sorted(answers) == [b"first", b"second", b"third"]
            assert sorted(numbers) == [1, 1, 2**31 - 1]
            assert peer.accepted == 2


async def test_a_call_is_sent_at_most_twice():
    with SocketServer(Leaving(2)) as server:
        async with opened(server) as connection:
            with pytest.raises(grpc.aio.AioRpcError) as no:
                await call(connection)
            assert ending(no.value) is Ending.GOAWAY
            assert connection.judge(no.value) is Verdict.UNAVAILABLE
            # The next call opens one more.
            assert await call(connection, b"x") == b"x"
            assert server.accepted == 3


async def test_a_call_that_the_server_may_have_processed_is_not_sent_again():
    with SocketServer(lambda server, _number, _data: hang_up(server)) as server:
        async with opened(server) as connection:
            with pytest.raises(grpc.aio.AioRpcError) as no:
                await call(connection)
            assert ending(no.value) is Ending.CUT_OFF
            assert server.accepted == 1


async def test_a_call_that_waited_for_a_stream_is_sent_on_the_new_connection():
    # It was not sent, so the end of the connection is no reason for it to fail.
    first = []

    def hang_up_once(server, number, data):
        if server is not accepting.servers[0]:
            server.answer(number, data)
            return
        first.append(data)
        go.wait(10)
        hang_up(server)

    go = threading.Event()
    with SocketServer(hang_up_once, settings={3: 1}) as accepting:
        async with opened(accepting) as connection:
            ends = {}

            async def ask(question):
                try:
                    ends[question] = await call(connection, question)
                except grpc.aio.AioRpcError as error:
                    ends[question] = ending(error)

            async with anyio.create_task_group() as tasks:
                for number in range(5):
                    tasks.start_soon(ask, str(number).encode())
                await eventually(lambda: first and len(connection._core._waiting) == 4)
                go.set()
        assert ends.pop(first[0]) is Ending.CUT_OFF
        assert ends == {question: question for question in ends}
        assert len(ends) == 4
        assert accepting.accepted == 2


async def test_without_a_new_connection_the_call_was_not_sent():
    with SocketServer() as server:
        async with opened(server) as connection:
            await lost(server, connection)
            server.listener.shutdown(socket.SHUT_RDWR)
            with pytest.raises(NotSent, match="nothing listens there") as no:
                await call(connection)
            assert connection.judge(no.value) is Verdict.UNAVAILABLE


@pytest.mark.parametrize("limit", [0.1, 60.0])
async def test_the_deadline_of_a_call_includes_the_new_connection(limit):
    with SocketServer() as server, socket.create_server(("127.0.0.1", 0)) as silent:
        async with opened(server, timeout=0.5) as connection:
            await lost(server, connection)
            reopens_at(connection, silent)
            with anyio.fail_after(20), pytest.raises(grpc.aio.AioRpcError) as no:
                await call(connection, timeout=limit)
            expected = Ending.TIMED_OUT if limit < 0.5 else Ending.NOT_SENT
            assert ending(no.value) is expected


async def test_a_probe_of_an_ended_connection_opens_no_other():
    with SocketServer() as server:
        async with opened(server) as connection:
            await lost(server, connection)
            for probe in (connection.probe, connection.greet):
                with pytest.raises(grpc.aio.AioRpcError) as no:
                    await probe(5.0)
                assert ending(no.value) is Ending.NOT_SENT
            assert server.accepted == 1


async def test_close_ends_calls_on_the_new_connection_as_lost():
    with SocketServer(lambda *_: None) as server:
        async with opened(server) as connection:
            await lost(server, connection)
            async with anyio.create_task_group() as tasks:

                async def ask():
                    with pytest.raises(ConnectionLost):
                        await call(connection)

                tasks.start_soon(ask)
                await eventually(
                    lambda: server.servers[1:] and server.servers[1].complete
                )
                await connection.close(0.0)
            with pytest.raises(ConnectionLost):
                await call(connection)
            assert server.accepted == 2


async def test_close_lets_calls_on_the_new_connection_end_in_their_grace():
    go = threading.Event()

    def answer_late(server, number, data):
        go.wait(10)
        server.answer(number, data)

    with SocketServer(answer_late) as server:
        async with opened(server) as connection, anyio.create_task_group() as tasks:
            await lost(server, connection)
            answers = []

            async def ask():
                answers.append(await call(connection, b"x"))

            tasks.start_soon(ask)
            await eventually(lambda: server.servers[1:] and server.servers[1].complete)
            tasks.start_soon(connection.close, 10.0)
            await eventually(lambda: connection._quiet is not None)
            go.set()
        assert answers == [b"x"]


async def test_close_ends_a_call_that_waits_for_a_new_connection():
    with SocketServer() as server, socket.create_server(("127.0.0.1", 0)) as silent:
        async with opened(server, timeout=60.0) as connection:
            await lost(server, connection)
            reopens_at(connection, silent)
            with anyio.fail_after(20):
                async with anyio.create_task_group() as tasks:

                    async def ask():
                        with pytest.raises(ConnectionLost):
                            await call(connection, timeout=None)

                    tasks.start_soon(ask)
                    await eventually(lambda: connection.has_calls)
                    await connection.close(0.0)


async def test_a_closed_loop_drops_the_new_connection():
    with SocketServer() as server:
        async with opened(server) as connection:
            await lost(server, connection)
            assert await call(connection, b"x") == b"x"
            connection.abandon()
            successor = connection._successors._connections[0]
            assert not successor._wire.is_open


@pytest.mark.parametrize("make_loop", list(event_loops()))
def test_a_closed_loop_closes_the_socket_of_an_unfinished_new_connection(make_loop):
    # Also if the application keeps the task of the call.
    kept = []

    async def use(server, silent):
        connection = await NativeOpener(Target(url=server.url, insecure=True)).open(5.0)
        await lost(server, connection)
        reopens_at(connection, silent)
        kept.append(asyncio.ensure_future(call(connection)))
        # A thread has accepted the new connection and got its preface.
        accepted, _ = await anyio.to_thread.run_sync(silent.accept)
        await anyio.to_thread.run_sync(accepted.recv, 1)
        return connection, accepted

    with SocketServer() as server, socket.create_server(("127.0.0.1", 0)) as silent:
        loop = make_loop()
        connection, accepted = loop.run_until_complete(use(server, silent))
        loop.close()
        connection.abandon()
        accepted.settimeout(10)
        with accepted:
            while accepted.recv(1000):
                pass
    assert not kept[0].done()
    kept[0]._log_destroy_pending = False
    kept.clear()
