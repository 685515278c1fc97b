"""
Test the snippets of the connection pooling guide, as they are written.

They run against the embedded authorizer over a socket, in an application on a real
server: uvicorn for asyncio, hypercorn for trio. The tests fill in only the parts that a
snippet leaves open: the `...` of a call, `AuthorizerOptions`, `get_identity`.
"""

from __future__ import annotations

import inspect
import textwrap
import warnings

import httpx
import pytest
from fastapi import Depends, FastAPI, Request

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    require_policy_allowed,
    require_policy_auto,
)
from fastapi_topaz._cli.demo import serving
from kit.backends import backends


pytestmark = pytest.mark.real_clock


BASIC = """
from fastapi_topaz import TopazConfig, ConnectionPool

config = TopazConfig(
    authorizer_options=AuthorizerOptions(url="localhost:8282"),
    policy_path_root="myapp",
    identity_provider=get_identity,
    policy_instance_name="myapp",

    connection_pool=ConnectionPool(
        min_connections=2,
        max_connections=10,
        acquire_timeout=5.0,
        connection_timeout=10.0,
        max_idle_time=300,
        idle_check_interval=60,
        health_check_interval=30,
        health_check_timeout=5.0,
        eager_init=False,
    ),
)
"""

ACQUISITION = """
# Automatic via context manager
async with pool.acquire() as conn:
    result = await conn.decisions(...)
# Connection returned to pool

# Or explicit
conn = await pool.acquire()
try:
    result = await conn.decisions(...)
finally:
    await pool.release(conn)
"""

WORKERS = """
# With 4 workers, each with max 10 connections
# Total to Topaz: up to 40 connections

connection_pool=ConnectionPool(
    min_connections=1,
    max_connections=5,
)
"""

HOOKS = """
@app.on_event("startup")
async def startup():
    await config.connection_pool.initialize()

@app.on_event("shutdown")
async def shutdown():
    await config.connection_pool.close()
"""

HEALTH = """
@app.get("/health")
async def health():
    pool_status = config.connection_pool.status()

    return {
        "status": "ok" if pool_status.healthy else "degraded",
        "connection_pool": {
            "total": pool_status.total,
            "idle": pool_status.idle,
            "busy": pool_status.busy,
            "healthy": pool_status.healthy_connections,
            "max": pool_status.max_connections,
        }
    }
"""

# The table of the configuration reference.
DEFAULTS = {
    "min_connections": 2,
    "max_connections": 10,
    "acquire_timeout": 5.0,
    "connection_timeout": 10.0,
    "max_idle_time": 300.0,
    "idle_check_interval": 60.0,
    "health_check_interval": 30.0,
    "health_check_timeout": 5.0,
    "eager_init": False,
    "retry_on_failure": True,
    "max_retries": 3,
}


@pytest.fixture
def authorizer(embedded_authorizer_tls):
    embedded_authorizer_tls.policies = {
        "myapp.GET.documents": lambda check: check.identity.value == "alice",
        "myapp.GET.documents.__id": lambda check: check.resource["id"] == "7",
    }
    return embedded_authorizer_tls


@pytest.fixture
def names(authorizer):
    """The names that the snippets assume."""

    def options(url):
        assert url == "localhost:8282"
        return AuthorizerOptions(
            url=authorizer.url, cert_file_path=authorizer.ca_cert_path
        )

    def get_identity(request: Request):
        return Identity(IdentityType.SUB, request.headers.get("user", "nobody"))

    return {
        "AuthorizerOptions": options,
        "ConnectionPool": ConnectionPool,
        "get_identity": get_identity,
        "app": FastAPI(),
    }


def run(snippet, names):
    with warnings.catch_warnings():
        # FastAPI now prefers a lifespan, but still supports the hooks of the guide.
        warnings.filterwarnings("ignore", "(?s).*on_event is deprecated")
        exec(compile(snippet, "guide", "exec"), names)


def flow(names):
    """Turn the lines of the acquisition flow into a function."""
    body = textwrap.indent(ACQUISITION.replace("(...)", "(**question)"), "    ")
    source = f"async def flow(pool, question):\n{body}\n    return result\n"
    exec(compile(source, "guide", "exec"), names)
    return names["flow"]


@backends
def test_every_snippet_works_in_one_application(backend, names, authorizer):
    run(BASIC, names)
    run(HOOKS, names)
    run(HEALTH, names)
    acquire_and_ask = flow(names)
    app, config = names["app"], names["config"]

    @app.get("/documents", dependencies=[Depends(require_policy_auto(config))])
    async def documents():
        return ["7"]

    @app.get("/flow")
    async def ask():
        question = {
            "policy_path": "myapp.GET.documents",
            "identity": Identity(IdentityType.SUB, "alice"),
        }
        return await acquire_and_ask(config.connection_pool, question)

    with serving(app, backend) as url, httpx.Client(base_url=url) as client:
        empty = {"total": 0, "idle": 0, "busy": 0, "healthy": 0, "max": 10}
        assert client.get("/health").json() == {
            "status": "ok",
            "connection_pool": empty,
        }
        assert client.get("/documents", headers={"user": "alice"}).status_code == 200
        assert client.get("/documents", headers={"user": "bob"}).status_code == 403
        assert client.get("/flow").json() == {"allowed": True}
        health = client.get("/health").json()
        assert health["status"] == "ok"
        pool = health["connection_pool"]
        assert pool["busy"] == 0
        assert 1 <= pool["total"] == pool["idle"] == pool["healthy"] <= 2
        assert pool["max"] == 10
        assert authorizer.connections_open <= 2
    assert config.connection_pool.status().total == 0
    assert repr(config.connection_pool).startswith("<ConnectionPool closed")


@backends
def test_the_lifespan_replaces_the_hooks(backend, names, authorizer):
    run(BASIC, names)
    config = names["config"]
    app = FastAPI(lifespan=config.lifespan)
    guard = Depends(require_policy_allowed(config, "myapp.GET.documents"))

    @app.get("/documents", dependencies=[guard])
    async def documents():
        return ["7"]

    with serving(app, backend) as url, httpx.Client(base_url=url) as client:
        assert client.get("/documents", headers={"user": "alice"}).json() == ["7"]
        assert client.get("/documents", headers={"user": "bob"}).status_code == 403
    assert repr(config.connection_pool).startswith("<ConnectionPool closed")


@backends
def test_each_worker_has_its_own_pool(backend, names, authorizer):
    run(BASIC, names)
    run(WORKERS, names)
    options = names["connection_pool"].options
    assert (options.min_connections, options.max_connections) == (1, 5)


def test_the_defaults_match_the_table():
    parameters = inspect.signature(ConnectionPool).parameters
    defaults = {name: parameters[name].default for name in DEFAULTS}
    assert defaults == DEFAULTS
    kinds = {name: type(value) for name, value in defaults.items()}
    assert kinds == {name: type(value) for name, value in DEFAULTS.items()}
    assert list(parameters)[: len(DEFAULTS)] == list(DEFAULTS)
