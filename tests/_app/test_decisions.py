"""Caches, memos, fallbacks and circuit breakers in an application, over real calls."""

from __future__ import annotations

import itertools

import anyio
import grpc
import pytest
from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fastapi_topaz import (
    AuthorizerOptions,
    CircuitBreaker,
    CircuitOpen,
    ConnectionPool,
    DecisionCache,
    Identity,
    IdentityType,
    PoolClosed,
    TopazConfig,
    require_policy_allowed,
    require_policy_auto,
)
from kit.backends import backends
from kit.configs import user
from kit.decisions import http_request


pytestmark = pytest.mark.real_clock

PATH = "app.GET.documents"


@pytest.fixture
def asked(embedded_authorizer):
    """Allow everything, and return the list of received checks."""
    checks = []
    embedded_authorizer.policies = lambda check: checks.append(check) or True
    return checks


def config_of(authorizer, **options):
    return TopazConfig(
        **{
            "authorizer_options": authorizer.options,
            "policy_path_root": "app",
            "identity_provider": lambda _request: Identity(IdentityType.SUB, "alice"),
            "connection_pool": ConnectionPool(min_connections=0),
            **options,
        }
    )


async def origins(config, *requests, **options):
    return [(await config.decide(r, PATH, **options)).origin for r in requests]


# -- the memo -------------------------------------------------------------------------


async def test_equal_questions_of_one_request_share_one_call(
    embedded_authorizer, asked
):
    config = config_of(embedded_authorizer)
    request = http_request()
    async with config.connection_pool:
        assert await origins(config, request, request) == ["authorizer", "cache"]
        ends = []

        async def ask():
            ends.append(
                await config.decide(request, PATH, resource_context={"id": "1"})
            )

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(ask)
        assert len(asked) == 2
        assert sorted({end.origin for end in ends}) == ["authorizer", "shared"]
        # Another request asks for itself.
        assert await origins(config, http_request()) == ["authorizer"]
        # So does a check with max_age=0, and the later answer is the one that counts.
        assert await origins(config, request, max_age=0) == ["authorizer"]
        config.invalidate(policy_path=PATH)
        assert await origins(config, request) == ["authorizer"]


async def test_a_request_uses_an_answer_for_at_most_5_seconds(
    embedded_authorizer, asked
):
    config = config_of(embedded_authorizer)
    now = [100.0]
    config._freshness.clock = lambda: now[0]
    request = http_request()
    async with config.connection_pool:
        assert await origins(config, request) == ["authorizer"]
        now[0] += 4.99
        assert await origins(config, request) == ["cache"]
        now[0] += 0.01
        assert await origins(config, request) == ["authorizer"]


async def test_a_request_keeps_no_longer_than_the_cache(embedded_authorizer, asked):
    config = config_of(
        embedded_authorizer, decision_cache=DecisionCache(ttl_seconds=1, jitter=0)
    )
    now = [100.0]
    config._freshness.clock = lambda: now[0]
    request = http_request()
    async with config.connection_pool:
        assert await origins(config, request) == ["authorizer"]
        now[0] += 1
        assert await origins(config, request) == ["authorizer"]


async def test_an_excluded_policy_is_asked_each_time_also_in_one_request(
    embedded_authorizer, asked
):
    config = config_of(
        embedded_authorizer, decision_cache=DecisionCache(exclude=["app.GET.*"])
    )
    request = http_request()
    async with config.connection_pool:
        assert await origins(config, request, request) == ["authorizer"] * 2


async def test_two_configurations_do_not_share_what_a_request_has_asked(
    embedded_authorizer, asked
):
    cache = DecisionCache()
    configs = [
        config_of(embedded_authorizer, decision_cache=given)
        for given in (None, None, cache, cache)
    ]
    request = http_request()
    async with anyio.create_task_group() as tasks:
        for config in configs:
            assert await origins(config, request) == ["authorizer"]
        for config in configs:
            tasks.start_soon(config.connection_pool.close)


def test_a_dependency_and_a_handler_share_one_call(embedded_authorizer, asked):
    config = config_of(embedded_authorizer)
    app = FastAPI(lifespan=config.lifespan)
    guards = [
        Depends(require_policy_allowed(config, PATH)),
        Depends(require_policy_allowed(config, PATH, max_age=5)),
    ]

    @app.get("/documents", dependencies=guards)
    async def documents(request: Request):
        return (await config.decide(request, PATH)).origin

    with TestClient(app) as client:
        assert client.get("/documents").json() == "cache"
        assert len(asked) == 1
        assert client.get("/documents").json() == "cache"
        assert len(asked) == 2


def test_a_websocket_asks_each_time(embedded_authorizer, asked):
    config = config_of(embedded_authorizer)
    app = FastAPI(lifespan=config.lifespan)

    @app.websocket("/documents")
    async def documents(websocket: WebSocket):
        await websocket.accept()
        for _ in range(2):
            await websocket.send_text((await config.decide(websocket, PATH)).origin)

    with TestClient(app) as client, client.websocket_connect("/documents") as socket:
        texts = [socket.receive_text() for _ in range(2)]
    assert texts == ["authorizer"] * 2
    assert len(asked) == 2


# -- the cache ------------------------------------------------------------------------


async def test_200_equal_questions_of_200_requests_make_one_call(
    embedded_authorizer, asked
):
    config = config_of(embedded_authorizer, decision_cache=DecisionCache())
    ends = []

    async def ask():
        ends.append(await config.is_allowed(http_request(), PATH))

    # The pool is not open yet.
    async with anyio.create_task_group() as tasks:
        for _ in range(200):
            tasks.start_soon(ask)
    await config.connection_pool.close()
    assert ends == [True] * 200
    assert len(asked) == 1


async def test_an_answer_of_the_cache_is_none_of_another_question(
    embedded_authorizer,
):
    embedded_authorizer.policies = lambda check: (
        {"allowed": check.identity.value == "alice", "visible": True}
    )
    names = []
    config = config_of(
        embedded_authorizer,
        decision_cache=DecisionCache(),
        identity_provider=lambda _request: Identity(IdentityType.SUB, names[-1]),
    )
    async with config.connection_pool:
        for name, allowed in (("alice", True), ("bob", False), ("alice", True)):
            names.append(name)
            decision = await config.decide(http_request(), PATH)
            assert decision.allowed is allowed
            assert await config.is_allowed(http_request(), PATH, decision="visible")
    assert config.decision_cache.status().misses == 4


async def test_a_closed_pool_answers_nothing_from_the_cache(embedded_authorizer, asked):
    config = config_of(embedded_authorizer, decision_cache=DecisionCache())
    async with config.connection_pool:
        assert await origins(config, http_request()) == ["authorizer"]
    with pytest.raises(PoolClosed):
        await config.decide(http_request(), PATH)
    async with config.connection_pool:
        assert await origins(config, http_request()) == ["authorizer"]


@pytest.mark.native  # one of the loops is trio's
@pytest.mark.parametrize("first", ["asyncio", "trio"])
@backends
def test_another_event_loop_gets_nothing_of_before(
    embedded_authorizer, asked, first, backend
):
    config = config_of(embedded_authorizer, decision_cache=DecisionCache())
    request = http_request()

    async def ask():
        async with config.connection_pool:
            return await origins(config, request, request)

    assert anyio.run(ask, backend=first) == ["authorizer", "cache"]
    assert anyio.run(ask, backend=backend) == ["authorizer", "cache"]
    assert len(asked) == 2


def test_a_forked_child_gets_nothing_of_its_parent(embedded_authorizer, run_program):
    embedded_authorizer.policies = {PATH: True}
    program = f"""
        import os, sys, threading
        import anyio
        from starlette.requests import Request
        from fastapi_topaz import *

        config = TopazConfig(
            authorizer_options=AuthorizerOptions(
                url={embedded_authorizer.url!r}, insecure=True
            ),
            policy_path_root="app",
            identity_provider=lambda _request: Identity(IdentityType.NONE),
            connection_pool=ConnectionPool(min_connections=0, transport="native"),
            decision_cache=DecisionCache(),
            circuit_breaker=CircuitBreaker(),
        )
        lock = config.decision_cache._freshness.invalidations._writing

        async def ask():
            scope = {{"type": "http", "headers": [], "path_params": {{}}}}
            return (await config.decide(Request(scope), {PATH!r})).origin

        def child():
            assert config.decision_cache.status().size == 0
            # Another thread of the parent held the lock.
            config.invalidate(policy_path="app")
            print(anyio.run(ask), flush=True)

        async def main():
            async with config.connection_pool:
                print(await ask(), await ask(), flush=True)
                def fork():
                    lock.acquire()
                    pid = os.fork()
                    if not pid:
                        code = 1
                        try:
                            child()
                            code = 0
                        finally:
                            os._exit(code)
                    lock.release()
                    assert os.waitpid(pid, 0)[1] == 0
                await anyio.to_thread.run_sync(fork)
                print(await ask(), flush=True)

        anyio.run(main)
    """
    ended = run_program(program, strict=False)
    assert ended.code == 0, ended.err
    assert ended.out.split() == ["authorizer", "cache", "authorizer", "cache"]


async def test_metadata_of_credentials_are_in_the_key(embedded_authorizer, asked):
    tenants = itertools.cycle(["a", "a", "b"])
    options = AuthorizerOptions(
        url=embedded_authorizer.url,
        cert_file_path=embedded_authorizer.ca_cert_path,
        insecure=embedded_authorizer.ca_cert_path is None,
        credentials=lambda: [("x-tenant", next(tenants))],
    )
    cache = DecisionCache()
    config = config_of(
        embedded_authorizer, authorizer_options=options, decision_cache=cache
    )
    async with config.connection_pool:
        # The probes call it as well, so the cycle is set again for each check.
        found = []
        for tenant in ("a", "a", "b", "a"):
            tenants = itertools.repeat(tenant)
            found += await origins(config, http_request())
    assert found == ["authorizer", "cache", "authorizer", "cache"]
    assert [check.metadata["x-tenant"] for check in asked] == ["a", "b"]


async def test_without_a_cache_each_call_computes_its_credentials(
    embedded_authorizer, asked
):
    numbers = itertools.count()
    options = AuthorizerOptions(
        url=embedded_authorizer.url,
        insecure=True,
        credentials=lambda: [("x-number", str(next(numbers)))],
    )
    config = config_of(embedded_authorizer, authorizer_options=options)
    request = http_request()
    async with config.connection_pool:
        assert await origins(config, request, request) == ["authorizer"] * 2


# -- fallbacks and the breaker --------------------------------------------------------


def application(config, **options):
    app = FastAPI(lifespan=config.lifespan)
    guard = Depends(require_policy_auto(config, **options))

    @app.get("/documents", dependencies=[guard])
    async def documents():
        return "ok"

    return app


def answers(config, times=1, **options):
    with TestClient(application(config, **options)) as client:
        found = [client.get("/documents") for _ in range(times)]
    return [(each.status_code, each.headers.get("Retry-After")) for each in found]


def test_without_a_fallback_an_outage_is_503(embedded_authorizer):
    embedded_authorizer.fail("INTERNAL")
    assert answers(config_of(embedded_authorizer)) == [(503, "1")]


def test_a_fallback_that_denies_makes_an_outage_403(embedded_authorizer):
    embedded_authorizer.fail("INTERNAL")
    assert answers(config_of(embedded_authorizer, fallback="deny")) == [(403, None)]


def test_a_route_has_a_fallback_of_its_own(embedded_authorizer):
    embedded_authorizer.fail("INTERNAL")
    config = config_of(embedded_authorizer, allow_unsafe_fallback=True)
    assert answers(config) == [(503, "1")]
    assert answers(config, fallback="deny") == [(403, None)]
    assert answers(config, fallback="allow") == [(200, None)]
    assert config._fallbacks.uses == {
        ("deny", False, "denied"): 1,
        ("allow", False, "allowed"): 1,
    }


def test_no_fallback_hides_an_unknown_identity_or_a_wrong_policy(embedded_authorizer):
    config = config_of(
        embedded_authorizer, allow_unsafe_fallback=True, fallback="allow"
    )
    embedded_authorizer.fail("NOT_FOUND")
    assert answers(config) == [(403, None)]
    embedded_authorizer.fail("INVALID_ARGUMENT")
    assert answers(config) == [(500, None)]


async def test_an_older_answer_is_used_in_an_outage(embedded_authorizer, asked):
    config = config_of(
        embedded_authorizer,
        decision_cache=DecisionCache(stale_ttl_seconds=60),
        fallback="cache_then_deny",
    )
    now = [100.0]
    config._freshness.clock = lambda: now[0]
    async with config.connection_pool:
        first = await config.decide(http_request(), PATH)
        now[0] += 40
        embedded_authorizer.fail("INTERNAL")
        stale = await config.decide(http_request(), PATH)
        assert (stale.allowed, stale.origin, stale.age) == (True, "stale", 40)
        assert stale.id == first.id
        for max_age in (0, 30):
            fallen = await config.decide(http_request(), PATH, max_age=max_age)
            assert (fallen.allowed, fallen.origin) == (False, "fallback")
        config.invalidate(identity=Identity(IdentityType.SUB, "alice"))
        assert (await config.decide(http_request(), PATH)).origin == "fallback"
    assert config.decision_cache.status().stale == 1


def test_an_open_breaker_is_503_with_the_time_to_wait(embedded_authorizer):
    embedded_authorizer.fail("INTERNAL")
    breaker = CircuitBreaker(failure_threshold=2, recovery_timeout=30)
    now = [100.0]
    breaker._clock = lambda: now[0]
    breaker._random = lambda: 0.0
    config = config_of(embedded_authorizer, circuit_breaker=breaker)
    app = application(config)
    with TestClient(app) as client:
        for _ in range(2):
            client.get("/documents")
        for _ in range(4):
            # Each trial fails, so the pause doubles.
            now[0] += 31
            client.get("/documents")
        answer = client.get("/documents")
        assert answer.status_code == 503
        assert 16 <= int(answer.headers["Retry-After"]) <= 32
        assert config.circuit_breaker.status().is_open
        embedded_authorizer.heal()
        embedded_authorizer.policies = {PATH: True}
        now[0] += 31
        codes = [client.get("/documents").status_code for _ in range(3)]
    assert codes == [200, 200, 200]
    assert not breaker.status().is_open


async def test_an_open_breaker_makes_no_call(embedded_authorizer, asked):
    config = config_of(
        embedded_authorizer,
        circuit_breaker=CircuitBreaker(failure_threshold=3, recovery_timeout=60),
    )
    config.circuit_breaker._clock = lambda: 100.0
    async with config.connection_pool:
        assert await config.is_allowed(http_request(), PATH)
        embedded_authorizer.fail("DEADLINE_EXCEEDED", methods=["Is"])
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError):
                await config.decide(http_request(), PATH)
        calls = embedded_authorizer.calls["Is"]
        for _ in range(50):
            with pytest.raises(CircuitOpen):
                await config.decide(http_request(), PATH)
        assert embedded_authorizer.calls["Is"] == calls == 4
    assert config.circuit_breaker.status().refused == 50


# -- spans ----------------------------------------------------------------------------


async def test_the_span_of_a_check_names_the_origin(embedded_authorizer, asked):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    config = config_of(
        embedded_authorizer,
        decision_cache=DecisionCache(),
        fallback="deny",
        tracer_provider=provider,
    )
    async with config.connection_pool:
        await origins(config, http_request(), http_request())
        embedded_authorizer.fail("INTERNAL")
        await config.decide(http_request(), PATH, max_age=0)
    spans = exporter.get_finished_spans()
    facts = [
        (
            span.attributes.get("topaz.origin"),
            span.attributes["topaz.outcome"],
            span.attributes.get("rpc.grpc.status_code"),
            [event.name for event in span.events if event.name == "topaz.fallback"],
        )
        for span in spans
    ]
    assert facts == [
        (None, "allowed", 0, []),
        ("cache", "allowed", None, []),
        ("fallback", "denied", None, ["topaz.fallback"]),
    ]
    (event,) = spans[2].events
    assert dict(event.attributes) == {
        "topaz.strategy": "deny",
        "error.type": "INTERNAL",
    }


# -- dependencies ---------------------------------------------------------------------


def test_equal_guards_are_the_same_object(embedded_authorizer):
    config = config_of(embedded_authorizer, decision_cache=DecisionCache())

    def decide(*_):
        return False

    variants = [
        {},
        {"max_age": 0},
        {"max_age": 1},
        {"fallback": "deny"},
        {"fallback": "error"},
        {"fallback": decide},
        {"fallback": "deny", "max_age": 1},
        {"decision": "visible"},
    ]
    guards = [require_policy_allowed(config, PATH, **each) for each in variants]
    assert len(set(guards)) == len(variants)
    for guard, each in zip(guards, variants, strict=True):
        assert require_policy_allowed(config, PATH, **each) is guard


@pytest.mark.parametrize("max_age", [-1, "1", float("nan")])
async def test_a_wrong_max_age_is_named(embedded_authorizer, max_age):
    config = config_of(embedded_authorizer, identity_provider=user)
    with pytest.raises((TypeError, ValueError), match="max_age"):
        await config.is_allowed(http_request(), PATH, max_age=max_age)
    with pytest.raises((TypeError, ValueError), match="max_age"):
        require_policy_auto(config, max_age=max_age)
