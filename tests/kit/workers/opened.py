"""The same application, which opens the pool at import time."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI

from kit.workers.app import app as guarded
from kit.workers.app import config


# Not asyncio.run(), which ends the pool with its loop. Then nothing is open at the
# fork, and the workers may open the pool again.
loop = asyncio.new_event_loop()
loop.run_until_complete(config.connection_pool.initialize())

app = guarded

# Without the lifespan, which refuses to start: a request is the first use of the pool.
lazy = FastAPI(routes=guarded.routes)
