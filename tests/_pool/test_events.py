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
from kit.pools import fill, make_pool
from kit.waiting import eventually


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
        assert "refused" in pool._events.recent()[1].detail


async def test_an_outage_takes_few_places():
    pool = make_pool(FakeConnector(default=fail("refused")), min_connections=1)
    async with pool:
        for _ in range(20):
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
        assert "probe failed" in kinds(pool)


async def test_a_silent_connection_is_suspect_and_recovers():
    async with make_pool() as pool:
        async with pool.acquire() as conn:
            conn.connection.frozen = True
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    await conn.call("/a/b", b"", timeout=1)
            conn.connection.frozen = False  # before the probe begins
        await eventually(lambda: kinds(pool)[0] == "recovered")
        suspect = pool._events.recent()[1]
        assert (suspect.kind, suspect.peer) == ("suspect", "fake:1")
        assert suspect.detail == "two calls in a row got no answer in time"


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
        assert "probe refused" in kinds(pool)
        connector.connections[0].refuses = ""
        await eventually(lambda: kinds(pool)[0] == "outage over", 60)


def test_a_connection_of_a_closed_event_loop_is_kept_as_closed():
    pool = make_pool(FakeConnector())
    loop = asyncio.new_event_loop()
    loop.run_until_complete(fill(pool, 1))
    with pytest.warns(ResourceWarning, match="was not closed before its event loop"):
        loop.close()
    assert kinds(pool) == ["pool closed", "closed", "connected", "pool opened"]


async def test_the_reason_of_each_closing_is_kept():
    pool = make_pool(FakeConnector(), max_idle_time=1, idle_check_interval=1)
    async with pool:
        async with pool.acquire():
            pass
        await anyio.sleep(3)
        newest = pool._events.recent()[0]
        assert (newest.kind, newest.detail) == ("closed", "idle")
