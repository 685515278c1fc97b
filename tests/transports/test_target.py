"""Test which urls are accepted, and the messages for rejected ones."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import aserto.client
import attrs
import grpc
import pytest

from fastapi_topaz import AuthorizerOptions, ConnectionPool
from fastapi_topaz._rpc.target import Target
from fastapi_topaz.connector import GrpcConnector
from kit.channels import connected


pytestmark = pytest.mark.real_clock

COMPLETE = [
    "topaz:1",
    "topaz:65535",
    "Topaz.Example.:8282",
    "my_topaz-1.svc:8282",
    "xn--bcher-kva.example:8282",
    "127.0.0.1:443",
    "[::1]:8282",
    "[2001:db8::1]:443",
    "[fe80::1%eth0]:8282",
    "dns:topaz:8282",
    "dns:///topaz:8282",
    "dns:///[::1]:8282",
    "dns://127.0.0.1:5353/topaz:8282",
    "dns://authority/topaz:8282",
    "ipv4:1.2.3.4:1",
    "ipv4:1.2.3.4:1,5.6.7.8:2",
    "ipv6:[::1]:1",
    "ipv6:[::1]:1,[::2]:2",
    "unix:/run/topaz.sock",
    "unix:///run/topaz.sock",
    "unix:topaz.sock",
    "unix-abstract:topaz",
]
INCOMPLETE = {
    "topaz": "topaz:8282",
    "localhost": "localhost:8282",
    "127.0.0.1": "127.0.0.1:8282",
    "[::1]": "[::1]:8282",
    "::1": "[::1]:8282",
    "2001:db8::1": "[2001:db8::1]:8282",
    "dns:topaz": "dns:topaz:8282",
    "dns:///topaz": "dns:///topaz:8282",
    "dns:///::1": "dns:///[::1]:8282",
    "dns://127.0.0.1/topaz": "dns://127.0.0.1/topaz:8282",
    "ipv4:1.2.3.4": "ipv4:1.2.3.4:8282",
    "ipv4:1.2.3.4,5.6.7.8:2": "ipv4:1.2.3.4:8282,5.6.7.8:2",
    "ipv6:::1,[::2]:2": "ipv6:[::1]:8282,[::2]:2",
    "topaz:08282": "topaz:8282",
}
# A url, and the part of the message that explains its fault.
REFUSED = {
    "topaz:0": "a port is a number from 1 to 65535",
    "topaz:65536": "a port is a number",
    "topaz:82820": "a port is a number",
    "topaz:4294975578": "a port is a number",
    "topaz:-1": "a port is a number",
    "topaz:+1": "a port is a number",
    "topaz:8_2": "a port is a number",
    "topaz:": "a port is a number",
    "topaz:grpc": "a port is a number",
    "topaz:80,": "a port is a number",
    "[::1]:": "a port is a number",
    "[::1]:99999": "a port is a number",
    "dns:///topaz:0": "a port is a number",
    "dns://127.0.0.1:0/topaz": "a port is a number",
    "ipv4:1.2.3.4:70000": "a port is a number",
    "topaz:\u0668\u0662": "beyond ASCII",
    "b\u00fccher.example": "xn--",
    "grpc://topaz:8282": "scheme grpc: is not supported",
    "GRPC://topaz:8282": "scheme GRPC: is not supported",
    "grpcs://topaz": "not supported",
    "tcp://topaz:8282": "scheme tcp: is not supported",
    "h2://topaz": "not supported",
    "topaz://x": "not supported",
    "xds:///topaz": "scheme xds: is not supported",
    "vsock:3:8282": "scheme vsock: is not supported",
    "http://topaz:8282": "insecure=True means plaintext",
    "HTTPS://topaz:8282": "TLS is the default",
    "user@topaz:8282": "must not have a user name",
    "dns:///user@topaz": "must not have a user name",
    "topaz/": "a slash at its end",
    "topaz:8282/": "a slash at its end",
    "topaz:8282/api": "a path",
    "dns:///topaz:8282/": "a slash at its end",
    "//topaz:8282": "a path",
    "topaz:8282?x=1": "a path",
    "topaz#x": "a path",
    " topaz:8282": "spaces or control characters",
    "topaz:8282 ": "spaces or control characters",
    "topaz:8282\n": "spaces or control characters",
    "to paz": "spaces or control characters",
    "to\x00paz": "spaces or control characters",
    "unix:/a b": "spaces or control characters",
    ":8282": "it has no host",
    "dns:///": "it has no host",
    "dns://127.0.0.1/": "it has no host",
    "8282": "a number alone is not a host",
    "dns:8282": "a number alone is not a host",
    "dns://topaz:8282": "write dns:///host:port",
    "-topaz": "no host name",
    "to..paz": "no host name",
    "*.topaz": "no host name",
    "'topaz'": "no host name",
    "to%70az": "no host name",
    "a" * 64: "no host name",
    ".".join(["abc"] * 64): "no host name",
    "1.2.3": "not an IPv4 address",
    "256.1.1.1:80": "not an IPv4 address",
    "ipv4:topaz:8282": "not an IPv4 address",
    "ipv4:1.2.3.4,": "not an IPv4 address",
    "ipv4:[::1]:1": "not an IPv4 address",
    "ipv6:1.2.3.4": "not an IPv6 address",
    "ipv6:topaz": "not an IPv6 address",
    "[topaz]:1": "not an IPv6 address",
    "[1.2.3.4]:1": "not an IPv6 address",
    "topaz:1:2": "not an IPv6 address",
    "[::1": "is followed by :port",
    "[::1]8282": "is followed by :port",
    "::1:8282": "write [::1]:8282 if 8282 is the port",
    "2001:db8::1:443": "else [2001:db8::1:443]",
    "unix:": "names no socket",
    "unix-abstract:": "names no socket",
    "unix://run/topaz.sock": "unix:///path",
    "unix:/" + "a" * 107: "at most 107 characters",
    "unix:/a?b": "percent-encode",
}


@pytest.mark.parametrize("url", COMPLETE)
def test_a_complete_url_is_unchanged(url):
    assert AuthorizerOptions(url=url).url == url


@pytest.mark.parametrize("url", INCOMPLETE)
def test_a_missing_port_becomes_8282(url):
    options = AuthorizerOptions(url=url)
    assert options.url == INCOMPLETE[url]
    assert options == AuthorizerOptions(url=INCOMPLETE[url])
    assert attrs.evolve(options, tenant_id="t").url == options.url


@pytest.mark.parametrize("url", REFUSED)
def test_an_invalid_url_error_names_the_fault_and_the_accepted_forms(url):
    with pytest.raises(ValueError, match="url must be host:port") as caught:
        AuthorizerOptions(url=url)
    text = str(caught.value)
    assert REFUSED[url] in text
    assert repr(url) in text
    assert "accepted are host, host:port, [IPv6]:port, dns:///host:port" in text


@pytest.mark.parametrize(
    "url", ["user:s3cret@topaz:8282", "grpc://user:s3/c:r@et@topaz", ":s3cret@topaz"]
)
def test_a_password_in_a_url_is_not_shown(url):
    with pytest.raises(ValueError, match="topaz") as caught:
        AuthorizerOptions(url=url)
    assert "s3" not in str(caught.value)


def test_aserto_options_get_the_default_port_too():
    given = aserto.client.AuthorizerOptions(url="topaz")
    assert AuthorizerOptions.coerce(given).url == "topaz:8282"


def test_a_pool_treats_two_spellings_of_a_url_as_equal():
    pool = ConnectionPool()
    pool.configure(AuthorizerOptions(url="topaz"))
    pool.configure(AuthorizerOptions(url="topaz:8282"))
    assert pool.authorizer_options.url == "topaz:8282"


@pytest.mark.parametrize(
    "url",
    [
        "localhost:{port}",
        "dns:localhost:{port}",
        "dns:///127.0.0.1:{port}",
        "ipv4:127.0.0.1:{port}",
        "ipv4:127.0.0.2:1,127.0.0.1:{port}",
        "ipv6:[::ffff:127.0.0.1]:{port}",
    ],
)
async def test_an_accepted_url_can_be_connected_to(url, embedded_authorizer):
    options = AuthorizerOptions(
        url=url.format(port=embedded_authorizer.port), insecure=True
    )
    async with connected(options, 5) as connection:
        await connection.probe(5)


@pytest.mark.parametrize(
    "url", ["unix:{path}", "unix://{path}", "unix-abstract:fastapi-topaz-{pid}"]
)
async def test_a_unix_socket_can_be_connected_to(url, tmp_path):
    url = url.format(path=tmp_path / "topaz.sock", pid=os.getpid())
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_insecure_port(url)
    server.start()
    try:
        async with connected(AuthorizerOptions(url=url, insecure=True), 5):
            pass
    finally:
        server.stop(0).wait()


# -- the servers of a target ----------------------------------------------------------


@pytest.mark.parametrize("transport", ["grpcio", "native"])
@pytest.mark.parametrize(
    "url, servers",
    [
        ("127.0.0.1:82", {"ipv4:127.0.0.1:82"}),
        ("ipv4:127.0.0.1:82,127.0.0.2:82", {"ipv4:127.0.0.1:82", "ipv4:127.0.0.2:82"}),
        ("unix:/run/topaz", {"unix:/run/topaz"}),
    ],
)
async def test_a_connector_finds_the_servers_of_its_target(url, servers, transport):
    connector = GrpcConnector(Target(url=url, insecure=True), transport)
    assert set(await connector.servers()) == servers


async def test_a_connector_resolves_the_name_of_its_target(monkeypatch):
    found = ["10.0.0.1", "10.0.0.2"]

    def getaddrinfo(host, port, **_options):
        assert (host, port) == ("topaz.test", "82")
        return [(socket.AF_INET, 1, 6, "", (ip, 82)) for ip in found]

    connector = GrpcConnector(Target(url="topaz.test:82", insecure=True))
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert set(await connector.servers()) == {"ipv4:10.0.0.1:82", "ipv4:10.0.0.2:82"}


async def test_a_url_that_only_the_core_of_grpc_resolves_has_no_known_servers():
    target = Target(url="dns://10.0.0.53/topaz.test:82", insecure=True)
    assert await GrpcConnector(target, "grpcio").servers() == ()
