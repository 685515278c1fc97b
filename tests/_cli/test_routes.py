"""Test that `routes` prints the policies that the guards of an application ask."""

from __future__ import annotations

import json

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, WebSocket
from starlette.endpoints import HTTPEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Route, Router

from fastapi_topaz import ConnectionPool, require_policy_allowed, require_policy_auto
from fastapi_topaz._app.guards import guard_of
from fastapi_topaz._app.listing import listed_routes
from fastapi_topaz._app.routes import route_policy_path
from fastapi_topaz._cli.routes_command import policies_of, show_routes
from fastapi_topaz.testing import unguarded_routes
from kit.configs import config_of


CODE = """
from fastapi import APIRouter, Depends, FastAPI
from fastapi_topaz import *

config = TopazConfig(
    authorizer_options=AuthorizerOptions(),
    policy_path_root="myapp",
    identity_provider=lambda _request: None,
)
guard = Depends(require_policy_auto(config))
app = FastAPI(openapi_url=None)
router = APIRouter(prefix="/documents", dependencies=[guard])


@router.get("/{id}")
def get(id: str): ...


@app.get("/user-profiles", dependencies=[guard])
def profiles(): ...


@app.get("/a.b", dependencies=[guard])
def dot(): ...


@app.get("/a/b", dependencies=[guard])
def slash(): ...


@app.get("/health")
def health(): ...


app.include_router(router)


def create():
    return app


class Proxy:
    def __getattr__(self, name):
        raise RuntimeError("outside of a request")


proxy = Proxy()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "main.py").write_text(CODE)
    return tmp_path


@pytest.mark.real_clock
@pytest.mark.parametrize("name", ["app", "create"])
def test_the_policies_of_the_routes_are_printed(name, folder, run_forked):
    ended = run_forked("routes", f"main:{name}", cwd=folder)

    assert (ended.code, ended.err) == (0, "")
    lines = [
        [cell.strip() for cell in line.split("\N{BOX DRAWINGS LIGHT VERTICAL}")[1:-1]]
        for line in ended.out.splitlines()
    ]
    assert sorted(filter(None, lines)) == [
        ["GET", "/a.b", "myapp.GET.a.b"],
        ["GET", "/a/b", "myapp.GET.a.b"],
        ["GET", "/documents/{id}", "myapp.GET.documents.__id"],
        ["GET", "/health", "not guarded"],
        ["GET", "/user-profiles", 'myapp.GET["user-profiles"]'],
    ]
    assert ended.out.splitlines()[-2:] == [
        "4 of 5 routes are guarded.",
        "myapp.GET.a.b is the policy of several routes: /a.b, /a/b",
    ]


@pytest.mark.real_clock
def test_the_application_inside_a_middleware_is_found(folder, run_forked):
    (folder / "wrapped.py").write_text(
        f"{CODE}\nfrom starlette.middleware.gzip import GZipMiddleware\n"
        "app = GZipMiddleware(app)\n"
    )
    ended = run_forked("routes", "wrapped:app", cwd=folder)

    assert "4 of 5 routes are guarded." in ended.out


@pytest.mark.real_clock
def test_json_is_the_whole_output(folder, run_forked):
    ended = run_forked("routes", "main:app", "--json", cwd=folder)

    routes = {each.pop("path"): each for each in json.loads(ended.out)["routes"]}
    assert routes["/documents/{id}"] == {
        "method": "GET",
        "guarded": True,
        "policies": ["myapp.GET.documents.__id"],
    }
    assert routes["/health"] == {"method": "GET", "guarded": False, "policies": []}


@pytest.mark.real_clock
@pytest.mark.parametrize(
    "reference, line",
    [
        ("main:config", "Error: main:config is of type TopazConfig: name a FastAPI "),
        ("main:ap", "Error: main has no 'ap'; it has: main:app, main:router"),
        ("mian:app", "Error: cannot import mian: there is no module mian in the "),
        ("main:proxy", "Error: main:proxy is of type Proxy: name a FastAPI applicat"),
    ],
)
def test_an_object_that_is_not_an_application_is_one_line(
    reference, line, folder, run_forked
):
    ended = run_forked("routes", reference, cwd=folder)

    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(line)
    assert ended.err.count("\n") == 1


# -- the rows -----------------------------------------------------------------------


def guarded(*guards):
    return [Depends(guard) for guard in guards]


@pytest.fixture
def auto():
    return require_policy_auto(config_of(ConnectionPool(), policy_path_root="myapp"))


def listed(app):
    """Return the policies of each route."""
    return {
        (route.method, route.path): policies_of(route) for route in listed_routes(app)
    }


def test_guards_are_found_on_each_level_and_inside_dependencies(auto):
    def inside(_guard: None = Depends(auto)):
        pass

    def deeper(_inside: None = Depends(inside)):
        pass

    app = FastAPI(openapi_url=None)
    router = APIRouter()
    app.add_api_route("/route", lambda: 1, dependencies=guarded(auto))
    app.add_api_route("/inside", lambda: 1, dependencies=guarded(deeper))
    app.add_api_route("/none", lambda: 1)
    router.add_api_route("/x", lambda: 1, methods=["PUT", "DELETE"])
    app.include_router(router, prefix="/of/{a}", dependencies=guarded(auto))

    assert listed(app) == {
        ("GET", "/route"): ["myapp.GET.route"],
        ("GET", "/inside"): ["myapp.GET.inside"],
        ("GET", "/none"): [],
        ("DELETE", "/of/{a}/x"): ["myapp.DELETE.of.__a.x"],
        ("PUT", "/of/{a}/x"): ["myapp.PUT.of.__a.x"],
    }


def test_a_guard_of_the_application_guards_all_its_routes(auto):
    app = FastAPI(openapi_url=None, dependencies=guarded(auto))
    app.add_api_route("/x", lambda: 1)
    app.add_route("/raw", lambda _request: PlainTextResponse("raw"))

    # FastAPI runs no dependencies for a route of Starlette.
    assert listed(app) == {
        ("GET", "/x"): ["myapp.GET.x"],
        ("GET", "/raw"): [],
    }


def test_each_guard_of_a_route_is_named_with_another_decision_than_allowed(auto):
    config = config_of(ConnectionPool(), policy_path_root="myapp")
    named = require_policy_allowed(config, "other.policy", max_age=5)
    visible = require_policy_allowed(config, "other.policy", decision="visible")
    app = FastAPI(openapi_url=None)
    app.add_api_route("/x", lambda: 1, dependencies=guarded(auto, named, visible))

    assert listed(app) == {
        ("GET", "/x"): ["myapp.GET.x", "other.policy", "other.policy (visible)"]
    }


def test_websockets_mounts_and_hosts_are_listed(auto):
    app, below = FastAPI(openapi_url=None), FastAPI(openapi_url=None)
    app.add_api_websocket_route("/ws", websocket, dependencies=guarded(auto))
    below.add_api_route("/d/{d}", lambda: 1, dependencies=guarded(auto))
    app.mount("/{tenant}", below)
    app.mount("/files", PlainTextResponse("files"))
    app.add_route("/class", Endpoint)
    app.router.routes.append(Host("api.example", below))

    assert listed(app) == {
        ("WEBSOCKET", "/ws"): ["myapp.GET.ws"],
        ("GET", "/{tenant}/d/{d}"): ["myapp.GET.__tenant.d.__d"],
        ("MOUNT", "/files"): [],
        ("ANY", "/class"): [],
        ("GET", "api.example/d/{d}"): ["none: require_policy_auto cannot name it"],
    }


async def websocket(_websocket: WebSocket):
    pass


class Endpoint(HTTPEndpoint):
    pass


async def test_the_listed_policy_is_the_one_that_is_asked(auto):
    asked = {}
    app, below = FastAPI(openapi_url=None), FastAPI(openapi_url=None)

    def remember(request: Request):
        asked[request.method, request.url.path] = route_policy_path(
            "myapp", request.scope
        )

    paths = ((app, "/a.b/{c}.json"), (app, "/files/{rest:path}"))
    for inner, path in (*paths, (below, "/user-profiles")):
        inner.add_api_route(
            path, lambda: 1, methods=["GET", "POST"], dependencies=guarded(remember)
        )
    app.mount("/{tenant}", below)
    expected = {
        (route.method, route.path): route.policy_path(guard_of(auto))
        for route in listed_routes(app)
    }
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
        for method, path in expected:
            await client.request(method, path.replace("{", "").replace("}", ""))

    assert len(asked) == 6
    assert sorted(asked.values()) == sorted(expected.values())


OTHER = PlainTextResponse("another ASGI application")


class Unknown(Route):
    """A route that has dependencies, and never runs them."""

    def __init__(self, dependant):
        super().__init__("/unknown", OTHER)
        self.dependant = dependant


def test_the_command_and_the_function_find_the_same_unguarded_routes(auto, capsys):
    app, below = FastAPI(openapi_url=None), FastAPI(openapi_url=None)
    for each in (app, below):
        each.add_api_route("/x", lambda: 1, dependencies=guarded(auto))
    below.dependency_overrides[auto] = lambda: None
    app.router.routes.append(Unknown(app.routes[0].dependant))
    app.mount("/inside", GZipMiddleware(below))
    app.host("files.example", OTHER)
    app.mount("/default", Router(default=OTHER))
    expected = [
        *("ANY /unknown", "MOUNT /inside", "GET /inside/x", "HOST files.example"),
        "DEFAULT /default",
    ]

    assert show_routes(list(listed_routes(app)), as_json=True) == 0
    printed = json.loads(capsys.readouterr().out)["routes"]
    assert unguarded_routes(app) == expected
    assert [
        f"{each['method']} {each['path']}" for each in printed if not each["guarded"]
    ] == expected
    assert len(printed) == len(expected) + 1


@pytest.mark.skipif(
    not hasattr(FastAPI, "frontend"), reason="this FastAPI has no app.frontend"
)
def test_files_of_a_frontend_are_listed_without_a_policy_of_their_own(auto, tmp_path):
    (tmp_path / "index.html").write_text("page")
    app = FastAPI(openapi_url=None, dependencies=guarded(auto))
    app.frontend("/own", directory=tmp_path)

    assert listed(app) == {
        ("GET", "/own"): ["none: require_policy_auto cannot name it"]
    }


def test_routes_that_share_a_policy_by_their_paths_are_said_once(auto, capsys):
    named = require_policy_allowed(config_of(ConnectionPool()), "myapp.GET.a.b")
    twice = require_policy_auto(guard_of(auto).config, max_age=0)
    app = FastAPI(openapi_url=None)
    for path in ("/a.b", "/a/b"):
        app.add_api_route(path, lambda: 1, dependencies=guarded(auto, twice, named))
    app.add_api_route("/c", lambda: 1, dependencies=guarded(named))

    show_routes(list(listed_routes(app)), as_json=False)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "3 of 3 routes are guarded.",
        "myapp.GET.a.b is the policy of several routes: /a.b, /a/b",
    ]
