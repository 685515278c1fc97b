"""Which addresses are tried, in which order, and what a failure says of each."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections import Counter

import anyio
import pytest

from fastapi_topaz._http2 import dialing, opening
from fastapi_topaz._http2.addresses import Address, parse
from fastapi_topaz._http2.dialing import FailedAddresses, Race
from fastapi_topaz._pool.state.rotation import RESPREAD
from fastapi_topaz._rpc.target import Target
from fastapi_topaz.exceptions import ConnectFailed
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


@pytest.mark.parametrize(
    "url, text",
    [
        ("http://topaz:8282", "it is not like host:port"),
        ("https://topaz", "it is not like host:port"),
        ("xds:///topaz:8282", "need transport='grpcio'"),
        ("passthrough:///topaz:8282", "need transport='grpcio'"),
        ("vsock:1:2", "need transport='grpcio'"),
        ("topaz:8282/path", "it is not like host:port"),
        ("topaz:1:2", "it is not like host:port"),
        ("[::1", "it must be like [IPv6]:port"),
        ("[::1]8282", "it must be like [IPv6]:port"),
        # The system takes these modulo 65,536.
        ("topaz:65536", "its port is above 65535"),
        ("10.0.0.1:73818", "its port is above 65535"),
        ("[::1]:99999", "its port is above 65535"),
        ("ipv4:10.0.0.1:80,10.0.0.2:65616", "its port is above 65535"),
    ],
)
def test_a_url_that_would_lead_elsewhere_is_refused(url, text):
    with pytest.raises(ValueError) as no:
        opening.NativeOpener(Target(url=url, insecure=True))
    assert text in str(no.value)


def test_the_last_port_is_a_port():
    assert parse("topaz:65535").port == "65535"
    assert parse("[::1]:65535").addresses == (v6("::1", 65535),)


@pytest.mark.parametrize(
    "url, name",
    [
        ("topaz.example.:8282", "topaz.example"),
        ("dns:///topaz.example.:8282", "topaz.example"),
        ("10.0.0.1:1", "10.0.0.1"),
    ],
)
def test_a_complete_name_needs_a_certificate_without_its_last_dot(url, name):
    assert parse(url).certificate_host == name


def test_an_ipv6_address_needs_a_certificate_without_its_scope(monkeypatch):
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *_, **__: [(socket.AF_INET6, 1, 6, "", ("fe80::1", 1, 0, 2))],
    )
    assert parse("[fe80::1%eth0]:1").certificate_host == "fe80::1"


@pytest.mark.parametrize("host", ["a..b", ".b", "x" * 64 + ".example"])
async def test_a_name_that_cannot_exist_cannot_be_resolved(host):
    failed = await failure_of(Target(url=f"{host}:1", insecure=True))
    assert failed.reason == "resolve"
    assert "the host name cannot be resolved" in str(failed)


async def test_a_name_without_an_ip_address_cannot_be_resolved(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    failed = await failure_of(Target(url="topaz:1", insecure=True))
    assert failed.reason == "resolve"


async def test_a_name_server_that_is_silent_is_named(monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer.wait(20) and [])
    failed = await failure_of(Target(url="topaz:1", insecure=True), 0.2)
    answer.set()
    assert failed.reason == "timeout"
    assert "its host name was not resolved within connection_timeout=0.2 s" in str(
        failed
    )


SILENT_NAME_SERVER = """
import asyncio, socket, sys, threading
import anyio, trio
from fastapi_topaz import ConnectionPool, AuthorizerOptions

asked = threading.Event()

def getaddrinfo(*_, **__):
    asked.set()
    threading.Event().wait()

socket.getaddrinfo = getaddrinfo

async def use():
    pool = ConnectionPool(transport="native")
    pool.configure(AuthorizerOptions(url="topaz:1", insecure=True))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.acquire().__aenter__)
        while not asked.is_set():
            await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    return pool

async def use_and_close():
    await (await use()).close()

if sys.argv[1] == "closed loop":
    # No task waits for the end of the loop, as in run_until_complete().
    loop = asyncio.new_event_loop()
    loop.create_task(use()).add_done_callback(lambda _: loop.stop())
    loop.run_forever()
    loop.close()
else:
    anyio.run(use_and_close, backend=sys.argv[1])
print("ended")
"""


@pytest.mark.parametrize("end", ["asyncio", "trio", "closed loop"])
def test_a_process_ends_although_a_name_server_is_silent(end):
    program = [sys.executable, "-c", SILENT_NAME_SERVER, end]
    run = subprocess.run(
        program, check=True, capture_output=True, text=True, timeout=30
    )
    assert run.stdout == "ended\n"


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


async def test_a_race_tells_which_addresses_were_too_slow(monkeypatch):
    network = Network(monkeypatch, _1=60, _2=0.4, _3=60)
    race = network.race()
    check_won(network, await race.run(), "1.1.1.2")
    # The third one had no 0.25 s.
    assert network.tried == ["1.1.1.1", "1.1.1.2", "1.1.1.3"]
    assert race.overtaken == {v4("1.1.1.1")}
    # If it wins a later race, it was not too slow.
    network.times = {"1.1.1.3": 60, "1.1.1.1": 0.001}
    check_won(network, await race.run(), "1.1.1.1")
    assert race.overtaken == set()


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
        with pytest.raises(ConnectFailed, match="not ready within") as no:
            await opens(opener, 200, timeout=0.5)  # the order is random
        assert no.value.reason == "timeout"
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


def test_a_url_for_grpc_alone_names_the_other_transport():
    target = Target(url="dns://10.0.0.53/topaz:8282", insecure=True)
    with pytest.raises(ValueError, match="needs transport='grpcio'"):
        opening.NativeOpener(target)
