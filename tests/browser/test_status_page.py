"""The status page in Chromium, as a person or a screen reader meets it."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi import Depends, FastAPI

from fastapi_topaz import (
    CircuitBreaker,
    ConnectionPool,
    DecisionCache,
    require_policy_allowed,
    status_app,
)
from fastapi_topaz._app import status_stream
from fastapi_topaz.testing import EmbeddedAuthorizer, FakeConnector, fail
from kit.backends import backends
from kit.configs import config_of, user
from kit.faultkit.proxy import Proxy


pytestmark = [pytest.mark.real_clock, pytest.mark.slow]

# Far longer than anything here takes.
PATIENCE = 30_000
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\u202e\"'&amp;"
POLICY = "app.GET.documents"


@pytest.fixture
def authorizer():
    with EmbeddedAuthorizer({POLICY: True}) as running:
        yield running


def configured(authorizer, name="main", **options):
    pool = ConnectionPool(
        name=name, min_connections=2, max_connections=4, streams_per_connection=5
    )
    return config_of(
        pool,
        authorizer.options,
        identity_provider=user,
        fallback="deny",
        decision_cache=DecisionCache(ttl_seconds=0, denied_ttl_seconds=0),
        circuit_breaker=CircuitBreaker(),
        **options,
    )


def application(config, guard=lambda _request: True, pools=()):
    app = FastAPI(lifespan=config.lifespan)
    app.mount("/topaz", status_app(config, guard=guard, pools=pools))

    @app.get(
        "/documents", dependencies=[Depends(require_policy_allowed(config, POLICY))]
    )
    async def documents():
        return []

    return app


def live(page):
    page.get_by_role("status").get_by_text("Live").wait_for(timeout=PATIENCE)


def ask(url, times=1):
    for number in range(times):
        httpx.get(f"{url}/documents", headers={"user": f"user{number}"}, timeout=30)


def row(page, table, first):
    """Return the texts of the row of *table* that begins with *first*."""
    found = page.get_by_role("table", name=table, exact=True).get_by_role("row")
    cells = found.filter(
        has=page.get_by_role("rowheader", name=first, exact=True)
    ).first
    return cells.locator("th, td").all_inner_texts()


def fact(page, name):
    """Return the value beside the term *name*."""
    return page.locator(f"dl > div:has(dt:text-is('{name}')) dd").inner_text()


@backends
def test_the_page_shows_the_pool_and_the_decisions(
    new_page, serve, authorizer, backend
):
    config = configured(authorizer)
    url = serve(application(config), backend)
    ask(url, 3)
    page = new_page()
    page.goto(f"{url}/topaz/")
    live(page)
    assert str(os.getpid()) in page.locator("#process").inner_text()
    page.get_by_role("heading", name="Pool main").wait_for(timeout=PATIENCE)
    assert page.get_by_text("Healthy").is_visible()
    assert fact(page, "Leases given") == "3"
    assert fact(page, "Connections") == f"{config.connection_pool.status().total} of 4"
    assert fact(page, "Reason of the limit") == "New, not raised yet"
    peer = f"ipv4:{authorizer.url}"
    assert row(page, "Connections", peer)[1] == "idle"
    assert row(page, "Cache", "Misses")[1] == "3"
    assert row(page, "Breaker", "State")[1] == "closed"
    events = page.get_by_role("table", name="Recent events")
    assert "connected" in events.inner_text()


def test_the_page_follows_an_outage_and_its_end(new_page, serve, authorizer):
    with Proxy([authorizer.port]) as door:
        config = configured(authorizer)
        options = config.authorizer_options
        config = config_of(
            ConnectionPool(name="main", min_connections=2),
            type(options)(url=door.url, insecure=True),
            fallback="deny",
        )
        url = serve(application(config))
        page = new_page()
        page.goto(f"{url}/topaz/")
        live(page)
        ask(url)
        page.get_by_text("Healthy").wait_for(timeout=PATIENCE)
        door.refuse()
        door.cut()
        ask(url)
        failing = page.get_by_text("Failing: no connection can be used")
        failing.wait_for(timeout=PATIENCE)
        events = page.get_by_role("table", name="Recent events")
        events.get_by_text("connect failed").first.wait_for(timeout=PATIENCE)
        events.get_by_text("lost").first.wait_for(timeout=PATIENCE)
        page.get_by_role("table", name="Fallbacks").wait_for(timeout=PATIENCE)
        assert row(page, "Fallbacks", "deny")[1:] == ["no", "denied", "1"]
        door.listen()
        page.get_by_text("Healthy").wait_for(timeout=PATIENCE)


def test_the_page_connects_again_after_each_stream(
    new_page, serve, authorizer, monkeypatch
):
    monkeypatch.setattr(status_stream, "LONGEST", 1.5)
    url = serve(application(configured(authorizer)))
    page = new_page()
    streams = []
    page.on("request", lambda each: streams.append(each.url.endswith("/events")))
    page.goto(f"{url}/topaz/")
    live(page)
    for _ in range(3):
        before = sum(streams)
        with page.expect_request("**/events", timeout=PATIENCE):
            pass
        assert sum(streams) > before
    live(page)
    # It never had to ask for the JSON.
    assert page.locator("#live").inner_text() == "Live"


def test_the_page_comes_back_after_the_application(
    new_page, serve, authorizer, complaints
):
    url = serve(application(configured(authorizer)))
    with Proxy([int(url.rpartition(":")[2])]) as door:
        page = new_page()
        page.goto(f"http://{door.url}/topaz/")
        live(page)
        door.refuse()
        door.cut()
        page.get_by_role("status").get_by_text("No answer").wait_for(timeout=PATIENCE)
        door.listen()
        live(page)
        page.close()
    # Chromium reports failed requests, and nothing else is expected.
    assert complaints
    assert all("net::ERR_" in each for each in complaints)
    complaints.clear()


def test_a_stalled_stream_is_replaced_by_the_json(new_page, serve, authorizer):
    """As behind a proxy that keeps events back."""
    url = serve(application(configured(authorizer)))
    page = new_page()
    page.route("**/events", lambda _route: None)
    page.goto(f"{url}/topaz/")
    page.get_by_role("status").get_by_text("Not live").wait_for(timeout=PATIENCE)
    page.get_by_role("heading", name="Pool main").wait_for(timeout=PATIENCE)
    page.unroute("**/events")
    live(page)


def test_the_page_says_that_the_guard_refuses(
    new_page, serve, authorizer, complaints, monkeypatch
):
    """The guard decides again at each stream, so a lost right ends the page."""
    monkeypatch.setattr(status_stream, "LONGEST", 1.5)
    permitted = [True]
    config = configured(authorizer)
    url = serve(application(config, lambda _request: permitted[0]))
    page = new_page()
    page.goto(f"{url}/topaz/")
    live(page)
    permitted[0] = False
    refused = page.get_by_role("status").get_by_text("Refused with status 403")
    refused.wait_for(timeout=PATIENCE)
    assert all("403" in each for each in complaints)
    complaints.clear()


def test_hostile_texts_are_only_texts(new_page, serve, authorizer):
    connector = FakeConnector(default=fail(f"refused: {HOSTILE}"))
    other = ConnectionPool(name=HOSTILE, connector=connector, retry_on_failure=False)
    config = configured(authorizer, name=HOSTILE)
    app = application(config, pools=[other])

    @app.get("/other")
    async def use_other():
        with contextlib.suppress(Exception):
            await other.acquire()

    url = serve(app)
    httpx.get(f"{url}/other", timeout=30)
    page = new_page()
    page.goto(f"{url}/topaz/")
    live(page)
    shown = HOSTILE.replace("\u202e", "\ufffd")
    titles = page.get_by_role("heading", level=2).all_inner_texts()
    assert titles[:2] == [f"Pool {shown}"] * 2
    assert shown in page.locator("#pools").inner_text()
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1


ATTACKS = {
    "html": "document.body.innerHTML = '<b>'",
    "script": "document.createElement('script').text = 'alert(1)'",
    "image": "document.body.append(Object.assign(new Image(), {src: '/documents'}))",
    "style": "document.body.setAttribute('style', 'color: red')",
    "frame": "document.body.append(Object.assign("
    "document.createElement('iframe'), {src: '/documents'}))",
    "request": "fetch('https://127.0.0.1:1/')",
    "timer": "setTimeout('alert(1)')",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_the_policy_stops_what_is_inserted(
    new_page, serve, authorizer, complaints, attack
):
    """Even if the page had a hole, the browser would refuse."""
    url = serve(application(configured(authorizer)))
    page = new_page()
    page.goto(f"{url}/topaz/")
    live(page)
    with (
        page.expect_console_message(
            lambda message: message.text.startswith("CSP: "), timeout=PATIENCE
        ),
        contextlib.suppress(Exception),
    ):
        page.evaluate(attack)
    page.close()
    complaints.clear()


def test_the_page_can_be_paused(new_page, serve, authorizer):
    url = serve(application(configured(authorizer)))
    page = new_page()
    page.goto(f"{url}/topaz/")
    live(page)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_role("status").get_by_text("Paused").wait_for(timeout=PATIENCE)
    button = page.get_by_role("button", name="Pause")
    assert button.get_attribute("aria-pressed") == "true"
    ask(url, 2)
    assert fact(page, "Leases given") == "0"
    button.press("Space")
    live(page)
    term = page.locator("dl > div:has(dt:text-is('Leases given'))")
    term.get_by_text("2", exact=True).wait_for(timeout=PATIENCE)


CONTRAST = """() => {
  const channel = (value) =>
    value <= 10 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4;
  const light = (colour) => {
    const [red, green, blue] = colour.match(/[\\d.]+/g).map(Number).map(channel);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const back = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? back(element.parentElement) : colour;
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some(
      (node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
    if (!own || !element.checkVisibility()) continue;
    const pair = [light(getComputedStyle(element).color), light(back(element))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    found.push([element.tagName + "." + element.className, ratio]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_text_has_enough_contrast(new_page, serve, authorizer, scheme):
    """WCAG 2.2, level AA: at least 4.5 to 1. In both schemes, also bad news."""
    connector = FakeConnector(default=fail("refused"))
    other = ConnectionPool(name="other", connector=connector, retry_on_failure=False)
    app = application(configured(authorizer), pools=[other])

    @app.get("/other")
    async def use_other():
        with contextlib.suppress(Exception):
            await other.acquire()

    url = serve(app)
    ask(url)
    httpx.get(f"{url}/other", timeout=30)
    page = new_page(color_scheme=scheme)
    page.goto(f"{url}/topaz/")
    live(page)
    found = page.evaluate(CONTRAST)
    assert {"DD.", "P.good", "P.bad", "TD.bad", "P.soft"} <= {name for name, _ in found}
    assert [pair for pair in found if pair[1] < 4.5] == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(13, 17, 23)") == (scheme == "dark")


def test_a_screen_reader_finds_landmarks_headings_and_tables(
    new_page, serve, authorizer
):
    url = serve(application(configured(authorizer)))
    ask(url)
    page = new_page(reduced_motion="reduce")
    page.goto(f"{url}/topaz/")
    live(page)
    tree = page.locator("body").aria_snapshot()
    for part in (
        "- banner:",
        '- heading "Topaz status" [level=1]',
        "- status: Live",
        '- button "Pause"',
        "- main:",
        '- heading "Pool main" [level=2]',
        '- table "Connections"',
        '- columnheader "Peer"',
        '- table "Recent events"',
        '- heading "Decisions" [level=2]',
        '- table "Cache"',
        "- contentinfo:",
    ):
        assert part in tree, tree
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("#live").get_attribute("aria-live") == "polite"
    assert page.evaluate("document.getAnimations().length") == 0
    # Each table can be scrolled with the keyboard.
    for frame in page.locator(".scroll").all():
        frame.focus()
        assert frame.evaluate("(each) => each === document.activeElement")


def test_the_page_fits_on_a_small_screen(new_page, serve, authorizer):
    url = serve(application(configured(authorizer)))
    ask(url)
    page = new_page(viewport={"width": 360, "height": 640})
    page.goto(f"{url}/topaz/")
    live(page)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_for_the_documentation(new_page, serve, authorizer, scheme):
    """`nox -s browser -- --pictures docs/images` writes them."""
    if "PICTURES" not in os.environ:
        pytest.skip("PICTURES names no folder for the pictures")
    url = serve(application(configured(authorizer, name="topaz")))
    ask(url, 40)
    # Two calls in a row without an answer make the pool suspect the connection.
    authorizer.freeze()
    ask(url, 2)
    authorizer.thaw()
    ask(url, 10)
    page = new_page(color_scheme=scheme, viewport={"width": 960, "height": 1250})
    page.goto(f"{url}/topaz/")
    live(page)
    events = page.get_by_role("table", name="Recent events")
    events.get_by_text("closed", exact=True).first.wait_for(timeout=PATIENCE)
    authorizer.delay = 3
    with ThreadPoolExecutor(8) as threads:
        for _ in range(8):
            threads.submit(ask, url)
        connections = page.get_by_role("table", name="Connections")
        connections.get_by_text("busy").first.wait_for(timeout=PATIENCE)
        page.screenshot(path=Path(os.environ["PICTURES"]) / f"status-page-{scheme}.png")
