"""Test that docs/status-page.md says what the status page does."""

from __future__ import annotations

import ast
import re

import httpx
import pytest
from fastapi import FastAPI, Request

from fastapi_topaz._app import status_stream
from fastapi_topaz._app.status_snapshot import snapshot
from fastapi_topaz._pool.events import MOST_EVENTS
from kit.configs import config_of
from kit.examples import ROOT
from kit.pools import make_pool


PAGE = (ROOT / "docs" / "status-page.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


async def get(app, path, **options):
    transport = httpx.ASGITransport(app)
    base = "http://127.0.0.1"
    async with httpx.AsyncClient(transport=transport, base_url=base) as client:
        return await client.get(path, **options)


@pytest.fixture
def app(monkeypatch):
    """The application of the first snippet."""
    monkeypatch.setenv("STATUS_PASSWORD", "open-sesame")
    names = {"app": FastAPI(), "config": config_of(make_pool())}
    exec(SNIPPETS[0], names)
    return names["app"]


@pytest.mark.parametrize("path", ["/topaz/", "/topaz/json", "/topaz/events"])
async def test_the_guard_of_the_page_wants_the_password(app, path):
    refused = await get(app, path)
    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"].startswith("Basic")
    refused = await get(app, path, auth=("anyone", "sesame"))
    assert refused.status_code == 401
    if path != "/topaz/events":
        permitted = await get(app, path, auth=("anyone", "open-sesame"))
        assert permitted.status_code == 200


async def test_the_guard_that_asks_topaz_returns_the_decision():
    class Config:
        async def is_allowed(self, request, policy_path):
            return (request, policy_path)

    names = {"config": Config(), "Request": Request}
    exec(SNIPPETS[1], names)
    assert await names["may_see_status"]("request") == ("request", "myapp.status")


async def test_each_member_of_the_json_is_in_the_tables():
    pool = make_pool()
    async with pool, pool.acquire():
        shown = snapshot(config_of(pool), ())
    (shown_pool,) = shown["pools"]
    (*_, event) = shown_pool["events"]
    members = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert members == [*shown, *shown_pool, *event]
    for name in (*shown["decisions"], *shown["process"]):
        assert f"`{name}`" in PAGE


def test_each_kind_of_event_is_in_the_table():
    found = {"outage", "probe refused"}  # one call adds either of them
    for path in (ROOT / "fastapi_topaz" / "_pool").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func).endswith("events.add")
                and isinstance(node.args[0], ast.Constant)
            ):
                found.add(node.args[0].value)
    row = re.search(r"^\| `kind` \| (.*) \|", PAGE, re.MULTILINE)
    assert set(re.findall(r"`([\w ]+)`", row[1])) == found


def test_the_limits_are_those_of_the_code():
    assert f"after {status_stream.LONGEST:.0f} seconds at the latest" in PAGE
    assert f"At most {status_stream.MOST_STREAMS} streams" in PAGE
    assert f"The last {MOST_EVENTS} events" in PAGE


def test_the_pictures_exist_and_are_small():
    pictures = re.findall(r"\]\((images/[\w-]+\.png)\)", PAGE)
    assert pictures
    for picture in pictures:
        path = ROOT / "docs" / picture
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert path.stat().st_size < 200_000
