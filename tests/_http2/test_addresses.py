"""What a url names, and what its name resolves to."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading

import pytest

from fastapi_topaz._http2 import opening
from fastapi_topaz._http2.addresses import parse
from fastapi_topaz._rpc.target import Target
from kit.h2peer import failure_of, v6


pytestmark = pytest.mark.real_clock


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


def test_a_url_for_grpc_alone_names_the_other_transport():
    target = Target(url="dns://10.0.0.53/topaz:8282", insecure=True)
    with pytest.raises(ValueError, match="needs transport='grpcio'"):
        opening.NativeOpener(target)
