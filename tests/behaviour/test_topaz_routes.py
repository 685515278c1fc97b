"""Below prefixes and mounts, the policy of the route decides, with Topaz itself."""

from __future__ import annotations

import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi.testclient import TestClient

from fastapi_topaz import Identity, IdentityType, TopazConfig, require_policy_auto
from kit.configs import Requests
from kit.topaz.config import ROUTE_POLICIES
from kit.topaz.server import EMBEDDED, REAL, Topazd


pytestmark = pytest.mark.real_clock


@pytest.fixture(scope="module", params=["embedded", *(["topaz"] if REAL else [])])
def server(request, tmp_path_factory):
    command = [REAL] if request.param == "topaz" else EMBEDDED
    home = tmp_path_factory.mktemp("topazd")
    with Topazd(command, home, policies=ROUTE_POLICIES) as running:
        yield running.start()


@pytest.fixture
def config(server):
    return TopazConfig(
        authorizer_options=server.options,
        policy_path_root="routes",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
    )


def documents(config):
    router = APIRouter(dependencies=[Depends(require_policy_auto(config))])

    @router.get("/documents/{id}")
    async def document(id: str):  # noqa: A002
        return id

    @router.get("/user-files")
    async def files():
        return "files"

    return router


def application(config):
    """Return an application with the same two routes below many prefixes."""
    app = FastAPI(lifespan=config.lifespan)
    router = documents(config)
    app.include_router(router)
    for prefix in ("/admin", "/public", "/v1.0/admin"):
        app.include_router(router, prefix=prefix)
    for prefix in ("/admin/{group}", "/public/{group}"):
        nested = APIRouter(prefix=prefix)
        nested.include_router(router)
        app.include_router(nested)
    mounted = FastAPI()
    mounted.include_router(router)
    mounted.include_router(router, prefix="/admin")
    app.mount("/{tenant}", mounted)
    return app


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_denied_route_returns_403_even_if_other_routes_are_public(backend, config):
    with TestClient(application(config), backend=backend) as client:
        for allowed in (
            *("/documents/7", "/user-files", "/public/documents/7"),
            "/public/readers/documents/7",
        ):
            assert client.get(allowed).status_code == 200
        for denied in (
            *("/admin/documents/7", "/admin/user-files", "/v1.0/admin/documents/7"),
            *("/admin/public/documents/7", "/tenant/documents/7"),
            *("/documents/documents/7", "/tenant/admin/documents/7"),
        ):
            assert client.get(denied).status_code == 403, denied


@pytest.mark.parametrize(
    "path, decision",
    [
        ("routes.GET.admin.documents.__id.allowed == false #", "allowed"),
        ("routes.GET.admin.documents.__id", "allowed == false #"),
        ("routes.GET.admin.documents.__id", "allowed == false\n#"),
    ],
)
async def test_rego_in_a_request_cannot_turn_a_denial_into_an_allow(
    path, decision, config
):
    request = Requests({"type": "http", "path_params": {}})
    async with config.connection_pool:
        with pytest.raises(ValueError):
            await config.is_allowed(request, path, decision=decision)
        denied = "routes.GET.admin.documents.__id"
        assert not await config.is_allowed(request, denied)
