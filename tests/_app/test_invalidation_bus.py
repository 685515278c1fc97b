"""Invalidations between applications: the bus lives and ends with the pool."""

from __future__ import annotations

import logging
from functools import partial

import anyio
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from fastapi_topaz import CacheStatus, ConnectionPool, DecisionCache
from kit.bus import KEY, running
from kit.configs import REQUEST
from kit.configs import config_of as config_with
from kit.logs import lines
from kit.threads import in_a_thread
from kit.waiting import eventually


pytestmark = pytest.mark.real_clock

PATH = "app.GET.documents"


@pytest.fixture
def authorizer(embedded_authorizer):
    embedded_authorizer.policies = {PATH: True}
    return embedded_authorizer


def cache_on(hub):
    return DecisionCache(invalidation_bus=hub, invalidation_key=KEY)


def config_of(authorizer, hub, **options):
    """Return the configuration of one process, as far as a bus can tell."""
    return config_with(
        ConnectionPool(min_connections=0),
        authorizer.options,
        decision_cache=cache_on(hub),
        **options,
    )


async def origin(config):
    return (await config.decide(REQUEST, PATH)).origin


def is_reachable(config):
    return config.decision_cache.status().bus.state == "reachable"


async def reaches(*configs):
    await eventually(lambda: all(map(is_reachable, configs)))


async def test_an_invalidation_of_one_application_reaches_another(authorizer, hub):
    here, there = config_of(authorizer, hub), config_of(authorizer, hub)
    async with here.lifespan(None), there.lifespan(None):
        # The first one makes no check.
        await reaches(here, there)
        assert [await origin(there), await origin(there)] == ["authorizer", "cache"]
        here.invalidate(policy_path=PATH)
        await eventually(lambda: there.decision_cache.status().bus.received > 2)
        await eventually(lambda: len(there._freshness.invalidations.marks.by_tag) == 1)
        assert await origin(there) == "authorizer"
        await here.decision_cache.clear()
        await eventually(lambda: there.decision_cache.status().size == 0)
        assert await origin(there) == "authorizer"
    for config in (here, there):
        assert not is_reachable(config)
    assert not hub._receivers


async def test_a_pool_that_a_check_opens_runs_the_bus(authorizer, hub):
    config = config_of(authorizer, hub)
    with anyio.CancelScope() as scope:
        scope.cancel()
        # This check is cancelled. The task of the bus does not belong to it.
        await origin(config)
    await origin(config)
    await reaches(config)
    await config.connection_pool.close()
    assert not hub._receivers


async def test_a_pool_that_replaces_another_runs_the_bus(authorizer, hub):
    config = config_of(authorizer, hub)
    config.connection_pool = pool = ConnectionPool(min_connections=0)
    pool.configure(authorizer.options)
    async with pool:
        await origin(config)
        await reaches(config)
        assert pool._companions == [config.decision_cache._companion]


@pytest.mark.parametrize("run", [lambda make: make(), in_a_thread])
async def test_a_configuration_made_while_its_pool_is_open_runs_the_bus(
    authorizer, hub, run
):
    pool = ConnectionPool(min_connections=0)
    pool.configure(authorizer.options)
    async with pool:
        await eventually(lambda: hasattr(pool._open_pool, "tasks"))  # it has begun
        make = partial(config_with, pool, authorizer.options)
        configs = [
            run(partial(make, decision_cache=cache)) for cache in [cache_on(hub)] * 2
        ]
        await reaches(*configs)
        assert hub.subscriptions == 1


async def test_opening_again_begins_with_an_empty_cache_and_a_new_sender(
    authorizer, hub
):
    config = config_of(authorizer, hub)
    for _ in range(2):
        async with config.connection_pool:
            await reaches(config)
            assert [await origin(config) for _ in "12"] == ["authorizer", "cache"]
    assert len({message[1] for message in hub.journal}) == 2


class Broken:
    """A bus that does everything wrong."""

    async def publish(self, tags, /):
        raise RuntimeError("no")

    async def receive(self, deliver, /):
        for garbage in (None, b"x", [b"x" * 16] * 9):
            deliver(garbage)
        raise ExceptionGroup("no", [RuntimeError("no")])


async def test_a_broken_bus_fails_no_request(authorizer, caplog):
    config = config_of(authorizer, Broken())
    async with config.connection_pool:
        await eventually(lambda: config.decision_cache.status().bus.rejected > 3)
        assert [await origin(config) for _ in "12"] == ["authorizer", "cache"]
        config.invalidate(policy_path=PATH)
        assert await origin(config) == "authorizer"
        assert config.decision_cache.status().bus.waiting == 1
    assert not lines(caplog, logging.ERROR)
    assert "were not sent to other processes before the pool closed" in caplog.text


async def test_a_companion_that_fails_does_not_end_the_pool(authorizer, hub, caplog):
    config = config_of(authorizer, hub)

    async def fails():
        raise RuntimeError("as the test says")

    config.connection_pool._accompany(fails)
    async with config.connection_pool:
        await reaches(config)
        assert await origin(config) == "authorizer"
    assert len(lines(caplog, logging.ERROR, part="a companion of the pool failed")) == 1
    assert not lines(caplog, logging.CRITICAL)


async def test_a_pool_without_a_bus_has_no_task_for_it(authorizer):
    config = config_with(
        ConnectionPool(), authorizer.options, decision_cache=DecisionCache()
    )
    assert not config.connection_pool._companions
    assert config._freshness._announce is None


def test_a_forked_child_sends_nothing_of_its_parent(authorizer, run_program):
    program = f"""
        import os, anyio
        from fastapi_topaz import *
        from kit.bus import KEY, FakeBus, reached
        from kit.configs import REQUEST, config_of
        from kit.waiting import eventually

        hub = FakeBus()
        config = config_of(
            ConnectionPool(min_connections=0, transport="native"),
            AuthorizerOptions(url={authorizer.url!r}, insecure=True),
            decision_cache=DecisionCache(invalidation_bus=hub, invalidation_key=KEY),
        )
        cache = config.decision_cache

        async def ask():
            return (await config.decide(REQUEST, {PATH!r})).origin

        async def child():
            bus = cache.status().bus
            assert (bus.state, bus.waiting) == ("unreachable", 0), bus
            hub.__init__()
            async with config.connection_pool:
                print(await ask(), await ask(), flush=True)
                await reached(cache)
                config.invalidate(policy_path={PATH!r})
                await eventually(lambda: cache.status().bus.waiting == 0)
            # Only what the child has invalidated.
            assert sum(len(parts) > 3 for parts in hub.journal) == 1

        async def main():
            async with config.connection_pool:
                await reached(cache)
                print(await ask(), await ask(), flush=True)
                hub.hangs = True
                config.invalidate(policy_path="app.other")

                def fork():
                    pid = os.fork()
                    if not pid:
                        code = 1
                        try:
                            anyio.run(child)
                            code = 0
                        finally:
                            os._exit(code)
                    assert os.waitpid(pid, 0)[1] == 0

                await anyio.to_thread.run_sync(fork)
                hub.hangs = False
                await eventually(lambda: cache.status().bus.waiting == 0)

        anyio.run(main)
    """
    ended = run_program(program, strict=False)
    assert ended.code == 0, ended.err
    assert ended.out.split() == ["authorizer", "cache"] * 2


def test_a_route_may_return_the_status(hub):
    app, cache = FastAPI(), cache_on(hub)

    @app.get("/")
    def status() -> CacheStatus:
        return cache.status()

    with TestClient(app) as client:
        assert client.get("/").json()["bus"]["state"] == "unreachable"


async def test_a_cache_without_a_pool_does_not_count_as_reachable(hub):
    cache = cache_on(hub)
    async with running(cache):
        assert cache.status().bus.state == "reachable"
    assert cache.status().bus.state == "unreachable"
