"""
A pool of connections to another gRPC service, on asyncio or trio.

The service is fictional: `stock.v1.Stock/Count` takes the name of an article and
returns the number in stock. Its server answers the standard health check.

    python another_service.py trio apples pears
"""

from __future__ import annotations

import os
import sys
from typing import Any

import anyio
from google.protobuf.wrappers_pb2 import Int64Value, StringValue

from fastapi_topaz import ConnectionPool, GrpcConnector, Target


class StockStub:
    """As protoc's gRPC plugin generates it. Import yours from `stock_pb2_grpc`."""

    def __init__(self, channel: Any) -> None:
        self.Count = channel.unary_unary(
            "/stock.v1.Stock/Count",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=Int64Value.FromString,
            _registered_method=True,
        )


async def main(articles: list[str]) -> None:
    url = os.environ.get("STOCK_URL", "127.0.0.1:50051")
    connector = GrpcConnector(Target(url=url, insecure=True))
    async with ConnectionPool(connector=connector, max_connections=2) as pool:
        for article in articles:
            async with pool.acquire() as conn:
                stock = conn.stub(StockStub)
                answer = await stock.Count(StringValue(value=article), timeout=5)
            print(f"{article}: {answer.value}")


if __name__ == "__main__":
    anyio.run(main, sys.argv[2:], backend=sys.argv[1])
