"""Which addresses are tried, in which order, and what a failure says of each."""

from __future__ import annotations

import socket
from collections import Counter

import anyio
import pytest

from fastapi_topaz._http2 import dialing, opening
from fastapi_topaz._http2.addresses import Address, parse
from fastapi_topaz._http2.dialing import FailedAddresses, Race
from fastapi_topaz._rpc.target import Target
from kit.h2peer import SocketServer, call, failure_of, opened


pytestmark = pytest.mark.real_clock


def v4(host, port=1):
    return Address(socket.AF_INET, (host, port), f"ipv4:{host}:{port}")


def v6(host, port=1):
    return Address(socket.AF_INET6, (host, port, 0, 0), f"ipv6:[{host}]:{port}")


@pytest.mark.parametrize(
    "url, authority, host, found",
    [
        ("topaz:8282", "topaz:8282", "topaz", []),
        ("topaz", "topaz:443", "topaz", []),
        ("dns:topaz:8282", "topaz:8282", "topaz", []),
        ("dns:///topaz:8282", "topaz:8282", "topaz", []),
        ("DNS:///topaz:8282", "topaz:8282", "topaz", []),
        ("10.0.0.1:80", "10.0.0.1:80", "10.0.0.1", ["ipv4:10.0.0.1:80"]),
        ("[::1]:80", "[::1]:80", "::1", ["ipv6:[::1]:80"]),
        ("::1", "[::1]:443", "::1", ["ipv6:[::1]:443"]),
        (
            "ipv4:10.0.0.1:80,10.0.0.2:81",
            "10.0.0.1:80",
            "10.0.0.1",
            ["ipv4:10.0.0.1:80", "ipv4:10.0.0.2:81"],
        ),
        (
            "ipv6:[::1]:80,[::2]:80",
            "[::1]:80",
            "::1",
            ["ipv6:[::1]:80", "ipv6:[::2]:80"],
        ),
        ("unix:/run/topaz", "localhost", "localhost", ["unix:/run/topaz"]),
        ("unix:///run/a%3Fb", "localhost", "localhost", ["unix:/run/a?b"]),
        ("unix:topaz.sock", "localhost", "localhost", ["unix:topaz.sock"]),
        ("unix-abstract:topaz", "localhost", "localhost", ["unix-abstract:topaz"]),
    ],
)
def test_a_url_leads_where_grpc_says(url, authority, host, found):
    endpoint = parse(url)
    assert (endpoint.authority, endpoint.host) == (authority, host)
    assert [address.text for address in endpoint.addresses] == found


@pytest.mark.parametrize(
    "url", ["dns://10.0.0.53/topaz:8282", "ipv4:topaz:80", ":80", "", "10.0.0.1:port"]
)
def test_a_url_that_only_grpc_can_use_is_refused(url):
    with pytest.raises(ValueError):
        parse(url)


async def test_a_name_is_resolved_to_all_its_addresses(monkeypatch):
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *_, **__: [
            (family, 1, 6, "", sockaddr)
            for family, sockaddr in (
                (socket.AF_INET6, ("::1", 80, 0, 0)),
                (socket.AF_INET, ("127.0.0.1", 80)),
                (socket.AF_INET, ("127.0.0.1", 80)),
                (socket.AF_INET, ("127.0.0.2", 80)),
            )
        ],
    )
    found = await parse("topaz:80").resolve()
    assert [address.text for address in found] == [
        *("ipv6:[::1]:80", "ipv4:127.0.0.1:80", "ipv4:127.0.0.2:80")
    ]


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


# -- the race -------------------------------------------------------------


class Network:
    """Addresses whose connects take a time each, and fail if it is negative."""

    def __init__(self, monkeypatch, **times):
        self.times = {f"1.1.1.{name[1:]}": time for name, time in times.items()}
        self.tried = []
        self.sockets = []
        monkeypatch.setattr(dialing, "connect", self.connect)

    async def connect(self, sock, address):
        host = address.sockaddr[0]
        self.tried.append(host)
        self.sockets.append(sock)
        try:
            await anyio.sleep(abs(self.times[host]))
            if self.times[host] < 0:
                raise ConnectionRefusedError
        except BaseException:
            sock.close()
            raise

    def race(self):
        return Race([v4(host) for host in self.times])

    def open(self):
        return [sock for sock in self.sockets if sock.fileno() >= 0]


def check_won(network, won, host):
    sock, address = won
    assert address == v4(host)
    assert network.open() == [sock]
    sock.close()


async def test_the_first_address_wins_if_it_connects_in_time(monkeypatch):
    network = Network(monkeypatch, _1=0.01, _2=0.01)
    check_won(network, await network.race().run(), "1.1.1.1")
    assert network.tried == ["1.1.1.1"]


async def test_the_next_address_is_tried_while_one_is_silent(monkeypatch):
    network = Network(monkeypatch, _1=60, _2=0.01, _3=0.01)
    race = network.race()
    began = anyio.current_time()
    check_won(network, await race.run(), "1.1.1.2")
    assert anyio.current_time() - began >= dialing.ATTEMPT_DELAY
    assert network.tried == ["1.1.1.1", "1.1.1.2"]
    assert race.pending == [v4("1.1.1.1")]
    # Those that are left are tried if the winner does not do.
    check_won(network, await race.run(), "1.1.1.3")


async def test_the_next_address_is_tried_at_once_if_one_fails(monkeypatch):
    network = Network(monkeypatch, _1=-0.001, _2=-0.001, _3=0.001)
    race = network.race()
    check_won(network, await race.run(), "1.1.1.3")
    assert [address for address, _ in race.failures] == [v4("1.1.1.1"), v4("1.1.1.2")]


async def test_no_address_is_left(monkeypatch):
    race = Network(monkeypatch, _1=-0.001, _2=-0.001).race()
    assert await race.run() is None
    assert len(race.failures) == 2


async def test_a_cancelled_race_leaves_no_socket(monkeypatch):
    network = Network(monkeypatch, _1=60, _2=60)
    with anyio.move_on_after(0.3):
        await network.race().run()
    assert network.open() == []
    assert network.tried == ["1.1.1.1", "1.1.1.2"]


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


def test_a_url_for_grpc_alone_names_the_other_transport():
    target = Target(url="dns://10.0.0.53/topaz:8282", insecure=True)
    with pytest.raises(ValueError, match="needs transport='grpcio'"):
        opening.NativeOpener(target)
