"""
Several worker processes, each with a pool of its own.

    gunicorn --config gunicorn.conf.py

With uvicorn's worker, from the package uvicorn-worker.
"""

from __future__ import annotations

from uvicorn_worker import UvicornWorker


# Seconds that requests have to end when a worker stops, be it for a deployment or for
# max_requests. The longest one that is worth waiting for.
REQUESTS = 20

# Seconds that the pool then gives leases which are still out: the grace of
# `ConnectionPool.close()`, which the lifespan calls.
POOL = 5


class Worker(UvicornWorker):
    """Ends requests in time: by itself uvicorn waits for them for ever."""

    CONFIG_KWARGS = UvicornWorker.CONFIG_KWARGS | {
        # A pool that cannot be opened is an error, not an application without one.
        "lifespan": "on",
        "timeout_graceful_shutdown": REQUESTS,
    }


wsgi_app = "lifespan_app:app"
bind = "127.0.0.1:8000"
worker_class = Worker

# Topaz sees up to workers x max_connections connections: 4 x 10 here.
workers = 4

# The application is imported once, and workers are forked off it. A pool may be built
# before a fork, and must be opened after it, since gRPC survives none with connections
# open. The lifespan does that: it runs in the workers. So no `pool.initialize()`, and
# no other gRPC call, at import time, nor in the hooks `on_starting`, `when_ready` and
# `pre_fork`, which run in the parent.
preload_app = True

# Longer than the two together: at its end gunicorn kills the worker, whose pool is not
# closed then. Topaz would learn it from the kernel, and the metrics not at all.
graceful_timeout = REQUESTS + POOL + 5

# A worker whose event loop stands still for so long is killed. No check does that: it
# waits for its connection and its answer without blocking, `check_timeout` at most.
# But a worker that ends by max_requests tells nothing any more, and may have been
# silent for half of the time before: so twice what it needs to end.
timeout = 2 * graceful_timeout

# Against memory that leaks somewhere, a worker is replaced after so many requests. The
# new one connects anew: with the jitter not all of them at the same time, and with
# thousands of requests in between it is nothing that Topaz would notice.
max_requests = 10_000
max_requests_jitter = 1_000
