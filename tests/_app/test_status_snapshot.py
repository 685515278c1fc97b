"""Test what the status page shows of pools and decisions, and what it hides."""

from __future__ import annotations

import enum
import json
import math

import attrs
import pytest

from fastapi_topaz import CircuitBreaker, ConnectionPool, DecisionCache
from fastapi_topaz._app import status_snapshot
from fastapi_topaz._app.status_snapshot import LONGEST, plain, snapshot
from fastapi_topaz.exceptions import ConnectFailed
from fastapi_topaz.testing import FakeConnector, fail
from kit.configs import config_of
from kit.decisions import http_request
from kit.pools import make_pool
from kit.secrets import ALICE, KEY, RESOURCE, SECRETS


def pools_of(pool, **options):
    shown = snapshot(config_of(pool, **options), ())
    json.dumps(shown, allow_nan=False)
    return shown["pools"][0]


async def test_a_new_pool_is_shown():
    shown = pools_of(make_pool(name="new"))
    assert (shown["name"], shown["phase"], shown["connections"]) == ("new", "new", [])
    assert shown["events"] == []


async def test_an_open_pool_is_shown_with_its_connections_and_events():
    pool = make_pool(FakeConnector())
    async with pool, pool.acquire():
        shown = pools_of(pool)
        (connection,) = shown["connections"]
        assert connection == {
            **pool.connections()[0].as_dict(),
            "age": connection["age"],
            "condition": "busy",
            "streams": 1,
        }
        assert shown["phase"] == "open"
        assert shown["status"] == pool.status().as_dict()
        assert shown["counters"]["acquisitions"] == 1
        assert [event["kind"] for event in shown["events"]] == [
            "connected",
            "pool opened",
        ]
    assert pools_of(pool)["phase"] == "closed"
    kinds = [event["kind"] for event in pools_of(pool)["events"]]
    assert kinds == ["pool closed", "closed", "connected", "pool opened"]


async def test_the_layers_of_decisions_are_shown():
    config = config_of(
        make_pool(), decision_cache=DecisionCache(), circuit_breaker=CircuitBreaker()
    )
    shown = snapshot(config, ())["decisions"]
    assert shown["cache"]["misses"] == 0
    assert shown["breaker"]["state"] == "closed"
    assert shown["fallbacks"] == []


async def test_a_layer_that_is_not_configured_is_none():
    shown = snapshot(config_of(make_pool()), ())["decisions"]
    assert shown["cache"] is None
    assert shown["breaker"] is None


async def test_outcomes_and_uses_of_a_fallback_are_shown():
    pool = make_pool(FakeConnector([fail()], default=fail()), retry_on_failure=False)
    config = config_of(pool, fallback="deny")
    async with pool:
        assert not await config.is_allowed(http_request(), "app.x")
    shown = snapshot(config, ())["decisions"]
    assert shown["fallbacks"] == [
        {"strategy": "deny", "older_answer": False, "decision": "denied", "count": 1}
    ]
    none = {"allowed": 0, "denied": 0, "error": 0, "cancelled": 0}
    assert shown["outcomes"] == [
        {"source": "dependency", **none},
        {"source": "manual", **none, "denied": 1},
    ]


async def test_a_further_section_needs_one_entry(monkeypatch):
    monkeypatch.setitem(
        status_snapshot.SECTIONS,
        "more",
        lambda config: {"root": config.policy_path_root},
    )
    shown = snapshot(config_of(make_pool()), ())["decisions"]
    assert shown["more"] == {"root": "app"}


# -- what is hidden -----------------------------------------------------------------


@pytest.mark.real_clock
async def test_no_secret_and_no_identity_are_shown(keyed_authorizer):
    pool = ConnectionPool(min_connections=0)
    config = config_of(
        pool,
        keyed_authorizer.options,
        identity_provider=lambda _request: ALICE,
        decision_cache=DecisionCache(),
    )
    async with pool:
        await config.is_allowed(
            http_request(), "app.x", resource_context={"card": RESOURCE}
        )
        keyed_authorizer.fail("UNAVAILABLE", f"{ALICE.value} {KEY} {RESOURCE}")
        with pytest.raises(Exception, match="UNAVAILABLE"):
            await config.is_allowed(http_request(), "app.y")
        text = json.dumps(snapshot(config, ()))
    assert "UNAVAILABLE" in text
    assert not [secret for secret in SECRETS if secret in text]


async def test_a_password_in_the_text_of_an_error_is_hidden():
    error = ConnectFailed("cannot connect to db://admin:hunter2@db.test/x for a@b.test")
    pool = make_pool(FakeConnector([fail(error)]), retry_on_failure=False)
    async with pool:
        with pytest.raises(ConnectFailed):
            await pool.acquire()
        details = [event["detail"] for event in pools_of(pool)["events"]]
    assert "cannot connect to db://***@db.test/x for ***@b.test" in details


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain", "plain"),
        ("x://user:pass@host/path", "x://***@host/path"),
        ("x://user:p@ss@host", "x://***@host"),
        ("x://user:p/ss@host", "x://***@host"),
        ('"x://u:p"w@h"', '"x://***@h"'),
        ("user:pass@host:8282", "***@host:8282"),
        ("mail alice@example.com now", "mail ***@example.com now"),
        ("a\u202eb", "a\ufffdb"),
        ("a\nb\tc\x00", "a\ufffdb\ufffdc\ufffd"),
        ("\ud800", "\ufffd"),
        ("<script>", "<script>"),
    ],
)
def test_texts_hide_what_stands_before_an_at_and_what_cannot_be_seen(text, shown):
    assert plain(text) == shown
    assert plain({text: [text]}) == {shown: [shown]}


@pytest.mark.parametrize("size", range(LONGEST - 30, LONGEST + 30))
def test_a_long_text_is_cut_so_that_no_part_of_a_password_is_left(size):
    text = plain("x" * size + " db://admin:swordfish@host and more" + " y" * LONGEST)
    assert len(text) <= LONGEST + 2
    assert "adm" not in text
    assert "sw" not in text


def test_a_huge_text_takes_little_time():
    """Without a limit, the search would look at each of its characters many times."""
    assert plain("x" * 5_000_000) == "…"
    assert plain("x://" + "a:" * 2_000_000) == "…"


class Colour(enum.IntEnum):
    RED = 1


@attrs.frozen
class Record:
    seconds: float
    names: tuple[str, ...]


class Unknown:
    def __repr__(self):
        return "a secret"


@pytest.mark.parametrize(
    "value, shown",
    [
        (math.inf, None),
        (math.nan, None),
        (0.5, 0.5),
        (True, True),
        (None, None),
        (Colour.RED, 1),
        (Record(math.inf, ("a",)), {"seconds": None, "names": ["a"]}),
        (Unknown(), "a Unknown"),
        (Record, "a type"),
        (b"bytes", "a bytes"),
        ({1: Unknown()}, {"1": "a Unknown"}),
    ],
)
def test_each_value_becomes_json(value, shown):
    assert plain(value) == shown
    json.dumps(plain(value), allow_nan=False)
