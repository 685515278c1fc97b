"""
A pool of connections to another gRPC service, on asyncio or trio.

The service is fictional: `stock.v1.Stock/Count` takes the name of an article and
returns the number in stock. Its server answers the standard health check.

    python another_service.py trio apples pears
"""

from __future__ import annotations

import os
import sys

import anyio
from google.protobuf.wrappers_pb2 import Int64Value, StringValue

from fastapi_topaz import ConnectionPool, GrpcConnector, Target


COUNT = "/stock.v1.Stock/Count"


async def main(articles: list[str]) -> None:
    url = os.environ.get("STOCK_URL", "127.0.0.1:50051")
    connector = GrpcConnector(Target(url=url, insecure=True))
    async with ConnectionPool(connector=connector, max_connections=2) as pool:
        for article in articles:
            async with pool.acquire() as conn:
                request = StringValue(value=article).SerializeToString()
                answer = Int64Value.FromString(await conn.call(COUNT, request))
            print(f"{article}: {answer.value}")


if __name__ == "__main__":
    anyio.run(main, sys.argv[2:], backend=sys.argv[1])
