"""Test which events a pool keeps, and how many."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from fastapi_topaz import ConnectFailed
from fastapi_topaz._fork import current as process
from fastapi_topaz._pool import events
from fastapi_topaz._pool.events import LONGEST, MOST_EVENTS, Events
from fastapi_topaz.testing import FakeConnector, fail, ok
from kit.autojump import jump
from kit.pools import fill, make_pool
from kit.waiting import eventually


def places(pool):
    """Return the kind and the peer of each event about a connection."""
    return [(each.kind, each.peer) for each in pool._events.recent() if each.peer]


def kinds(pool):
    return [event.kind for event in pool._events.recent()]


def test_the_newest_event_is_first():
    kept = Events()
    kept.add("a")
    kept.add("b", "peer", "why")
    newest, oldest = kept.recent()
    assert (newest.kind, newest.peer, newest.detail) == ("b", "peer", "why")
    assert (oldest.kind, oldest.peer, oldest.detail) == ("a", None, None)


def test_equal_events_in_a_row_share_one_place(monkeypatch):
    times = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(events.time, "time", lambda: next(times))
    kept = Events()
    for kind in ("a", "a", "b", "a"):
        kept.add(kind)
    assert [(each.kind, each.count, each.at) for each in kept.recent()] == [
        ("a", 1, 4.0),
        ("b", 1, 3.0),
        ("a", 2, 2.0),
    ]


def test_the_number_of_events_and_the_length_of_a_detail_are_limited():
    kept = Events()
    for number in range(2 * MOST_EVENTS):
        kept.add("a", detail=f"{number} " + "x" * LONGEST)
    recent = kept.recent()
    assert len(recent) == MOST_EVENTS
    assert recent[0].detail == f"{2 * MOST_EVENTS - 1} …"


def test_a_forked_process_has_no_events_of_its_parent(monkeypatch):
    kept = Events()
    kept.add("a")
    monkeypatch.setattr(process, "pid", process.pid + 1)
    assert kept.recent() == ()
    kept.add("b")
    assert [event.kind for event in kept.recent()] == ["b"]


async def test_a_failed_attempt_is_kept_with_its_reason():
    pool = make_pool(FakeConnector([fail("refused"), ok()]), max_retries=1)
    async with pool:
        async with pool.acquire():
            pass
        assert kinds(pool) == ["connected", "connect failed", "pool opened"]
        assert places(pool) == [("connected", "fake:1")]
        assert "refused" in pool._events.recent()[1].detail


@pytest.mark.costly
async def test_an_outage_takes_few_places():
    pool = make_pool(FakeConnector(default=fail("refused")), min_connections=1)
    async with pool:
        for _ in range(5):
            with pytest.raises(ConnectFailed):
                await pool.acquire()
            await anyio.sleep(60)
        failed, opened = pool._events.recent()
        assert (failed.kind, opened.kind) == ("connect failed", "pool opened")
        assert failed.count > 10


async def test_a_connection_that_does_not_answer_is_kept_with_its_reasons():
    connector = FakeConnector()
    pool = make_pool(
        connector, min_connections=1, health_check_interval=1, eager_init=True
    )
    async with pool:
        connector.open[0].alive = False
        await eventually(lambda: "closed" in kinds(pool), 60)
        (closed,) = (each for each in pool._events.recent() if each.kind == "closed")
        assert closed.peer == "fake:1"
        assert closed.detail == "unhealthy, its last error: fake connection 1 is dead"
        assert ("probe failed", "fake:1") in places(pool)


async def test_a_silent_connection_is_suspect_and_recovers():
    async with make_pool() as pool:
        async with pool.acquire() as conn:
            conn.connection.frozen = True
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    await conn.call("/a/b", b"", timeout=1)
            conn.connection.frozen = False  # before the probe begins
        await eventually(lambda: places(pool)[0] == ("recovered", "fake:1"))
        suspect = pool._events.recent()[1]
        assert (suspect.kind, suspect.peer) == ("suspect", "fake:1")
        assert suspect.detail == "two calls in a row got no answer in time"


async def test_a_connection_without_an_answer_for_long_is_suspect_with_this_reason():
    pool = make_pool(max_connections=1, max_idle_time=0, max_lifetime=0)
    async with pool:
        await fill(pool, 1)
        jump(8 * 3600)
        async with pool.acquire(timeout=60):
            pass
        (suspect,) = (each for each in pool._events.recent() if each.kind == "suspect")
        assert suspect.detail == "it has answered nothing for too long"


async def test_refusals_are_an_outage_until_a_probe_is_answered():
    """As by a proxy that answers for a server that is down."""
    connector = FakeConnector()
    async with make_pool(connector, max_connections=1) as pool:
        async with pool.acquire() as conn:
            conn.connection.refuses = "no healthy upstream"
            with pytest.raises(ConnectionRefusedError):
                await conn.call("/a/b", b"")
        await eventually(lambda: "outage" in kinds(pool), 60)
        (outage,) = (each for each in pool._events.recent() if each.kind == "outage")
        assert (outage.peer, outage.count) == ("fake:1", 1)
        assert "not available: no healthy upstream" in outage.detail
        assert ("probe refused", "fake:1") in places(pool)
        connector.connections[0].refuses = ""
        await eventually(lambda: places(pool)[0] == ("outage over", "fake:1"), 60)
        assert pool.connections()[0].last_error == "no healthy upstream"
    closed = pool._events.recent()[1]
    assert (closed.kind, closed.detail) == ("closed", "close"), "not for its error"


def test_a_connection_of_a_closed_event_loop_is_kept_as_closed():
    pool = make_pool(FakeConnector())
    loop = asyncio.new_event_loop()
    loop.run_until_complete(fill(pool, 1))
    with pytest.warns(ResourceWarning, match="was not closed before its event loop"):
        loop.close()
    assert kinds(pool) == ["pool closed", "closed", "connected", "pool opened"]
    closed = pool._events.recent()[1]
    assert (closed.peer, closed.detail) == ("fake:1", "close")


def test_a_closed_event_loop_keeps_the_reason_why_a_connection_was_leaving():
    pool = make_pool(FakeConnector(), max_connections=2)

    async def leave_one():
        leases = [await pool.acquire() for _ in range(2)]
        pool.resize(0, 1)
        return leases

    loop = asyncio.new_event_loop()
    leases = loop.run_until_complete(leave_one())
    with pytest.warns(ResourceWarning, match="was not closed before its event loop"):
        loop.close()
    closed = [each for each in pool._events.recent() if each.kind == "closed"]
    assert sorted((each.peer, each.detail) for each in closed) == [
        ("fake:1", "resize"),
        ("fake:2", "close"),
    ]
    for lease in leases:
        anyio.run(pool.release, lease)


async def test_the_reason_of_each_closing_is_kept():
    pool = make_pool(FakeConnector(), max_idle_time=1, idle_check_interval=1)
    async with pool:
        async with pool.acquire():
            pass
        await anyio.sleep(3)
        newest = pool._events.recent()[0]
        assert (newest.kind, newest.detail) == ("closed", "idle")
