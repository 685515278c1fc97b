"""Test that the transport `grpcio` refuses to work on trio, and says what to do."""

from __future__ import annotations

import pytest

from fastapi_topaz import AuthorizerOptions, ConnectionPool
from fastapi_topaz.connector import TRANSPORT_VARIABLE, GrpcConnector
from kit.backends import backends
from kit.configs import TOPAZ


REMEDY = r"asyncio only.*use transport='native', or unset FASTAPI_TOPAZ_TRANSPORT"

on_trio = pytest.mark.parametrize("anyio_backend", ["trio"], indirect=True)


@on_trio
@pytest.mark.parametrize("eager", [False, True])
async def test_a_pool_on_trio_is_refused_when_it_opens(eager):
    pool = ConnectionPool(transport="grpcio", eager_init=eager)
    pool.configure(TOPAZ)
    with pytest.raises(ValueError, match=REMEDY):
        await pool.initialize()
    with pytest.raises(ValueError, match=REMEDY):
        async with pool:
            pytest.fail("opened")
    with pytest.raises(ValueError, match=REMEDY):
        await pool.acquire()
    assert pool.status().connecting == 0


@on_trio
async def test_the_environment_variable_is_refused_too(monkeypatch):
    monkeypatch.setenv(TRANSPORT_VARIABLE, "grpcio")
    pool = ConnectionPool()
    pool.configure(TOPAZ)
    with pytest.raises(ValueError, match=REMEDY):
        await pool.initialize()


@on_trio
async def test_a_connector_on_trio_is_refused_when_it_connects():
    connector = GrpcConnector(TOPAZ.target, "grpcio")
    pool = ConnectionPool(connector=connector)
    with pytest.raises(ValueError, match=REMEDY):
        await pool.acquire()
    with pytest.raises(ValueError, match=REMEDY):
        await connector.connect(1)


def test_options_can_be_checked_before_an_event_loop_runs(tmp_path):
    GrpcConnector(TOPAZ.target, "grpcio").validate()
    options = AuthorizerOptions(cert_file_path=tmp_path / "none.pem")
    with pytest.raises(ValueError, match="cert_file_path"):
        GrpcConnector(options.target, "grpcio").validate()


@backends
def test_the_same_options_work_on_trio_with_the_default(backend, embedded_authorizer):
    import anyio

    async def main():
        pool = ConnectionPool(min_connections=0)
        pool.configure(embedded_authorizer.options)
        async with pool, pool.acquire() as conn:
            return await conn.info()

    assert anyio.run(main, backend=backend).version
