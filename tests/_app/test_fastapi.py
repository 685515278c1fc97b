"""Test requests that are allowed, denied, or find no authorizer, on a real server."""

from __future__ import annotations

import contextlib

import grpc
import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.testclient import TestClient

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectFailed,
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
    require_policy_allowed,
    require_policy_auto,
)
from fastapi_topaz._app.routes import policy_path_of
from fastapi_topaz._cli.demo import serving
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.backends import backends
from kit.configs import user


pytestmark = pytest.mark.real_clock


def configured(authorizer, **options):
    pool = options.pop("pool", {})
    return TopazConfig(
        **{
            "authorizer_options": authorizer.options,
            "policy_path_root": "myapp",
            "identity_provider": user,
            "policy_instance_name": "myapp",
            "connection_pool": ConnectionPool(**pool),
            **options,
        }
    )


def application(config, *, path="/documents/{id}"):
    app = FastAPI(lifespan=config.lifespan)

    @app.get(path, dependencies=[Depends(require_policy_auto(config))])
    @app.delete(path, dependencies=[Depends(require_policy_auto(config))])
    async def document(request: Request):
        return request.path_params

    return app


@contextlib.contextmanager
def client_of(app, backend):
    with (
        serving(app, backend) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        yield client


# -- decisions ----------------------------------------------------------------------


@backends
def test_allowed_is_200_and_denied_is_403(backend, embedded_authorizer):
    embedded_authorizer.policies = {
        "myapp.GET.documents.__id": True,
        "myapp.DELETE.documents.__id": lambda check: check.identity.value == "alice",
    }
    with client_of(application(configured(embedded_authorizer)), backend) as client:
        assert client.get("/documents/7").status_code == 200
        assert client.delete("/documents/7").status_code == 403
        allowed = client.delete("/documents/7", headers={"user": "alice"})
        assert allowed.status_code == 200
        assert allowed.json() == {"id": "7"}


@backends
def test_the_policy_sees_identity_instance_and_resource(backend, embedded_authorizer):
    seen = []
    embedded_authorizer.policies = lambda check: bool(seen.append(check)) or True
    config = configured(
        embedded_authorizer,
        policy_instance_label="blue",
        resource_context_provider=lambda request: {"agent": "x", "n": 1},
    )
    with client_of(application(config), backend) as client:
        assert client.get("/documents/7", headers={"user": "bob"}).is_success
    (check,) = seen
    assert check.policy_path == "myapp.GET.documents.__id"
    assert check.decisions == ("allowed",)
    assert check.identity == Identity(IdentityType.SUB, "bob")
    assert check.resource == {"id": "7", "agent": "x", "n": 1}
    assert check.policy_instance_name == "myapp"
    assert check.policy_instance_label == "blue"


@backends
def test_providers_may_be_async(backend, embedded_authorizer):
    embedded_authorizer.policies = lambda check: (
        check.identity.value == "eve" and check.resource["tenant"] == "t1"
    )

    async def identity(_request: Request):
        return Identity(IdentityType.SUB, "eve")

    async def resource(_request: Request):
        return {"tenant": "t1"}

    config = configured(
        embedded_authorizer,
        identity_provider=identity,
        resource_context_provider=resource,
    )
    with client_of(application(config), backend) as client:
        assert client.get("/documents/7").status_code == 200


@pytest.mark.parametrize(
    "decisions, status",
    # As in Topaz: one decision is undefined, the other one ends without any decision.
    [({"visible": True}, 500), ({"allowed": "yes"}, 503), ({"allowed": 1}, 503)],
)
def test_a_missing_decision_never_allows(
    decisions, status, embedded_authorizer, caplog
):
    embedded_authorizer.policies = lambda check: decisions
    with TestClient(application(configured(embedded_authorizer))) as client:
        assert client.get("/documents/7").status_code == status
    if "allowed" in decisions:
        assert (
            "INTERNAL (it failed, its answer is wrong, or the answer lacks"
            in caplog.text
        )


@pytest.mark.parametrize(
    "template, path",
    [
        ("/documents/{id}", "myapp.GET.documents.__id"),
        ("/documents", "myapp.GET.documents"),
        ("/", "myapp.GET"),
        ("/a/{b}/c/{d}", "myapp.GET.a.__b.c.__d"),
        ("/files/{name}.json", "myapp.GET.files.__name.json"),
        ("/a//b/", "myapp.GET.a.b"),
        ("/user-profiles/{id}", 'myapp.GET["user-profiles"].__id'),
        ("/v1.0/2024/in", 'myapp.GET.v1["0"]["2024"]["in"]'),
        ('/a"b\\c/é', r'myapp.GET["a\"b\\c"]["é"]'),
    ],
)
def test_the_policy_path_of_a_route(template, path):
    assert policy_path_of("myapp", "GET", template) == path


def test_methods_are_quoted_like_path_segments():
    path = policy_path_of("myapp", "M-SEARCH", "/devices")
    assert path == 'myapp["M-SEARCH"].devices'


def test_the_policy_path_has_the_prefix_and_converters_of_the_route(
    embedded_authorizer,
):
    seen = []
    embedded_authorizer.policies = lambda check: (
        bool(seen.append(check.policy_path)) or True
    )
    config = configured(embedded_authorizer)
    guard = [Depends(require_policy_auto(config))]
    router = APIRouter(prefix="/v1", dependencies=guard)

    @router.get("/files/{name:path}")
    async def files(name: str):
        return name

    app = FastAPI(lifespan=config.lifespan)
    app.include_router(router)
    with TestClient(app) as client:
        assert client.get("/v1/files/a/b").json() == "a/b"
    assert seen == ["myapp.GET.v1.files.__name"]


@pytest.mark.parametrize(
    "guard", [lambda c: require_policy_allowed(c, "a.b"), require_policy_auto]
)
def test_a_dependency_without_a_topaz_config_is_rejected(guard):
    with pytest.raises(TypeError, match="config must be a TopazConfig, got 'myapp'"):
        guard("myapp")


def test_the_mount_prefix_is_part_of_the_policy_path(embedded_authorizer):
    embedded_authorizer.policies = {
        "myapp.GET.documents.__id": True,
        "myapp.GET.admin.documents.__id": False,
    }
    config = configured(embedded_authorizer)
    app = application(config)
    app.mount("/admin", application(config))
    for root_path in ("", "/behind/a/proxy"):
        with TestClient(app, root_path=root_path) as client:
            assert client.get(f"{root_path}/documents/7").status_code == 200
            assert client.get(f"{root_path}/admin/documents/7").status_code == 403


def test_client_input_cannot_replace_path_parameters(embedded_authorizer):
    embedded_authorizer.policies = lambda check: check.resource["id"] == "1"
    config = configured(
        embedded_authorizer,
        resource_context_provider=lambda request: dict(request.query_params),
    )
    with TestClient(application(config)) as client:
        assert client.get("/documents/1").status_code == 200
        assert client.get("/documents/2?id=1").status_code == 403


def test_configurations_of_two_authorizers_do_not_share_a_pool(embedded_authorizer):
    first = configured(embedded_authorizer)
    configured(embedded_authorizer, connection_pool=first.connection_pool)
    with pytest.raises(ValueError, match="elsewhere:8282"):
        configured(
            embedded_authorizer,
            connection_pool=first.connection_pool,
            authorizer_options=AuthorizerOptions(url="elsewhere:8282"),
        )


# -- missing answers ------------------------------------------------------------------


def unavailable(response):
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    return True


@backends
def test_an_unavailable_authorizer_is_503_until_it_is_back(
    backend, embedded_authorizer
):
    embedded_authorizer.policies = lambda check: True
    config = configured(embedded_authorizer, pool={"max_retries": 0})
    with client_of(application(config), backend) as client:
        assert client.get("/documents/7").status_code == 200
        embedded_authorizer.stop()
        assert unavailable(client.get("/documents/7"))
        assert unavailable(client.get("/documents/7"))
        embedded_authorizer.start()
        deadline = 50
        while client.get("/documents/7").status_code != 200:
            deadline -= 1
            assert deadline, "the application did not recover"


@backends
def test_an_application_starts_before_its_authorizer(backend, embedded_authorizer):
    embedded_authorizer.policies = lambda check: True
    embedded_authorizer.stop()
    pool = {"eager_init": True, "connection_timeout": 0.3, "max_retries": 0}
    with client_of(
        application(configured(embedded_authorizer, pool=pool)), backend
    ) as c:
        assert unavailable(c.get("/documents/7"))


@backends
@pytest.mark.parametrize("code", ["UNAVAILABLE", "INTERNAL", "CANCELLED"])
def test_an_authorizer_error_is_503(backend, code, embedded_authorizer):
    embedded_authorizer.policies = lambda check: True
    with client_of(application(configured(embedded_authorizer)), backend) as client:
        embedded_authorizer.fail(grpc.StatusCode[code], methods=["Is"])
        assert unavailable(client.get("/documents/7"))


@backends
@pytest.mark.parametrize("identities, status", [(["alice"], 200), ([], 403)])
def test_an_unknown_identity_is_denied(backend, identities, status, caplog):
    with EmbeddedAuthorizer(lambda check: True, identities=identities) as authorizer:
        application_ = application(configured(authorizer))
        with client_of(application_, backend) as client:
            answer = client.get("/documents/7", headers={"user": "alice"})
    assert answer.status_code == status
    assert ("does not know the identity" in caplog.text) == (status == 403)
    assert "alice" not in caplog.text


@backends
@pytest.mark.parametrize(
    "policies",
    [
        {},
        {"myapp.GET.documents.__id": {"visible": True}},
        {"myapp.GET.documents.__id": {}},
        {"myapp.GET.documents.__id": lambda check: 1 / 0},
    ],
    ids=["no policy", "no rule", "no value", "fails"],
)
def test_a_policy_that_cannot_be_evaluated_is_500_and_not_retried(
    backend, policies, embedded_authorizer, caplog
):
    embedded_authorizer.policies = policies
    with client_of(application(configured(embedded_authorizer)), backend) as client:
        response = client.get("/documents/7")
    assert response.status_code == 500
    assert "retry-after" not in response.headers
    detail = response.json()["detail"]
    assert "no such policy or rule" in detail
    assert "no value" in detail
    assert "myapp" not in detail
    assert "no decision on myapp.GET.documents.__id" in caplog.text
    assert "there is no such policy" in caplog.text
    assert embedded_authorizer.calls["Is"] == 1


@backends
def test_policy_errors_of_the_authorizer_are_not_shown_to_clients(
    backend, embedded_authorizer
):
    with client_of(application(configured(embedded_authorizer)), backend) as client:
        embedded_authorizer.fail("INVALID_ARGUMENT", "swordfish", methods=["Is"])
        response = client.get("/documents/7")
    assert response.status_code == 500
    assert "swordfish" not in response.text + str(response.headers)


@backends
@pytest.mark.parametrize(
    "code, hint",
    [("UNIMPLEMENTED", "serves no Authorizer"), ("UNAUTHENTICATED", "api_key")],
)
def test_an_error_fixable_on_the_server_is_503_with_a_hint(
    backend, code, hint, embedded_authorizer, caplog
):
    with client_of(application(configured(embedded_authorizer)), backend) as client:
        embedded_authorizer.fail(code, methods=["Is"])
        assert unavailable(client.get("/documents/7"))
    assert hint in caplog.text


@backends
def test_an_authorizer_timeout_is_503(backend, embedded_authorizer, caplog):
    embedded_authorizer.policies = lambda check: True
    config = configured(embedded_authorizer, check_timeout=0.3)
    with client_of(application(config), backend) as client:
        assert client.get("/documents/7").status_code == 200
        embedded_authorizer.delay = 30.0
        assert unavailable(client.get("/documents/7"))
    assert "no answer within 0.3 s" in caplog.text
    assert "answered DEADLINE_EXCEEDED" not in caplog.text


def test_check_timeout_is_one_budget_for_the_wait_and_the_call(embedded_authorizer):
    """A check that waits for most of its budget leaves only the rest for its call."""
    deadlines = []

    class Spy(ConnectionPool):
        def acquire(self, *, timeout=None):
            deadlines.append(timeout)
            return super().acquire(timeout=timeout)

    config = configured(
        embedded_authorizer, connection_pool=Spy(acquire_timeout=9), check_timeout=2
    )
    embedded_authorizer.policies = lambda check: True
    with TestClient(application(config)) as client:
        assert client.get("/documents/7").status_code == 200
    (waited,) = deadlines
    assert 0 < waited <= 2


@backends
def test_a_saturated_pool_is_503(backend, embedded_authorizer):
    embedded_authorizer.policies = lambda check: True
    pool = {"max_connections": 1, "min_connections": 1, "max_waiting": 0}
    config = configured(embedded_authorizer, pool=pool)
    app = application(config)

    @app.get("/while-leased")
    async def while_leased(request: Request):
        guard = require_policy_allowed(config, "myapp.x")
        async with config.connection_pool.acquire():
            await guard(request)

    with client_of(app, backend) as client:
        assert unavailable(client.get("/while-leased"))


def test_a_pool_that_cannot_be_opened_is_503(embedded_authorizer):
    options = AuthorizerOptions(
        url=embedded_authorizer.url, cert_file_path="/nowhere/ca.pem"
    )
    config = configured(embedded_authorizer, authorizer_options=options)
    # Without a lifespan. With it the application would not have started.
    app = FastAPI()

    @app.get("/", dependencies=[Depends(require_policy_auto(config))])
    async def root():
        return "open door"

    assert unavailable(TestClient(app).get("/"))


def test_a_missing_certificate_file_stops_the_start(embedded_authorizer):
    options = AuthorizerOptions(
        url=embedded_authorizer.url, cert_file_path="/nowhere/ca.pem"
    )
    config = configured(embedded_authorizer, authorizer_options=options)
    with (
        pytest.raises(ValueError) as caught,
        TestClient(application(config)),
    ):
        pytest.fail("it started")
    assert "cert_file_path" in str(caught.value)
    assert "/nowhere/ca.pem" in str(caught.value)


# -- errors of the application ------------------------------------------------------


def test_a_provider_exception_is_an_application_error(embedded_authorizer):
    embedded_authorizer.policies = lambda check: True

    def no_token(_request):
        raise HTTPException(401, "Who are you?")

    config = configured(embedded_authorizer, identity_provider=no_token)
    with TestClient(application(config)) as client:
        assert client.get("/documents/7").status_code == 401

    def broken(_request):
        raise ConnectFailed("the user service is down")

    for name in ("identity_provider", "resource_context_provider"):
        config = configured(embedded_authorizer, **{name: broken})
        client = TestClient(application(config), raise_server_exceptions=False)
        with client:
            assert client.get("/documents/7").status_code == 500
    assert embedded_authorizer.calls["Is"] == 0


@pytest.mark.parametrize(
    "name, value",
    [
        ("identity_provider", "secret-token"),
        ("identity_provider", None),
        ("identity_provider", 7),
        ("resource_context_provider", [("a", 1)]),
        ("resource_context_provider", None),
        ("resource_context_provider", {"when": object()}),
        ("resource_context_provider", {1: "one"}),
    ],
)
def test_a_provider_that_returns_the_wrong_type_never_allows(
    name, value, embedded_authorizer
):
    embedded_authorizer.policies = lambda check: True
    good = configured(embedded_authorizer)
    config = configured(
        embedded_authorizer,
        connection_pool=good.connection_pool,
        **{name: lambda _request: value},
    )
    with TestClient(application(config)) as client:
        with pytest.raises(TypeError) as caught:
            client.get("/documents/7")
        assert name.removesuffix("_provider") in str(caught.value)
        assert "secret-token" not in str(caught.value)
    with TestClient(application(good)) as client:
        assert client.get("/documents/7").status_code == 200


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_test_client_can_enter_the_same_application_twice(
    backend, embedded_authorizer
):
    embedded_authorizer.policies = lambda check: True
    app = application(configured(embedded_authorizer))
    for _ in range(2):
        with TestClient(app, backend=backend) as client:
            assert client.get("/documents/7").status_code == 200


@pytest.mark.parametrize(
    "options, words",
    [
        ({"policy_path_root": ""}, ["policy_path_root", "''"]),
        ({"policy_path_root": 7}, ["policy_path_root", "7"]),
        ({"identity_provider": None}, ["identity_provider", "None"]),
        ({"resource_context_provider": 7}, ["resource_context_provider", "7"]),
        ({"connection_pool": {}}, ["connection_pool", "{}"]),
        ({"check_timeout": 0}, ["check_timeout", "0"]),
        ({"check_timeout": float("nan")}, ["check_timeout", "nan"]),
        ({"check_timeout": float("inf")}, ["check_timeout", "inf"]),
        ({"policy_path_root": "myapp."}, ["policy_path_root", "'myapp.'"]),
        ({"check_timeout": True}, ["check_timeout", "True"]),
        ({"authorizer_options": "localhost:8282"}, ["authorizer_options", "str"]),
        ({"policy_instance_name": ""}, ["policy_instance_name", "''"]),
    ],
)
def test_an_invalid_configuration_error_has_the_name_and_value(options, words):
    good = {
        "authorizer_options": AuthorizerOptions(),
        "policy_path_root": "myapp",
        "identity_provider": user,
    }
    with pytest.raises((TypeError, ValueError)) as caught:
        TopazConfig(**{**good, **options})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("path", ["", "  ", None, 7])
def test_an_empty_policy_path_is_rejected_when_the_route_is_created(path):
    config = TopazConfig(
        authorizer_options=AuthorizerOptions(),
        policy_path_root="myapp",
        identity_provider=user,
    )
    with pytest.raises((TypeError, ValueError)) as caught:
        require_policy_allowed(config, path)
    assert "policy_path" in str(caught.value)
    assert repr(path) in str(caught.value)


def test_a_config_repr_shows_its_target_and_no_secret():
    config = TopazConfig(
        authorizer_options=AuthorizerOptions(url="topaz.test:8282", api_key="secret"),
        policy_path_root="app",
        identity_provider=lambda _: Identity(IdentityType.NONE),
    )
    assert repr(config) == "<TopazConfig 'app' to topaz.test:8282>"
