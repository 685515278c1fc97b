"""
Configures gunicorn with several worker processes. Each has its own pool.

    gunicorn --config gunicorn.conf.py

It uses the worker class of uvicorn, from the package uvicorn-worker.
"""

from __future__ import annotations

from uvicorn_worker import UvicornWorker


# Time in seconds for requests to end when a worker stops, for a deployment or because
# of max_requests. Set it to the longest request that is worth the wait.
REQUESTS = 20

# Time in seconds that the pool then gives to leases in use. It is the grace of
# `ConnectionPool.close()`, which the lifespan calls.
POOL = 5


class Worker(UvicornWorker):
    """A worker that limits the wait for requests. By default uvicorn has no limit."""

    CONFIG_KWARGS = UvicornWorker.CONFIG_KWARGS | {
        # If the pool cannot be opened, the application must not start without it.
        "lifespan": "on",
        "timeout_graceful_shutdown": REQUESTS,
    }


wsgi_app = "lifespan_app:app"
bind = "127.0.0.1:8000"
worker_class = Worker

# Topaz sees up to workers x max_connections connections: 4 x 10 here.
workers = 4

# The parent imports the application once, then forks the workers. A pool may be created
# before the fork. The lifespan opens it, and runs in the workers. If the pool is opened
# before the fork, the parent keeps connections that it does not need. With
# FASTAPI_TOPAZ_TRANSPORT=grpcio it must not be: gRPC does not survive such a fork. So
# call no `pool.initialize()` at import time. The hooks `on_starting`, `when_ready` and
# `pre_fork` also run in the parent.
preload_app = True

# Longer than both together. After this time gunicorn kills the worker, and its pool is
# not closed. Then Topaz learns of it from the kernel, and the metrics do not show it.
graceful_timeout = REQUESTS + POOL + 5

# If the event loop of a worker is blocked for this time, gunicorn kills the worker. A
# check does not block the loop. It waits for its connection and answer for at most
# `check_timeout`. But a worker that stops because of max_requests sends no heartbeat.
# Before that, it may have sent none for half of this time. So the timeout is twice the
# time that a worker needs to stop.
timeout = 2 * graceful_timeout

# To limit memory leaks, a worker is replaced after this number of requests. The new
# worker makes new connections. Because of the jitter, the workers are not replaced at
# the same time. With thousands of requests in between, this is no load for Topaz.
max_requests = 10_000
max_requests_jitter = 1_000
