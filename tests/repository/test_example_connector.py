"""Test the example of a pool for another service."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import anyio
import grpc
import pytest
from google.protobuf.wrappers_pb2 import Int64Value, StringValue

from fastapi_topaz import ConnectFailed, ConnectionLost, ConnectionPool
from kit.backends import asyncio_only
from kit.examples import EXAMPLES, command, environment, load, program, run


pytestmark = pytest.mark.real_clock


class Stock(grpc.GenericRpcHandler):
    """The service of the example: it counts the letters of a name."""

    def __init__(self):
        self.serving = True
        self.peers = set()
        self.arrived = threading.Semaphore(0)
        self.go_on = threading.Event()

    def service(self, details):
        answer = {
            "/stock.v1.Stock/Count": self.count,
            "/grpc.health.v1.Health/Check": self.check,
        }
        return grpc.unary_unary_rpc_method_handler(answer[details.method])

    def count(self, request, context):
        self.peers.add(context.peer())
        name = StringValue.FromString(request).value
        if name == "none":
            context.abort(grpc.StatusCode.CANCELLED, "no such article any more")
        if name.startswith("slow"):
            self.arrived.release()
            self.go_on.wait(50)
        return Int64Value(value=len(name)).SerializeToString()

    def check(self, _request, _context):
        return b"\x08\x01" if self.serving else b"\x08\x02"


@pytest.fixture
def stock():
    service = Stock()
    with ThreadPoolExecutor(4) as executor:
        server = grpc.server(executor, handlers=[service])
        port = server.add_insecure_port("127.0.0.1:0")
        service.target = f"127.0.0.1:{port}"
        server.start()
        yield service
        service.go_on.set()
        server.stop(None).wait()


@pytest.fixture
def example():
    return load("own_connector")


@pytest.mark.parametrize("transport", ["native", "grpcio"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_command_for_another_service_works(
    stock, tmp_path, warnings_are, backend, transport
):
    line = command(EXAMPLES / "another_service.py").replace("trio", backend)
    env = environment(
        tmp_path, STOCK_URL=stock.target, FASTAPI_TOPAZ_TRANSPORT=transport
    )
    ended = run(program(line, options=warnings_are), env=env)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == ["apples: 6", "pears: 5"]


def test_the_command_of_the_connector_works(stock, tmp_path, warnings_are):
    line = command(EXAMPLES / "own_connector.py")
    env = environment(tmp_path, STOCK_URL=stock.target)
    ended = run(program(line, options=warnings_are), env=env)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == ["apples: 6", "pears: 5"]


async def arrived(stock):
    await anyio.to_thread.run_sync(lambda: stock.arrived.acquire(timeout=50))


async def flush(stock, example):
    """
    Wait until grpc.aio has reported all ended calls to this loop.

    Otherwise it would report the rest of a cut-off call to the loop of the next test,
    and fail because this loop is closed.
    """
    connection = await example.StockConnector(stock.target).connect(5.0)
    await connection.close(0)


@asyncio_only
async def test_each_connection_of_the_connector_is_a_socket(stock, example):
    async with ConnectionPool(connector=example.StockConnector(stock.target)) as pool:
        async with anyio.create_task_group() as tasks:
            for name in ("slow figs", "slow kiwis", "slow plums"):
                tasks.start_soon(example.count, pool, name)
            for _ in range(3):
                await arrived(stock)
            assert pool.status().busy == 3
            stock.go_on.set()
        assert len(stock.peers) == 3


@asyncio_only
async def test_a_call_of_the_connector_is_cancelled_like_any_anyio_call(stock, example):
    async with ConnectionPool(connector=example.StockConnector(stock.target)) as pool:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(example.count, pool, "slow figs")
                await arrived(stock)
                scope.cancel()
        assert scope.cancelled_caught
        assert pool.status().busy == 0
        stock.go_on.set()
        assert await example.count(pool, "figs") == 4


@asyncio_only
async def test_a_call_during_the_close_of_its_pool_is_lost(stock, example):
    pool = ConnectionPool(connector=example.StockConnector(stock.target))
    lost = []

    async def count():
        with pytest.raises(ConnectionLost) as raised:
            await example.count(pool, "slow figs")
        lost.append(raised.value)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        await arrived(stock)
        await pool.close(grace=0)
    assert len(lost) == 1
    stock.go_on.set()
    await flush(stock, example)


@asyncio_only
async def test_a_call_cancelled_by_the_server_counts_as_answered(stock, example):
    async with ConnectionPool(connector=example.StockConnector(stock.target)) as pool:
        with pytest.raises(grpc.aio.AioRpcError, match="no such article") as raised:
            await example.count(pool, "none")
        assert raised.value.code() is grpc.StatusCode.CANCELLED
        assert pool.status().suspect == 0
        await flush(stock, example)


@asyncio_only
async def test_a_not_serving_server_gets_no_connection(stock, example):
    stock.serving = False
    connector = example.StockConnector(stock.target)
    async with ConnectionPool(connector=connector, retry_on_failure=False) as pool:
        with pytest.raises(ConnectFailed, match=stock.target):
            await example.count(pool, "figs")
    assert stock.peers == set()


@asyncio_only
async def test_a_server_that_stops_serving_fails_its_probes(stock, example):
    async with (
        ConnectionPool(connector=example.StockConnector(stock.target)) as pool,
        pool.acquire() as conn,
    ):
        await conn.connection.probe(5.0)
        stock.serving = False
        with pytest.raises(ConnectionLost):
            await conn.connection.probe(5.0)
