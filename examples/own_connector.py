"""
A pool of connections to another gRPC service, with your own `Connector`.

The service is fictional: `stock.v1.Stock/Count` takes the name of an article and
returns the number in stock. Request and response are messages that protobuf includes.

    python own_connector.py apples pears
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import anyio
import grpc
import grpc.aio
from google.protobuf.wrappers_pb2 import Int64Value, StringValue

from fastapi_topaz import ConnectionLost, ConnectionPool, Verdict


if TYPE_CHECKING:
    from collections.abc import Sequence


# The encoded messages HealthCheckRequest(), about the whole server, and
# HealthCheckResponse(SERVING). Their classes are in grpcio-health-checking.
CHECK = b""
SERVING = b"\x08\x01"


class StockConnection:
    """One channel of grpc.aio, with one TCP connection."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(
            target,
            # Without this option, all channels to a target share one TCP connection.
            options=[("grpc.use_local_subchannel_pool", 1)],
        )
        self._closed = False

    async def probe(self, timeout: float, /) -> None:
        """
        Make a health check.

        The state of the channel is no proof: it stays READY if the server is frozen.
        """
        health = "/grpc.health.v1.Health/Check"
        answer = await self.call(health, CHECK, timeout=timeout)
        if answer != SERVING:
            raise ConnectionLost("the server says that it does not serve")

    async def call(
        self,
        method: str,
        request: bytes,
        *,
        timeout: float | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> bytes:
        """Make one call. Because this method exists, leases also have `call()`."""
        call = self._channel.unary_unary(method)(
            request, timeout=timeout, metadata=tuple(metadata)
        )
        # Not `await call`: if it is cancelled, it raises a CancelledError of its own,
        # which anyio's cancel scopes do not recognise.
        ended = anyio.Event()
        call.add_done_callback(lambda _: ended.set())
        try:
            await ended.wait()
        finally:
            call.cancel()  # does nothing if the call has ended
        if call.cancelled() and self._closed:
            raise ConnectionLost("the connection was closed under the call")
        if call.cancelled():  # by the server, so it is an answer
            none = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(
                await call.code(), none, none, details=await call.details()
            )
        response: bytes = await call
        return response

    def judge(self, error: BaseException, /) -> Verdict | None:
        """Return what the error of a call means for this connection."""
        if isinstance(error, ConnectionLost):
            return Verdict.BROKEN
        if not isinstance(error, grpc.aio.AioRpcError):
            return None
        bad: dict[Any, Verdict] = {
            grpc.StatusCode.UNAVAILABLE: Verdict.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED: Verdict.SILENT,
        }
        return bad.get(error.code(), Verdict.ANSWERED)

    async def close(self, grace: float, /) -> None:
        """Close the channel. Calls in flight have *grace* seconds to end."""
        self._closed = True
        await self._channel.close(grace)


class StockConnector:
    """
    Makes connections to the stock service at *target*.

    It works only on asyncio, because grpc.aio does not support trio.
    """

    def __init__(self, target: str) -> None:
        self.target = target  # the pool shows it in messages

    async def connect(self, timeout: float, /) -> StockConnection:
        """Return a connection that has answered a probe, or raise an error."""
        connection = StockConnection(self.target)
        try:
            await connection.probe(timeout)
        except BaseException:
            # Also if the pool cancels this attempt.
            with anyio.CancelScope(shield=True):
                await connection.close(0)
            raise
        return connection


async def count(pool: ConnectionPool, article: str) -> int:
    """Return the number of *article* in stock."""
    async with pool.acquire() as conn:
        answer: Int64Value = await conn.call(
            "/stock.v1.Stock/Count",
            StringValue(value=article),
            request_serializer=StringValue.SerializeToString,
            response_deserializer=Int64Value.FromString,
            timeout=2.0,
        )
    return answer.value


async def main(articles: Sequence[str]) -> None:
    target = os.environ.get("STOCK_URL", "127.0.0.1:50051")
    pool = ConnectionPool(connector=StockConnector(target), max_connections=2)
    counts: dict[str, int] = {}

    async def look(article: str) -> None:
        counts[article] = await count(pool, article)

    async with pool, anyio.create_task_group() as tasks:
        for article in articles:
            tasks.start_soon(look, article)
    for article in articles:
        print(f"{article}: {counts[article]}")


if __name__ == "__main__":
    anyio.run(main, sys.argv[1:])
