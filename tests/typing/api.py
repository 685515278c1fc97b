"""Never run: it exists for the type checkers, as a user's program would."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_type

from fastapi import Depends, FastAPI, Request

from fastapi_topaz import (
    AuthorizerOptions,
    CacheStatus,
    CircuitBreaker,
    CircuitStatus,
    ConnectionPool,
    Connector,
    CredentialsFailed,
    Decision,
    DecisionCache,
    Identity,
    IdentityType,
    PooledConnection,
    PoolError,
    PoolMisuse,
    PoolStatus,
    Target,
    TopazConfig,
    require_policy_allowed,
    require_policy_auto,
    status_app,
)
from fastapi_topaz.testing import (
    Check,
    EmbeddedAuthorizer,
    FakeConnector,
    fail,
    slow,
    unguarded_routes,
)


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def get_identity(request: Request) -> Identity:
    return Identity(IdentityType.SUB, request.headers["user"])


async def get_identity_later(request: Request) -> Identity:
    return get_identity(request)


config = TopazConfig(
    authorizer_options=AuthorizerOptions(url="localhost:8282", insecure=True),
    policy_path_root="myapp",
    identity_provider=get_identity,
    policy_instance_name="myapp",
    resource_context_provider=lambda request: {"path": request.url.path},
    connection_pool=ConnectionPool(min_connections=1, max_idle_time=300),
)
TopazConfig(
    authorizer_options=AuthorizerOptions(),
    policy_path_root="myapp",
    identity_provider=get_identity_later,
)


async def decide_in_an_outage(
    _request: object,
    policy_path: str,
    _resource: object,
    cached: bool | None,
    _error: Exception,
) -> bool:
    return cached is True and policy_path == "myapp.d"


cached = TopazConfig(
    authorizer_options=AuthorizerOptions(),
    policy_path_root="myapp",
    identity_provider=get_identity,
    decision_cache=DecisionCache(ttl_seconds=10, exclude=["*.DELETE.*"]),
    circuit_breaker=CircuitBreaker(on_state_change=print),
    fallback=decide_in_an_outage,
    on_fallback=print,
)


async def is_operator(request: Request) -> bool:
    return request.url.hostname == "localhost"


app = FastAPI(lifespan=config.lifespan)
app.mount("/topaz", status_app(config, guard=is_operator, pools=[ConnectionPool()]))
app.mount("/other", status_app(config, guard=lambda _request: False))


@app.get(
    "/d",
    dependencies=[
        Depends(require_policy_auto(cached, fallback="deny", max_age=0)),
        Depends(require_policy_allowed(cached, "myapp.d", decision="visible")),
    ],
)
async def decided(request: Request) -> Decision:
    cached.invalidate(resource={"id": "1"})
    if cached.decision_cache is not None and cached.circuit_breaker is not None:
        await cached.decision_cache.clear()
        assert_type(cached.decision_cache.status(), CacheStatus)
        assert_type(cached.circuit_breaker.status(), CircuitStatus)
    return await cached.decide(request, "myapp.d", max_age=1)


@app.get("/a", dependencies=[Depends(require_policy_auto(config))])
@app.get("/b", dependencies=[Depends(require_policy_allowed(config, "myapp.b"))])
async def route(request: Request) -> bool:
    return await config.is_allowed(request, "myapp.c", resource_context={"n": 1})


class GreeterStub:
    """A generated stub, as its type stubs for grpc.aio describe it."""

    SayHello: Callable[[str], Awaitable[str]]

    def __init__(self, channel: object) -> None: ...


async def use(pool: ConnectionPool) -> None:
    async with pool.acquire(timeout=1) as conn:
        assert_type(conn, PooledConnection)
        assert_type(await conn.decisions(policy_path="myapp.a"), dict[str, bool])
        assert_type(
            await conn.decision_tree(policy_path="myapp"), dict[str, dict[str, bool]]
        )
        assert_type((await conn.info()).version, str)
        pairs: list[tuple[str, str | bytes]] = [("x-region", "eu"), ("x-bin", b"1")]
        assert_type(
            await conn.decisions(policy_path="a", metadata=pairs), dict[str, bool]
        )
        await conn.info(metadata=(("x-region", "eu"),))
        assert_type(conn.stub(GreeterStub), GreeterStub)
        assert_type(await conn.stub(GreeterStub).SayHello("Ann"), str)
    conn = await pool.acquire()
    assert_type(conn, PooledConnection)
    await pool.release(conn)
    await pool.release(conn, discard=True)
    misuse: PoolError = PoolMisuse("on another loop")
    wrong: RuntimeError = PoolMisuse(str(misuse))
    del wrong
    assert_type(pool.status(), PoolStatus)
    assert_type(pool.status().healthy, bool)
    assert_type(pool.status().ready, bool)
    assert_type(await config.is_ready(timeout=2.0), bool)
    async with pool as same:
        assert_type(same, ConnectionPool)


def key() -> list[tuple[str, str]]:
    return [("authorization", "Bearer abc")]


async def renewed_key() -> tuple[tuple[str, str | bytes], ...]:
    return (("authorization", "Bearer abc"), ("x-bin", b"1"))


AuthorizerOptions(
    extra_metadata=[("x-region", "eu")],
    credentials=key,
    client_cert_path="client.pem",
    client_key_path="client.key",
    server_name="topaz.internal",
    authority="policies",
    max_message_bytes=1_000_000,
)
Target(url="localhost:1", credentials=renewed_key)
failed: PoolError = CredentialsFailed("credentials raised KeyError")


class Service:
    """A connection to something else."""

    async def probe(self, timeout: float, /) -> None: ...

    async def close(self, grace: float, /) -> None: ...


class ServiceConnector:
    async def connect(self, timeout: float, /) -> Service:
        return Service()


connector: Connector = ServiceConnector()
ConnectionPool(connector=connector)
ConnectionPool(connector=FakeConnector([slow(1.0), fail("no")]))


async def policy(check: Check) -> bool:
    return check.identity.value == "alice"


EmbeddedAuthorizer({"a": True, "b": {"allowed": False}, "c": policy})
EmbeddedAuthorizer(lambda check: check.resource["id"] == "7", tls=True)

assert_type(unguarded_routes(FastAPI()), list[str])
assert_type(unguarded_routes(app.router, config), list[str])
