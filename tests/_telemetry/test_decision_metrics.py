"""Test the metrics of checks: each check ends in exactly one count."""

from __future__ import annotations

import gc
import logging
import weakref

import anyio
import grpc
import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from opentelemetry.metrics import MeterProvider, NoOpMeter
from prometheus_client import REGISTRY

import fastapi_topaz
from fastapi_topaz import (
    CircuitBreaker,
    ConnectionPool,
    DecisionCache,
    Identity,
    IdentityType,
    PoolError,
    TopazConfig,
    TopazError,
    require_policy_allowed,
)
from fastapi_topaz._telemetry.decisions import ERROR_TYPES, FALLBACKS, error_type
from kit.decisions import http_request
from kit.logs import lines
from kit.scraping import scrape
from kit.secrets import IDENTITY, RESOURCE
from kit.waiting import eventually


pytestmark = pytest.mark.real_clock

OPEN, SHUT = "app.GET.open", "app.GET.shut"
REQUESTS = 'topaz_auth_requests_total{check_type="policy",decision="%s",source="%s"}'
LATENCY = 'topaz_auth_latency_seconds_count{cached="%s",source="%s"}'
CALLS = "topaz_topaz_latency_seconds_count"
HITS = 'topaz_cache_hits_total{source="%s"}'
MISSES = 'topaz_cache_misses_total{source="%s"}'
ERRORS = 'topaz_errors_total{error_type="%s"}'
FALLBACK = 'topaz_fallback_total{cache_hit="%s",decision="%s",strategy="%s"}'
CHANGES = 'topaz_circuit_transitions_total{from_state="%s",to_state="%s"}'
STATE, SIZE = "topaz_circuit_state", "topaz_cache_size"
POOL = "topaz_pool"


@pytest.fixture
def authorizer(embedded_authorizer):
    """Allow `OPEN` and deny `SHUT`."""
    embedded_authorizer.policies = {OPEN: True, SHUT: False}
    return embedded_authorizer


@pytest.fixture
def make(authorizer, provider):
    """Return a function that makes a configuration with metrics."""

    def config_of(*, name=None, **options):
        return TopazConfig(
            **{
                "authorizer_options": authorizer.options,
                "policy_path_root": "app",
                "identity_provider": lambda _r: Identity(IdentityType.SUB, IDENTITY),
                "resource_context_provider": lambda _r: {"card": RESOURCE},
                "connection_pool": ConnectionPool(
                    min_connections=0, max_retries=0, name=name
                ),
                "meter_provider": provider,
                **options,
            }
        )

    return config_of


def scraped():
    """Return the values of the metrics of checks, except those that are 0."""
    found = scrape(REGISTRY, "topaz_")
    return {
        name: value
        for name, value in found.items()
        if value and not name.startswith(POOL) and "_seconds_" not in name
    }


def ask(config, path=OPEN, **options):
    return config.decide(http_request(), path, **options)


def test_all_counters_and_gauges_are_exported_before_the_first_check(make):
    config = make()
    found = scrape(REGISTRY, "topaz_")
    expected = {
        *(
            REQUESTS % (outcome, source)
            for outcome in ("allowed", "denied", "error", "cancelled")
            for source in ("dependency", "manual")
        ),
        *(name % s for name in (HITS, MISSES) for s in ("dependency", "manual")),
        *("topaz_cache_shared_total", "topaz_cache_stale_total", SIZE, STATE),
        'topaz_cache_evictions_total{reason="size"}',
        *(ERRORS % kind for kind in ERROR_TYPES),
        *(FALLBACK % (str(hit).lower(), end, name) for name, hit, end in FALLBACKS),
        CHANGES % ("closed", "open"),
        CHANGES % ("open", "half_open"),
        CHANGES % ("half_open", "open"),
        CHANGES % ("half_open", "closed"),
        CHANGES % ("open", "closed"),
    }
    assert found == dict.fromkeys(expected, 0.0)
    assert config.decision_cache is None


async def test_each_end_of_a_check_is_counted_once(make, authorizer):
    config = make()
    async with config.connection_pool:
        assert (await ask(config)).allowed
        assert not await config.is_allowed(http_request(), SHUT)
        authorizer.fail("PERMISSION_DENIED", methods=["Is"])
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(config)
        authorizer.heal()
        authorizer.freeze()
        with anyio.move_on_after(0.05) as scope:
            await ask(config)
        assert scope.cancelled_caught
        authorizer.thaw()
    assert scraped() == {
        REQUESTS % ("allowed", "manual"): 1,
        REQUESTS % ("denied", "manual"): 1,
        REQUESTS % ("error", "manual"): 1,
        REQUESTS % ("cancelled", "manual"): 1,
        ERRORS % "PERMISSION_DENIED": 1,
        MISSES % "manual": 3,
    }
    found = scrape(REGISTRY, "topaz_")
    # Without the cancelled one, whose length means nothing.
    assert found[LATENCY % ("false", "manual")] == found[CALLS] == 3


async def test_a_check_that_is_never_resumed_counts_as_cancelled(make):
    config = make()
    # It begins as a task would, and waits for a connection.
    async with config.connection_pool:
        check = ask(config).__await__()
        check.send(None)
        check.close()
    assert scraped() == {REQUESTS % ("cancelled", "manual"): 1}


def test_a_guard_is_another_source_than_the_application(make, authorizer):
    config = make()
    app = FastAPI(lifespan=config.lifespan)

    @app.get("/open", dependencies=[Depends(require_policy_allowed(config, OPEN))])
    async def opened():
        pass

    @app.get("/shut", dependencies=[Depends(require_policy_allowed(config, SHUT))])
    async def shut():
        pass

    with TestClient(app) as client:
        assert client.get("/open").status_code == 200
        assert client.get("/shut").status_code == 403
        authorizer.fail("UNAUTHENTICATED", methods=["Is"])
        assert client.get("/open").status_code == 503
    assert scraped() == {
        REQUESTS % ("allowed", "dependency"): 1,
        REQUESTS % ("denied", "dependency"): 1,
        REQUESTS % ("error", "dependency"): 1,
        ERRORS % "UNAUTHENTICATED": 1,
        MISSES % "dependency": 3,
    }


async def test_answers_of_a_cache_are_hits_and_others_are_misses(make):
    config = make(decision_cache=DecisionCache(max_size=1))
    async with config.connection_pool:
        for path in (OPEN, OPEN, SHUT, SHUT, SHUT):
            await ask(config, path)
    status = config.decision_cache.status()
    assert (status.hits, status.misses, status.evictions) == (3, 2, 1)
    assert scraped() == {
        REQUESTS % ("allowed", "manual"): 2,
        REQUESTS % ("denied", "manual"): 3,
        HITS % "manual": 3,
        MISSES % "manual": 2,
        'topaz_cache_evictions_total{reason="size"}': 1,
        SIZE: 1,
    }
    found = scrape(REGISTRY, "topaz_")
    assert found[LATENCY % ("true", "manual")] == 3
    assert found[LATENCY % ("false", "manual")] == found[CALLS] == 2


async def test_without_a_cache_an_answer_of_the_same_request_is_a_hit(make):
    config, request = make(), http_request()
    async with config.connection_pool:
        for _ in range(3):
            await config.decide(request, OPEN)
    assert scraped() == {
        REQUESTS % ("allowed", "manual"): 3,
        HITS % "manual": 2,
        MISSES % "manual": 1,
    }


async def test_equal_checks_at_the_same_time_are_shared(make, authorizer):
    config = make(decision_cache=DecisionCache())
    authorizer.delay = 0.1
    async with config.connection_pool, anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(ask, config)
    assert scraped() == {
        REQUESTS % ("allowed", "manual"): 10,
        MISSES % "manual": 1,
        "topaz_cache_shared_total": 9,
        SIZE: 1,
    }


# -- fallbacks and errors -------------------------------------------------------------


async def test_a_fallback_is_counted_with_the_error_that_it_replaces(make, authorizer):
    config = make(
        decision_cache=DecisionCache(
            ttl_seconds=0, denied_ttl_seconds=0, stale_ttl_seconds=60
        ),
        fallback="cache_then_allow",
        allow_unsafe_fallback=True,
    )
    async with config.connection_pool:
        assert not (await ask(config, SHUT)).allowed
        authorizer.fail("UNKNOWN", methods=["Is"])
        assert (await ask(config, SHUT)).origin == "stale"
        assert (await ask(config, OPEN)).origin == "fallback"
    assert scraped() == {
        REQUESTS % ("denied", "manual"): 2,
        REQUESTS % ("allowed", "manual"): 1,
        FALLBACK % ("true", "denied", "cache_then_allow"): 1,
        FALLBACK % ("false", "allowed", "cache_then_allow"): 1,
        ERRORS % "UNKNOWN": 2,
        MISSES % "manual": 3,
        "topaz_cache_stale_total": 1,
        SIZE: 1,
    }


@pytest.mark.parametrize(
    "fallback, label",
    [
        ("deny", "deny"),
        ("allow", "allow"),
        ("cache_then_deny", "cache_then_deny"),
        (lambda *_: True, "custom"),
    ],
)
async def test_each_strategy_has_a_label_of_its_own(make, authorizer, fallback, label):
    config = make(
        decision_cache=DecisionCache(), fallback=fallback, allow_unsafe_fallback=True
    )
    authorizer.fail("INTERNAL", methods=["Is"])
    async with config.connection_pool:
        decision = await ask(config)
    found = scraped()
    end = "allowed" if decision.allowed else "denied"
    assert found[FALLBACK % ("false", end, label)] == 1
    assert found[REQUESTS % (end, "manual")] == 1


def test_each_error_of_a_check_has_a_type_and_all_others_share_one():
    codes = {code.name for code in grpc.StatusCode} - {"OK"}
    classes = {
        error.__name__
        for error in vars(fastapi_topaz).values()
        if isinstance(error, type) and issubclass(error, TopazError)
    } - {"TopazError", "PoolError"}
    assert classes <= set(ERROR_TYPES)
    assert codes <= set(ERROR_TYPES)
    assert set(ERROR_TYPES) - codes - classes == {"other"}
    assert error_type(type("AliceError", (Exception,), {})()) == "other"


async def test_no_label_holds_an_identity_a_context_or_a_policy(make, authorizer):
    config = make(decision_cache=DecisionCache(), fallback="deny")
    async with config.connection_pool:
        await ask(config)
        authorizer.fail("UNAVAILABLE", IDENTITY, methods=["Is"])
        await ask(config, SHUT)
    text = str(scrape(REGISTRY, "topaz_"))
    for secret in (IDENTITY, RESOURCE, OPEN, SHUT):
        assert secret not in text


# -- circuit breakers ------------------------------------------------------------------


async def test_the_state_of_a_breaker_and_its_changes(make, authorizer):
    breaker = CircuitBreaker(failure_threshold=2, success_threshold=1)
    now = [100.0]
    breaker._clock = lambda: now[0]
    config = make(circuit_breaker=breaker)
    authorizer.fail("UNAVAILABLE", methods=["Is"])
    async with config.connection_pool:
        for error in ("UNAVAILABLE", "UNAVAILABLE", "CircuitOpen"):
            with pytest.raises((PoolError, grpc.aio.AioRpcError)):
                await ask(config)
            assert scraped()[ERRORS % error]
        found = scraped()
        assert (found[STATE], found[CHANGES % ("closed", "open")]) == (1, 1)
        authorizer.heal()
        authorizer.delay = 0.2
        now[0] += 2
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, config)
            await eventually(lambda: scraped().get(STATE) == 2)
    found = scraped()
    assert STATE not in found, "closed is 0"
    assert found[CHANGES % ("open", "half_open")] == 1
    assert found[CHANGES % ("half_open", "closed")] == 1
    assert found[ERRORS % "CircuitOpen"] == 1


async def test_a_shared_breaker_and_a_shared_cache_are_reported_once(make, authorizer):
    shared = {
        "circuit_breaker": CircuitBreaker(failure_threshold=1),
        "decision_cache": DecisionCache(),
        "connection_pool": ConnectionPool(min_connections=0),
    }
    one, two = make(**shared), make(**shared)
    async with one.connection_pool:
        for config in (one, two):
            await ask(config)
        authorizer.fail("UNAVAILABLE", methods=["Is"])
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(one, SHUT)
    found = scraped()
    assert found[SIZE] == shared["decision_cache"].status().size
    assert found[CHANGES % ("closed", "open")] == 1
    assert found[REQUESTS % ("allowed", "manual")] == 2, "checks are added up"


async def test_an_open_breaker_is_not_hidden_by_a_closed_one(make, authorizer):
    opened = make(circuit_breaker=CircuitBreaker(failure_threshold=1))
    closed = [make(circuit_breaker=CircuitBreaker()) for _ in range(2)]
    authorizer.fail("UNAVAILABLE", methods=["Is"])
    async with opened.connection_pool:
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(opened)
    assert scraped()[STATE] == 1
    assert len(closed) == 2


# -- providers, names, forks -----------------------------------------------------------


async def test_the_name_of_the_pool_is_a_label(make):
    one, two = make(name="one"), make(name="two")
    async with one.connection_pool, two.connection_pool:
        for config in (one, two, two):
            await ask(config)
    found = scrape(REGISTRY, "topaz_auth")
    asked = (
        "topaz_auth_requests_total"
        '{check_type="policy",decision="allowed",pool="%s",source="manual"}'
    )
    assert (found[asked % "one"], found[asked % "two"]) == (1, 2)
    took = 'topaz_auth_latency_seconds_count{cached="false",pool="%s",source="manual"}'
    assert (found[took % "one"], found[took % "two"]) == (1, 2)
    assert scrape(REGISTRY, CALLS) == {
        f'{CALLS}{{pool="one"}}': 1,
        f'{CALLS}{{pool="two"}}': 2,
    }


async def test_another_pool_of_a_configuration_brings_its_own_name(make, authorizer):
    config = make(name="one")
    config.connection_pool = ConnectionPool(min_connections=0, name="two")
    config.connection_pool.configure(authorizer.options)
    async with config.connection_pool:
        await ask(config)
    for name in scrape(REGISTRY, "topaz_auth"):
        assert 'pool="two"' in name


def test_metrics_keep_no_reference_to_a_configuration(make):
    config = make()
    reference = weakref.ref(config)
    del config
    gc.collect()
    assert reference() is None
    assert scraped() == {}


class BrokenProvider(MeterProvider):
    """Its histograms raise errors, as a foreign SDK may."""

    def get_meter(self, name, *_args, **_options):
        class Broken:
            def record(self, *_args):
                raise OSError(IDENTITY)

        class Meter(NoOpMeter):
            def create_histogram(self, *_args, **_options):
                return Broken()

        return Meter(name)


async def test_an_error_of_the_sdk_breaks_no_check(make, authorizer, caplog):
    config = make(meter_provider=BrokenProvider(), fallback="deny")
    async with config.connection_pool:
        assert (await ask(config)).allowed
        authorizer.fail("PERMISSION_DENIED", methods=["Is"])
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(config)
    assert config._metrics.counts.requests()["manual", "allowed", "policy"] == 1
    assert len(lines(caplog, logging.WARNING, logger="fastapi_topaz.metrics")) == 1


def test_an_invalid_meter_provider_is_rejected(make):
    with pytest.raises(TypeError, match="meter_provider must be a MeterProvider, got"):
        make(meter_provider="global")


FORKED = """
import os, warnings
import anyio
from opentelemetry import metrics
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import generate_latest
from starlette.requests import Request
from fastapi_topaz import *

config = TopazConfig(
    authorizer_options=AuthorizerOptions(url="127.0.0.1:1", insecure=True),
    policy_path_root="app",
    identity_provider=lambda _: Identity(IdentityType.NONE),
    connection_pool=ConnectionPool(min_connections=0, max_retries=0),
    circuit_breaker=CircuitBreaker(), decision_cache=DecisionCache(), fallback="deny",
)
# Later than the configuration, as an application may do it.
metrics.set_meter_provider(MeterProvider([PrometheusMetricReader()]))

async def main(times):
    async with config.lifespan(None):
        report("opened")
        for _ in range(times):
            request = Request({"type": "http", "headers": [], "path_params": {}})
            await config.decide(request, "app.x")

def report(when):
    names = "topaz_auth_requests_total", "topaz_errors_total", "topaz_fallback_total"
    lines = [line for line in generate_latest().decode().splitlines()
             if line.startswith(names)]
    counts = [int(float(line.split()[-1])) for line in lines]
    print(when, bool(lines), *[count for count in counts if count], flush=True)

anyio.run(main, 2, backend="{backend}")
report("parent")
warnings.simplefilter("ignore", DeprecationWarning)
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
    report("parent")
else:
    report("child")
    anyio.run(main, 1, backend="{backend}")
    report("child")
    os._exit(0)
"""


@pytest.mark.costly
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_forked_child_counts_from_0_and_reports_once_it_is_used(backend, run_program):
    """Run in a separate process, because the test sets the global provider."""
    ended = run_program(FORKED.replace("{backend}", backend), strict=False)
    # The log of the refused connections is in stderr.
    assert ended.code == 0, ended.err
    assert ended.out.splitlines() == [
        "opened True",
        "parent True 2 2 2",
        "child False",
        "opened True",
        "child True 1 1 1",
        "parent True 2 2 2",
    ]
