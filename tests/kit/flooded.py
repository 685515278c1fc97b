"""
Checks of a separate process, and the resources that they use.

    python flooded.py URL BACKEND CALLERS SECONDS

sends one check to the server at URL for each caller, with a timeout of SECONDS. It
prints how the checks ended, by how many MiB the memory grew, and the seconds of CPU
time.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections import Counter

import anyio
import grpc
from starlette.requests import Request

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
    TopazError,
)
from fastapi_topaz.testing import EmbeddedAuthorizer


POLICY = "app.GET.documents"
GIB = 2**30


def flooding_config(options, seconds):
    return TopazConfig(
        authorizer_options=options,
        policy_path_root="app",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
        connection_pool=ConnectionPool(streams_per_connection=10),
        check_timeout=seconds,
    )


async def ends_of(config, callers):
    ends = Counter()

    async def check():
        # Not one for all: equal checks of one request share a call.
        request = Request({"type": "http", "headers": [], "path_params": {}})
        try:
            ends[str(await config.is_allowed(request, POLICY))] += 1
        except grpc.aio.AioRpcError as error:
            ends[error.code().name] += 1
        except TopazError as error:
            ends[type(error).__name__] += 1

    async with config.connection_pool, anyio.create_task_group() as tasks:
        for _ in range(callers):
            tasks.start_soon(check)
    return ends


async def main(url, callers, seconds):
    # Resources that a process allocates once, for its first connections and calls.
    with EmbeddedAuthorizer({POLICY: True}) as authorizer:
        await ends_of(flooding_config(authorizer.options, 20.0), callers)
    config = flooding_config(AuthorizerOptions(url=url, insecure=True), seconds)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    ends = await ends_of(config, callers)
    cpu = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"ends": ends, "mib": grown, "cpu": cpu}))  # noqa: T201


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    # A limit that protects the machine.
    resource.setrlimit(resource.RLIMIT_AS, (6 * GIB, 6 * GIB))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, url, backend, callers, seconds = sys.argv
    anyio.run(main, url, int(callers), float(seconds), backend=backend)
