"""
An application of several processes, whose caches get invalidations through Redis.

Each process publishes what it invalidates to one channel, and receives what others
publish. coredis runs on anyio, so this works on asyncio and on trio.

    uvicorn redis_bus:app --workers 4
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import coredis
from coredis.retry import NoRetryPolicy
from fastapi import Depends, FastAPI, Request

from fastapi_topaz import (
    AuthorizerOptions,
    CacheStatus,
    DecisionCache,
    Identity,
    IdentityType,
    TopazConfig,
    require_policy_auto,
)


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class RedisBus:
    """
    An `InvalidationBus` on a channel of Redis.

    Args:
        url: The URL of the server, such as `redis://127.0.0.1:6379`.
        channel: The channel. Processes with another key need another one.
    """

    def __init__(self, url: str, channel: str) -> None:
        self._url, self._channel = url, channel
        self._client: coredis.Redis[bytes] | None = None

    async def publish(self, tags: Sequence[bytes], /) -> None:
        """Send *tags*, on the connection that `receive` has opened."""
        if self._client is None:
            raise ConnectionError("Redis is not connected")
        # Each tag has 16 bytes, so they can be separated again.
        await self._client.publish(self._channel, b"".join(tags))

    async def receive(self, deliver: Callable[[Sequence[bytes]], object], /) -> None:
        """Subscribe, and pass on what arrives."""
        # No repetition here: the cache must learn at once that the connection is lost.
        async with coredis.Redis.from_url(
            self._url,
            connect_timeout=2,
            stream_timeout=2,
            retry_policy=NoRetryPolicy(),
        ) as client:
            self._client = client
            try:
                async with client.pubsub(
                    channels=[self._channel],
                    retry_policy=NoRetryPolicy(),
                    ignore_subscribe_messages=True,
                ) as messages:
                    async for message in messages:
                        data = message["data"]
                        if isinstance(data, bytes):
                            deliver([data[i : i + 16] for i in range(0, len(data), 16)])
            finally:
                self._client = None


def get_identity(request: Request) -> Identity:
    user = request.headers.get("x-user")
    return Identity(IdentityType.MANUAL, user) if user else Identity(IdentityType.NONE)


cache = DecisionCache(
    invalidation_bus=RedisBus(
        os.environ.get("REDIS_URL", "redis://127.0.0.1:6379"), "myapp.invalidations"
    ),
    # The same secret in all processes, such as `secrets.token_bytes(32).hex()`.
    invalidation_key=bytes.fromhex(os.environ["INVALIDATION_KEY"]),
)
config = TopazConfig(
    authorizer_options=AuthorizerOptions(
        url=os.environ.get("TOPAZ_URL", "127.0.0.1:8282"), insecure=True
    ),
    policy_path_root="myapp",
    identity_provider=get_identity,
    decision_cache=cache,
)
app = FastAPI(lifespan=config.lifespan)
guarded = [Depends(require_policy_auto(config))]


@app.get("/documents/{id}", dependencies=guarded)
async def document(id: str) -> dict[str, str]:
    return {"id": id}


@app.delete("/documents/{id}", dependencies=guarded)
async def delete(id: str) -> None:
    # The rights of this document have changed: no process may use an older answer.
    config.invalidate(resource={"id": id})


@app.get("/health")
async def health() -> CacheStatus:
    return cache.status()
