"""Test guards of WebSocket routes, and dependencies that are the same object."""

from __future__ import annotations

import gc
import socket
import weakref

import pytest
from fastapi import APIRouter, Depends, FastAPI, WebSocket
from fastapi.testclient import TestClient
from starlette import __version__ as starlette
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    TopazConfig,
    require_policy_allowed,
    require_policy_auto,
)
from fastapi_topaz._cli.demo import serving
from kit.backends import backends
from kit.configs import user


pytestmark = pytest.mark.real_clock

# Starlette before 0.41 can only close a refused WebSocket.
OLD = tuple(map(int, starlette.split(".")[:2])) < (0, 41)


def live_config(options, **pool):
    return TopazConfig(
        authorizer_options=options,
        policy_path_root="m",
        identity_provider=user,
        connection_pool=ConnectionPool(**pool),
    )


def application(config):
    """Return an application with the guard on the application, not on the route."""
    guard = Depends(require_policy_auto(config))
    app = FastAPI(lifespan=config.lifespan, dependencies=[guard])
    router = APIRouter(prefix="/live", dependencies=[guard])

    @router.websocket("/{id}")
    async def live(websocket: WebSocket):
        await websocket.accept()
        await websocket.send_json(websocket.path_params)
        await websocket.close()

    app.include_router(router, prefix="/v1")
    return app


def only_alice(check):
    return check.identity.value == "alice" and check.resource == {"id": "7"}


def refused(client, user):
    """Return the status of a refused WebSocket, or else its close code."""
    with (
        pytest.raises(WebSocketDisconnect) as caught,
        client.websocket_connect("/v1/live/7", headers={"user": user}),
    ):
        pytest.fail("it was accepted")
    if isinstance(caught.value, WebSocketDenialResponse):
        retry = caught.value.headers.get("retry-after")
        assert (retry is not None) == (caught.value.status_code == 503)
        return caught.value.status_code
    return caught.value.code


@backends
def test_a_websocket_is_accepted_if_its_policy_allows_it(backend, embedded_authorizer):
    embedded_authorizer.policies = {"m.GET.v1.live.__id": only_alice}
    app = application(live_config(embedded_authorizer.options))
    with TestClient(app, backend=backend) as client:
        with client.websocket_connect("/v1/live/7", headers={"user": "alice"}) as ws:
            assert ws.receive_json() == {"id": "7"}
        assert refused(client, "mallory") == (1008 if OLD else 403)
    # The guard on the application, the router and the route is one object. It checks
    # once.
    assert embedded_authorizer.calls["Is"] == 2


@backends
def test_a_websocket_is_503_if_the_authorizer_is_down(backend, embedded_authorizer):
    embedded_authorizer.stop()
    config = live_config(embedded_authorizer.options, max_retries=0)
    with TestClient(application(config), backend=backend) as client:
        assert refused(client, "alice") == (1008 if OLD else 503)


class WithoutDenialResponses:
    """A server that cannot refuse a WebSocket with an HTTP status."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        scope.pop("extensions", None)
        await self.app(scope, receive, send)


@backends
@pytest.mark.parametrize("is_down", [False, True])
def test_a_server_without_denial_responses_closes_with_1008(
    backend, is_down, embedded_authorizer
):
    embedded_authorizer.policies = lambda check: False
    if is_down:
        embedded_authorizer.stop()
    config = live_config(embedded_authorizer.options, max_retries=0)
    app = WithoutDenialResponses(application(config))
    with TestClient(app, backend=backend) as client:
        assert refused(client, "alice") == 1008


def handshake(url, user):
    """Return the status of a server's answer to a WebSocket handshake."""
    host, port = url.removeprefix("http://").split(":")
    request = (
        f"GET /v1/live/7 HTTP/1.1\r\nhost: {host}\r\nuser: {user}\r\n"
        "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(request.encode())
        with client.makefile("rb") as answer:
            return int(answer.readline().split()[1])


@backends
def test_real_servers_answer_a_refused_handshake_with_its_status(
    backend, embedded_authorizer
):
    """Run uvicorn on asyncio, Hypercorn on trio."""
    embedded_authorizer.policies = {"m.GET.v1.live.__id": only_alice}
    config = live_config(embedded_authorizer.options, max_retries=0)
    with serving(application(config), backend) as url:
        assert handshake(url, "alice") == 101
        assert handshake(url, "mallory") == 403
        embedded_authorizer.stop()
        assert handshake(url, "alice") == (403 if OLD else 503)


# -- one object -----------------------------------------------------------------------


def test_equal_arguments_return_the_same_dependency():
    config = live_config(AuthorizerOptions())
    other = live_config(AuthorizerOptions())
    auto, allowed = require_policy_auto(config), require_policy_allowed(config, "m.a")
    assert require_policy_auto(config) is auto
    assert require_policy_allowed(config, "m.a") is allowed
    different = [
        require_policy_auto(other),
        require_policy_allowed(other, "m.a"),
        require_policy_allowed(config, "m.b"),
    ]
    assert len({auto, allowed, *different}) == 5


def test_dependency_overrides_replace_a_guard():
    config = live_config(AuthorizerOptions(url="127.0.0.1:1", insecure=True))
    app = FastAPI()

    @app.get("/", dependencies=[Depends(require_policy_auto(config))])
    async def root():
        return "here"

    app.dependency_overrides[require_policy_auto(config)] = lambda: None
    assert TestClient(app).get("/").json() == "here"


def test_a_request_with_repeated_guards_is_checked_once(embedded_authorizer):
    embedded_authorizer.policies = lambda check: True
    config = live_config(embedded_authorizer.options)
    app = FastAPI(
        lifespan=config.lifespan, dependencies=[Depends(require_policy_auto(config))]
    )
    router = APIRouter(dependencies=[Depends(require_policy_auto(config))])

    @router.get("/", dependencies=[Depends(require_policy_auto(config))])
    async def root():
        return "here"

    app.include_router(router, dependencies=[Depends(require_policy_auto(config))])
    with TestClient(app) as client:
        assert client.get("/").status_code == 200
    assert embedded_authorizer.calls["Is"] == 1


def test_a_dependency_does_not_outlive_its_configuration():
    config = live_config(AuthorizerOptions())
    gone = weakref.ref(require_policy_allowed(config, "m.a"))
    assert gone() is not None
    del config
    gc.collect()
    assert gone() is None
