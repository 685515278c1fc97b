"""Cancelling a check at any await of the decision layers leaves no trace."""

from __future__ import annotations

from functools import partial

import anyio
import pytest

from fastapi_topaz import CircuitBreaker, ConnectionLost, Decision, DecisionCache
from fastapi_topaz._decisions.breaker import Breaking
from fastapi_topaz._decisions.cache import Cached
from fastapi_topaz._decisions.fallback import Fallback, Fallbacks
from fastapi_topaz._decisions.memo import Memo
from kit.bus import FakeBus, Process, running
from kit.decisions import OpenHere, Subject, http_request
from kit.strikes import ON_ASYNCIO, SCOPE, TASK, Strike, sweep


ALICE = Subject(resource={"id": "1"})


class _Pool:
    class _counters:  # noqa: N801
        connects = 0

    authorizer_options = None


class Layers:
    """All layers above an authorizer that takes a second, and perhaps fails."""

    def __init__(self, error=None, fallback="error"):
        self.error = error
        self.calls = self.running = 0
        self.openings = OpenHere()
        self.cache = DecisionCache(stale_ttl_seconds=100)
        self.breaker = CircuitBreaker(failure_threshold=1, success_threshold=1)
        self.breaker._clock = anyio.current_time
        breaking = Breaking(self.authorizer, self.breaker, _Pool)
        cached = Cached(breaking, self.cache, self.openings)
        cached.freshness.clock = anyio.current_time
        self.memo = Memo(
            *(cached, cached.freshness, self.openings),
            *(self.cache._excludes, cached.hit),
        )
        self.asking = self.memo
        if fallback != "error":
            shared = Fallbacks(cached.stale, allow_unsafe=True, on_fallback=None)
            self.asking = Fallback(self.memo, fallback, shared)
        self.http = http_request()
        self.got = []

    async def authorizer(self, question, /):
        self.calls += 1
        self.running += 1
        question.budget.sent = question.budget.left()
        try:
            await anyio.sleep(1)
        finally:
            self.running -= 1
        if self.error is not None:
            raise self.error()
        return Decision(allowed=True)

    async def ask(self, http=None):
        return await self.asking(ALICE.question(http=http))

    async def ask_for(self, http=None):
        self.got.append(await self.ask(http))

    def assert_at_rest(self):
        assert not self.running
        assert not self.openings.current().flights
        assert not self.http.scope["fastapi_topaz"].flights
        for circuit in self.breaker._circuits.values():
            assert not circuit._trials


async def alone(strike):
    layers = Layers()
    await strike.hit(partial(layers.ask, layers.http))
    layers.assert_at_rest()
    # Whether it was cancelled or not, the next caller gets an answer.
    assert (await layers.ask(layers.http)).allowed
    assert layers.calls == (1 if strike.ended else 2)


async def in_front(strike):
    """Others wait for this caller."""
    layers = Layers()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(strike.hit, partial(layers.ask, layers.http))
        await anyio.sleep(0.5)
        for http in (layers.http, None, http_request()):
            tasks.start_soon(layers.ask_for, http)
    layers.assert_at_rest()
    assert [each.allowed for each in layers.got] == [True] * 3
    assert layers.calls <= 2


async def behind(strike):
    """This caller waits for another one."""
    layers = Layers()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(layers.ask_for, layers.http)
        await anyio.sleep(0.5)
        tasks.start_soon(layers.ask_for)
        await strike.hit(partial(layers.ask, layers.http))
    layers.assert_at_rest()
    assert [each.allowed for each in layers.got] == [True] * 2
    assert layers.calls == 1


async def behind_the_cancelled(strike):
    """This caller takes over from another one."""
    layers = Layers()
    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as first:
                first.start_soon(layers.ask, layers.http)
                await anyio.sleep(0.5)
                tasks.start_soon(strike.hit, partial(layers.ask, layers.http))
                await anyio.sleep(0.2)
                scope.cancel()
        tasks.start_soon(layers.ask_for)
    layers.assert_at_rest()
    assert [each.allowed for each in layers.got] == [True]


async def failing(strike):
    """The check fails, and the fallback has an older answer."""
    layers = Layers(fallback="cache_then_deny")
    await layers.ask(layers.http)
    await anyio.sleep(50)
    layers.error = partial(ConnectionLost, "x")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(strike.hit, partial(layers.ask, layers.http))
        await anyio.sleep(0.5)
        tasks.start_soon(layers.ask_for, layers.http)
        tasks.start_soon(layers.ask_for)
    layers.assert_at_rest()
    assert [each.origin for each in layers.got] == ["stale"] * 2


async def with_a_slow_fallback(strike):
    async def decide(*_):
        await anyio.sleep(1)
        return True

    layers = Layers(partial(ConnectionLost, "x"), fallback=decide)
    decision = await strike.hit(partial(layers.ask, layers.http))
    assert strike.times or decision.allowed
    layers.assert_at_rest()


async def half_open(strike):
    """A trial of the circuit breaker."""
    layers = Layers(partial(ConnectionLost, "x"))
    with pytest.raises(ConnectionLost):
        await layers.ask(layers.http)
    assert layers.breaker.status().is_open
    layers.error = None
    await anyio.sleep(2)
    await strike.hit(partial(layers.ask, layers.http))
    layers.assert_at_rest()
    assert layers.breaker.status().state == ("closed" if strike.ended else "half_open")
    # The permit came back.
    assert (await layers.ask()).allowed
    assert layers.breaker.status().state == "closed"


async def connected(strike):
    """The task that receives and sends invalidations."""
    process = Process(FakeBus())
    link = process.cache._link
    for path in ("app.x", "app.y"):
        process.cache.invalidate(policy_path=path)

    async def live():
        with anyio.move_on_after(6):
            await link.run()

    await strike.hit(live)
    assert not link._bus._receivers
    assert not link._turns
    assert not link._is_sending
    # An invalidation was sent, or it waits.
    sent = {message[3] for message in link._bus.journal if len(message) > 3}
    assert len(sent | {next(iter(tags)) for tags in link._outbox}) == 2
    # It can run again.
    async with running(process.cache):
        await anyio.sleep(0.1)
        assert process.bus.waiting == 0
    assert len({message[3] for message in link._bus.journal if len(message) > 3}) == 2


async def disconnected(strike):
    """The same while the bus is down, and then comes back."""
    bus = FakeBus()
    process = Process(bus)
    process.cache.invalidate(policy_path="app.x")
    bus.is_down = True

    async def live():
        with anyio.move_on_after(3):
            await process.cache._companion()

    await strike.hit(live)
    assert not bus._receivers
    assert not process.cache._link._turns
    assert process.bus.waiting == 1
    bus.is_down = False
    async with running(process.cache):
        await anyio.sleep(0.1)
        assert process.bus.waiting == 0


SCENARIOS = [alone, in_front, behind, behind_the_cancelled, failing]
SCENARIOS += [with_a_slow_fallback, half_open, connected, disconnected]


@pytest.mark.parametrize("how", SCOPE)
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_cancelling_a_scope_at_any_await_leaves_no_trace(scenario, how):
    assert await sweep(scenario, how) > 0


@ON_ASYNCIO
@pytest.mark.parametrize("how", TASK)
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_cancelling_a_task_at_any_await_leaves_no_trace(scenario, how):
    assert await sweep(scenario, how) > 0


async def test_a_hit_has_no_cancellation_point():
    async def hit(strike):
        layers = Layers()
        await layers.ask(layers.http)
        await strike.hit(layers.ask)

    assert await sweep(hit, "scope") == 0
    assert Strike().times == 0
