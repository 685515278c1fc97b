"""Which addresses are tried, in which order, and what a failure says of each."""

from __future__ import annotations

import socket
from collections import Counter

import anyio
import pytest

from fastapi_topaz._http2 import dialing, opening
from fastapi_topaz._http2.dialing import FailedAddresses, Race
from fastapi_topaz._pool.state.rotation import RESPREAD
from fastapi_topaz._rpc.target import Target
from kit.h2peer import SocketServer, call, failure_of, opened, v4, v6
from kit.waiting import eventually


pytestmark = pytest.mark.real_clock


# -- the order ------------------------------------------------------------


def test_the_order_is_random_and_the_families_take_turns():
    firsts = Counter()
    every = [v4("1.1.1.1"), v4("1.1.1.2"), v4("1.1.1.3"), v6("::1"), v6("::2")]
    for _ in range(500):
        order = FailedAddresses().order(every)
        assert sorted(order, key=every.index) == every
        families = [address.family for address in order[:4]]
        assert families[0] != families[1]
        assert families[2] != families[3]
        firsts[order[0]] += 1
    assert set(firsts) == set(every)


def test_an_address_that_failed_lately_comes_last(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(dialing, "monotonic", lambda: now[0])
    failed = FailedAddresses()
    every = [v4("1.1.1.1"), v4("1.1.1.2")]
    failed.add(every[0])
    assert all(failed.order(every)[1] == every[0] for _ in range(50))
    now[0] += dialing.FAILED_FOR
    assert any(failed.order(every)[0] == every[0] for _ in range(50))
    failed.add(every[0])
    failed.remove(every[0])
    assert any(failed.order(every)[0] == every[0] for _ in range(50))


def test_an_address_that_refused_comes_last_for_a_shorter_time(monkeypatch):
    # The pool reconnects about 2 s after a loss. By then the replica may be back.
    now = [100.0]
    monkeypatch.setattr(dialing, "monotonic", lambda: now[0])
    failed = FailedAddresses()
    every = [v4("1.1.1.1"), v4("1.1.1.2")]
    failed.add(every[0], ConnectionRefusedError())
    now[0] += dialing.REFUSED_FOR - 0.1
    assert all(failed.order(every)[1] == every[0] for _ in range(50))
    now[0] += 0.1
    assert any(failed.order(every)[0] == every[0] for _ in range(50))
    failed.add(every[0], ConnectionResetError())
    now[0] += dialing.FAILED_FOR - 0.1
    assert all(failed.order(every)[1] == every[0] for _ in range(50))


def test_the_spread_after_a_loss_meets_no_address_that_only_refused():
    earliest = RESPREAD[0] * 0.75
    assert earliest > dialing.REFUSED_FOR


def test_an_address_with_fewer_connections_comes_first():
    every = [v4("1.1.1.1"), v4("1.1.1.2"), v4("1.1.1.3")]
    first, second, third = every
    in_use = {first.text: 2, second.text: 1}
    assert all(
        FailedAddresses().order(every, in_use) == [third, second, first]
        for _ in range(50)
    )
    in_use[third.text] = 3
    assert FailedAddresses().order(every, in_use) == [second, first, third]
    equal = {address.text: 1 for address in every}
    firsts = {FailedAddresses().order(every, equal)[0] for _ in range(500)}
    assert firsts == set(every)


def test_an_address_that_works_comes_after_each_one_that_may_be_silent():
    # After half of the servers were lost without a word, none of them has a connection.
    silent = [v6(f"::{number}") for number in range(1, 5)]
    well = [v4(f"1.1.1.{number}") for number in range(1, 5)]
    in_use = {address.text: number for number, address in enumerate(well, start=1)}
    for _ in range(50):
        order = FailedAddresses().order([*silent, *well], in_use)
        assert order[1::2] == well
        assert set(order[::2]) == set(silent)


def test_a_failed_address_without_connections_comes_last_all_the_same():
    failed, every = FailedAddresses(), [v4("1.1.1.1"), v4("1.1.1.2")]
    failed.add(every[0])
    in_use = {every[1].text: 5}
    assert all(failed.order(every, in_use)[1] == every[0] for _ in range(50))


# -- the race -------------------------------------------------------------


class Network:
    """
    Addresses that take a time each until they are ready, and fail if it is negative.

    By *stage*, the time passes while a socket connects, or after that.
    """

    def __init__(self, monkeypatch, stage, **times):
        self.times = {f"1.1.1.{name[1:]}": time for name, time in times.items()}
        self.stage = stage
        self.tried = []
        self.sockets = []
        monkeypatch.setattr(dialing, "connect", self.connect)

    async def connect(self, sock, address):
        host = address.sockaddr[0]
        self.tried.append(host)
        self.sockets.append(sock)
        if self.stage == "connect":
            try:
                await self.pass_time(host)
            except BaseException:
                sock.close()
                raise

    async def greet(self, sock):
        if self.stage == "greet":
            await self.pass_time(self.tried[self.sockets.index(sock)])
        return sock

    async def pass_time(self, host):
        await anyio.sleep(abs(self.times[host]))
        if self.times[host] < 0:
            raise ConnectionRefusedError

    def race(self):
        return Race([v4(host) for host in self.times], self.greet)

    def open(self):
        return [sock for sock in self.sockets if sock.fileno() >= 0]


def check_won(network, won, host):
    sock, address = won
    assert address == v4(host)
    assert network.open() == [sock]
    sock.close()


stages = pytest.mark.parametrize("stage", ["connect", "greet"])


@stages
async def test_the_first_address_wins_if_it_connects_in_time(monkeypatch, stage):
    network = Network(monkeypatch, stage, _1=0.01, _2=0.01)
    check_won(network, await network.race().run(), "1.1.1.1")
    assert network.tried == ["1.1.1.1"]


@stages
async def test_the_next_address_is_tried_while_one_is_silent(monkeypatch, stage):
    network = Network(monkeypatch, stage, _1=60, _2=0.01, _3=0.01)
    race = network.race()
    began = anyio.current_time()
    check_won(network, await race.run(), "1.1.1.2")
    assert anyio.current_time() - began >= dialing.ATTEMPT_DELAY
    assert network.tried == ["1.1.1.1", "1.1.1.2"]
    assert race.pending == [v4("1.1.1.1")]


@stages
async def test_the_next_address_is_tried_at_once_if_one_fails(monkeypatch, stage):
    network = Network(monkeypatch, stage, _1=-0.001, _2=-0.001, _3=0.001)
    race = network.race()
    check_won(network, await race.run(), "1.1.1.3")
    assert [address for address, _ in race.failures] == [v4("1.1.1.1"), v4("1.1.1.2")]


@stages
async def test_no_address_is_left(monkeypatch, stage):
    race = Network(monkeypatch, stage, _1=-0.001, _2=-0.001).race()
    assert await race.run() is None
    assert len(race.failures) == 2


@stages
async def test_a_race_tells_which_addresses_were_too_slow(monkeypatch, stage):
    network = Network(monkeypatch, stage, _1=60, _2=0.4, _3=60)
    race = network.race()
    check_won(network, await race.run(), "1.1.1.2")
    # The third one had no 0.25 s.
    assert network.tried == ["1.1.1.1", "1.1.1.2", "1.1.1.3"]
    assert race.overtaken == {v4("1.1.1.1")}


@stages
async def test_a_cancelled_race_leaves_no_socket(monkeypatch, stage):
    network = Network(monkeypatch, stage, _1=60, _2=60)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(network.race().run)
        await eventually(lambda: network.tried == ["1.1.1.1", "1.1.1.2"])
        tasks.cancel_scope.cancel()
    assert network.open() == []


# -- real sockets ---------------------------------------------------------


def refused_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


async def test_a_port_where_nothing_listens_is_refused():
    failed = await failure_of(Target(url=f"127.0.0.1:{refused_port()}", insecure=True))
    assert failed.reason == "refused"
    assert not failed.permanent
    assert "nothing listens there" in str(failed)
    assert isinstance(failed.__cause__, ConnectionRefusedError)


async def test_each_address_of_a_list_is_tried():
    with SocketServer() as server:
        url = f"ipv4:127.0.0.1:{refused_port()},127.0.0.1:{server.port}"
        opener = opening.NativeOpener(Target(url=url, insecure=True))
        for _ in range(10):
            connection = await opener.open(5.0)
            assert connection.peer == f"ipv4:127.0.0.1:{server.port}"
            await connection.close(0.0)


async def test_connections_go_to_the_address_with_the_fewest():
    with SocketServer() as one, SocketServer() as two, SocketServer() as three:
        servers = [one, two, three]
        opener = opening.NativeOpener(
            Target(url=f"ipv4:{','.join(each.url for each in servers)}", insecure=True)
        )
        opened = [await opener.open(5.0) for _ in range(9)]
        assert Counter(each.peer for each in opened) == {
            f"ipv4:{each.url}": 3 for each in servers
        }
        first, rest = opened[0], opened[1:]
        for each in [each for each in rest if each.peer == first.peer]:
            await each.close(0.0)
        opened.append(await opener.open(5.0))
        assert opened[-1].peer == first.peer, "closed connections do not count"
        for each in opened:
            await each.close(0.0)


async def test_an_address_that_does_not_speak_http2_yields_to_another():
    with SocketServer() as server, socket.create_server(("127.0.0.1", 0)) as other:
        other.listen()
        url = f"ipv4:127.0.0.1:{other.getsockname()[1]},127.0.0.1:{server.port}"
        opener = opening.NativeOpener(Target(url=url, insecure=True))
        async with anyio.create_task_group() as tasks:

            def answer():
                for _ in range(3):
                    try:
                        sock, _ = other.accept()
                    except OSError:
                        return
                    sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    sock.close()

            tasks.start_soon(anyio.to_thread.run_sync, answer)
            for _ in range(6):
                connection = await opener.open(5.0)
                assert connection.peer == f"ipv4:127.0.0.1:{server.port}"
                await connection.close(0.0)
            other.shutdown(socket.SHUT_RDWR)


def is_last(opener, number):
    """Return whether address *number* of the target comes last now."""
    addresses = opener._endpoint.addresses
    orders = [opener._failed.order(addresses) for _ in range(50)]
    return all(order[-1] == addresses[number] for order in orders)


async def opens(opener, times, timeout=5.0):
    for _ in range(times):
        connection = await opener.open(timeout)
        await connection.close(0.0)


async def test_an_address_that_refuses_beside_one_that_connects_comes_last():
    with SocketServer() as server:
        url = f"ipv4:127.0.0.1:{refused_port()},127.0.0.1:{server.port}"
        opener = opening.NativeOpener(Target(url=url, insecure=True))
        with anyio.fail_after(20):
            while not is_last(opener, 0):
                await opens(opener, 1)


async def test_an_address_that_is_silent_beside_one_that_connects_comes_last(
    monkeypatch,
):
    connect, hidden = dialing.connect, []

    async def blackhole(sock, address):
        if address in hidden:
            try:
                await anyio.sleep_forever()
            finally:
                sock.close()
        await connect(sock, address)

    monkeypatch.setattr(dialing, "connect", blackhole)
    with SocketServer() as server:
        url = f"ipv4:127.0.0.2:{server.port},127.0.0.1:{server.port}"
        opener = opening.NativeOpener(Target(url=url, insecure=True))
        hidden.append(opener._endpoint.addresses[0])
        with anyio.fail_after(20):
            while not is_last(opener, 0):
                await opens(opener, 1)


async def test_an_address_that_accepts_and_is_silent_comes_last():
    with SocketServer() as server, socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ipv4:127.0.0.1:{silent.getsockname()[1]},{server.url}"
        opener = opening.NativeOpener(Target(url=url, insecure=True))
        for _ in range(200):  # the order is random
            await opens(opener, 1)
            if is_last(opener, 0):
                break
        assert is_last(opener, 0)
        await opens(opener, 10)


async def test_all_addresses_that_fail_are_named():
    first, second = refused_port(), refused_port()
    url = f"ipv4:127.0.0.1:{first},127.0.0.2:{second}"
    failed = await failure_of(Target(url=url, insecure=True))
    for address in (f"127.0.0.1:{first}", f"127.0.0.2:{second}"):
        assert f"ipv4:{address}" in str(failed)


async def test_a_name_that_does_not_exist_cannot_be_resolved():
    failed = await failure_of(Target(url="topaz.invalid:1", insecure=True), 30.0)
    assert failed.reason == "resolve"
    assert not failed.permanent


async def test_a_server_that_accepts_and_is_silent_times_out():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        failed = await failure_of(Target(url=f"127.0.0.1:{port}", insecure=True), 0.3)
    assert failed.reason == "timeout"
    assert f"ipv4:127.0.0.1:{port}: no answer" in str(failed)


async def test_a_server_that_accepts_and_is_silent_yields_to_another():
    with SocketServer() as server, socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ipv4:127.0.0.1:{silent.getsockname()[1]},127.0.0.1:{server.port}"
        opener = opening.NativeOpener(Target(url=url, insecure=True))
        for _ in range(6):
            with anyio.fail_after(5):
                connection = await opener.open(60.0)
            assert connection.peer == f"ipv4:127.0.0.1:{server.port}"
            await connection.close(0.0)


async def test_an_address_that_did_not_answer_a_ping_comes_last():
    with SocketServer() as server, SocketServer() as other:
        url = f"ipv4:127.0.0.1:{server.port},127.0.0.1:{other.port}"
        opener = opening.NativeOpener(Target(url=url, insecure=True))
        connection = await opener.open(5.0)
        connection._core._lose_silent()
        await connection.close(0.0)
        for _ in range(10):
            after = await opener.open(5.0)
            assert after.peer != connection.peer
            await after.close(0.0)


async def test_a_server_that_says_goaway_at_once_is_explained():
    hello = bytes.fromhex("000000040000000000 000000040100000000")
    goaway = bytes.fromhex("000008 07 00 00000000 00000000 00000000")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        async with anyio.create_task_group() as tasks:

            def answer():
                sock, _ = listener.accept()
                sock.sendall(hello + goaway)
                sock.recv(1000)
                sock.close()

            tasks.start_soon(anyio.to_thread.run_sync, answer)
            failed = await failure_of(Target(url=f"127.0.0.1:{port}", insecure=True))
    assert "as soon as it was ready (GOAWAY)" in str(failed)


SETTINGS, ACK = "000000040000000000", "000000040100000000"
GOAWAY = "00000c 07 00 00000000 00000000 00000000" + b"bye!".hex()


@pytest.mark.parametrize(
    "said, text",
    [
        (bytes.fromhex(SETTINGS + GOAWAY), "GOAWAY received; NO_ERROR: bye!"),
        (bytes.fromhex(SETTINGS + ACK + GOAWAY), "GOAWAY received; NO_ERROR: bye!"),
        (b"HTTP/1.1 503 Busy\r\n\r\n", "the server speaks HTTP/1 and not HTTP/2"),
    ],
    ids=["GOAWAY before the ACK", "GOAWAY", "HTTP/1"],
)
@pytest.mark.parametrize("reset", [False, True])
async def test_what_a_server_says_before_it_closes_is_the_reason(said, text, reset):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        async with anyio.create_task_group() as tasks:

            def answer():
                sock, _ = listener.accept()
                if not reset:
                    sock.recv(1000)  # otherwise the close resets the connection
                sock.sendall(said)
                sock.close()

            tasks.start_soon(anyio.to_thread.run_sync, answer)
            failed = await failure_of(Target(url=f"127.0.0.1:{port}", insecure=True))
    assert text in str(failed)


async def test_a_unix_socket_is_reached(tmp_path):
    path = tmp_path / "socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    with SocketServer(listener=listener) as server:
        async with opened(Target(url=f"unix:{path}", insecure=True)) as connection:
            assert await call(connection, b"x") == b"x"
            assert connection.peer == f"unix:{path}"
        assert (":authority", "localhost") in server.servers[0].headers[1]
    failed = await failure_of(Target(url=f"unix:{path}.no", insecure=True))
    assert failed.reason == "refused"


async def test_an_ipv6_address_is_reached():
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
    with SocketServer(listener=listener) as server:
        url = f"[::1]:{server.port}"
        async with opened(Target(url=url, insecure=True)) as connection:
            assert await call(connection, b"x") == b"x"
            assert connection.peer == f"ipv6:{url}"
        assert (":authority", url) in server.servers[0].headers[1]


async def test_localhost_is_reached_over_ipv6_or_ipv4():
    with SocketServer() as server:
        target = Target(url=f"localhost:{server.port}", insecure=True)
        async with opened(target) as connection:
            assert await call(connection, b"x") == b"x"
