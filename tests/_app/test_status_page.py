"""Test who may see the status page, its addresses, and its headers."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import warnings
from http import HTTPStatus
from importlib.resources import files

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from starlette.applications import Starlette
from starlette.routing import Mount

from fastapi_topaz import (
    ConnectionPool,
    PoolMisuse,
    PoolTimeout,
    require_policy_allowed,
    status_app,
)
from kit.configs import config_of
from kit.logs import lines
from kit.pools import make_pool


PATHS = ["/", "/json", "/events", "/no-such-path"]


def permit(_request):
    return True


def page(guard=permit, pool=None, **options):
    return status_app(config_of(pool or make_pool(), **options), guard=guard)


async def answer(app, path, method="GET", **options):
    """Return the response of *app*, mounted at /topaz unless *path* is a whole URL."""
    if path.startswith("/"):
        app, path = Starlette(routes=[Mount("/topaz", app)]), f"/topaz{path}"
    transport = httpx.ASGITransport(app, **options)
    base = "http://127.0.0.1"
    async with httpx.AsyncClient(transport=transport, base_url=base) as client:
        return await client.request(method, path)


# -- who may see it -----------------------------------------------------------------


async def test_a_guard_that_returns_true_permits():
    async def permit_later(_request):
        return True

    for guard in (permit, permit_later):
        for path in ("/", "/json"):
            assert (await answer(page(guard), path)).status_code == 200


async def no_value(_request):
    """Return nothing, as a dependency of FastAPI does that permits."""


async def generator(_request):
    yield True


REFUSALS = {
    "False": lambda _request: False,
    "None": lambda _request: None,
    "a truthy text": lambda _request: "yes",
    "1": lambda _request: 1,
    "a list": lambda _request: [True],
    "a coroutine that returns nothing": no_value,
    "a generator, as a dependency with yield": generator,
    "a class": Exception,
    "a nested coroutine": lambda _request: permit_twice(),
}


async def permit_twice():
    async def inner():
        return True

    # Closed, so that Python does not warn that it was never awaited.
    coroutine = inner()
    coroutine.close()
    return coroutine


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("guard", REFUSALS.values(), ids=REFUSALS)
async def test_only_true_permits(guard, path):
    refused = await answer(page(guard), path)
    assert (refused.status_code, refused.text) == (403, "Not allowed.")


@pytest.mark.real_clock
async def test_a_dependency_is_no_guard_even_if_its_policy_permits(embedded_authorizer):
    """It returns nothing then. A guard that asks the same policy is one line."""
    embedded_authorizer.policies = {"app.status": True}
    config = config_of(ConnectionPool(), embedded_authorizer.options)
    dependency = require_policy_allowed(config, "app.status")

    async def guard(request):
        return await config.is_allowed(request, "app.status")

    async with config.connection_pool:
        for asked, status in ((dependency, 403), (guard, 200)):
            app = status_app(config, guard=asked)
            assert (await answer(app, "/")).status_code == status


async def test_the_log_says_what_a_guard_must_return(caplog):
    await answer(page(lambda _request: "secret"), "/")
    (line,) = lines(caplog, logging.ERROR)
    assert "must return True or False, and returned an object of type str" in line
    assert "secret" not in caplog.text


def raising(error):
    def guard(_request):
        raise error

    return guard


ERRORS = [
    (HTTPException(401, "Who?", {"WWW-Authenticate": "Basic"}), 401),
    (HTTPException(307, headers={"Location": "/login"}), 307),
    (HTTPException(404), 404),
    (HTTPException(HTTPStatus.UNAUTHORIZED), 401),
    (HTTPException(HTTPStatus.OK), 403),
    (HTTPException(True, "no"), 403),
    (HTTPException("401", "no"), 403),
    (HTTPException(401.5, "no"), 403),
    (HTTPException(700, "no"), 403),
    (HTTPException(200, "an error is no permission"), 403),
    (HTTPException(204), 403),
    (HTTPException(304), 403),
    (HTTPException(101), 403),
    (PoolTimeout("nothing free"), 503),
    (PoolMisuse("another loop"), 500),
    (RuntimeError("a bug"), 500),
    (TimeoutError(), 500),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "error, status", ERRORS, ids=[f"{type(e).__name__}-{s}" for e, s in ERRORS]
)
async def test_an_error_of_a_guard_is_a_refusal(error, status, path):
    refused = await answer(page(raising(error)), path)
    assert refused.status_code == status
    assert "pools" not in refused.text
    assert "<html" not in refused.text
    assert "a bug" not in refused.text


async def test_the_headers_of_an_http_exception_reach_the_client():
    app = page(
        raising(
            HTTPException(
                401,
                headers={
                    "WWW-Authenticate": "Basic",
                    "Content-Length": "1000",
                    "Content-Encoding": "gzip",
                    "Transfer-Encoding": "chunked",
                    "Cache-Control": "public",
                },
            )
        )
    )
    refused = await answer(app, "/")
    assert refused.headers["WWW-Authenticate"] == "Basic"
    assert refused.headers["Cache-Control"] == "no-store"
    assert refused.headers["Content-Length"] == str(len(refused.content))
    assert "Content-Encoding" not in refused.headers
    assert "Transfer-Encoding" not in refused.headers


BAD_HEADERS = [
    {"Location": "/login\r\nSet-Cookie: session=1"},
    {"X-A\nB": "1"},
    {"Location": "/a\0b"},
    {"Location": "/\u4e2d"},
    {"Retry-After": 5},
    {b"Location": b"/login"},
    ["Location"],
    7,
]


@pytest.mark.parametrize("headers", BAD_HEADERS, ids=range(len(BAD_HEADERS)))
async def test_headers_that_cannot_be_sent_are_a_failure(headers, caplog):
    error = HTTPException(401)
    error.headers = headers
    refused = await answer(page(raising(error)), "/")
    assert (refused.status_code, refused.text) == (500, "Internal Server Error")
    assert refused.headers["Cache-Control"] == "no-store"
    assert not {"Set-Cookie", "Location"} & {*refused.headers}
    (line,) = lines(caplog, logging.ERROR)
    assert line == "the guard of the status page failed; the request is refused"


async def test_an_error_of_a_guard_is_in_the_log_once_for_many_requests(caplog):
    app = page(raising(RuntimeError("a bug")))
    for _ in range(5):
        await answer(app, "/")
    (line,) = lines(caplog, logging.ERROR)
    assert line == "the guard of the status page failed; the request is refused"
    assert "a bug" in caplog.text  # the traceback


@pytest.mark.parametrize("guard", [None, True, "admin", object()])
def test_a_guard_must_be_callable(guard):
    with pytest.raises(TypeError, match="guard must be callable"):
        status_app(config_of(make_pool()), guard=guard)


def test_a_guard_is_required():
    with pytest.raises(TypeError, match="guard"):
        status_app(config_of(make_pool()))


def test_the_other_arguments_are_checked():
    config = config_of(make_pool())
    with pytest.raises(TypeError, match="config must be a TopazConfig, got 7"):
        status_app(7, guard=permit)
    with pytest.raises(TypeError, match="pools must be ConnectionPools, got 7"):
        status_app(config, guard=permit, pools=[7])


async def test_a_websocket_is_refused():
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    await page()({"type": "websocket", "path": "/events"}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_the_application_runs_without_a_mount():
    """Then the server sends it the events of the lifespan, too."""
    sent, events = [], iter(("lifespan.startup", "lifespan.shutdown"))

    async def receive():
        return {"type": next(events)}

    async def send(message):
        sent.append(message["type"])

    await page()({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert (await answer(page(), "http://127.0.0.1/json")).status_code == 200


# -- addresses ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE"])
@pytest.mark.parametrize("path", PATHS)
async def test_other_methods_are_not_allowed(method, path):
    refused = await answer(page(), path, method)
    assert (refused.status_code, refused.headers["Allow"]) == (
        405,
        "GET, HEAD, OPTIONS",
    )


async def test_options_names_the_methods():
    told = await answer(page(lambda _request: False), "/", "OPTIONS")
    assert (told.status_code, told.content) == (204, b"")
    assert told.headers["Allow"] == "GET, HEAD, OPTIONS"


async def messages(method, path, root=""):
    """Return what the page sends to the server for a request to it."""
    sent = []
    scope = {"type": "http", "method": method, "headers": [], "query_string": b""}

    async def receive():
        return {"type": "http.request"}

    async def send(message):
        sent.append(message)

    await page()({**scope, "path": path, "root_path": root}, receive, send)
    return sent


@pytest.mark.parametrize(
    "path, media_type",
    [("/", b"text/html"), ("/json", b"application/json"), ("/events", b"text/event-")],
)
async def test_head_has_the_headers_of_get_and_no_body(path, media_type):
    start, body = await messages("HEAD", path)
    headers = dict(start["headers"])
    assert start["status"] == 200
    assert headers[b"content-type"].startswith(media_type)
    assert (b"content-length" in headers) == (path != "/events")
    assert not body.get("body")
    if path == "/":
        assert int(headers[b"content-length"]) == len(HTML.encode())


@pytest.mark.parametrize("path", ["/no", "/json/", "//", "/x/json", "/../json", "/a/"])
async def test_no_other_path_is_found(path):
    assert (await answer(page(), path)).status_code == 404


def proxied(prefix):
    """Mount below two prefixes. The server puts that of a proxy before the path."""
    inner = Starlette(routes=[Mount("/ops", page())])
    app = FastAPI()
    app.mount("/admin", inner)
    return app, f"http://127.0.0.1{prefix}/admin/ops", {"root_path": prefix}


def stripped():
    """Mount in an application that names the prefix of a proxy itself."""
    with warnings.catch_warnings():
        # Newer versions of FastAPI want the server to name it.
        warnings.simplefilter("ignore")
        app = FastAPI(root_path="/prefix")
    app.mount("/ops", page())
    return app, "http://127.0.0.1/ops", {}


@pytest.mark.parametrize(
    "place",
    [lambda: proxied(""), lambda: proxied("/prefix"), stripped],
    ids=["mounts", "proxy", "root_path"],
)
async def test_it_works_below_prefixes(place):
    app, base, options = place()
    for path, media_type in (("/", "text/html"), ("/json", "application/json")):
        found = await answer(app, base + path, **options)
        assert found.status_code == 200
        assert found.headers["Content-Type"].startswith(media_type)
    assert (await answer(app, base + "/no", **options)).status_code == 404


@pytest.mark.parametrize("path", ["/ops", "/a b", "/a:b", "/é"])
async def test_the_page_without_a_slash_redirects_to_a_relative_address(path):
    """The addresses in the page are relative, also behind a proxy with a prefix."""
    sent = await messages("GET", path, root=path)
    assert sent[0]["status"] == 307
    location = dict(sent[0]["headers"])[b"location"].decode()
    went = httpx.URL("http://127.0.0.1/prefix" + path).join(location)
    assert went.path == f"/prefix{path}/"


# -- headers and the page itself ----------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
@pytest.mark.parametrize("guard", [permit, lambda _: False, raising(OSError())])
async def test_each_response_has_the_headers(guard, method):
    headers = (await answer(page(guard), "/", method)).headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Frame-Options"] == "DENY"
    policy = headers["Content-Security-Policy"].split("; ")
    assert {"default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'"} <= {
        *policy
    }
    assert "unsafe" not in headers["Content-Security-Policy"]


HTML = files("fastapi_topaz._app").joinpath("status_page.html").read_text("utf-8")


async def test_the_policy_permits_exactly_the_parts_of_the_page():
    policy = (await answer(page(), "/")).headers["Content-Security-Policy"]
    for name in ("script", "style"):
        (content,) = re.findall(rf"<{name}>(.*?)</{name}>", HTML, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy.split("; ")


def test_the_page_writes_no_html_and_asks_no_other_server():
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacent", "document.write"):
        assert forbidden not in HTML
    for forbidden in ("eval(", "Function(", "http:", "https:", " style=", " onclick"):
        assert forbidden not in HTML
    assert not re.search(r"<(?:script|link|img|iframe)[^>]*\ssrc=", HTML)


# -- what it shows ------------------------------------------------------------------


async def test_the_json_names_its_process():
    shown = (await answer(page(), "/json")).json()
    assert shown["process"]["pid"] == os.getpid()
    assert shown["process"]["host"]


async def test_the_pools_are_that_of_the_configuration_and_further_ones():
    mine, other = make_pool(name="mine"), ConnectionPool(name="other")
    app = status_app(config_of(mine), guard=permit, pools=[other])
    shown = (await answer(app, "/json")).json()
    assert [pool["name"] for pool in shown["pools"]] == ["mine", "other"]


async def test_a_replaced_pool_is_shown():
    config = config_of(make_pool(name="before"))
    app = status_app(config, guard=permit)
    config.connection_pool = make_pool(name="after")
    shown = (await answer(app, "/json")).json()
    assert [pool["name"] for pool in shown["pools"]] == ["after"]


async def test_no_text_ends_the_line_of_an_event():
    app = page(pool=make_pool(name="a\nb\r\u2028c\x00"))
    text = (await answer(app, "/json")).text
    assert text.isascii()
    assert "\n" not in text
    assert json.loads(text)["pools"][0]["name"] == "a\ufffdb\ufffd\ufffdc\ufffd"
