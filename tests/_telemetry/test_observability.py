"""
Test the metrics that Prometheus sees if the authorizer of an application fails.

The set-up is that of users: the SDK with its Prometheus exporter, `/metrics` mounted in
an application on a real server, uvicorn for asyncio, hypercorn for trio. The
application counts the outcome of each `acquire()` itself, and exports it in the same
scrape. Both counts must agree in every scrape, not only at the end.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from contextlib import asynccontextmanager
from typing import get_args

import anyio
import httpx
import pytest
from fastapi import Depends, FastAPI
from prometheus_client import REGISTRY, generate_latest, make_asgi_app
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

import fastapi_topaz as topaz
from fastapi_topaz._cli.demo import serving
from fastapi_topaz._pool.state.status import CloseReason
from fastapi_topaz.exceptions import FailureReason
from kit.waiting import eventually


pytestmark = pytest.mark.real_clock

GUIDE = """\
topaz_pool_connections_total{state="idle"} 3
topaz_pool_connections_total{state="busy"} 7
topaz_pool_acquisitions_total 15234
topaz_pool_timeouts_total 12
topaz_pool_acquire_latency_seconds_bucket{le="0.001"} 14500
"""

# The outcomes of acquire(): as counted by the pool, and as seen by the caller.
ENDS = {
    "topaz_pool_acquisitions_total": "leased",
    "topaz_pool_timeouts_total": "PoolTimeout",
    "topaz_pool_rejected_total": "PoolSaturated",
    "topaz_pool_cancelled_total": "cancelled",
    'topaz_pool_failed_total{reason="connect"}': "ConnectFailed",
    'topaz_pool_failed_total{reason="closed"}': "PoolClosed",
}
IDLE = 'topaz_pool_connections_total{state="idle"}'
BUSY = 'topaz_pool_connections_total{state="busy"}'
WAITING, HEALTHY = "topaz_pool_waiting", "topaz_pool_healthy"
FAILURES = 'topaz_pool_connect_failures_total{reason="%s"}'
CLOSES = 'topaz_pool_closes_total{reason="%s"}'
APP = 'app_total{saw="%s"}'
DURATIONS = ("acquire_latency", "hold_time", "connect_time")


class CountedPool(topaz.ConnectionPool):
    """Counts the outcomes seen by its callers, without the counts of the pool."""

    def __init__(self, **options):
        super().__init__(**options)
        self.saw = Counter()

    @asynccontextmanager
    async def acquire(self, *, timeout=None):
        self.saw.update(("asked", "asking"))
        end = "leased"
        try:
            conn = await super().acquire(timeout=timeout)
        except topaz.PoolError as error:
            end = type(error).__name__
            raise
        except anyio.get_cancelled_exc_class():
            end = "cancelled"
            raise
        finally:
            self.saw.subtract(("asking",))
            self.saw[end] += 1
        try:
            yield conn
        finally:
            await self.release(conn)
            self.saw["returned"] += 1

    def collect(self):
        family = GaugeMetricFamily("app_total", "", labels=["saw"])
        for what in ("asked", "asking", "returned", *ENDS.values()):
            family.add_metric([what], self.saw[what])
        return [family]


def bare(text):
    """Remove the exporter's labels, and format whole numbers as the guide does."""
    text = re.sub(r'otel_scope_\w+="[^"]*",?', "", text)
    return re.sub(r"(?m)\.0$", "", text.replace("{}", "").replace(",}", "}"))


def samples(text):
    """Return the values by series, and the series that may never decrease."""
    values, rising = {}, {}
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            own = {key: labels[key] for key in labels if "otel_" not in key}
            inside = ",".join(f'{key}="{own[key]}"' for key in sorted(own))
            series = f"{name}{{{inside}}}" if inside else name
            assert series not in values, f"{series} appears twice"
            values[series] = value
            if family.type in {"counter", "histogram"}:
                rising[series] = value
    return values, rising


class Shop:
    """An application, as seen by its clients and by Prometheus."""

    def __init__(self, pool, authorizer):
        self.pool, self.authorizer = pool, authorizer
        self.answers, self.statuses, self.before = True, Counter(), {}
        authorizer.policies = {"shop.GET.goods": self.policy}
        config = topaz.TopazConfig(
            authorizer_options=authorizer.options,
            policy_path_root="shop",
            identity_provider=lambda _: topaz.Identity(topaz.IdentityType.NONE),
            connection_pool=pool,
            check_timeout=60.0,
        )
        self.app = app = FastAPI(lifespan=config.lifespan)
        app.mount("/metrics", make_asgi_app())

        @app.get("/goods", dependencies=[Depends(topaz.require_policy_auto(config))])
        async def goods():
            return []

        @app.get("/lease")
        async def lease(timeout: float, patience: float):
            with anyio.move_on_after(patience):
                try:
                    async with pool.acquire(timeout=timeout):
                        return "leased"
                except topaz.PoolError as error:
                    return type(error).__name__
            return "cancelled"

    async def policy(self, _check):
        while not self.answers:  # noqa: ASYNC110  (set from another thread)
            await asyncio.sleep(0.005)
        return True

    @asynccontextmanager
    async def open(self, backend):
        with serving(self.app, backend) as url:
            limits = {"timeout": 60, "follow_redirects": True, "trust_env": False}
            async with httpx.AsyncClient(base_url=url, **limits) as self.client:
                yield

    async def goods(self):
        self.statuses[(await self.client.get("/goods")).status_code] += 1

    async def lease(self, expected, timeout=60.0, patience=60.0):
        url = f"/lease?timeout={timeout}&patience={patience}"
        assert (await self.client.get(url)).json() == expected

    async def scrape(self):
        """Return the values by series, after checking the invariants."""
        response = await self.client.get("/metrics")
        now, rising = samples(response.raise_for_status().text)
        assert [name for name in self.before if now[name] < self.before[name]] == []
        self.before = rising
        for name, end in ENDS.items():
            assert now[name] == now[APP % end], name
        in_flight = now[APP % "asking"]
        assert sum(map(now.get, ENDS)) == now[APP % "asked"] - in_flight
        # A served or timed out caller no longer waits, but its task has not run yet.
        assert now[WAITING] <= in_flight
        counted = (APP % "leased", APP % "returned", "topaz_pool_connects_total")
        for what, name in zip(DURATIONS, counted, strict=True):
            # A histogram exists only after its first recorded value.
            assert now.get(f"topaz_pool_{what}_seconds_count", 0) == now[name]
        return now

    async def until(self, condition):
        """Return the first scrape that fulfils *condition*."""
        deadline = anyio.current_time() + 30
        while not condition(now := await self.scrape()):
            assert anyio.current_time() < deadline, f"not true within 30 s: {now}"
            await anyio.sleep(0.01)
        return now

    @asynccontextmanager
    async def all_leased(self):
        """Lease all connections to checks that get no answer until the end."""
        self.answers = False
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(self.goods)
            try:
                now = await self.until(lambda now: now[BUSY] == 3)
                assert (now[IDLE], self.authorizer.connections_open) == (0, 3)
                yield tasks
            finally:
                self.answers = True

    async def rest(self, *left):
        """Return a scrape after all activity ended with this many connections left."""

        def over(now):
            total = now["topaz_pool_connects_total"]
            total -= sum(now[CLOSES % reason] for reason in get_args(CloseReason))
            unrest = now[BUSY] + now["topaz_pool_connecting"] + now[WAITING]
            same = total == now[IDLE] == self.authorizer.connections_open
            return total in left and same and not unrest

        now = await self.until(over)
        assert now[APP % "asking"] == 0
        return now


@pytest.fixture
def shop(provider, embedded_authorizer, request):
    limits = {"min_connections": 1, "max_connections": 3, "max_waiting": 2}
    intervals = {"idle_check_interval": 0.02, "health_check_interval": 0.1}
    times = {"acquire_timeout": 60, "health_check_timeout": 60}
    times["max_idle_time"] = getattr(request, "param", 0.05)
    options = {**limits, **intervals, **times, "max_retries": 1}
    pool = CountedPool(**options, meter_provider=provider)
    REGISTRY.register(pool)
    yield Shop(pool, embedded_authorizer)
    REGISTRY.unregister(pool)


async def test_metrics_of_a_slow_authorizer(shop, anyio_backend_name):
    async with shop.open(anyio_backend_name):
        now = await shop.scrape()
        # Series are exported before their first event. Otherwise the first increase
        # would be lost.
        assert not any(now[FAILURES % reason] for reason in get_args(FailureReason))
        assert not any(now[CLOSES % reason] for reason in get_args(CloseReason))
        await shop.goods()
        await shop.rest(1)
        async with shop.all_leased() as tasks:
            for waiting in (1, 2):
                await shop.lease("PoolTimeout", timeout=0)
                await shop.lease("PoolTimeout", timeout=0.01)
                await shop.lease("cancelled", patience=0.01)
                tasks.start_soon(shop.lease, "leased")
                now = await shop.until(lambda now, n=waiting: now[WAITING] == n)
            assert sum(map(now.get, ENDS)) == shop.pool.saw["asked"] - 2
            await shop.lease("PoolSaturated")
        now = await shop.rest(1)
        assert [now[end] for end in ENDS] == [1 + 3 + 2, 4, 1, 2, 0, 0]
        assert now[CLOSES % "idle"] >= 2
        for what in DURATIONS:
            found = [name for name in now if f"{what}_seconds_bucket" in name]
            bounds = [float(name.split('"')[1]) for name in found]
            assert (len(bounds), bounds[0], bounds[-2]) == (17, 0.0001, 10.0)
            assert 0.001 in bounds
    # The SDK keeps the values that it has recorded. The pool itself is gone.
    after, _ = samples(generate_latest().decode())
    left = {name.split("_seconds_")[0] for name in after if "topaz" in name}
    assert left == {f"topaz_pool_{what}" for what in DURATIONS}


@pytest.mark.costly
@pytest.mark.parametrize("shop", [3600.0], indirect=True)
async def test_metrics_of_a_killed_a_stopped_and_a_failing_authorizer(
    shop, anyio_backend_name
):
    async with shop.open(anyio_backend_name):
        async with shop.all_leased():
            assert shop.authorizer.drop_connections() == 3
            retries = "topaz_pool_retries_total"
            await shop.until(lambda now: now[retries] == now[BUSY] == 3)
        assert shop.statuses == {200: 3}
        shop.authorizer.stop()
        await shop.until(lambda now: not now[HEALTHY])
        await shop.lease("ConnectFailed")
        await shop.goods()
        now = await shop.scrape()
        assert [now[end] for end in ENDS][1:] == [0, 0, 0, 2, 0]
        failed = [why for why in get_args(FailureReason) if now[FAILURES % why]]
        # A connection that ended right after its first answered probe is "unanswered".
        assert {"refused"} <= set(failed) <= {"refused", "unanswered"}
        assert now["topaz_pool_connect_retries_total"] > 0
        assert now[IDLE] == now[BUSY] == shop.authorizer.connections_open == 0
        gone = now[CLOSES % "lost"] + now[CLOSES % "unhealthy"]
        assert gone == now["topaz_pool_connects_total"] >= 3
        shop.authorizer.start()
        closed = (await shop.until(lambda now: now[HEALTHY]))[CLOSES % "unhealthy"]
        # As a proxy in front of a stopped server does: an outage, which closes no
        # connection.
        shop.authorizer.fail("UNAVAILABLE", methods=["Info"])
        now = await shop.until(lambda now: not now[HEALTHY])
        assert now["topaz_pool_probe_failures_total"] >= 2
        assert now[CLOSES % "unhealthy"] == closed
        shop.authorizer.heal()
        await shop.lease("leased")
        await shop.rest(1, 2, 3)
        assert shop.statuses == {200: 3, 503: 1}


async def test_metrics_of_a_closed_and_reopened_pool(shop, anyio_backend_name):
    @shop.app.post("/reopen")
    async def reopen():
        await shop.pool.close(grace=60)
        with pytest.raises(topaz.PoolClosed):
            async with shop.pool.acquire():
                pass
        await shop.pool.initialize()

    async with shop.open(anyio_backend_name):
        async with shop.all_leased() as tasks:
            tasks.start_soon(shop.lease, "PoolClosed")
            await shop.until(lambda now: now[WAITING])
            tasks.start_soon(shop.client.post, "/reopen")
            await shop.until(lambda now: now[APP % "PoolClosed"])
        await shop.goods()
        now = await shop.rest(1)
        assert [now[end] for end in ENDS] == [4, 0, 0, 0, 0, 2]
        assert now[CLOSES % "close"] == 3
        assert shop.statuses == {200: 4}


async def test_the_exact_metric_lines_of_the_guide(
    provider, embedded_authorizer, anyio_backend_name
):
    pool = topaz.ConnectionPool(
        min_connections=10, eager_init=True, acquire_timeout=60, meter_provider=provider
    )
    shop, leases = Shop(pool, embedded_authorizer), []

    async def lease():
        async with pool.acquire():
            pass

    @shop.app.post("/day")
    async def day():
        leases.extend([await pool.acquire() for _ in range(10)])
        for _ in range(12):
            with pytest.raises(topaz.PoolTimeout):
                await pool.acquire(timeout=0)
        async with anyio.create_task_group() as tasks:
            for _ in range(15_234 - 14_500):
                tasks.start_soon(lease)
            await eventually(lambda: pool.status().waiting == 15_234 - 14_500)
            # Wait until the last of them has waited longer, too.
            await anyio.sleep(0.002)
            await pool.release(leases.pop())
        for _ in range(14_500 - 10):
            await lease()
        for _ in range(2):
            await pool.release(leases.pop())

    @shop.app.post("/night")
    async def night():
        for conn in leases:
            await pool.release(conn)

    async with shop.open(anyio_backend_name):
        (await shop.client.post("/day")).raise_for_status()
        lines = bare((await shop.client.get("/metrics")).text).splitlines()
        assert [line for line in GUIDE.splitlines() if line not in lines] == []
        (await shop.client.post("/night")).raise_for_status()


LATE = """
import anyio, prometheus_client
from fastapi_topaz import ConnectionPool
from fastapi_topaz.testing import FakeConnector

# When the module is imported, as in any application.
pool = ConnectionPool(min_connections=0, connector=FakeConnector())

async def lease(times):
    for _ in range(times):
        async with pool.acquire():
            pass

async def main(times, provided):
    async with pool:
        await lease(times)
        if provided:
            from opentelemetry import metrics
            from opentelemetry.exporter.prometheus import PrometheusMetricReader
            from opentelemetry.sdk.metrics import MeterProvider

            metrics.set_meter_provider(MeterProvider([PrometheusMetricReader()]))
            await lease(4)
            print(prometheus_client.generate_latest().decode())

anyio.run(main, 2, False, backend="{backend}")
anyio.run(main, 3, True, backend="{backend}")
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_global_provider_may_be_missing_or_set_after_the_first_leases(
    backend, run_program
):
    ended = run_program(LATE.format(backend=backend), strict=False)
    assert (ended.err, ended.code) == ("", 0)
    now, _ = samples(ended.out)
    assert now["topaz_pool_acquisitions_total"] == 2 + 3 + 4
    assert now["topaz_pool_connects_total"] == 2
    assert now[IDLE] == 1
    # The durations of the first leases were not recorded.
    assert now["topaz_pool_acquire_latency_seconds_count"] == 4
    assert now["topaz_pool_hold_time_seconds_count"] == 4
