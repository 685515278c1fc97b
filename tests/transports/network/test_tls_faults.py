"""Test TLS handshakes that are slow or fail."""

from __future__ import annotations

import datetime as dt

import anyio
import anyio.lowlevel
import pytest
import trustme
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from fastapi_topaz import AuthorizerOptions, ConnectFailed
from fastapi_topaz.testing import EmbeddedAuthorizer
from fastapi_topaz.testing._certs import Certificates
from kit.network import (
    ASK,
    HOURS,
    PATH,
    PATIENCE,
    Outcomes,
    forget_errors,
    paced,
    pool_to,
    served,
    sockets,
    soon,
    via,
)


# -- F5: the TLS handshake is slow --------------------------------------------------


@sockets
async def test_a_slow_tls_handshake_within_the_limit_counts_as_time_to_connect(
    tls, tls_proxy
):
    tls_proxy.slow_handshake(0.5)
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    options = {"connection_timeout": PATIENCE, "meter_provider": provider}
    async with pool_to(via(tls_proxy, tls.ca_cert_path), **options) as pool:
        async with pool.acquire(timeout=PATIENCE) as conn:
            assert await conn.decisions(**ASK) == {"allowed": True}
        assert not pool._counters.connect_failures
        (scope,) = reader.get_metrics_data().resource_metrics[0].scope_metrics
        points = {metric.name: metric.data.data_points for metric in scope.metrics}
        (took,) = points["topaz_pool_connect_time"]
        assert took.count == 1
        assert took.sum >= 0.5
    provider.shutdown()


@sockets
async def test_a_tls_handshake_over_the_limit_is_a_failed_attempt(
    tls, tls_proxy, caplog
):
    tls_proxy.slow_handshake(HOURS)
    options = {"connection_timeout": 1, "max_retries": 0}
    async with pool_to(via(tls_proxy, tls.ca_cert_path), **options) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire(timeout=PATIENCE)
        assert (caught.value.reason, caught.value.permanent) == ("timeout", False)
        assert set(pool._counters.connect_failures) == {"timeout"}
        tls_proxy.heal()
        assert await served(pool)
        del caught
        forget_errors(caplog)
        await soon(lambda: tls_proxy.open == 1)


@sockets
async def test_a_slow_tls_handshake_does_not_block_an_existing_connection(
    tls, tls_proxy
):
    options = {"max_connections": 2, "connection_timeout": HOURS}
    async with pool_to(via(tls_proxy, tls.ca_cert_path), **options) as pool:
        outcomes = Outcomes()

        async def caller():
            async with pool.acquire(timeout=PATIENCE) as conn:
                return await conn.decisions(**ASK)

        first = await pool.acquire()
        tls_proxy.slow_handshake(HOURS)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(outcomes.of, caller)
            await soon(lambda: tls_proxy.accepted == 2)
            assert pool.status().connecting == 1
            assert await first.decisions(**ASK) == {"allowed": True}
            await pool.release(first)
        for _ in range(10):
            async with pool.acquire(timeout=0) as conn:
                assert await conn.decisions(**ASK) == {"allowed": True}
        assert outcomes == [{"allowed": True}]
        assert pool.status().connecting == 1, "the attempt continues"
        tls_proxy.heal()
        await soon(lambda: pool.status().total == 2)
        assert not pool._counters.connect_failures


# -- F6: TLS fails ------------------------------------------------------------------


LONG_AGO = dt.datetime(2001, 1, 1, tzinfo=dt.UTC)


def certified(authority, *names, **dates):
    leaf = authority.issue_cert(*names, **dates)
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    return Certificates("", leaf.private_key_pem.bytes(), chain)


def expired(authority):
    return certified(authority, "127.0.0.1", not_after=LONG_AGO)


def for_another_name(authority):
    return certified(authority, "topaz.example")


def of_an_unknown_ca(_authority):
    return certified(trustme.CA(), "127.0.0.1")


def plaintext(_authority):
    return None


@sockets
@pytest.mark.parametrize(
    "wrong",
    [expired, for_another_name, of_an_unknown_ca, plaintext],
    ids=lambda function: function.__name__,
)
async def test_a_tls_failure_is_permanent_until_the_server_is_fixed(wrong, tmp_path):
    authority = trustme.CA()
    path = str(tmp_path / "ca.pem")
    authority.cert_pem.write_to_path(path)
    authorizer = EmbeddedAuthorizer({PATH: True})
    authorizer._certificates = wrong(authority)
    with authorizer:
        options = AuthorizerOptions(url=authorizer.url, cert_file_path=path)
        # Retries do not matter here: the test allows enough of them.
        endless = {"max_retries": 1_000_000, "acquire_timeout": HOURS}
        async with pool_to(options, **endless) as pool:

            async def caller():
                for _ in range(3):
                    with pytest.raises(ConnectFailed) as caught:
                        await pool.acquire(timeout=PATIENCE)
                    assert caught.value.reason == "tls"
                    assert caught.value.permanent

            with paced(pool):
                async with anyio.create_task_group() as tasks:
                    for _ in range(50):
                        tasks.start_soon(caller)
            assert pool._counters.failed == 150
            # Two attempts at once, then one for each later request.
            assert set(pool._counters.connect_failures) == {"tls"}
            assert pool._counters.connect_failures["tls"] <= 12
            assert authorizer.connections_accepted <= 24
            authorizer.stop()
            authorizer._certificates = certified(authority, "127.0.0.1")
            authorizer.start()
            assert await served(pool)
