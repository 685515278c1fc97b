"""A bus in this process for tests of invalidations, and another process on it."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager

import anyio

from fastapi_topaz import Decision, DecisionCache
from fastapi_topaz._decisions.cache import Cached
from fastapi_topaz._decisions.seal import Message, Seal, derived
from fastapi_topaz._decisions.tags import Tagger
from kit.decisions import OpenHere, Subject
from kit.waiting import eventually


KEY = b"a key of these tests, 32 bytes.."
ALICE = Subject("app.a", "alice", {"id": "1", "kind": "x"})
BOB = Subject("app.b", "bob", {"id": "2"})
PATIENCE = 5.0
"""With the default `denied_ttl_seconds`."""


class FakeBus:
    """
    An `InvalidationBus` that loses, repeats and delays what a test wants.

    Attributes:
        journal: All messages published, also those that were lost.
        is_down: Whether both methods raise an error.
        hangs: Whether `publish` never returns.
        is_mute: Whether messages are lost, without an error.
        held: If a list, messages wait in it until the test passes them on.
    """

    def __init__(self):
        self.journal = []
        self.is_down = self.hangs = self.is_mute = False
        self.held = None
        self.subscriptions = 0
        self._receivers = {}

    async def publish(self, tags, /):
        await anyio.lowlevel.checkpoint()
        if self.is_down:
            raise ConnectionRefusedError("redis://user:password@host is down")
        if self.hangs:
            await anyio.sleep_forever()
        self.journal.append(tags)
        if self.held is not None:
            self.held.append(tags)
        elif not self.is_mute:
            self.pass_on(tags)

    async def receive(self, deliver, /):
        await anyio.lowlevel.checkpoint()
        if self.is_down:
            raise ConnectionRefusedError("redis://user:password@host is down")
        self.subscriptions += 1
        ended = anyio.Event()
        self._receivers[ended] = deliver
        try:
            await ended.wait()
        finally:
            del self._receivers[ended]
        raise ConnectionResetError("redis://user:password@host has gone")

    def pass_on(self, tags):
        for deliver in list(self._receivers.values()):
            deliver(tags)

    def go_down(self):
        self.is_down = True
        for ended in self._receivers:
            ended.set()


class Peer:
    """Another process on the bus: it makes messages, which the test delivers."""

    def __init__(self, key=KEY):
        self.tagger = Tagger(derived(key, b"topaz bus tags"))
        self.seal = Seal(key)
        self.sender = os.urandom(16)
        self.beat = self.number = 0

    def says(self, identity=None, policy_path=None, resource=None):
        """Return the messages of an invalidation."""
        concerned = self.tagger.concerned(identity, policy_path, resource)
        return [self._message(tags or {self.tagger.everything}) for tags in concerned]

    def beats(self):
        """Return a message without an invalidation."""
        return self._message(frozenset())

    def _message(self, tags):
        self.beat, self.number = self.beat + 1, self.number + bool(tags)
        return self.seal.close(
            Message(self.sender, self.beat, self.number, frozenset(tags))
        )


@asynccontextmanager
async def running(*caches, settled=True):
    """Run the links of *caches*, and wait until they reach their bus."""
    async with anyio.create_task_group() as tasks:
        for cache in caches:
            tasks.start_soon(cache._companion)
        if settled:
            await reached(*caches)
        yield
        tasks.cancel_scope.cancel()


async def reached(*caches):
    def all_reach_it():
        return {cache.status().bus.state for cache in caches} == {"reachable"}

    await eventually(all_reach_it, 60)


class Answering:
    """An `Ask` that allows all."""

    async def __call__(self, question, /):
        return Decision(allowed=True)


class Process:
    """The cache of one process on *bus*."""

    def __init__(self, bus, key=KEY, **options):
        self.cache = DecisionCache(
            jitter=0, invalidation_bus=bus, invalidation_key=key, **options
        )
        self.layer = Cached(Answering(), self.cache, OpenHere())
        self.layer.freshness.clock = anyio.current_time
        self.cache._link._limit.clock = anyio.current_time

    async def origins(self, *subjects):
        return [(await self.layer(each.question())).origin for each in subjects]

    @property
    def bus(self):
        return self.cache.status().bus


async def ages_out(process, seconds, again="authorizer"):
    """Return whether an allowed answer ends after *seconds*."""
    await process.origins(ALICE)
    await anyio.sleep(seconds - 0.01)
    assert await process.origins(ALICE) == ["cache"]
    await anyio.sleep(0.02)
    assert await process.origins(ALICE) == [again]
