"""
One worker of a soak: pools, and callers that account for each of their requests.

    python tests/kit/soaking/worker.py '{"backend": "trio", "urls": [...], ...}'

It prints `ready` when the start measures are taken, `done` when its callers have ended,
and then its results as JSON. After each, it waits for a line of input.
"""

# ruff: noqa: T201  (processes communicate this way)

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import random
import re
import sys
import threading
import time
import warnings
from collections import Counter

import anyio
import anyio.to_thread
import grpc
import psutil

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectFailed,
    ConnectionLost,
    ConnectionPool,
    PoolClosed,
    PoolSaturated,
    PoolTimeout,
)


SILENCE = 30.0
"""Seconds within which some request must end, whatever is broken."""

CALLERS = 12
"""The number of callers for each pool."""

PATH = "soak.even"
# Each is about the network, none about the pool itself. Lines like "cannot connect:
# other: 3 more in the last 10 s" report suppressed lines.
EXPECTED = re.compile(
    r"cannot connect|failed its health check|health check failed: .* more in"
    r"|took back a lease|lease garbage-collected: .* more in|is out for"
    r"|is suspect and gets no lease|suspect: silent: .* more in"
    r"|its server is not available|refused: .* more in|a probe was refused"
    r"|unanswered: .* more in"
    r"|closed before .* came back|no connection to .* at startup"
)
ENDS = {PoolTimeout: "timeouts", PoolSaturated: "rejected"}
ENDS |= {ConnectFailed: "failed", PoolClosed: "closed"}


class Records(logging.Handler):
    """Keeps unexpected log lines."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.kinds = Counter()
        self.unexpected = []

    def emit(self, record):
        line = f"{record.levelname} {record.name}: {record.getMessage()}"
        if record.levelno == logging.WARNING and EXPECTED.search(line):
            self.kinds[re.sub(r"\d+", "N", EXPECTED.search(line)[0])] += 1
        else:
            self.unexpected.append(
                line + (f" {record.exc_info}" if record.exc_info else "")
            )


class Worker:
    def __init__(self, seed, urls):
        self.random = random.Random(seed)
        self.urls = urls
        self.pools = []
        self.asked = Counter()  # calls of acquire(), by outcome
        self.ended = Counter()  # requests, by outcome
        self.begun = self.numbers = 0
        self.wrong = []
        self.stopping = False
        self.last_end = time.monotonic()

    # -- callers --------------------------------------------------------------------

    async def caller(self, pool):
        while not self.stopping:
            await self.request(pool)
            self.last_end = time.monotonic()
            # No caller immediately asks a pool again that is down.
            await anyio.sleep(self.random.expovariate(50))

    async def request(self, pool):
        """Send one request, and record its outcome."""
        self.begun += 1
        self.numbers += 1
        number, how = self.numbers, "cancelled"
        patience = self.random.choice([0, 0.001, 0.02, 0.3, 3, 3, 3, 30])
        try:
            with anyio.move_on_after(patience):
                how = await self.answer(pool, number)
        finally:
            self.ended[how] += 1

    async def answer(self, pool, number):
        timeout = self.random.choice([None, None, 0, 0.05, 1])
        try:
            conn = await self.lease(pool, timeout)
        except (PoolTimeout, PoolSaturated, ConnectFailed, PoolClosed) as error:
            return type(error).__name__
        if self.random.random() < 0.02:
            del conn  # garbage
            return "lost lease"
        try:
            decisions = await conn.decisions(
                policy_path=PATH,
                resource_context={"number": str(number)},
                timeout=self.random.choice([0.02, 0.5, 2.0, 5.0]),
            )
        except grpc.aio.AioRpcError as error:
            return error.code().name
        except ConnectionLost:
            return "ConnectionLost"
        finally:
            await pool.release(conn)
        if decisions != {"allowed": number % 2 == 0}:
            self.wrong.append(f"{number}: {decisions}")
        return "allowed" if decisions["allowed"] else "denied"

    async def lease(self, pool, timeout):
        """Lease a connection, and record the outcome of acquire()."""
        end = "cancelled"
        try:
            conn = await pool.acquire(timeout=timeout)
            end = "acquisitions"
        except tuple(ENDS) as error:
            end = ENDS[type(error)]
            raise
        finally:
            self.asked[pool, end] += 1
        return conn

    # -- disturbance ----------------------------------------------------------------

    async def operator(self, pool):
        """Resize, drain, close and reopen. The pool stays open, with its first size."""
        while not self.stopping:
            await anyio.sleep(self.random.expovariate(0.5))
            match self.random.randrange(8):
                case 0:
                    with anyio.move_on_after(self.random.choice([0.01, 5])):
                        await pool.close(self.random.choice([0, 0.1, 1]))
                    await anyio.sleep(self.random.uniform(0, 0.2))
                    await pool.initialize()
                case 1 | 2:
                    pool.drain()
                case 3:
                    gc.collect()
                case _:
                    most = self.random.randint(1, 6)
                    pool.resize(self.random.randint(0, most), most)
        pool.resize(1, 4)
        await pool.initialize()

    async def watchdog(self):
        while not self.stopping:
            await anyio.sleep(1)
            if time.monotonic() - self.last_end > SILENCE:
                faulthandler.dump_traceback(all_threads=True)
                self.wrong.append(f"no request ended for {SILENCE} s: {self.pools}")
                return

    # -- the phases of a run ----------------------------------------------------------

    def make_pools(self):
        for url in self.urls:
            for streams in (1, 50):
                pool = ConnectionPool(
                    min_connections=1,
                    max_connections=4,
                    streams_per_connection=streams,
                    acquire_timeout=3,
                    connection_timeout=2,
                    health_check_interval=2,
                    health_check_timeout=1,
                    max_idle_time=3,
                    idle_check_interval=1,
                    max_lifetime=5,
                    leak_threshold=4,
                    max_waiting=self.random.choice([None, 2, 8]),
                    name=f"{url} {streams}",
                )
                pool.configure(AuthorizerOptions(url=url, insecure=True))
                self.pools.append(pool)

    async def period(self, seconds):
        """Use all pools at the same time for this time."""
        self.stopping, self.last_end = False, time.monotonic()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.watchdog)
            for pool in self.pools:
                await pool.initialize()
                tasks.start_soon(self.operator, pool)
                for _ in range(CALLERS):
                    tasks.start_soon(self.caller, pool)
            await anyio.sleep(seconds)
            self.stopping = True

    async def assert_whole(self):
        """Each pool serves its full capacity at once, and one more caller waits."""
        gc.collect()  # leases, too
        for pool in self.pools:
            with anyio.fail_after(60):
                while (  # noqa: ASYNC110
                    pool.status().streams_in_use or not await self.is_served(pool)
                ):
                    await anyio.sleep(0.05)
                # An expired connection makes room when its leases are released.
                while not await self.serves_all(pool):  # noqa: ASYNC110
                    await anyio.sleep(0.5)

    async def serves_all(self, pool):
        leases = []
        try:
            for _ in range(pool.options.capacity):
                leases.append(await self.lease(pool, 2))  # noqa: PERF401
            try:
                leases.append(await self.lease(pool, 0))
            except PoolTimeout:
                return True
            self.wrong.append(f"{pool} gave more than it has")
        except PoolTimeout:
            pass
        finally:
            for conn in leases:
                await pool.release(conn)
        return False

    async def is_served(self, pool):
        try:
            conn = await self.lease(pool, 5)
            try:
                await conn.info(timeout=2)
            finally:
                await pool.release(conn)
        except (*ENDS, grpc.aio.AioRpcError, ConnectionLost):
            return False
        return True

    def check_books(self):
        """Compare the counts of the callers with the counters of the pools."""
        if sum(self.ended.values()) != self.begun:
            self.wrong.append(f"{self.begun} requests were begun, {self.ended}")
        for pool in self.pools:
            ends = ("acquisitions", "timeouts", "rejected", "failed", "closed")
            for end in (*ends, "cancelled"):
                told, counted = getattr(pool._counters, end), self.asked[pool, end]
                if told != counted:
                    self.wrong.append(f"{pool}: {end} {told}, callers say {counted}")


def measures():
    process = psutil.Process()
    gc.collect()
    return {
        "fds": process.num_fds(),
        "threads": process.num_threads(),
        "tasks": len(anyio.get_running_tasks()),
        "rss": process.memory_info().rss // 1024,
    }


async def settled(before):
    """Return the measures once all but RSS are as *before*, or after 20 s."""
    with anyio.move_on_after(20):
        while any(  # noqa: ASYNC110
            n > before[k] for k, n in measures().items() if k != "rss"
        ):
            await anyio.sleep(0.2)
    return measures()


async def soak(seed, urls, seconds, warm_up):
    worker = Worker(seed, urls)
    worker.make_pools()
    # Caches, and the threads and files that gRPC keeps once it has them.
    await worker.period(warm_up)
    for pool in worker.pools:
        await pool.close(0)
    await anyio.sleep(2)
    await told("ready")
    before = measures()
    await worker.period(seconds)
    await told("done")  # the faults are over when the answer comes
    await worker.assert_whole()
    for pool in worker.pools:
        await pool.close()
    worker.check_books()
    after = await settled(before)
    return worker, before, after


async def told(word):
    print(word, flush=True)
    await anyio.to_thread.run_sync(sys.stdin.readline)


def main(options):
    # A worker that blocks so that even the watchdog does not run.
    faulthandler.dump_traceback_later(
        options["seconds"] + options["warm_up"] + 240, exit=True
    )
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "(?s).*was garbage-collected", ResourceWarning)
    records = Records()
    logging.getLogger().addHandler(records)
    backend = options["backend"]
    worker, before, after = anyio.run(
        soak,
        *(options[name] for name in ("seed", "urls", "seconds", "warm_up")),
        backend=backend.partition("+")[0],
        backend_options={"use_uvloop": True} if backend.endswith("uvloop") else None,
    )
    found = {
        "requests": worker.begun,
        "ended": dict(worker.ended),
        "logged": dict(records.kinds),
        "wrong": worker.wrong,
        "unexpected": records.unexpected,
        "before": before,
        "after": after,
        "alive": [thread.name for thread in threading.enumerate()],
        "reclaimed": sum(pool._counters.reclaimed for pool in worker.pools),
    }
    print(json.dumps(found), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
