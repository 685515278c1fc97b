"""Test that exactly the routes without a guard are listed, on each FastAPI."""

from __future__ import annotations

import functools

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, Security, WebSocket
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import (
    BaseRoute,
    Host,
    Match,
    Mount,
    Route,
    Router,
    WebSocketRoute,
)
from starlette.staticfiles import StaticFiles

from fastapi_topaz import ConnectionPool, require_policy_allowed, require_policy_auto
from fastapi_topaz.testing import unguarded_routes
from kit.configs import config_of
from kit.pools import make_pool


@pytest.fixture
def config():
    return config_of(make_pool())


@pytest.fixture
def guard(config):
    return Depends(require_policy_auto(config))


@pytest.fixture
def app():
    """Return an application without the pages of FastAPI."""
    return FastAPI(openapi_url=None)


async def talk(websocket: WebSocket):
    await websocket.accept()


async def raw(_request: Request):
    return PlainTextResponse("raw")


async def other_app(scope, receive, send):
    await PlainTextResponse("other")(scope, receive, send)


class Endpoint:
    """A raw endpoint for all methods."""

    async def __call__(self, scope, receive, send):
        await other_app(scope, receive, send)


def add(router, path, *dependencies, methods=("GET",)):
    """Add a route that returns its path."""
    router.add_api_route(
        path, lambda: path, methods=list(methods), dependencies=list(dependencies)
    )
    return router


# -- one route ------------------------------------------------------------------------


def test_a_route_is_listed_if_it_has_no_guard(app, guard):
    add(app, "/guarded", guard)
    add(app, "/open/{id:int}")
    assert unguarded_routes(app) == ["GET /open/{id:int}"]


@pytest.mark.parametrize(
    "made",
    [
        lambda config: require_policy_auto(config, max_age=5),
        lambda config: require_policy_auto(config, fallback="deny"),
        lambda config: require_policy_auto(config, fallback=lambda *_: False),
        lambda config: require_policy_allowed(config, "app.GET.x"),
        lambda config: require_policy_allowed(config, "app.GET.x", decision="may"),
    ],
)
@pytest.mark.parametrize("depends", [Depends, Security])
def test_a_guard_with_any_arguments_guards_a_route(app, config, made, depends):
    add(app, "/", depends(made(config)))
    assert unguarded_routes(app) == []


def test_a_guard_guards_only_the_methods_of_its_route(app, guard):
    add(app, "/documents", guard)
    add(app, "/documents", methods=["POST", "DELETE"])
    assert unguarded_routes(app) == ["DELETE /documents", "POST /documents"]


def test_a_guard_in_another_dependency_is_found(app, config, guard):
    def checked(allowed: None = guard) -> None:
        pass

    def user(_: None = Depends(checked)) -> str:
        return "alice"

    class Session:
        def __init__(self, user: str = Depends(user)) -> None:
            pass

    @app.get("/session")
    async def session(session: object = Depends(Session)):
        pass

    @app.get("/parameter")
    async def parameter(allowed: None = guard):
        pass

    @app.get("/other")
    async def other(other: object = Depends(talk)):
        pass

    assert unguarded_routes(app) == ["GET /other"]


def test_a_function_with_the_name_and_attributes_of_a_guard_is_no_guard(app, config):
    guard = require_policy_auto(config)

    @functools.wraps(guard)
    async def imitation(request: Request):
        pass

    assert set(vars(imitation)) >= set(vars(guard))
    assert imitation.__name__ == guard.__name__
    add(app, "/", Depends(imitation))
    assert unguarded_routes(app) == ["GET /"]


def test_a_guard_that_a_dependency_calls_by_itself_is_not_seen(app, config):
    async def checked(request: Request):
        await require_policy_auto(config)(request)

    add(app, "/own", Depends(checked))
    add(app, "/partial", Depends(functools.partial(require_policy_auto(config))))
    assert unguarded_routes(app) == ["GET /own", "GET /partial"]


@pytest.mark.parametrize("what", ["guard", "dependency"])
def test_a_guard_that_the_application_overrides_is_no_guard(app, config, guard, what):
    def checked(_: None = guard) -> None:
        pass

    add(app, "/", guard if what == "guard" else Depends(checked))
    add(app, "/other", Depends(require_policy_auto(config, max_age=0)))
    replaced = require_policy_auto(config) if what == "guard" else checked
    app.dependency_overrides[replaced] = lambda: None
    assert unguarded_routes(app) == ["GET /"]
    app.dependency_overrides[replaced] = require_policy_allowed(config, "app.GET.x")
    assert unguarded_routes(app) == []


def test_only_guards_of_the_named_configuration_count(app, config, guard):
    other = config_of(make_pool())
    add(app, "/one", guard)
    add(app, "/two", Depends(require_policy_auto(other)))
    add(app, "/three")
    assert unguarded_routes(app) == ["GET /three"]
    assert unguarded_routes(app, config) == ["GET /two", "GET /three"]
    assert unguarded_routes(app, other) == ["GET /one", "GET /three"]


# -- routers --------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["application", "outer", "include", "inner", None])
def test_a_guard_above_a_route_guards_it(app, guard, place):
    def given(here):
        return [guard] if place == here else []

    app = FastAPI(openapi_url=None, dependencies=given("application"))
    outer = APIRouter(prefix="/b", dependencies=given("outer"))
    inner = APIRouter(prefix="/c", dependencies=given("inner"))
    add(inner, "/{id}", methods=["PUT"])
    inner.add_api_websocket_route("/news", talk)
    outer.include_router(inner)
    app.include_router(outer, prefix="/a", dependencies=given("include"))
    expected = ["PUT /a/b/c/{id}", "WEBSOCKET /a/b/c/news"]
    assert unguarded_routes(app) == ([] if place else expected)


def test_a_router_included_twice_is_judged_at_both_places(app, guard):
    router = add(APIRouter(), "/users")
    app.include_router(router, prefix="/admin", dependencies=[guard])
    app.include_router(router, prefix="/public")
    assert unguarded_routes(app) == ["GET /public/users"]


def test_a_raw_route_is_listed_also_below_a_guard(guard):
    app = FastAPI(openapi_url=None, dependencies=[guard])
    router = APIRouter(dependencies=[guard])
    for each, path in ((app.router, "/app"), (router, "/router")):
        each.add_route(path, raw, methods=["GET", "POST"])
        each.add_route(f"{path}/any", Endpoint())
        each.routes.append(WebSocketRoute(f"{path}/news", talk))
    add(router, "/guarded")
    app.include_router(router, prefix="/a")
    expected = ["GET {}", "POST {}", "ANY {}/any", "WEBSOCKET {}/news"]
    assert unguarded_routes(app) == [
        each.format(path) for path in ("/app", "/a/router") for each in expected
    ]


def test_the_pages_of_fastapi_are_listed(guard):
    app = FastAPI(dependencies=[guard])
    pages = ["/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"]
    assert unguarded_routes(app) == [f"GET {page}" for page in pages]


def test_routes_that_are_added_later_are_found(app, guard):
    router = add(APIRouter(), "/first", guard)
    app.include_router(router)
    assert unguarded_routes(app) == []
    add(app, "/second")
    assert unguarded_routes(app) == ["GET /second"]


def test_a_websocket_route_is_judged_as_others(app, guard):
    app.add_api_websocket_route("/guarded", talk, dependencies=[guard])
    app.add_api_websocket_route("/open", talk)
    assert unguarded_routes(app) == ["WEBSOCKET /open"]


# -- mounts and hosts -----------------------------------------------------------------


@pytest.mark.parametrize("kind", [FastAPI, APIRouter])
def test_the_routes_of_a_mounted_application_are_judged(app, guard, kind):
    sub = kind()
    add(sub, "/guarded", guard)
    add(sub, "/open")
    app.mount("/{tenant}", sub)
    pages = [path for path in unguarded_routes(sub) if path != "GET /open"]
    expected = [path.replace("GET ", "GET /{tenant}") for path in pages]
    assert unguarded_routes(app) == [*expected, "GET /{tenant}/open"]


def test_a_guard_of_the_outer_application_does_not_guard_a_mount(guard):
    app = FastAPI(openapi_url=None, dependencies=[guard])
    app.mount("/sub", add(FastAPI(openapi_url=None), "/open"))
    assert unguarded_routes(app) == ["GET /sub/open"]


def test_overrides_of_the_outer_application_do_not_concern_a_mount(app, config, guard):
    app.mount("/sub", add(FastAPI(openapi_url=None), "/guarded", guard))
    app.dependency_overrides[require_policy_auto(config)] = lambda: None
    assert unguarded_routes(app) == []


@pytest.mark.parametrize("way", ["mounted router", "routes"])
def test_overrides_of_the_application_that_made_a_route_concern_it(config, guard, way):
    made = add(FastAPI(openapi_url=None), "/guarded", guard)
    made.dependency_overrides[require_policy_auto(config)] = lambda: None
    app = FastAPI(openapi_url=None, routes=made.routes if way == "routes" else None)
    if way == "mounted router":
        app.mount("", made.router)
    assert TestClient(app).get("/guarded").json() == "/guarded"
    assert unguarded_routes(app) == ["GET /guarded"]


def test_another_asgi_application_is_listed_as_a_whole(app, tmp_path):
    app.mount("/static", StaticFiles(directory=tmp_path))
    app.mount("/metrics", other_app)
    app.host("files.example.org", other_app)
    assert unguarded_routes(app) == [
        *("MOUNT /static", "MOUNT /metrics", "HOST files.example.org"),
    ]


def test_a_mount_at_the_root_has_a_slash(app, guard, tmp_path):
    app.mount("/", StaticFiles(directory=tmp_path))
    assert unguarded_routes(app) == ["MOUNT /"]


def test_an_application_in_a_middleware_is_listed_beside_its_routes(app, guard):
    sub = add(add(FastAPI(openapi_url=None), "/guarded", guard), "/open")
    app.mount("/sub", GZipMiddleware(sub))
    assert unguarded_routes(app) == ["MOUNT /sub", "GET /sub/open"]


def test_the_middlewares_of_a_mount_do_not_hide_its_routes(app, guard):
    sub = add(add(FastAPI(openapi_url=None), "/guarded", guard), "/open")
    app.routes.append(Mount("/sub", sub, middleware=[Middleware(GZipMiddleware)]))
    assert unguarded_routes(app) == ["GET /sub/open"]


def test_the_routes_of_a_host_are_judged(app, guard):
    sub = add(add(APIRouter(), "/guarded", guard), "/open")
    app.mount("/a", Router([Host("{tenant}.example.org", sub)]))
    assert unguarded_routes(app) == ["GET {tenant}.example.org/a/open"]


def test_the_default_of_a_router_is_listed(app):
    assert unguarded_routes(APIRouter()) == []
    assert unguarded_routes(APIRouter(default=other_app)) == ["DEFAULT /"]
    app.mount("/sub", Router(default=other_app))
    assert unguarded_routes(app) == ["DEFAULT /sub"]


def test_an_application_that_is_mounted_in_itself_is_judged_once(app):
    add(app, "/open")
    app.mount("/again", app)
    assert unguarded_routes(app) == ["GET /open"]


def test_a_route_of_an_unknown_kind_is_listed(app, guard):
    class Own(BaseRoute):
        # What a guarded route has, but this class never uses it.
        dependant = add(APIRouter(), "/", guard).routes[0].dependant

        def matches(self, scope):
            return Match.NONE, {}

    class Named(Own):
        path = "/named"
        methods = ("PUT",)

    app.routes.extend([Own(), Named()])
    assert unguarded_routes(app) == ["ANY  Own", "PUT /named"]


def test_a_starlette_application_is_judged(guard):
    inner = add(FastAPI(openapi_url=None), "/guarded", guard)
    app = Starlette(routes=[Route("/raw", raw), Mount("/sub", inner)])
    assert unguarded_routes(app) == ["GET /raw"]


@pytest.mark.skipif(
    not hasattr(FastAPI, "frontend"), reason="this FastAPI has no app.frontend"
)
@pytest.mark.parametrize("place", ["application", "include", "router", None])
def test_the_files_of_a_frontend_are_judged(guard, tmp_path, place):
    (tmp_path / "index.html").write_text("page")

    def given(here):
        return [guard] if place == here else []

    app = FastAPI(openapi_url=None, dependencies=given("application"))
    app.frontend("/own", directory=tmp_path)
    router = APIRouter(dependencies=given("router"))
    router.frontend("/", directory=tmp_path)
    app.include_router(router, prefix="/a", dependencies=given("include"))
    expected = {
        "application": [],
        "include": ["GET /own"],
        "router": ["GET /own"],
        None: ["GET /own", "GET /a/"],
    }
    assert unguarded_routes(app) == expected[place]


# -- the whole ------------------------------------------------------------------------


@pytest.mark.real_clock
def test_exactly_the_listed_routes_answer_if_all_policies_deny(embedded_authorizer):
    embedded_authorizer.policies = lambda _check: False
    config = config_of(ConnectionPool(), embedded_authorizer.options)
    guard = Depends(require_policy_auto(config))

    def checked(_: None = guard) -> None:
        pass

    app = FastAPI(lifespan=config.lifespan)
    add(app, "/1", guard, methods=["GET"])
    add(app, "/1", methods=["POST"])
    router = APIRouter(dependencies=[Depends(checked)])
    add(router, "/2", methods=["PUT"]).add_route("/2/raw", raw)
    app.include_router(router, prefix="/a")
    sub = add(add(FastAPI(), "/3", guard), "/3/open", methods=["DELETE"])
    sub.include_router(add(APIRouter(), "/4"), dependencies=[guard])
    sub.include_router(add(APIRouter(), "/5"), prefix="/b")
    app.mount("/sub", sub)
    with TestClient(app) as client:
        answered = [
            f"{method} {path}"
            for method, path in every_route(app)
            if client.request(method, path).status_code != 403
        ]
    assert sorted(unguarded_routes(app)) == sorted(answered)
    assert len(every_route(app)) - len(answered) == 4


def every_route(app):
    """Return the methods and paths of all routes, guarded or not."""
    nothing = config_of(make_pool())
    return [tuple(each.split(" ")) for each in unguarded_routes(app, nothing)]


# -- arguments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [None, "main:app", GZipMiddleware(FastAPI()), [], other_app]
)
def test_an_object_without_routes_is_refused_and_not_judged_as_guarded(wrong):
    with pytest.raises(TypeError, match="app must be a FastAPI or Starlette"):
        unguarded_routes(wrong)


def test_a_config_of_another_type_is_refused(app):
    with pytest.raises(TypeError, match="config must be a TopazConfig"):
        unguarded_routes(app, "config")
