"""
Measures leases in this process, and prints microseconds of CPU for one.

`commits.py` starts this file, with the package of a commit in PYTHONPATH.
"""

from __future__ import annotations

import sys
import time

import anyio
from anyio.lowlevel import checkpoint

from fastapi_topaz import ConnectionPool
from fastapi_topaz.testing import FakeConnector


async def measure(streams, tasks, leases):
    async def lease(count):
        for _ in range(count):
            async with pool.acquire():
                if tasks > 1:
                    await checkpoint()

    async def all_tasks(count):
        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(lease, count // tasks)

    pool = ConnectionPool(
        connector=FakeConnector(),
        min_connections=10,
        max_connections=10,
        streams_per_connection=streams,
        eager_init=True,
    )
    async with pool:
        await all_tasks(leases // 5)
        began = time.process_time()
        await all_tasks(leases)
        return (time.process_time() - began) / leases * 1e6


if __name__ == "__main__":
    backend, *numbers = sys.argv[1:]
    print(
        anyio.run(
            measure,
            *map(int, numbers),
            backend="asyncio" if backend == "uvloop" else backend,
            backend_options={"use_uvloop": True} if backend == "uvloop" else {},
        )
    )
