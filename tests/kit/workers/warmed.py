"""The same application, which uses the pool at import time and then closes it."""

from __future__ import annotations

import asyncio

from kit.workers.app import app, config


async def ask() -> object:
    async with config.connection_pool as pool, pool.acquire() as conn:
        await conn.info()
        return conn.connection


asyncio.run(ask())

__all__ = ["app"]
