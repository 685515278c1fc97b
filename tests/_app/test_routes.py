"""Test that the policy path matches the executed route, on every supported FastAPI."""

from __future__ import annotations

import contextlib
import warnings
from urllib.parse import quote

import attrs
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, Response, WebSocket
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount, Route

from fastapi_topaz import (
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
    require_policy_auto,
)
from fastapi_topaz._app.routes import route_policy_path


pytestmark = pytest.mark.real_clock


class Asked:
    """A configuration that allows everything, and the policies that were checked."""

    def __init__(self, authorizer):
        self.authorizer = authorizer
        self.policies = []
        authorizer.policies = self._allow
        self.config = TopazConfig(
            authorizer_options=authorizer.options,
            policy_path_root="m",
            identity_provider=lambda _request: Identity(IdentityType.NONE),
            connection_pool=ConnectionPool(min_connections=1, max_connections=2),
        )
        self.guard = Depends(require_policy_auto(self.config))

    def _allow(self, check):
        self.policies.append(check.policy_path)
        return True

    def by(self, app, url, method="GET", **options):
        """
        Return the policies that a request of *url* checks. The request is allowed.
        """
        self.policies.clear()
        with TestClient(app, **options) as client:
            answer = client.request(method, url)
        assert answer.status_code == 200, answer.text
        return self.policies.copy()


@pytest.fixture
def asked(embedded_authorizer):
    return Asked(embedded_authorizer)


def routes_of(asked, *templates, prefix="", methods=("GET",)):
    """Return a router with guarded routes that return their template."""
    router = APIRouter(prefix=prefix)
    for template in templates:
        router.add_api_route(
            template,
            lambda template=template: template,
            methods=list(methods),
            dependencies=[asked.guard],
        )
    return router


def application(asked, *routers, **includes):
    app = FastAPI(lifespan=asked.config.lifespan)
    for router in routers:
        app.include_router(router, **includes)
    return app


# -- included routers -----------------------------------------------------------------


def test_the_prefix_given_to_include_router_is_part_of_the_path(asked):
    app = application(asked)
    app.include_router(routes_of(asked, "/users"), prefix="/admin")
    app.include_router(routes_of(asked, "/users"), prefix="/public")
    assert asked.by(app, "/admin/users") == ["m.GET.admin.users"]
    assert asked.by(app, "/public/users") == ["m.GET.public.users"]


def test_a_router_included_twice_has_the_policies_of_both_prefixes(asked):
    app, router = application(asked), routes_of(asked, "/users")
    app.include_router(router, prefix="/admin")
    app.include_router(router, prefix="/public")
    assert asked.by(app, "/admin/users") == ["m.GET.admin.users"]
    assert asked.by(app, "/public/users") == ["m.GET.public.users"]


def test_prefixes_can_be_nested_and_have_parameters(asked):
    inner = routes_of(asked, "/documents/{id}", prefix="/own")
    middle = APIRouter(prefix="/{group}")
    middle.include_router(inner, prefix="/v1.0")
    app = application(asked, middle, prefix="/{tenant}")
    path = 'm.GET.__tenant.__group.v1["0"].own.documents.__id'
    assert asked.by(app, "/a/b/v1.0/own/documents/7") == [path]


def test_dependencies_of_include_router_check_the_complete_path(asked):
    router = APIRouter()
    router.add_api_route("/users/{id}", lambda: "", methods=["GET"])
    app = application(asked, router, prefix="/admin", dependencies=[asked.guard])
    assert asked.by(app, "/admin/users/7") == ["m.GET.admin.users.__id"]


def test_router_and_application_dependencies_check_the_same_path(asked):
    inner = APIRouter(dependencies=[asked.guard])
    inner.add_api_route("/users", lambda: "", methods=["GET"])
    outer = APIRouter(prefix="/b", dependencies=[asked.guard])
    outer.include_router(inner, prefix="/c")
    app = FastAPI(lifespan=asked.config.lifespan, dependencies=[asked.guard])
    app.include_router(outer, prefix="/a")
    assert set(asked.by(app, "/a/b/c/users")) == {"m.GET.a.b.c.users"}


def test_routes_added_after_the_first_check_are_found(asked):
    router = routes_of(asked, "/first")
    app = application(asked, router, prefix="/a")
    assert asked.by(app, "/a/first") == ["m.GET.a.first"]
    app.include_router(routes_of(asked, "/second"), prefix="/b")
    assert asked.by(app, "/b/second") == ["m.GET.b.second"]
    assert asked.by(app, "/a/first") == ["m.GET.a.first"]


# -- mounts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mount, url, path",
    [
        ("/sub", "/sub/documents/7", "m.GET.sub.documents.__id"),
        ("/{tenant}", "/a/documents/7", "m.GET.__tenant.documents.__id"),
        ("/{tenant}", "/public/documents/7", "m.GET.__tenant.documents.__id"),
        # The inner route has a parameter of that name too.
        ("/{id}", "/public/documents/7", "m.GET.__id.documents.__id"),
        ("/{id}", "/documents/documents/7", "m.GET.__id.documents.__id"),
        ("/{number:int}", "/42/documents/7", "m.GET.__number.documents.__id"),
        ("/t-{tenant}.v1", "/t-a.v1/documents/7", 'm.GET["t-__tenant"].v1'),
        ("/v1.0/{a}/{b}", "/v1.0/x/y/documents/7", 'm.GET.v1["0"].__a.__b'),
        ("", "/documents/7", "m.GET.documents.__id"),
    ],
)
def test_the_template_of_a_mount_is_part_of_the_path(mount, url, path, asked):
    app = application(asked)
    app.mount(mount, application(asked, routes_of(asked, "/documents/{id}")))
    expected = path if path.endswith("__id") else f"{path}.documents.__id"
    assert asked.by(app, url) == [expected]


def test_a_path_converter_in_a_mount_or_a_route_is_one_parameter(asked):
    app = application(asked)
    app.mount("/files/{rest:path}", application(asked, routes_of(asked, "/{id}")))
    app.mount("/all", application(asked, routes_of(asked, "/{name:path}/raw")))
    assert asked.by(app, "/files/a/b/7") == ["m.GET.files.__rest.__id"]
    assert asked.by(app, "/files/public/x/7") == ["m.GET.files.__rest.__id"]
    assert asked.by(app, "/all/public/a/raw") == ["m.GET.all.__name.raw"]


def test_a_client_cannot_choose_the_policy_by_mount_parameters(asked):
    app = application(asked)
    app.mount("/{tenant}", application(asked, routes_of(asked, "/documents/{id}")))
    hostile = ["public", "public.documents", '"]', "a] == true #", "__tenant", "%20"]
    for tenant in hostile:
        answered = asked.by(app, f"/{tenant}/documents/7".replace("#", "%23"))
        assert answered == ["m.GET.__tenant.documents.__id"]


def test_mounts_can_be_nested_below_mounts_and_included_routers(asked):
    innermost = application(asked, routes_of(asked, "/x", prefix="/y"), prefix="/z")
    inner = Starlette(routes=[Mount("/{b}", app=innermost)])
    router = APIRouter(prefix="/r")
    router.mount("/{a}", inner)
    app = application(asked)
    app.mount("/plain", inner)
    assert asked.by(app, "/plain/1/z/y/x") == ["m.GET.plain.__b.z.y.x"]
    app.include_router(router, prefix="/p")
    with TestClient(app) as client:
        asked.policies.clear()
        # FastAPI before 0.137 ignores mounts of an included router.
        if client.get("/p/r/1/2/z/y/x").status_code == 200:
            assert asked.policies == ["m.GET.p.r.__a.__b.z.y.x"]
        assert client.get("/plain/1/z/y/x").status_code == 200


def test_an_application_mounted_twice_has_the_policies_of_both_mounts(asked):
    inner = application(asked, routes_of(asked, "/users"))
    app = application(asked)
    app.mount("/admin", inner)
    app.mount("/{tenant}", inner)
    assert asked.by(app, "/admin/users") == ["m.GET.admin.users"]
    assert asked.by(app, "/public/users") == ["m.GET.__tenant.users"]
    # Routers use the first matching route, and a new one may come before it.
    app.router.routes.insert(0, Mount("/{first}", app=inner))
    assert asked.by(app, "/admin/users") == ["m.GET.__first.users"]


class Wrapper:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)


def test_a_mounted_application_may_be_wrapped_in_middleware(asked):
    inner = application(asked, routes_of(asked, "/users"))
    app = application(asked)
    app.mount("/a", Wrapper(Wrapper(inner)))
    app.router.routes.append(Mount("/b", app=inner, middleware=[Middleware(Wrapper)]))
    assert asked.by(app, "/a/users") == ["m.GET.a.users"]
    assert asked.by(app, "/b/users") == ["m.GET.b.users"]


def test_an_application_may_be_mounted_in_itself(asked):
    app = application(asked, routes_of(asked, "/users"))
    app.mount("/again", app)
    assert asked.by(app, "/users") == ["m.GET.users"]


def test_a_server_root_path_is_not_part_of_the_policy_path(asked):
    app = application(asked, routes_of(asked, "/users"), prefix="/v1")
    app.mount("/sub", application(asked, routes_of(asked, "/users")))
    for root in ("", "/behind/a/proxy"):
        found = asked.by(app, f"{root}/v1/users", root_path=root)
        assert found == ["m.GET.v1.users"]
        found = asked.by(app, f"{root}/sub/users", root_path=root)
        assert found == ["m.GET.sub.users"]


def test_an_application_root_path_is_not_part_of_the_policy_path(asked):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions want it given to the server
        app = FastAPI(lifespan=asked.config.lifespan, root_path="/api")
    app.include_router(routes_of(asked, "/users"), prefix="/v1")
    assert asked.by(app, "/v1/users") == ["m.GET.v1.users"]
    assert asked.by(app, "/api/v1/users") == ["m.GET.v1.users"]


# -- methods --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "methods, method, asks",
    [
        (["GET", "HEAD"], "HEAD", "GET"),
        (["GET", "HEAD"], "GET", "GET"),
        (["HEAD"], "HEAD", "HEAD"),
        (["HEAD", "POST"], "HEAD", "HEAD"),
        (["get"], "GET", "GET"),
        (["PUT", "PATCH"], "PATCH", "PATCH"),
        (["M-SEARCH"], "M-SEARCH", '["M-SEARCH"]'),
        (["OPTIONS"], "OPTIONS", "OPTIONS"),
    ],
)
def test_the_policy_path_has_the_method_of_the_route(methods, method, asks, asked):
    app = application(asked, routes_of(asked, "/x", methods=methods), prefix="/p")
    dot = "" if asks.startswith("[") else "."
    assert asked.by(app, "/p/x", method) == [f"m{dot}{asks}.p.x"]


def test_a_websocket_checks_the_policy_of_get(asked):
    router = APIRouter(prefix="/r")
    seen = []

    @router.websocket("/live/{id}")
    async def live(websocket: WebSocket):
        scope = websocket.scope
        seen.append(route_policy_path("m", scope))
        await websocket.accept()
        await websocket.close()

    inner = application(asked, router, prefix="/q")
    app = application(asked, router, prefix="/p")
    app.mount("/{tenant}", inner)
    with TestClient(app) as client:
        for url in ("/p/r/live/7", "/a/q/r/live/7"):
            with client.websocket_connect(url):
                pass
    assert seen == ["m.GET.p.r.live.__id", "m.GET.__tenant.q.r.live.__id"]


# -- routes without a policy path -----------------------------------------------------


@contextlib.contextmanager
def refused(asked, *words):
    """Expect a RuntimeError with *words*, and check that no question is sent."""
    with pytest.raises(RuntimeError) as caught:
        yield
    for word in words:
        assert word in str(caught.value)
    assert "require_policy_allowed" in str(caught.value)
    assert asked.authorizer.calls["Is"] == 0


def test_a_host_route_is_refused(asked):
    app = application(asked)
    app.host("{sub}.example.org", application(asked, routes_of(asked, "/users")))
    client = TestClient(app, base_url="http://a.example.org")
    with client, refused(asked, "Host", "/users"):
        client.get("/users")


def test_a_host_route_is_refused_even_if_the_application_is_mounted_too(asked):
    inner = application(asked, routes_of(asked, "/users"))
    app = application(asked)
    app.host("a.example.org", inner)
    app.mount("/", inner)
    client = TestClient(app, base_url="http://a.example.org")
    with client, refused(asked, "Host"):
        client.get("/users")


def test_frontend_files_are_refused(asked, tmp_path):
    (tmp_path / "index.html").write_text("hello")
    app = FastAPI(lifespan=asked.config.lifespan, dependencies=[asked.guard])
    if not hasattr(app, "frontend"):
        pytest.skip("this FastAPI has no app.frontend")
    app.frontend("/", directory=str(tmp_path))
    client = TestClient(app)
    with client, refused(asked, "app.frontend"):
        client.get("/index.html")


def test_an_application_not_reached_through_a_router_is_refused(asked):
    inner = application(asked, routes_of(asked, "/users"))

    async def dispatch(scope, receive, send):
        await inner(scope, receive, send)

    app = Starlette(
        routes=[Mount("/hidden", app=dispatch)], lifespan=asked.config.lifespan
    )
    client = TestClient(app)
    with client, refused(asked, "/users", "GET"):
        client.get("/hidden/users")


@pytest.mark.parametrize(
    "change",
    [
        {"path": "/other"},
        {"path": "/p/users/7"},
        {"path": "/users"},
        {"root_path": "/p"},
        {"route": None},
        {"router": None},
        {"route": Route("/p/users", lambda _request: None)},
        {"method": "DELETE"},
    ],
)
def test_a_template_that_does_not_match_the_request_is_refused(change, asked):
    """A framework whose scope contradicts the decision of its router."""

    def lie(request: Request):
        request.scope.update(change)

    app = application(
        asked,
        routes_of(asked, "/users"),
        prefix="/p",
        dependencies=[Depends(lie)],
    )
    client = TestClient(app)
    with client, refused(asked):
        client.get("/p/users")


# -- any application ------------------------------------------------------------------

LITERALS = ["users", "admin", "public", "v1.0", "my-docs", "in", "__id", "a.b", "é"]
# Texts that a client may send for a parameter, for each converter.
TEXTS = {
    "": ["public", "admin", "a.b", '"]', "__id", "é", "x y", "{id}", "== true #"],
    ":int": ["0", "007", "9" * 20],
    ":float": ["1.5", "7"],
    ":uuid": ["0f8fad5b-d9cb-469f-a165-70867728950e"],
}


@attrs.frozen
class Segment:
    """One segment of a template: a literal, or a parameter with a converter."""

    literal: str
    converter: str | None
    text: str

    def template(self, number):
        if self.converter is None:
            return f"/{self.literal}"
        return f"/{{p{number}{self.converter}}}"

    def policy(self, number):
        return self.literal.split(".") if self.converter is None else [f"__p{number}"]


def parameter(converter):
    texts = st.sampled_from(TEXTS[converter])
    return st.builds(Segment, st.just(""), st.just(converter), texts)


segments = st.sampled_from(LITERALS).map(lambda text: Segment(text, None, text)) | (
    st.sampled_from(sorted(TEXTS)).flatmap(parameter)
)
prefixes = st.lists(segments, min_size=1, max_size=2)
METHODS = ["GET", "POST", "HEAD", "DELETE"]
# The paths from the application to a route: mounts, then prefixes of include_router and
# of APIRouter, then the template of the route. FastAPI before 0.137 ignores the mounts
# of an included router, so there mounts come first.
branches = st.tuples(
    st.lists(prefixes, max_size=2),
    st.lists(st.tuples(prefixes, st.lists(segments, max_size=1)), max_size=2),
    prefixes,
    st.sampled_from(METHODS),
)


class Branch:
    """A generated branch: its application, and its policy derived from the segments."""

    def __init__(self, asked, index, drawn):
        mounts, includes, leaf, self.method = drawn
        self.segments = []
        methods = ["GET", "HEAD"] if self.method == "HEAD" else [self.method]
        templates = [self._template(mount) for mount in mounts]
        routers = [(self._template(a), self._template(b)) for a, b in includes]
        inner = APIRouter()
        inner.add_api_route(
            self._template(leaf),
            lambda: Response(headers={"branch": str(index)}),
            methods=methods,
            dependencies=[asked.guard],
        )
        for prefix, own in reversed(routers):
            # The prefix of the router comes before the prefixes of the included
            # routers.
            outer = APIRouter(prefix=prefix)
            outer.include_router(inner, prefix=own)
            inner = outer
        self.router, self.mount = inner, None
        for template in reversed(templates):
            app = FastAPI()
            self.add_to(app)
            self.router, self.mount = app, template

    def _template(self, drawn):
        first = len(self.segments)
        self.segments += drawn
        return "".join(each.template(first + n) for n, each in enumerate(drawn))

    def add_to(self, app):
        if self.mount is None:
            app.include_router(self.router)
        else:
            app.mount(self.mount, self.router)

    @property
    def url(self):
        return "".join(f"/{quote(each.text)}" for each in self.segments)

    @property
    def policy(self):
        path = "m." + ("GET" if self.method == "HEAD" else self.method)
        for number, segment in enumerate(self.segments):
            for part in segment.policy(number):
                is_name = part.isascii() and part.isidentifier() and part != "in"
                path += f".{part}" if is_name else f'["{part}"]'
        return path


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(drawn=st.lists(branches, min_size=1, max_size=3))
def test_any_nesting_of_routers_checks_the_policy_of_its_templates(drawn, asked):
    app = FastAPI(lifespan=asked.config.lifespan)
    every = [Branch(asked, index, each) for index, each in enumerate(drawn)]
    for branch in every:
        branch.add_to(app)
    with TestClient(app, follow_redirects=False) as client:
        for index, branch in enumerate(every):
            asked.policies.clear()
            answer = client.request(branch.method, branch.url)
            if answer.status_code in {404, 405}:
                # A mount of an earlier branch handled the request.
                assert index > 0
                assert not asked.policies
                continue
            assert answer.status_code == 200
            answered = every[int(answer.headers["branch"])]
            assert asked.policies == [answered.policy]
