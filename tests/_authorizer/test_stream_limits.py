"""Test servers that limit the streams of a connection."""

from __future__ import annotations

import asyncio
import contextlib

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import httpx
import pytest
from fastapi import Depends, FastAPI

from fastapi_topaz import (
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
    require_policy_allowed,
)
from fastapi_topaz._authorizer.messages import IS, is_request
from fastapi_topaz._cli.demo import serving
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.backends import asyncio_only
from kit.pools import Gauge
from kit.waiting import eventually


POLICY = "myapp.GET.documents"


@contextlib.contextmanager
def limited(streams, **options):
    """Serve with a limit, and count the calls of each connection on the server."""
    gauge = Gauge()
    with EmbeddedAuthorizer(
        {POLICY: True}, max_concurrent_streams=streams, **options
    ) as authorizer:
        service = authorizer._service
        answer = service._answer

        async def counted(method, context, work):
            with gauge.inside(context.peer()):
                return await answer(method, context, work)

        service._answer = counted
        yield authorizer, gauge


@pytest.mark.real_clock
async def test_a_pool_carries_more_checks_than_one_socket_allows():
    """
    Make 150 checks at once on 5 connections with 10 streams. The server allows 20.
    """
    with limited(20) as (authorizer, gauge):
        authorizer.delay = 0.05
        pool = ConnectionPool(
            min_connections=0,
            max_connections=5,
            streams_per_connection=10,
            acquire_timeout=60,
            connection_timeout=60,
        )
        pool.configure(authorizer.options)
        answers = []

        async def caller():
            async with pool.acquire() as conn:
                answers.append(await conn.decisions(policy_path=POLICY, timeout=60))

        async with pool, anyio.create_task_group() as tasks:
            for _ in range(150):
                tasks.start_soon(caller)
        assert answers == [{"allowed": True}] * 150
        assert authorizer.connections_accepted == 5
        assert len(gauge.peak) == 5
        assert max(gauge.peak.values()) == 10
        assert authorizer.calls["Is"] == 150


class Turnstile:
    """A policy that answers only while the gate is open."""

    def __init__(self):
        self._opened = asyncio.Event()  # on the authorizer's loop

    async def __call__(self, _check):
        await self._opened.wait()
        return True

    def open(self, authorizer):
        authorizer._in_loop(self._opened.set)

    def close(self, authorizer):
        authorizer._in_loop(self._opened.clear)


@pytest.mark.real_clock
@asyncio_only
async def test_on_one_shared_channel_checks_beyond_the_limit_time_out():
    """The excess calls wait inside gRPC, uncounted, until their deadlines pass."""
    request = is_request(POLICY, ("allowed",), None, None, None, None)
    gate = Turnstile()
    with EmbeddedAuthorizer({POLICY: gate}, max_concurrent_streams=20) as authorizer:
        async with grpc.aio.insecure_channel(authorizer.url) as channel:
            await channel.channel_ready()
            ask = channel.unary_unary(IS)
            inside = [ask(request) for _ in range(20)]
            await eventually(lambda: authorizer.streams == 20)
            beyond = [ask(request, timeout=0.2) for _ in range(130)]
            codes = [await call.code() for call in beyond]
            assert codes == [grpc.StatusCode.DEADLINE_EXCEEDED] * 130
            assert authorizer.calls["Is"] == 20
            gate.open(authorizer)
            codes = [await call.code() for call in inside]
            assert codes == [grpc.StatusCode.OK] * 20


@pytest.mark.real_clock
@asyncio_only
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
async def test_a_saturated_application_rejects_one_more_and_serves_the_rest(
    backend,
):
    """Two checks run, one waits, and one more gets 503 while the others still wait."""
    gate = Turnstile()
    with EmbeddedAuthorizer({POLICY: gate}) as authorizer:
        pool = ConnectionPool(
            min_connections=1,
            max_connections=1,
            streams_per_connection=2,
            max_waiting=1,
            acquire_timeout=300,
        )
        config = TopazConfig(
            authorizer_options=authorizer.options,
            policy_path_root="myapp",
            identity_provider=lambda _request: Identity(IdentityType.SUB, "alice"),
            connection_pool=pool,
            # Long after the client's timeout: a 503 comes at once or never.
            check_timeout=300,
        )
        app = FastAPI(lifespan=config.lifespan)
        guard = Depends(require_policy_allowed(config, POLICY))

        @app.get("/", dependencies=[guard])
        async def root():
            return "inside"

        with serving(app, backend) as url:
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                inside = []

                async def enter():
                    inside.append(await client.get("/"))

                for round_ in (1, 2):
                    gate.close(authorizer)
                    async with anyio.create_task_group() as tasks:
                        for _ in range(3):
                            tasks.start_soon(enter)
                        await eventually(lambda: authorizer.streams == 2)
                        await eventually(lambda: pool.status().waiting == 1)
                        for _ in range(3):
                            refusal = await client.get("/")
                            assert refusal.status_code == 503
                            assert refusal.headers["retry-after"] == "1"
                        assert authorizer.streams == 2
                        assert len(inside) == 3 * (round_ - 1), (
                            "the other requests are still in progress"
                        )
                        gate.open(authorizer)
                    assert [r.status_code for r in inside] == [200] * 3 * round_
                    assert (await client.get("/")).status_code == 200
                assert authorizer.connections_accepted == 1
                assert authorizer.calls["Is"] == 8
                assert pool.status().streams_in_use == pool.status().waiting == 0
