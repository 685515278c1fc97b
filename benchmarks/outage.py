"""
Measures how long a pool needs to recover from an outage, and its cost during one.

    .venv/bin/python benchmarks/outage.py [--backend trio] [--down 30]
        [--callers 20] [--quick] [--save]

Callers ask an embedded authorizer all the time. It is stopped, and started again. The
benchmark prints, for one run on one machine:

- the attempts to connect per second during the outage;
- how long callers waited for their error;
- the share of one CPU that the process used;
- the time from the restart to the first answer and to the last connection.
"""

from __future__ import annotations

import logging
import statistics
import time

import anyio
from _rounds import parsed, parser, save
from anyio.to_thread import run_sync

from fastapi_topaz import ConnectFailed, ConnectionPool
from fastapi_topaz.testing import EmbeddedAuthorizer


POLICY = "myapp.GET.documents"


class Callers:
    """Callers that repeat a check, and record the outcomes."""

    def __init__(self, pool):
        self.pool = pool
        self.first_answer = None
        self.told_after = []
        self.lost = 0
        self.stopped = False

    async def ask(self):
        while not self.stopped:
            began = time.monotonic()
            try:
                async with self.pool.acquire() as conn:
                    await conn.decisions(policy_path=POLICY)
            except ConnectFailed:
                self.told_after.append(time.monotonic() - began)
            except Exception:  # noqa: BLE001  (a call that the stop interrupted)
                self.lost += 1
            else:
                self.first_answer = self.first_answer or time.monotonic()
            await anyio.sleep(0.005)


async def until(predicate):
    while not predicate():  # noqa: ASYNC110  (there is no event)
        await anyio.sleep(0.001)


async def main(options):
    down, count = options.down, options.callers
    logging.getLogger("fastapi_topaz").setLevel(logging.ERROR)
    with EmbeddedAuthorizer({POLICY: True}) as authorizer:
        pool = ConnectionPool(min_connections=10, eager_init=True)
        pool.configure(authorizer.options)
        callers = Callers(pool)
        async with pool, anyio.create_task_group() as tasks:
            for _ in range(count):
                tasks.start_soon(callers.ask)
            await until(lambda: pool.status().total == 10)
            await run_sync(authorizer.stop)
            await until(lambda: pool.status().failing)
            failures = pool._counters.connect_failures
            attempts, cpu = sum(failures.values()), time.process_time()
            began = time.monotonic()
            await anyio.sleep(down)
            took = time.monotonic() - began
            attempts = sum(failures.values()) - attempts
            cpu = time.process_time() - cpu
            callers.first_answer = None
            await run_sync(authorizer.start)
            back = time.monotonic()
            await until(lambda: authorizer.connections_open == 10)
            full = time.monotonic() - back
            await until(lambda: callers.first_answer)
            callers.stopped = True
        first = callers.first_answer - back
    told = callers.told_after
    rows = {
        "attempts to connect": f"{attempts / took:.1f} /s",
        "CPU of the process": f"{100 * cpu / took:.1f} %",
        "calls cut off": str(callers.lost),
        "told after, median": f"{statistics.median(told):.3f} s",
        "told after, at most": f"{max(told):.3f} s",
        "back: first answer after": f"{first:.3f} s",
        "back: all connections after": f"{full:.3f} s",
    }
    title = f"Down for {took:.1f} s, asked by {count} callers on {options.backend}"
    print(title)
    for name, value in rows.items():
        print(f"  {name:<28}{value}")
    save(options, f"outage-{options.backend}", {"title": title, "rows": rows})


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--backend", default="asyncio", choices=["asyncio", "trio"])
    arguments.add_argument("--down", type=float, default=30.0)
    arguments.add_argument("--callers", type=int, default=20)
    given = parsed(arguments, down=3.0)
    anyio.run(main, given, backend=given.backend)
