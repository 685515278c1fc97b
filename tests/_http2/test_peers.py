"""Servers that say GOAWAY all the time, or allow few streams: no call is lost."""

from __future__ import annotations

import contextlib
import os
import random
import time

import anyio
import grpc
import pytest

from fastapi_topaz import ConnectionPool, GrpcConnector, Target
from fastapi_topaz._rpc.statuses import ending
from kit.ccore import CCoreServer
from kit.gopeer.process import Gopeer
from kit.h2peer import opened
from kit.sizes import at_night


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop, pytest.mark.timeout(600)]

needs_gopeer = pytest.mark.skipif(
    "GOPEER" not in os.environ,
    reason="GOPEER does not name the server of tests/kit/gopeer: `nox -s gopeer`",
)

CALLERS = 20
AGE = 300
"""Milliseconds after which a server ends each connection with GOAWAY."""

DELAY = 0.005
"""Seconds that a call takes, so that some are in flight at each GOAWAY."""

METHOD = "/aserto.authorizer.v2.Authorizer/Is"
PROBE = "/aserto.authorizer.v2.Authorizer/Info"
PATIENCE = 20.0


class Counted:
    """How many connections a server of C-core has had."""

    def __init__(self):
        self.peers = set()

    def __call__(self, method, request, context):
        self.peers.add(context.peer())
        time.sleep(DELAY)
        return request


@contextlib.contextmanager
def ccore():
    """Yield the url of a server on C-core, and what counts its connections."""
    counted = Counted()
    options = {
        "grpc.max_connection_age_ms": AGE,
        "grpc.max_connection_age_grace_ms": 20_000,
    }
    with CCoreServer(counted, options) as server:
        yield server.url, lambda: len(counted.peers)


@contextlib.contextmanager
def gopeer():
    """Yield the url of a server on grpc-go, and what counts its connections."""
    with Gopeer(max_connection_age=f"{AGE}ms", delay=f"{DELAY}s") as peer:
        yield peer.url, lambda: peer.count("Accepted")


AGEING = [
    pytest.param(ccore, 2_500, id="C-core-2500"),
    pytest.param(ccore, at_night(25_000), id="C-core-25000", marks=pytest.mark.nightly),
    pytest.param(
        gopeer, 5_000, id="grpc-go-5000", marks=[pytest.mark.slow, needs_gopeer]
    ),
    pytest.param(
        gopeer,
        at_night(25_000),
        id="grpc-go-25000",
        marks=[pytest.mark.nightly, needs_gopeer],
    ),
]


@pytest.mark.costly
@pytest.mark.parametrize("server, calls", AGEING)
async def test_no_call_is_lost_with_goaway_every_300_ms(server, calls):
    failures = []
    made = 0
    with server() as (url, connections):
        connector = GrpcConnector(
            Target(url=url, insecure=True, probe=PROBE), transport="native"
        )
        pool = ConnectionPool(
            connector=connector,
            min_connections=0,
            max_connections=4,
            streams_per_connection=5,
            acquire_timeout=PATIENCE,
        )
        async with pool, anyio.create_task_group() as tasks:

            async def caller():
                nonlocal made
                while made < calls:
                    made += 1
                    try:
                        async with pool.acquire() as conn:
                            await conn.call(METHOD, b"", timeout=PATIENCE)
                    except Exception as error:  # noqa: BLE001  (kept, whatever it is)
                        failures.append(error)

            began = anyio.current_time()
            for _ in range(CALLERS):
                tasks.start_soon(caller)
        took = anyio.current_time() - began
        ended = connections()
    print(f"{made} calls in {took:.1f} s over {ended} connections")  # noqa: T201
    assert failures == []
    # Without a GOAWAY there would be four.
    assert ended > 4 + calls // 2500


# -- the stream limit ------------------------------------------------------------------


LIMITS = [
    pytest.param(*each, marks=marks)
    for each, marks in (
        ((5, 2_000), pytest.mark.slow),
        ((100, 5_000), pytest.mark.slow),
        ((5, at_night(20_000)), pytest.mark.nightly),
        ((100, at_night(40_000)), pytest.mark.nightly),
    )
]


class Callers:
    """Twice as many callers as streams; a third of their calls is cancelled."""

    def __init__(self, peer, limit, calls):
        self.peer = peer
        self.limit = limit
        self.left = calls
        self.answered = 0
        self.errors = []

    async def run(self, ask):
        rng = random.Random(1)
        async with anyio.create_task_group() as tasks:
            for _ in range(2 * self.limit):
                tasks.start_soon(self.caller, ask, rng)
        assert self.errors == []
        assert self.answered > 0
        assert self.peer.count("MostCall") <= self.limit
        assert self.peer.count("Accepted") == 1

    async def caller(self, ask, rng):
        while self.left > 0:
            self.left -= 1
            # A call takes a millisecond, and waits for as many others.
            patience = rng.uniform(0, 0.004) if rng.random() < 1 / 3 else PATIENCE
            with anyio.move_on_after(patience):
                try:
                    await ask()
                except grpc.aio.AioRpcError as error:
                    self.errors.append((ending(error), error))
                else:
                    self.answered += 1


@needs_gopeer
@pytest.mark.parametrize("limit, calls", LIMITS)
async def test_twice_as_many_callers_as_streams_are_not_refused(limit, calls):
    with Gopeer(max_streams=limit, delay="1ms") as peer:
        target = Target(url=peer.url, insecure=True)
        async with opened(target) as connection:

            async def ask():
                await connection.call(METHOD, b"", timeout=PATIENCE, metadata=())

            await Callers(peer, limit, calls).run(ask)


@needs_gopeer
@pytest.mark.parametrize("limit, calls", LIMITS)
async def test_a_pool_takes_no_more_leases_than_the_server_takes_calls(limit, calls):
    with Gopeer(max_streams=limit, delay="1ms") as peer:
        target = Target(url=peer.url, insecure=True, probe=PROBE)
        pool = ConnectionPool(
            connector=GrpcConnector(target, transport="native"),
            min_connections=0,
            max_connections=1,
            streams_per_connection=4 * limit,
            acquire_timeout=PATIENCE,
        )
        async with pool:

            async def ask():
                async with pool.acquire() as conn:
                    assert pool.status().streams_in_use <= limit
                    await conn.call(METHOD, b"", timeout=PATIENCE)

            await Callers(peer, limit, calls).run(ask)
