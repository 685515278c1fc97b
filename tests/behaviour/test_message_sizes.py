"""Test `max_message_bytes`, the limit of requests and of responses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import anyio
import grpc
import grpc.aio
import pytest

from fastapi_topaz import AuthorizerOptions, ConnectionPool, GrpcConnector, Target
from kit.h2peer import METHOD


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]

MIB = 2**20
DEFAULT = 4 * MIB


class Sized(grpc.GenericRpcHandler):
    """Answers with as many bytes as a request says, or with as many as it has."""

    def __init__(self):
        self.asked = 0
        self.peers = set()

    def service(self, _details):
        return grpc.unary_unary_rpc_method_handler(self.answer)

    def answer(self, request, context):
        self.asked += 1
        self.peers.add(context.peer())
        return bytes(int(request) if request.isdigit() else len(request))


@pytest.fixture
def server():
    sized = Sized()
    options = [("grpc.max_receive_message_length", -1)]
    with ThreadPoolExecutor(8) as executor:
        running = grpc.server(executor, handlers=[sized], options=options)
        sized.url = f"127.0.0.1:{running.add_insecure_port('127.0.0.1:0')}"
        running.start()
        yield sized
        running.stop(None).wait()


def pool_to(server, transport, **options):
    target = Target(url=server.url, insecure=True, **options)
    connector = GrpcConnector(target, transport)
    return ConnectionPool(connector=connector, min_connections=0, max_connections=1)


LIMITS = [{}, {"max_message_bytes": 1}, {"max_message_bytes": 1000}]
LIMITS += [{"max_message_bytes": 20 * MIB}]


@pytest.mark.parametrize("options", LIMITS, ids=repr)
async def test_a_request_beyond_the_limit_is_not_sent(server, transport, options):
    limit = options.get("max_message_bytes", DEFAULT)
    async with pool_to(server, transport, **options) as pool, pool.acquire() as conn:
        assert len(await conn.call(METHOD, bytes(limit), timeout=50)) == limit
        before = server.asked
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await conn.call(METHOD, bytes(limit + 1), timeout=50)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        text = caught.value.details()
        assert f"its request has {limit + 1} bytes" in text
        assert f"max_message_bytes={limit}" in text
        assert METHOD in text
        assert server.url in text
        assert server.asked == before
        assert len(await conn.call(METHOD, b"1", timeout=50)) == 1
        assert pool.status().suspect == 0
    assert len(server.peers) == 1


@pytest.mark.parametrize("options", [LIMITS[0], *LIMITS[2:]], ids=repr)
async def test_a_response_beyond_the_limit_is_an_error(server, transport, options):
    limit = options.get("max_message_bytes", DEFAULT)
    async with pool_to(server, transport, **options) as pool, pool.acquire() as conn:
        assert len(await conn.call(METHOD, b"%d" % limit, timeout=50)) == limit
        for size in (limit + 1, limit + 10**5):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await conn.call(METHOD, b"%d" % size, timeout=50)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert str(size) in caught.value.details()
            assert str(limit) in caught.value.details()
        assert len(await conn.call(METHOD, b"%d" % limit, timeout=50)) == limit
        assert pool.status().suspect == 0
    assert len(server.peers) == 1


@pytest.mark.costly
async def test_many_large_responses_at_once_fit_the_windows(server, transport):
    size = 9 * MIB
    options = {"max_message_bytes": size}
    async with pool_to(server, transport, **options) as pool, pool.acquire() as conn:
        sizes = []

        async def ask():
            sizes.append(len(await conn.call(METHOD, b"%d" % size, timeout=50)))

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(ask)
    assert sizes == [size] * 8


async def test_the_limit_applies_to_checks(embedded_authorizer, transport):
    embedded_authorizer.policies = {"app.x": True}
    options = AuthorizerOptions(
        url=embedded_authorizer.url, insecure=True, max_message_bytes=200
    )
    pool = ConnectionPool(transport=transport, min_connections=0)
    pool.configure(options)
    async with pool, pool.acquire() as conn:
        ask = {"policy_path": "app.x", "timeout": 50}
        assert await conn.decisions(**ask) == {"allowed": True}
        context = {"text": "x" * 200}
        with pytest.raises(grpc.aio.AioRpcError, match="max_message_bytes=200"):
            await conn.decisions(**ask, resource_context=context)


@pytest.mark.parametrize("cls", [Target, AuthorizerOptions])
@pytest.mark.parametrize("wrong", [0, -1, 2**30 + 1, 1.5, "1", True, None])
def test_a_limit_that_cannot_be_is_refused(cls, wrong):
    with pytest.raises((TypeError, ValueError), match="max_message_bytes must be"):
        cls(url="localhost:1", max_message_bytes=wrong)
    largest = cls(url="localhost:1", max_message_bytes=2**30)
    assert largest.max_message_bytes == 2**30


@pytest.mark.parametrize("limit", [1, 2**30])
async def test_the_least_and_the_largest_limit_work(server, transport, limit):
    options = {"max_message_bytes": limit}
    async with pool_to(server, transport, **options) as pool, pool.acquire() as conn:
        assert await conn.call(METHOD, b"1", timeout=50) == b"\0"
