"""Test that the pool spreads its connections if there is a new server."""

from __future__ import annotations

import anyio
import pytest

from fastapi_topaz._pool import servers
from fastapi_topaz._pool.servers import KnownServers
from fastapi_topaz._pool.state.rotation import GROWN
from fastapi_topaz.testing import FakeConnector
from kit.pools import make_pool


SLACK = 5
"""Seconds for the replacements themselves."""

SOON = 1.5 * servers.LOOK + GROWN + SLACK
"""Seconds within which a new server is noticed and all connections are replaced."""


class Named(FakeConnector):
    """A connector to several servers, which a test changes."""

    spreads = True

    def __init__(self, *found, **options):
        super().__init__(**options)
        self.found = list(found)
        self.looks = 0

    async def servers(self):
        self.looks += 1
        await anyio.lowlevel.checkpoint()
        if isinstance(self.found, Exception):
            raise self.found
        return list(self.found)


def make_named(connector, **options):
    options = {"min_connections": 3, "eager_init": True, "max_lifetime": 0, **options}
    return make_pool(connector, **options)


# -- the new servers ------------------------------------------------------------------


def test_the_first_servers_are_not_new():
    known = KnownServers()
    assert not known.see([], 0.0)
    assert not known.see(["a", "b"], 1.0)
    assert not known.see(["b", "a"], 2.0)


def test_a_server_that_was_not_there_is_new_once():
    known = KnownServers()
    known.see(["a"], 0.0)
    assert known.see(["a", "b"], 1.0)
    assert not known.see(["a", "b"], 2.0)


def test_a_server_that_leaves_is_not_new():
    known = KnownServers()
    known.see(["a", "b"], 0.0)
    assert not known.see(["a"], 1.0)


def test_a_name_server_that_returns_some_of_many_servers_shows_no_new_one():
    known = KnownServers()
    for second in range(10):
        known.see([second % 4, (second + 1) % 4], float(second))
    for second in range(10, 2000, 30):
        assert not known.see([second % 4, (second + 1) % 4], float(second))


def test_a_server_that_comes_back_makes_the_answer_longer():
    known = KnownServers()
    known.see(["a", "b", "c", "d"], 0.0)
    known.see(["a", "b"], 30.0)
    assert known.see(["a", "b", "c"], 60.0)
    assert known.see(["a", "b", "c", "d"], 90.0)
    assert not known.see(["a", "b", "c", "d"], 120.0)


def test_an_answer_without_servers_is_ignored():
    known = KnownServers()
    known.see(["a"], 0.0)
    assert not known.see([], 30.0)
    assert not known.see(["a"], 60.0)


def test_a_server_that_comes_back_after_a_long_time_is_new():
    known = KnownServers()
    for second in range(0, 700, 30):
        known.see(["a", "b"] if not second else ["a"], float(second))
    assert known.see(["a", "b"], 700.0)


def test_after_a_pause_without_answers_the_same_servers_are_not_new():
    # The pool had no connections during the night, or the name server was down.
    known = KnownServers()
    known.see(["a", "b"], 0.0)
    assert not known.see(["a", "b"], 40_000.0)
    assert known.see(["a", "c"], 80_000.0)


# -- the spread -----------------------------------------------------------------------


async def test_a_new_server_gets_connections():
    connector = Named("a", "b")
    async with make_named(connector) as pool:
        await anyio.sleep(1000)
        assert connector.attempts == 3, "nothing is new"
        connector.found.append("c")
        await anyio.sleep(SOON)
        assert connector.attempts == 6
        assert pool._counters.closes == {"spread": 3}
        assert pool.status().total == 3
        await anyio.sleep(1000)
        assert connector.attempts == 6, "once"


async def test_a_server_that_comes_back_gets_connections():
    connector = Named("a", "b")
    async with make_named(connector) as pool:
        await anyio.sleep(100)
        connector.found.remove("b")
        await anyio.sleep(100)
        assert connector.attempts == 3
        connector.found.append("b")
        await anyio.sleep(SOON)
        assert connector.attempts == 6
        assert pool._counters.closes == {"spread": 3}


async def test_the_pool_asks_for_the_servers_about_every_30_s():
    connector = Named("a")
    async with make_named(connector):
        await anyio.sleep(30 * 100)
    assert 80 < connector.looks < 120


@pytest.mark.parametrize("share, pause", [(0.0, 15), (0.5, 30), (1.0, 45)])
async def test_the_pause_between_two_questions_is_up_to_half_longer_or_shorter(
    share, pause, monkeypatch
):
    monkeypatch.setattr(servers.random, "random", lambda: share)
    connector = Named("a")
    async with make_named(connector):
        await anyio.sleep(servers.FIRST_LOOK + 10 * pause + 1)
    assert connector.looks == 11


async def test_a_pool_without_connections_asks_only_once_it_has_one():
    connector = Named("a")
    async with make_pool(connector, max_idle_time=0) as pool:
        await anyio.sleep(1000)
        assert connector.looks == 0
        async with pool.acquire():
            pass
        await anyio.sleep(SOON)
    assert connector.looks > 0


async def test_connections_to_one_server_are_not_replaced_for_a_new_address():
    connector = Named("a")
    connector.spreads = False
    async with make_named(connector):
        await anyio.sleep(10)
        connector.found.append("b")
        await anyio.sleep(1000)
    assert connector.attempts == 3
    assert connector.looks == 0


@pytest.mark.parametrize("failure", [OSError("no name server"), ValueError("a bug")])
async def test_a_lookup_that_fails_changes_nothing(failure, host_survives):
    connector = Named("a")
    async with make_named(connector) as pool:
        await anyio.sleep(10)
        found, connector.found = connector.found, failure
        await anyio.sleep(200)
        connector.found = found
        await anyio.sleep(200)
        assert connector.attempts == 3
        connector.found.append("b")
        await anyio.sleep(SOON)
        assert connector.attempts == 6
        async with pool.acquire():
            pass


async def test_a_lookup_that_hangs_is_ended_and_repeated(host_survives):
    class Hanging(Named):
        async def servers(self):
            self.looks += 1
            await anyio.sleep_forever()

    connector = Hanging()
    async with make_named(connector):
        await anyio.sleep(1000)
    assert connector.looks > 10


async def test_a_pool_closes_during_a_lookup():
    class Hanging(Named):
        async def servers(self):
            self.looks += 1
            await anyio.sleep_forever()

    connector = Hanging()
    async with make_named(connector) as pool:
        await anyio.sleep(servers.FIRST_LOOK + 1)
        assert connector.looks == 1
        began = anyio.current_time()
        await pool.close()
        assert anyio.current_time() == began
