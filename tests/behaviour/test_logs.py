"""What the log tells an operator, and the secrets that it must not contain."""

from __future__ import annotations

import io
import logging
import re

import anyio
import grpc
import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
    require_policy_allowed,
)
from fastapi_topaz.testing import EmbeddedAuthorizer, FakeConnector, fail, ok
from kit.logs import lines
from kit.pools import fill, make_pool


COUNTS = r"\(total=\d+ busy=\d+ waiting=\d+ connecting=\d+"


async def test_all_records_share_one_logger_tree_and_are_formatted_lazily(caplog):
    pool = make_pool(FakeConnector([fail()]), name="main", leak_threshold=1)
    async with pool:
        async with pool.acquire():
            await anyio.sleep(2)
        pool.resize(0, 5)
        pool.drain()
    assert len(caplog.records) > 8
    for record in caplog.records:
        assert record.name.startswith("fastapi_topaz.")
        assert record.args, record.msg
        assert "pool 'main'" in record.getMessage()


async def test_an_outage_logs_a_line_at_its_start_and_at_its_end(caplog):
    pool = make_pool(FakeConnector([fail("out of order")] * 3))
    async with pool, pool.acquire(timeout=60):
        pass
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.INFO]
    assert "opened, to fake" in told[0]
    assert "out of order" in told[1]
    assert "the outage is over (failed rounds of attempts: 3)" in told[2]
    assert "closing, with 5 s of grace" in told[3]


async def test_each_change_is_logged_with_the_counts_before_and_after(caplog):
    pool = make_pool(max_idle_time=10, idle_check_interval=1)
    async with pool:
        async with pool.acquire(), pool.acquire(), pool.acquire():
            pool.resize(0, 4)
        await anyio.sleep(12)
    (resized,) = lines(caplog, logging.INFO, part="resized")
    assert "(total=3 busy=3 waiting=0 connecting=0 -> total=3 busy=3" in resized
    (reaped,) = lines(
        caplog,
        logging.DEBUG,
        part="closing connections that were idle for max_idle_time=10 s",
    )
    assert "(total=3 busy=0 waiting=0 connecting=0 -> total=0 busy=0" in reaped
    assert (
        len(
            lines(
                caplog,
                logging.DEBUG,
                part="closing a connection to fake (fake:1) after 1",
            )
        )
        == 1
    )
    assert len(lines(caplog, logging.DEBUG, part=": idle (left: total=0")) == 3


async def test_a_lost_connection_is_logged_at_info_and_a_reaped_one_at_debug(caplog):
    connector = FakeConnector()
    pool = make_pool(connector, max_idle_time=10, idle_check_interval=1)
    async with pool:
        async with pool.acquire(), pool.acquire():
            pass
        connector.connections[0].hung_up = True
        await anyio.sleep(30)
    (line,) = lines(caplog, logging.INFO, part="closing a connection")
    assert "fake:1" in line
    assert ": lost (left: total=1" in line


async def test_a_connection_that_becomes_suspect_and_recovers_logs_two_lines(caplog):
    connector = FakeConnector()
    pool = make_pool(connector, health_check_interval=0, health_check_timeout=3)
    async with pool:
        async with pool.acquire() as conn:
            silent_one = connector.connections[0]
            silent_one.frozen = True

            async def probe(timeout):
                await anyio.sleep(timeout - 1)

            silent_one.probe = probe
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    await conn.call("/a/b", b"", timeout=1)
        await anyio.sleep(1)
        (silent,) = lines(caplog, logging.WARNING, part="is suspect")
        assert "fake:1" in silent
        assert "two calls in a row got no answer in time" in silent
        assert not lines(caplog, logging.DEBUG, part="is used again")
        await anyio.sleep(5)
        (back,) = lines(
            caplog, logging.INFO, part="answered its probe and is used again"
        )
        assert "fake:1" in back
        assert len(lines(caplog, logging.DEBUG, part="is suspect")) == 1


async def test_a_failed_probe_is_logged_with_the_health_check_timeout(caplog):
    connector = FakeConnector()
    pool = make_pool(connector, health_check_interval=10, health_check_timeout=3)
    async with pool:
        async with pool.acquire():
            pass
        connector.connections[0].frozen = True
        await anyio.sleep(20)
    (suspect,) = lines(caplog, logging.INFO, part="is suspect")
    assert "no answer within health_check_timeout=3 s" in suspect
    (gone,) = lines(
        caplog, logging.WARNING, part="failed its health check and is closed"
    )
    assert "no answer within health_check_timeout=3 s" in gone


# -- the text of each line about a connection -----------------------------------------

ONE = r"pool 'main': a connection to fake \(fake:\d\)"
COUNTED = COUNTS + r"\)"


def assert_told(caplog, expected):
    """Check that each line of *expected*, a level and a pattern, was logged."""
    told = [(record.levelno, record.getMessage()) for record in caplog.records]
    for level, pattern in expected:
        assert [
            line for at, line in told if at == level and re.fullmatch(pattern, line)
        ], pattern


async def test_the_lines_of_a_lost_server_name_the_address_and_the_counts(caplog):
    connector = FakeConnector([ok(), ok(), ok(), fail("no")])
    async with make_pool(connector, health_check_interval=10, name="main") as pool:
        await fill(pool, 3)
        for conn in connector.connections:
            conn.alive = False
        await anyio.sleep(11)
        async with pool.acquire():
            pass
        assert pool._counters.connects == 4
    dead = r"fake connection \d is dead"
    over = (
        r"pool 'main': connected to fake \(fake:4\) in 0.000 s, the outage is over "
        rf"\(failed rounds of attempts: 1\) {COUNTED}; not logged meanwhile: "
        r"suspect \(2\), health check failed: ConnectionLost \(2\), "
        r"closing: unhealthy \(2\)"
    )
    failed = f"{ONE} failed its health check"
    closing = ONE.replace("a connection", "closing a connection")
    expected = [
        (
            logging.DEBUG,
            rf"pool 'main': connected to fake \(fake:1\) in 0.000 s {COUNTED}",
        ),
        (logging.DEBUG, f"{failed}, and is probed once more: {dead} {COUNTED}"),
        (
            logging.INFO,
            f"{ONE} is suspect and gets no lease until it answers a probe: {dead} "
            + COUNTED,
        ),
        (logging.WARNING, f"{failed} and is closed: {dead} {COUNTED}"),
        (
            logging.INFO,
            rf"{closing} after 10\.0 s: unhealthy, its last error: {dead} "
            + COUNTED.replace("total", "left: total"),
        ),
        (logging.WARNING, f"pool 'main': no {COUNTED}"),
        (logging.INFO, over),
        (
            logging.DEBUG,
            rf"{closing} after 0\.0 s: close "
            + COUNTED.replace("total", "left: total"),
        ),
    ]
    assert_told(caplog, expected)


async def test_the_lines_of_a_refusing_server_name_the_address_and_the_counts(caplog):
    connector = FakeConnector()
    async with make_pool(connector, name="main", max_connections=2) as pool:
        await fill(pool, 2)
        for conn in connector.connections:
            conn.refuses = "503"
        for _ in range(2):
            async with pool.acquire() as conn:
                with pytest.raises(ConnectionRefusedError):
                    await conn.call("/a/b", b"")
        await anyio.sleep(3)
        for conn in connector.connections:
            conn.refuses = ""
        await anyio.sleep(10)
        assert pool._counters.probe_failures > 2
    over = (
        r"pool 'main': fake \(fake:\d\) answers again, the outage is over "
        rf"{COUNTED}; not logged meanwhile: suspect \(\d+\)"
    )
    refuses = "pool 'main': fake answers that its server is not available: 503"
    expected = [
        (
            logging.DEBUG,
            rf"pool 'main': a probe was refused by fake \(fake:\d\): 503 {COUNTED}",
        ),
        (
            logging.WARNING,
            f"{refuses}; all callers fail until a probe is answered {COUNTED}",
        ),
        (logging.INFO, over),
        (logging.INFO, f"{ONE} answered its probe and is used again {COUNTED}"),
    ]
    assert_told(caplog, expected)


# -- secrets ------------------------------------------------------------------------

IDENTITY, RESOURCE, KEY, TENANT = "swordfish", "hunter2", "open-sesame", "t-0815"


def everything_that_happens(config, authorizer, backend):
    """Send checks through an application while everything that can fail does fail."""
    app = FastAPI(lifespan=config.lifespan)
    guard = Depends(require_policy_allowed(config, "myapp.GET.documents"))

    @app.get("/{card}", dependencies=[guard])
    async def index(card: str): ...

    with TestClient(app, backend=backend) as client:

        def status():
            return client.get(f"/{RESOURCE}").status_code

        assert status() == 200
        authorizer.policies = {"myapp.GET.documents": False}
        assert status() == 403
        for code in ("INTERNAL", "UNAUTHENTICATED", "INVALID_ARGUMENT", "UNAVAILABLE"):
            details = f"{IDENTITY} with {RESOURCE} of {TENANT}"
            authorizer.fail(code, details)
            assert status() == (500 if code == "INVALID_ARGUMENT" else 503)
        authorizer.heal()
        authorizer.delay = 30
        assert status() == 503
        authorizer.stop()
        assert status() == 503


@pytest.mark.real_clock
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_no_identity_resource_or_key_is_logged(backend, monkeypatch):
    spans = InMemorySpanExporter()
    tracer_provider = TracerProvider()
    tracer_provider.add_span_processor(SimpleSpanProcessor(spans))
    reader = InMemoryMetricReader()
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    logging.getLogger("fastapi_topaz").setLevel(logging.DEBUG)
    authorizer = EmbeddedAuthorizer(
        {"myapp.GET.documents": True}, api_key=KEY, tenant_id=TENANT
    )
    with authorizer:
        config = TopazConfig(
            authorizer_options=AuthorizerOptions(
                url=authorizer.url, api_key=KEY, tenant_id=TENANT, insecure=True
            ),
            policy_path_root="myapp",
            identity_provider=lambda _request: Identity(IdentityType.SUB, IDENTITY),
            resource_context_provider=lambda _request: {"card": RESOURCE},
            connection_pool=ConnectionPool(
                min_connections=0,
                leak_threshold=0.05,
                meter_provider=MeterProvider([reader]),
                semantic_conventions=True,
            ),
            check_timeout=0.2,
            tracer_provider=tracer_provider,
        )
        everything_that_happens(config, authorizer, backend)
    told = {
        "log": log.getvalue(),
        "spans": "".join(span.to_json() for span in spans.get_finished_spans()),
        "metrics": str(reader.get_metrics_data()),
    }
    assert "no decision on myapp.GET.documents" in told["log"]
    assert grpc.StatusCode.INTERNAL.name in told["spans"]
    assert told["metrics"]
    for where, text in told.items():
        for secret in (IDENTITY, RESOURCE, KEY, TENANT):
            assert secret not in text, where
