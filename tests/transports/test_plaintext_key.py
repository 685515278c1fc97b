"""Test that the pool warns once if the api_key crosses a network in plaintext."""

from __future__ import annotations

import logging

import pytest

from fastapi_topaz import AuthorizerOptions, ConnectionPool, Identity, TopazConfig
from fastapi_topaz._rpc.loopback import is_loopback


KEY = "open-sesame"

LOOPBACK = [
    *("localhost", "localhost:8282", "LocalHost:8282", "localhost.", "localhost.:8282"),
    *("127.0.0.1", "127.0.0.1:8282", "127.255.3.4:1", "localhost:https"),
    *("::1", "[::1]", "[::1]:8282", "[0:0:0:0:0:0:0:1]:8282", "[::ffff:127.0.0.1]:1"),
    *("unix:topaz.sock", "unix:/run/topaz.sock", "unix:///run/topaz.sock"),
    "unix-abstract:topaz",
    *("ipv4:127.0.0.1", "ipv4:127.0.0.1:8282", "ipv4:127.0.0.1:1,127.0.0.2:2"),
    *("ipv6:::1", "ipv6:[::1]", "ipv6:[::1]:8282", "ipv6:[::1]:1,[::1]:2"),
    *("dns:localhost", "dns:localhost:8282", "dns:/localhost", "dns:///127.0.0.1"),
    *("dns:///localhost", "dns:///localhost:8282", "dns:///[::1]:8282"),
    # gRPC ignores the case of a scheme.
    *("IPV4:127.0.0.1:8282", "Ipv6:[::1]:8282", "UNIX:/topaz.sock", "DNS:localhost:1"),
]
ELSEWHERE = [
    *("topaz", "topaz:8282", "topaz.example.com:8282", "10.0.0.1", "10.0.0.1:8282"),
    *("localhost.evil.com", "localhost.evil.com:8282", "localhosts:8282"),
    *("evil-localhost:8282", "localhost@evil.com:8282", "localhost:8282@evil.com"),
    *("localhost:1:2", "localhost/evil.com", "localhost..", "127.0.0.1.evil.com:8282"),
    *("127.0.0.1.", "127.1", "126.255.255.255:1", "128.0.0.1:1", "0.0.0.0:8282"),
    *("::2", "[::2]:8282", "::1:8282", "[fe80::1]:8282", "[::ffff:10.0.0.1]:8282"),
    *("[::1", "[localhost]:8282:1", "[::1]evil.com:1"),
    *("ipv4:10.0.0.1:8282", "ipv4:127.0.0.1:1,10.0.0.1:2", "ipv4:10.0.0.1,127.0.0.1"),
    *("ipv4:", "ipv4:127.0.0.1,", "ipv4:localhost", "ipv6:[::1]:1,[::2]:1"),
    *("dns:topaz", "dns:///topaz:8282", "dns:///localhost.evil.com:8282"),
    *("dns:///localhost/evil.com", "dns:////localhost", "dns:localhost.evil.com"),
    # The DNS server named there may answer with any address.
    *("dns://8.8.8.8/localhost:8282", "dns://localhost/topaz:8282"),
    *("xds:///localhost:8282", "vsock:2:8282", "IPV4:10.0.0.1:8282"),
    *(" localhost", "localhost:8282,10.0.0.1:8282", "127.0.0.1:1,10.0.0.1:2"),
]


@pytest.mark.parametrize("url", LOOPBACK)
def test_a_loopback_address_is_recognized(url):
    assert is_loopback(url)


@pytest.mark.parametrize("url", ELSEWHERE)
def test_other_addresses_are_not_loopback(url):
    assert not is_loopback(url)


def warned(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING
    ]


async def open_and_close(pool):
    await pool.initialize()
    await pool.close()


def pool_of(**options):
    pool = ConnectionPool(min_connections=0, name="main")
    pool.configure(AuthorizerOptions(**options))
    return pool


SECRET_OPTIONS = [
    {"api_key": KEY},
    {"extra_metadata": [("x-api-key", KEY)]},
    {"extra_metadata": [("authorization", KEY)]},
    {"credentials": lambda: [("authorization", KEY)]},
]


@pytest.mark.parametrize("options", SECRET_OPTIONS, ids=lambda each: next(iter(each)))
@pytest.mark.parametrize("url", ["topaz.example.com:8282", "dns:///10.0.0.1:8282"])
async def test_a_key_in_plaintext_logs_one_warning(url, options, caplog):
    pool = pool_of(url=url, insecure=True, **options)
    assert not warned(caplog), "logging may not be configured when pools are built"
    for _ in range(3):
        await open_and_close(pool)
    (line,) = warned(caplog)
    assert "pool 'main'" in line
    assert url in line
    assert "insecure=True" in line
    assert KEY not in caplog.text


async def test_each_authorizer_gets_its_own_warning(caplog):
    for url in ("one.example.com:8282", "two.example.com:8282"):
        await open_and_close(pool_of(url=url, api_key=KEY, insecure=True))
    assert ["one" in warned(caplog)[0], "two" in warned(caplog)[1]] == [True, True]


async def test_the_first_acquire_warns_too(caplog):
    config = TopazConfig(
        authorizer_options=AuthorizerOptions(
            url="ipv4:192.0.2.1:8282", api_key=KEY, insecure=True
        ),
        policy_path_root="app",
        identity_provider=lambda _request: Identity(1),
    )
    pool = config.connection_pool
    with pytest.raises(TimeoutError):
        await pool.acquire(timeout=0)
    await pool.close()
    (line,) = (line for line in warned(caplog) if "without TLS" in line)
    assert "192.0.2.1" in line


@pytest.mark.parametrize(
    "options",
    [
        {"url": "topaz.example.com:8282", "api_key": KEY},
        {"url": "topaz.example.com:8282", "insecure": True},
        {"url": "topaz.example.com:8282", "insecure": True, "tenant_id": "t-0815"},
        {"url": "localhost:8282", "api_key": KEY, "insecure": True},
        {"url": "unix:/run/topaz.sock", "api_key": KEY, "insecure": True},
        *(
            {**options, **place}
            for options in SECRET_OPTIONS
            for place in (
                {"url": "topaz.example.com:8282"},
                {"url": "localhost:8282", "insecure": True},
            )
        ),
    ],
    ids=lambda options: " ".join(
        name if callable(value) else f"{name}={value}"
        for name, value in options.items()
    ),
)
async def test_other_configurations_log_no_warning(options, caplog):
    await open_and_close(pool_of(**options))
    assert not warned(caplog)
