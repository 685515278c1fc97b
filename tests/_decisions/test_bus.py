"""Invalidations between processes: what arrives, what is lost, and what is hostile."""

from __future__ import annotations

import logging
import threading

import anyio
import pytest

from fastapi_topaz import DecisionCache, Identity, IdentityType
from fastapi_topaz._decisions.seal import (
    MOST_SENDERS,
    MOST_TAGS,
    Message,
    Seal,
    Senders,
)
from fastapi_topaz._decisions.tags import Tagger
from kit.bus import (
    ALICE,
    BOB,
    KEY,
    PATIENCE,
    FakeBus,
    Peer,
    Process,
    ages_out,
    reached,
    running,
)
from kit.decisions import HeldAuthorizer, Subject
from kit.logs import lines


# -- at the door ----------------------------------------------------------------------


class Half:
    async def publish(self, tags):
        pass


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"invalidation_bus": FakeBus()}, TypeError, "needs an invalidation_key"),
        ({"invalidation_key": KEY}, TypeError, "needs an invalidation_bus"),
        (
            {"invalidation_bus": FakeBus(), "invalidation_key": "k" * 32},
            TypeError,
            "secret of bytes.* got str",
        ),
        (
            {"invalidation_bus": FakeBus(), "invalidation_key": b"secret"},
            ValueError,
            "at least 16 bytes, got 6",
        ),
        (
            {"invalidation_bus": FakeBus(), "invalidation_key": b""},
            ValueError,
            "at least 16 bytes",
        ),
        ({"invalidation_bus": Half(), "invalidation_key": KEY}, TypeError, "receive"),
        ({"invalidation_bus": FakeBus, "invalidation_key": KEY}, TypeError, "publish"),
    ],
)
def test_a_missing_or_wrong_argument_is_an_error_at_once(options, error, text):
    with pytest.raises(error, match=text) as caught:
        DecisionCache(**options)
    assert "secret'" not in str(caught.value)
    assert "k" * 32 not in str(caught.value)


def test_without_a_bus_there_is_no_link():
    cache = DecisionCache()
    assert cache.status().bus is None
    assert cache._companion is None


# -- what arrives ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "about",
    [
        {"identity": ALICE.identity},
        {"policy_path": "app.a"},
        {"resource": {"id": "1"}},
        {"resource": {"kind": "x", "id": "1"}},
        {"identity": Identity(IdentityType.SUB, "carl"), "policy_path": "app.a"},
    ],
)
async def test_an_invalidation_reaches_other_processes(hub, here, about):
    there = Process(hub)
    async with running(here.cache, there.cache):
        await there.origins(ALICE, BOB)
        assert await there.origins(ALICE, BOB) == ["cache", "cache"]
        here.cache.invalidate(**about)
        await anyio.sleep(0.01)
        assert await there.origins(ALICE, BOB) == ["authorizer", "cache"]
        # The new answers stay.
        await anyio.sleep(3)
        assert await there.origins(ALICE, BOB) == ["cache", "cache"]


async def test_all_fields_of_a_resource_count_there_too(hub, here):
    there = Process(hub)
    async with running(here.cache, there.cache):
        await there.origins(ALICE)
        here.cache.invalidate(resource={"id": "1", "kind": "y"})
        await anyio.sleep(0.01)
        assert await there.origins(ALICE) == ["cache"]


@pytest.mark.parametrize("how", ["clear", "invalidate"])
async def test_clearing_reaches_other_processes(hub, here, how):
    there = Process(hub)
    async with running(here.cache, there.cache):
        await there.origins(ALICE, BOB)
        if how == "clear":
            await here.cache.clear()
        else:
            here.cache.invalidate()
        await anyio.sleep(0.01)
        assert there.cache.status().size == 0
        assert await there.origins(ALICE, BOB) == ["authorizer", "authorizer"]


async def test_an_answer_under_way_does_not_survive_a_foreign_invalidation(hub, here):
    there = Process(hub)
    server = HeldAuthorizer()
    there.layer.ask = server
    async with running(here.cache, there.cache), anyio.create_task_group() as tasks:
        tasks.start_soon(there.origins, ALICE)
        await anyio.sleep(0.1)
        here.cache.invalidate(identity=ALICE.identity)
        await anyio.sleep(0.1)
        server.open[0].answer(allowed=True)
        await anyio.sleep(0.1)
        tasks.start_soon(there.origins, ALICE)
        await anyio.sleep(0.1)
        assert len(server.calls) == 2
        server.open[0].answer(allowed=True)


async def test_a_resource_with_very_many_fields_concerns_more(hub, here):
    there = Process(hub, max_request_bytes=10**6)
    many = Subject("app.a", resource={str(n): n for n in range(MOST_TAGS + 1)})
    async with running(here.cache, there.cache):
        await there.origins(many)
        here.cache.invalidate(resource=many.resource)
        await anyio.sleep(0.01)
        assert await there.origins(many) == ["authorizer"]
        assert there.bus.rejected == 0


async def test_an_own_message_that_comes_back_invalidates_nothing(hub, here):
    async with running(here.cache):
        here.cache.invalidate(policy_path="app.a")
        # Asked after the change, and before the own message comes back.
        hub.held = []
        here.cache.invalidate(policy_path="app.a")
        await anyio.sleep(0.01)
        await here.origins(ALICE)
        for each in [*hub.held, *hub.held]:
            hub.pass_on(each)
        assert await here.origins(ALICE) == ["cache"]
        assert here.bus.state == "reachable"


async def test_an_invalidation_works_from_another_thread(hub, here):
    there = Process(hub)
    now = anyio.current_time()
    async with running(here.cache, there.cache):
        await there.origins(ALICE)
        # The clock of a loop does not work in other threads.
        here.layer.freshness.clock = lambda: now
        threads = [
            threading.Thread(target=here.cache.invalidate, kwargs={"policy_path": p})
            for p in ("app.a", "app.c")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        await anyio.sleep(0.01)
        assert await there.origins(ALICE) == ["authorizer"]
        assert here.bus.waiting == 0


# -- what leaves the process ----------------------------------------------------------


async def test_nothing_leaves_the_process_in_clear(hub, here):
    async with running(here.cache):
        here.cache.invalidate(
            identity=Identity(IdentityType.SUB, "alice@example.com"),
            policy_path="app.secret",
            resource={"document": "confidential"},
        )
        await anyio.sleep(0.01)
    data = b"".join(part for message in hub.journal for part in message)
    for text in (b"alice", b"secret", b"document", b"confidential", KEY):
        assert text not in data
    assert {len(part) for message in hub.journal for part in message} == {16}


def test_tags_are_hashes_with_the_key():
    about = (ALICE.identity, "app.a", {"id": "1"})
    same, other = Peer().tagger.concerned(*about), Peer(b"x" * 32).tagger
    assert same == Peer().tagger.concerned(*about)
    assert not set().union(*same) & set().union(*other.concerned(*about))
    assert Tagger().concerned(*about) != Tagger().concerned(*about)


# -- while the bus is unreachable -----------------------------------------------------


async def test_answers_live_long_only_while_the_bus_is_reachable(hub, here, caplog):
    # The pool is not open yet.
    assert here.bus.state == "unreachable"
    await ages_out(here, 5)
    async with running(here.cache):
        await ages_out(here, 30)
        await here.origins(ALICE, BOB)
        await anyio.sleep(6)
        hub.go_down()
        await anyio.sleep(0.001)
        # At once, also those that are known already.
        assert here.bus.state == "unreachable"
        assert await here.origins(ALICE) == ["authorizer"]
        await ages_out(here, 5)
        assert here.bus.outages == 1
        await here.origins(BOB)
        hub.is_down = False
        await reached(here.cache)
        # An invalidation may have been lost meanwhile.
        assert await here.origins(BOB) == ["authorizer"]
        await ages_out(here, 30)
    warnings = lines(caplog, logging.WARNING, logger="fastapi_topaz.decisions")
    text = "\n".join(warnings)
    assert "unreachable (ConnectionResetError): answers live at most 5 s" in text
    assert "password" not in caplog.text
    assert "is reachable; the cache was cleared" in caplog.text
    # Limited, though it tried very often.
    assert len(warnings) < 12


async def test_a_bus_that_goes_silent_is_unreachable_after_a_few_seconds(hub, here):
    async with running(here.cache):
        await here.origins(ALICE)
        hub.is_mute = True
        await anyio.sleep(PATIENCE)
        assert here.bus.state == "unreachable"
        assert await here.origins(ALICE) == ["authorizer"]
        await anyio.sleep(PATIENCE)
        assert here.bus.outages == 1
        # It subscribes again by itself, because the old subscription may be dead.
        before = hub.subscriptions
        await anyio.sleep(3 * PATIENCE)
        assert hub.subscriptions > before
        hub.is_mute = False
        await reached(here.cache)
        await ages_out(here, 30)


async def test_a_blocked_loop_uses_no_old_answer_before_it_looks_at_the_bus(here):
    async with running(here.cache):
        now = [anyio.current_time()]
        here.layer.freshness.clock = lambda: now[0]
        await anyio.sleep(4)
        await here.origins(ALICE)
        now[0] += PATIENCE + 1
        assert here.bus.state == "unreachable"
        assert await here.origins(ALICE) == ["authorizer"]


async def test_a_clock_that_goes_back_makes_the_bus_unreachable(here):
    async with running(here.cache):
        here.layer.freshness.clock = lambda: anyio.current_time() - 100
        assert here.bus.state == "unreachable"


async def test_a_stale_answer_is_limited_too(hub):
    here = Process(hub, stale_ttl_seconds=100)
    async with running(here.cache):
        await here.origins(ALICE)
        await anyio.sleep(40)
        assert here.layer.stale(ALICE.question()).origin == "stale"
        hub.go_down()
        await anyio.sleep(0.001)
        assert here.layer.stale(ALICE.question()) is None
        await here.origins(ALICE)
        await anyio.sleep(4.9)
        assert here.layer.stale(ALICE.question()).origin == "stale"


@pytest.mark.parametrize("denied, patience", [(0, 1), (0.5, 1), (7, 7), (300, 15)])
def test_how_soon_a_silent_bus_is_noticed_follows_the_limit(hub, denied, patience):
    here = Process(hub, ttl_seconds=600, denied_ttl_seconds=denied)
    assert here.cache._link.patience == patience


async def test_the_bus_never_makes_an_answer_live_longer(hub):
    here = Process(hub, ttl_seconds=2, denied_ttl_seconds=20)
    await ages_out(here, 2)
    async with running(here.cache):
        await ages_out(here, 2)


# -- lost, repeated and reordered -----------------------------------------------------


async def test_a_gap_clears_the_cache(hub, here, caplog):
    there = Peer()
    async with running(here.cache):
        for message in there.says(policy_path="app.c"):
            hub.pass_on(message)
        await here.origins(ALICE, BOB)
        there.says(policy_path="app.a")  # lost
        for message in there.says(policy_path="app.c"):
            hub.pass_on(message)
        assert await here.origins(ALICE, BOB) == ["authorizer", "authorizer"]
        assert here.bus.gaps == 1
        assert here.bus.state == "reachable"
    assert "has lost messages of another process" in caplog.text


async def test_a_gap_at_the_end_is_noticed_with_the_next_message(hub, here):
    there = Peer()
    async with running(here.cache):
        hub.pass_on(there.beats())
        await here.origins(ALICE)
        hub.pass_on(there.beats())
        assert await here.origins(ALICE) == ["cache"]
        there.says(policy_path="app.a")  # lost
        hub.pass_on(there.beats())
        assert await here.origins(ALICE) == ["authorizer"]
        assert here.bus.gaps == 1


async def test_a_process_whose_first_messages_are_unknown_clears_the_cache(hub, here):
    there = Peer()
    there.says(policy_path="app.a")  # before, or lost
    async with running(here.cache):
        await here.origins(ALICE)
        hub.pass_on(there.beats())
        assert await here.origins(ALICE) == ["authorizer"]
        hub.pass_on(there.beats())
        assert await here.origins(ALICE) == ["cache"]
        assert here.bus.gaps == 0


async def test_a_new_process_clears_nothing(hub, here):
    async with running(here.cache):
        await here.origins(ALICE)
        cleared = here.bus.clears
        async with running(Process(hub).cache):
            await anyio.sleep(4)
        assert await here.origins(ALICE) == ["cache"]
        assert here.bus.clears == cleared


async def test_what_comes_twice_or_too_late_changes_nothing_more(hub, here):
    there = Peer()
    async with running(here.cache):
        (first,), (second,), (third,) = (there.says(policy_path="app.a") for _ in "123")
        hub.pass_on(first)
        await here.origins(ALICE)
        hub.pass_on(first)
        assert await here.origins(ALICE) == ["cache"]
        # The gap covers the message that comes later.
        hub.pass_on(third)
        assert await here.origins(ALICE) == ["authorizer"]
        hub.pass_on(second)
        assert await here.origins(ALICE) == ["cache"]
        assert (here.bus.ignored, here.bus.gaps) == (2, 1)


def test_the_number_of_known_senders_is_bounded():
    senders = Senders()
    for n in range(MOST_SENDERS + 10):
        assert senders.hear(Message(n.to_bytes(16), 1, 0)) == "next"
    assert len(senders._numbers) == MOST_SENDERS
    assert senders.hear(Message((0).to_bytes(16), 2, 1)) == "joined"


# -- what cannot be read --------------------------------------------------------------


class Hostile(list):
    def __len__(self):
        raise RuntimeError("no length")


def altered(position, change):
    message = list(Peer().says(policy_path="app.a")[0])
    message[position] = change(message[position])
    return message


GARBAGE = [
    None,
    7,
    b"x" * 64,
    "x" * 64,
    [],
    [b"x" * 16],
    [b"x" * 16] * 4,
    [b"x" * 15] * 4,
    ["x" * 16] * 4,
    [bytearray(16)] * 4,
    [None] * 4,
    [b"x" * 16] * (MOST_TAGS + 4),
    [b"x" * 16] * 1_000_000,
    [b"x" * 10_000_000] * 4,
    {1: 2},
    iter([b"x" * 16] * 4),
    Hostile(),
    Peer(b"another key of 32 bytes.........").beats(),
    altered(0, lambda part: part[::-1]),
    altered(1, lambda part: part[::-1]),
    altered(2, lambda part: part[:-1] + b"\x07"),
    altered(3, lambda part: part[::-1]),
    Peer().beats() + Peer().beats(),
    Peer().says(policy_path="app.a")[0][:3],
]


@pytest.mark.parametrize("message", GARBAGE, ids=range(len(GARBAGE)))
async def test_what_cannot_be_read_makes_the_bus_untrusted(hub, here, message, caplog):
    async with running(here.cache):
        await here.origins(ALICE)
        await anyio.sleep(6)
        await here.origins(BOB)
        hub.pass_on(message)
        assert (here.bus.rejected, here.bus.state) == (1, "unreachable")
        assert await here.origins(ALICE, BOB) == ["authorizer", "cache"]
        await anyio.sleep(PATIENCE - 0.1)
        assert here.bus.state == "unreachable"
        await here.origins(BOB)
        await reached(here.cache)
        assert await here.origins(BOB) == ["authorizer"]
    assert "a message cannot be read" in caplog.text


def test_a_message_is_read_as_it_was_written():
    seal, tags = Seal(KEY), frozenset(bytes([n]) * 16 for n in range(MOST_TAGS))
    for message in (
        Message(b"s" * 16, 1, 0),
        Message(b"s" * 16, 2**64 - 1, 2**64 - 1, tags),
    ):
        assert seal.open(seal.close(message)) == message
        assert seal.open(list(seal.close(message))) == message
