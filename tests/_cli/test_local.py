"""Test which urls lead to this machine only."""

from __future__ import annotations

import pytest

from fastapi_topaz._cli import local as _local
from fastapi_topaz._cli.local import remote_part
from kit.broken import resolving


pytestmark = pytest.mark.real_clock

NAMES = {
    "here.test": ["127.0.0.1", "127.0.0.2"],
    "both.test": ["127.0.0.1", "192.0.2.7"],
    "there.test": ["192.0.2.7"],
    "nowhere.test": None,
}


@pytest.fixture(autouse=True)
def names():
    with resolving(NAMES) as server:
        yield server


@pytest.mark.parametrize(
    "url",
    [
        *("127.0.0.1", "127.9.9.9:1", "[::1]:8282", "localhost:8282", "here.test:1"),
        *("unix:/run/topaz.sock", "unix-abstract:topaz", "dns:///here.test"),
        *("ipv4:127.0.0.1:1,127.0.0.2:2", "ipv6:[::ffff:127.0.0.1]:1"),
    ],
)
async def test_only_loopback_and_unix_sockets_are_this_machine(url):
    assert await remote_part(url) is None


@pytest.mark.parametrize(
    "url, said",
    [
        ("192.0.2.7:8282", "ipv4:192.0.2.7:8282"),
        # A wildcard address may lead to any interface of this machine.
        ("0.0.0.0:8282", "ipv4:0.0.0.0:8282"),
        ("[2001:db8::1]:8282", "ipv6:[2001:db8::1]:8282"),
        ("ipv6:[::ffff:192.0.2.7]:1", "ipv6:[::ffff:192.0.2.7]:1"),
        ("ipv4:127.0.0.1:1,192.0.2.7:2", "ipv4:192.0.2.7:2"),
        ("there.test:1", "ipv4:192.0.2.7:1"),
        ("both.test:1", "ipv4:192.0.2.7:1"),
        ("nowhere.test:1", "nowhere.test (it cannot be resolved)"),
    ],
)
async def test_everything_else_is_another_machine(url, said):
    assert await remote_part(url) == said


async def test_a_name_that_is_not_resolved_in_time_is_another_machine(
    names, monkeypatch
):
    monkeypatch.setattr(_local, "RESOLVING", 0.05)
    names.silent()
    assert await remote_part("here.test:1") == "here.test (it cannot be resolved)"
    names.heal()


@pytest.mark.parametrize("url", ["http://127.0.0.1", "", "dns://9.9.9.9/here.test"])
async def test_a_malformed_url_is_an_error(url):
    with pytest.raises(ValueError):
        await remote_part(url)
