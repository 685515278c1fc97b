"""The tasks that send and receive invalidations: failures, odd endings, the end."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from functools import partial

import anyio
import pytest

from fastapi_topaz._decisions import bus as bus_module
from fastapi_topaz._pool.owner_loop import OwnerLoop
from kit.backends import asyncio_only
from kit.bus import (
    ALICE,
    BOB,
    PATIENCE,
    FakeBus,
    Peer,
    Process,
    ages_out,
    reached,
    running,
)
from kit.threads import in_a_thread


# -- what cannot be sent --------------------------------------------------------------


async def test_an_invalidation_that_cannot_be_sent_is_sent_later(hub, here, caplog):
    there = Process(hub)
    async with running(here.cache, there.cache):
        publish, hub.publish = hub.publish, refused
        await there.origins(ALICE)
        here.cache.invalidate(policy_path="app.a")
        await here.origins(ALICE)
        await anyio.sleep(1)
        assert here.bus.waiting == 1
        assert here.bus.failed >= 1
        assert "was not sent (PermissionError): 1 invalidations wait" in caplog.text
        hub.publish = publish
        await anyio.sleep(3)
        assert here.bus.waiting == 0
        assert await there.origins(ALICE) == ["authorizer"]


async def refused(_tags):
    raise PermissionError("password")


async def test_a_bus_that_hangs_does_not_hold_invalidations_up(hub, here):
    async with running(here.cache):
        await here.origins(ALICE)
        hub.hangs = True
        here.cache.invalidate(policy_path="app.a")
        # Here it applies at once.
        assert await here.origins(ALICE) == ["authorizer"]
        await anyio.sleep(2 * PATIENCE)
        assert (here.bus.waiting, here.bus.state) == (1, "unreachable")
        assert here.bus.failed >= 1
        hub.hangs = False
        await reached(here.cache)
        assert here.bus.waiting == 0


async def test_an_invalidation_before_the_pool_is_open_waits(hub, here, caplog):
    there = Process(hub)
    here.cache.invalidate(policy_path="app.a")
    assert here.bus.waiting == 1
    assert "wait to be sent to other processes until the pool is open" in caplog.text
    async with running(there.cache):
        await there.origins(ALICE)
        async with running(here.cache):
            assert await there.origins(ALICE) == ["authorizer"]


async def test_many_that_wait_become_one_for_everything(hub, here, monkeypatch):
    monkeypatch.setattr(bus_module, "MOST_WAITING", 3)
    there = Process(hub)
    for n in range(5):
        here.cache.invalidate(policy_path=f"app.x{n}")
        assert here.bus.waiting <= 3
    async with running(there.cache):
        await there.origins(ALICE)
        async with running(here.cache):
            assert await there.origins(ALICE) == ["authorizer"]


class Emptied(deque):
    """What waits, if another thread empties it in the moment in which it is read."""

    def popleft(self):
        self.clear()
        return super().popleft()


async def test_what_another_thread_replaces_does_not_end_the_task(here):
    here.cache._link._outbox = Emptied([frozenset()])
    async with running(here.cache):
        await anyio.sleep(2 * PATIENCE)
        assert (here.bus.waiting, here.bus.state) == (0, "reachable")


# -- tasks ----------------------------------------------------------------------------


async def test_what_waits_is_sent_at_the_end(hub, here):
    there = Process(hub)
    async with running(there.cache):
        await there.origins(ALICE)
        async with running(here.cache):
            here.cache.invalidate(policy_path="app.a")
        assert await there.origins(ALICE) == ["authorizer"]
    assert here.bus.state == "unreachable"
    assert not hub._receivers


async def test_a_bus_that_hangs_delays_the_end_by_a_second_at_most(hub, here, caplog):
    began = None
    async with running(here.cache):
        hub.hangs = True
        here.cache.invalidate(policy_path="app.a")
        await anyio.sleep(0.01)
        began = anyio.current_time()
    assert anyio.current_time() - began <= 1.01
    assert here.bus.waiting == 1
    assert "1 invalidations were not sent to other processes" in caplog.text


async def test_it_begins_again_as_another_sender(hub, here):
    there = Process(hub)
    async with running(there.cache):
        for _ in range(2):
            async with running(here.cache):
                here.cache.invalidate(policy_path="app.c")
                await anyio.sleep(0.01)
                await there.origins(ALICE)
        assert there.bus.gaps == 0
    assert len({message[1] for message in hub.journal}) == 3


async def test_two_pools_of_one_cache_take_turns(hub, here):
    async with anyio.create_task_group() as tasks:
        async with running(here.cache):
            tasks.start_soon(here.cache._companion)
            await anyio.sleep(10)
            assert hub.subscriptions == 1
        await anyio.sleep(10)
        assert (hub.subscriptions, here.bus.state) == (2, "reachable")
        tasks.cancel_scope.cancel()


async def test_a_pool_that_closes_before_its_turn_disturbs_nothing(hub, here):
    async with running(here.cache):
        async with running(here.cache):
            await anyio.sleep(10)
        assert here.bus.state == "reachable"
        await anyio.sleep(10)
        assert (hub.subscriptions, here.bus.state) == (1, "reachable")


def owner_of_a_closed_loop():
    async def own():
        return OwnerLoop()

    # On a loop of its own, also if the test runs on trio.
    return in_a_thread(partial(asyncio.run, own()))


async def test_a_pool_whose_loop_was_closed_does_not_keep_its_turn(here):
    """asyncio can close a loop before its tasks have ended."""
    turns = here.cache._link._turns
    turns += [owner_of_a_closed_loop(), owner_of_a_closed_loop()]
    async with running(here.cache, settled=False):
        await anyio.sleep(PATIENCE)
        assert here.bus.state == "reachable"
    assert not turns


async def test_a_pool_of_the_parent_process_has_no_turn_here(here):
    owner = OwnerLoop()
    owner.pid += 1
    here.cache._link._turns.append(owner)
    async with running(here.cache, settled=False):
        await anyio.sleep(PATIENCE)
        assert here.bus.state == "reachable"


class Odd(FakeBus):
    """A bus with one odd ending of its methods."""

    def __init__(self, method, ending):
        super().__init__()
        self.method, self.ending, self.times = method, ending, 0

    async def publish(self, tags, /):
        await self.end("publish")
        await super().publish(tags)

    async def receive(self, deliver, /):
        if self.method != "receive" or not await self.end("receive"):
            await super().receive(deliver)

    async def end(self, method):
        if method == self.method and self.times < 3:
            self.times += 1
            return await self.ending()
        return None


async def returns():
    return True


async def fails():
    raise OSError("password")


async def fails_in_a_group():
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fails)


class Panic(BaseException):
    """An error as clients in Rust have it: it is no `Exception`."""


async def panics():
    raise Panic


async def panics_in_a_group():
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(panics)


async def cancels_itself():
    raise asyncio.CancelledError


ENDINGS = [returns, fails, fails_in_a_group, panics, panics_in_a_group]


@pytest.mark.parametrize("method", ["publish", "receive"])
@pytest.mark.parametrize("ending", ENDINGS)
async def test_an_odd_ending_of_a_method_is_survived(method, ending):
    here = Process(Odd(method, ending))
    async with running(here.cache):
        await ages_out(here, 30)


@asyncio_only
@pytest.mark.parametrize("method", ["publish", "receive"])
async def test_a_method_that_cancels_itself_cancels_nothing_else(method):
    here = Process(Odd(method, cancels_itself))
    async with running(here.cache):
        await ages_out(here, 30)


class FailsAtTheEnd(FakeBus):
    """A bus whose client fails in a task of its own when it is cancelled."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    async def receive(self, deliver, /):
        async def fail():
            try:
                await anyio.sleep_forever()
            finally:
                raise self.error

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fail)
            await super().receive(deliver)


@pytest.mark.parametrize("error", [RuntimeError("as the test says"), Panic()])
async def test_a_client_that_fails_when_it_is_cancelled_ends_nothing_else(error):
    here = Process(FailsAtTheEnd(error))
    # Nothing but the cancellation leaves this.
    for _ in range(2):
        async with running(here.cache):
            assert here.bus.state == "reachable"
    assert not here.cache._link._turns


async def test_a_method_that_is_no_coroutine_function_is_survived(hub, here):
    hub.receive = lambda _deliver: None
    async with running(here.cache, settled=False):
        await anyio.sleep(10)
        assert here.bus.state == "unreachable"
        await ages_out(here, 5)


async def test_a_late_delivery_of_an_ended_subscription_changes_nothing(hub, here):
    async with running(here.cache):
        (deliver,) = hub._receivers.values()
    received = here.bus.received
    deliver(Peer().beats())
    deliver(None)
    assert (here.bus.received, here.bus.rejected) == (received, 0)


async def test_messages_may_come_from_any_thread(hub, here):
    there = Peer()
    deliver = hub.pass_on
    # That of anyio works only in tasks.
    clock = OwnerLoop().clock.peek
    here.layer.freshness.clock = here.cache._link._limit.clock = clock
    hub.held = []
    async with running(here.cache, settled=False):
        await anyio.sleep(0.5)
        # The task that sends waits now. Only its own thread can wake it.
        for message in hub.held:
            assert in_a_thread(partial(deliver, message)) is None
        hub.held = None
        await reached(here.cache)
    hub.pass_on = lambda message: in_a_thread(partial(deliver, message))
    async with running(here.cache):
        await here.origins(ALICE, BOB)
        for message in there.says(policy_path="app.a"):
            assert hub.pass_on(message) is None
        await anyio.sleep(0.01)
        assert await here.origins(ALICE, BOB) == ["authorizer", "cache"]
        hub.pass_on(None)
        await anyio.sleep(0.01)
        assert (here.bus.rejected, here.bus.state) == (1, "unreachable")


async def test_the_status_is_complete(here):
    async with running(here.cache):
        await anyio.sleep(10)
        status = here.bus
        # One is sent before the bus has the subscription.
        assert status.published - 1 == status.received > 3
        assert dataclasses.asdict(status) == {
            "state": "reachable",
            "published": status.published,
            "received": status.received,
            **dict.fromkeys(("failed", "waiting", "ignored", "rejected"), 0),
            "gaps": 0,
            "outages": 0,
            "clears": 1,
        }
