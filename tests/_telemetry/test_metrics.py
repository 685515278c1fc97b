"""Test the metric lines of the guide, through the SDK as users set it up."""

from __future__ import annotations

import gc
import os
import re
import warnings
import weakref

import anyio
import anyio.lowlevel
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import REGISTRY

from fastapi_topaz import ConnectionPool, PoolError, PoolTimeout
from fastapi_topaz._telemetry.instruments import TOPAZ
from fastapi_topaz.testing import FakeConnector, fail
from kit.pools import make_pool
from kit.scraping import scrape


@pytest.fixture
def registry():
    return REGISTRY


def make_metered(provider, connector=None, **options):
    return ConnectionPool(
        connector=connector or FakeConnector(),
        meter_provider=provider,
        **{"min_connections": 0, **options},
    )


async def test_the_five_metric_lines_of_the_guide(provider, registry):
    async with make_metered(provider, max_connections=3) as pool:
        leases = [await pool.acquire() for _ in range(3)]
        await pool.release(leases.pop())
        for _ in leases:
            with pytest.raises(PoolTimeout):
                async with pool.acquire():
                    await pool.acquire(timeout=0)
        samples = scrape(registry)
        assert samples['topaz_pool_connections_total{state="idle"}'] == 1
        assert samples['topaz_pool_connections_total{state="busy"}'] == 2
        assert samples["topaz_pool_acquisitions_total"] == 5
        assert samples["topaz_pool_timeouts_total"] == 2
        assert samples['topaz_pool_acquire_latency_seconds_bucket{le="0.001"}'] == 5
        assert samples["topaz_pool_acquire_latency_seconds_count"] == 5
        for conn in leases:
            await pool.release(conn)


async def test_connection_events_are_counted_by_reason(provider, registry):
    connector = FakeConnector([fail()])
    async with make_metered(provider, connector) as pool:
        async with pool.acquire():
            pass
        pool.drain()
    samples = scrape(registry)
    assert "topaz_pool_connects_total" not in samples, "a closed pool is not exported"
    async with make_metered(provider, FakeConnector([fail()])) as pool:
        async with pool.acquire():
            pass
        samples = scrape(registry)
        assert samples["topaz_pool_connects_total"] == 1
        assert samples['topaz_pool_connect_failures_total{reason="refused"}'] == 1


async def test_named_pools_are_reported_separately(provider, registry):
    one, two = make_metered(provider, name="one"), make_metered(provider, name="two")
    async with one, two:
        async with one.acquire(), two.acquire(), two.acquire():
            samples = scrape(registry)
            busy = 'topaz_pool_connections_total{pool="%s",state="busy"}'
            assert samples[busy % "one"] == 1
            assert samples[busy % "two"] == 2
        assert scrape(registry)['topaz_pool_acquisitions_total{pool="two"}'] == 2


@pytest.mark.parametrize("order", [("late", "given"), ("given", "late")])
@pytest.mark.parametrize("early", [True, False])
def test_an_injected_provider_and_the_global_one_show_both_pools(
    order, early, run_program
):
    """Run in a separate process, because the test sets the global provider."""
    program = f"""
import anyio
from fastapi_topaz import ConnectionPool
from fastapi_topaz.testing import FakeConnector
from opentelemetry import metrics
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import generate_latest

provider = MeterProvider([PrometheusMetricReader()])

def make(name):
    given = provider if name == "given" else None
    return ConnectionPool(connector=FakeConnector(), name=name, meter_provider=given)

async def main():
    if {early} and {order[0]!r} == "late":
        pools = [make({order[0]!r})]
        metrics.set_meter_provider(provider)
        pools.append(make({order[1]!r}))
    else:
        metrics.set_meter_provider(provider)
        pools = [make(name) for name in {order!r}]
    async with pools[0], pools[1]:
        for pool in pools:
            async with pool.acquire():
                pass
        print(generate_latest().decode())

anyio.run(main)
"""
    ended = run_program(program, strict=False)
    assert (ended.err, ended.code) == ("", 0)
    for name in order:
        line = rf'^topaz_pool_acquisitions_total\{{.*pool="{name}"\}} 1.0$'
        assert len(re.findall(line, ended.out, re.MULTILINE)) == 1


async def test_a_forked_child_reports_no_pools_of_its_parent(provider, registry):
    async with make_metered(provider):
        assert scrape(registry)["topaz_pool_healthy"] == 1
        with warnings.catch_warnings():
            # A warning of Python 3.12 and newer about threads of other tests.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            os._exit(len(scrape(registry)))
        assert os.waitpid(child, 0) == (child, 0)  # noqa: ASYNC222  (it ends at once)


async def test_a_connector_without_a_target_is_labelled_with_its_class(
    provider, registry
):
    class Odd(FakeConnector):
        target = property()  # raises AttributeError

    async with make_metered(provider, Odd(), semantic_conventions=True):
        samples = scrape(registry, "db_client_connection_max")
    assert list(samples) == [
        'db_client_connection_max{db_client_connection_pool_name="Odd"}'
    ]


async def test_metrics_keep_no_reference_to_a_closed_pool(provider):
    pool = make_metered(provider)
    async with pool, pool.acquire():
        pass
    # The background task ends one step after it has signalled its end.
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()
    reference = weakref.ref(pool)
    del pool
    gc.collect()
    assert reference() is None


async def test_counters_survive_a_reopening(provider, registry):
    pool = make_metered(provider)
    for count in (1, 2, 3):
        async with pool:
            async with pool.acquire():
                pass
            assert scrape(registry)["topaz_pool_acquisitions_total"] == count


async def test_every_instrument_has_a_description_and_every_duration_a_unit():
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    async with make_metered(provider) as pool:
        async with pool.acquire():
            pass
        data = reader.get_metrics_data()
        (resource,) = data.resource_metrics
        (scope,) = resource.scope_metrics
        assert scope.scope.name == "fastapi_topaz"
        assert scope.scope.version
        assert {metric.name for metric in scope.metrics} == {
            instrument.name
            for instrument in (*TOPAZ.durations, *TOPAZ.levels, *TOPAZ.events)
        }
        for metric in scope.metrics:
            assert metric.description, metric.name
            duration = metric.name.endswith(("_time", "_latency"))
            assert metric.unit == "s" if duration else metric.unit[0] + metric.unit[-1]
    provider.shutdown()


async def test_each_reason_is_exported_before_its_first_event(provider, registry):
    async with make_metered(provider):
        samples = scrape(registry)
    for reason in ("refused", "resolve", "tls", "timeout", "other"):
        name = f'topaz_pool_connect_failures_total{{reason="{reason}"}}'
        assert samples[name] == 0
    for reason in ("idle", "lifetime", "lost", "unhealthy", "spread", "drain", "close"):
        assert samples[f'topaz_pool_closes_total{{reason="{reason}"}}'] == 0


async def test_each_acquire_is_counted_by_its_outcome(provider, registry):
    pool = make_metered(provider, max_connections=1, max_waiting=1, acquire_timeout=10)
    async with pool, anyio.create_task_group() as tasks:
        endings = []

        async def ask(timeout=None):
            try:
                async with pool.acquire(timeout=timeout):
                    endings.append("lease")
            except PoolError as error:
                endings.append(type(error).__name__)
            except BaseException:
                endings.append("cancelled")
                raise

        async with pool.acquire():
            tasks.start_soon(ask, 1)  # waits, and is not served in time
            await anyio.sleep(0.1)
            tasks.start_soon(ask)  # one too many
            await anyio.sleep(2)
            with anyio.move_on_after(1):
                await ask()
        tasks.start_soon(ask)
        await anyio.sleep(1)
        samples = scrape(registry)
        assert sorted(endings) == ["PoolSaturated", "PoolTimeout", "cancelled", "lease"]
        counted = {
            name: samples[f"topaz_pool_{name}_total"]
            for name in ("acquisitions", "timeouts", "rejected", "cancelled")
        }
        expected = {"acquisitions": 2, "timeouts": 1, "rejected": 1, "cancelled": 1}
        assert counted == expected
        assert samples['topaz_pool_failed_total{reason="connect"}'] == 0


async def test_connect_retries_are_counted(provider, registry):
    connector = FakeConnector([fail(), fail()])
    async with make_metered(provider, connector) as pool:
        async with pool.acquire():
            pass
        samples = scrape(registry)
        assert samples["topaz_pool_connect_retries_total"] == 2
        assert samples["topaz_pool_connects_total"] == 1


async def test_pools_with_the_same_name_are_reported_as_one(provider, registry):
    one, two = make_metered(provider), make_metered(provider)
    async with one, two, one.acquire(), two.acquire(), two.acquire():
        samples = scrape(registry)
        assert samples['topaz_pool_connections_total{state="busy"}'] == 3
        assert samples["topaz_pool_acquisitions_total"] == 3
        assert samples["topaz_pool_streams_max"] == 20


async def test_opentelemetry_names_are_exported_on_request(provider, registry):
    pool = make_metered(provider, max_connections=7, semantic_conventions=True)
    async with pool, pool.acquire():
        samples = scrape(registry, "db_client")
        of_pool = 'db_client_connection_pool_name="fake"'
        name = "db_client_connection_count{%s,db_client_connection_state=%s}"
        assert samples[name % (of_pool, '"used"')] == 1
        assert samples[name % (of_pool, '"idle"')] == 0
        assert samples[f"db_client_connection_max{{{of_pool}}}"] == 7
        wait = f"db_client_connection_wait_time_seconds_count{{{of_pool}}}"
        assert samples[wait] == 1
        assert scrape(registry)["topaz_pool_acquisitions_total"] == 1
    assert not scrape(registry, "db_client_connection_max")


async def test_opentelemetry_names_are_not_exported_by_default(provider, registry):
    async with make_metered(provider) as pool, pool.acquire():
        assert not scrape(registry, "db_client")


@pytest.mark.parametrize("wrong", [None, 1, "yes"])
def test_semantic_conventions_must_be_a_bool(wrong):
    with pytest.raises(TypeError, match="semantic_conventions must be True or False"):
        ConnectionPool(semantic_conventions=wrong)


def test_an_invalid_meter_provider_is_rejected():
    class Provider:
        def get_meter(self, *_):
            return object()

    with pytest.raises(TypeError, match="meter_provider must be a MeterProvider"):
        make_pool(meter_provider=Provider())
