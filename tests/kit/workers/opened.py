"""The same application by somebody who opens the pool as the module is imported."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI

from kit.workers.app import app as guarded
from kit.workers.app import config


# Not asyncio.run(), which ends the pool with its loop: then nothing is open at the
# fork, and the workers may open it anew.
loop = asyncio.new_event_loop()
loop.run_until_complete(config.connection_pool.initialize())

app = guarded

# Without the lifespan, which refuses to start: a request is the first to use the pool.
lazy = FastAPI(routes=guarded.routes)
