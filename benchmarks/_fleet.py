"""
A simulated network of replicas, in virtual time.

The pools and the checks are real. Only the part below the connector is scripted: DNS,
dialing, connections and replicas. It follows the native transport: the timeouts below
are its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import math
import random
import socket
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import patch
from weakref import WeakSet

import anyio
import grpc
import trio
from aserto.authorizer.v2 import Decision, IsResponse
from trio.testing import MockClock

from fastapi_topaz._http2 import dialing
from fastapi_topaz._http2.addresses import Address
from fastapi_topaz._http2.connection import PING_TIMEOUT, SILENCE
from fastapi_topaz._rpc.statuses import EndedCall, Ending, verdict
from fastapi_topaz.exceptions import ConnectFailed, ConnectionLost


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from kit.autojump import AutojumpLoop


LATENCY = 0.0005
"""Seconds from a worker to a replica, or back."""

HANDSHAKE = 0.005
"""Seconds for TCP, TLS and the settings of HTTP/2."""

PROBE = 0.001
"""Seconds that a replica needs to answer a probe."""

DRAWS = 100
"""The checks of one replica whose times are drawn together."""

EXPONENTIAL = [-math.log(1 - (each + 0.5) / DRAWS) for each in range(DRAWS)]
"""The quantiles of the exponential distribution with the mean 1."""

ALLOWED = IsResponse(
    decisions=[Decision(decision="allowed", **{"is": True})]
).SerializeToString()


# -- virtual time ---------------------------------------------------------------------


class AsyncioAgenda:
    """Calls functions at virtual times, on asyncio."""

    def __init__(self):
        self.now = asyncio.get_running_loop().time
        self.at = asyncio.get_running_loop().call_at

    async def run(self):
        """Return, because the loop itself calls the functions."""


class TrioAgenda:
    """Calls functions at virtual times, on trio."""

    def __init__(self):
        self.now = trio.current_time
        self._scope = None
        self._entries = []
        self._count = 0

    def at(self, when, function):
        # The count keeps entries of the same time in their order.
        self._count += 1
        heapq.heappush(self._entries, (when, self._count, function))
        if self._scope is not None and when < self._scope.deadline:
            self._scope.deadline = when

    async def run(self):
        """Call the functions until this task is cancelled."""
        while True:
            while self._entries and self._entries[0][0] <= self.now():
                heapq.heappop(self._entries)[2]()
            when = self._entries[0][0] if self._entries else math.inf
            with trio.CancelScope(deadline=when) as self._scope:
                await trio.sleep_forever()


def _time_of_loop():
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return trio.current_time()


def run_virtually(function, seed, backend="asyncio"):
    """
    Return the result of `await function()`, in virtual time.

    Two runs with the same *seed* and backend are the same.
    """
    options = {"loop_factory": AutojumpLoop}
    if backend == "trio":
        options = {"clock": MockClock(autojump_threshold=0)}
        trio._core._run._r.seed(seed)
    state = random.getstate()
    random.seed(seed)
    try:
        with patch.object(dialing, "monotonic", _time_of_loop):
            return anyio.run(function, backend=backend, backend_options=options)
    finally:
        random.setstate(state)


# -- replicas -------------------------------------------------------------------------


class Replica:
    """
    One server: it answers up to *parallel* calls at a time, and queues the others.

    Args:
        network: The network that it belongs to.
        number: Its number, which gives its address.
        parallel: The calls that it answers at the same time.
        service: The mean of the seconds that one check takes. They are random, with
            an exponential distribution. The mean of each `DRAWS` checks is the same, so
            the capacity of a replica is known.

    Attributes:
        is_listening: It accepts connections. If not, it refuses them.
        is_silent: It is frozen, or the network drops all packets to it.
        slowness: The factor by which all calls take longer.
        connections: Its open connections.
        checks: The checks that have reached it.
        connects: The connections that it has accepted.
    """

    def __init__(self, network, number, parallel, service):
        self.network = network
        self.number = number
        self.parallel = parallel
        self.service = service
        self.address = Address(
            socket.AF_INET,
            (f"10.0.{number // 250}.{1 + number % 250}", 8282),
            f"ipv4:10.0.{number // 250}.{1 + number % 250}:8282",
        )
        self.is_listening = True
        self.is_silent = False
        self.is_stopping = False
        self.slowness = 1.0
        self.connections = {}
        self.in_service = {}
        self.checks = self.connects = 0
        self._draws = []
        # When each of its places for a call becomes free.
        self._free_at = [0.0] * parallel

    def receive(self, call):
        """Take a call that arrives now."""
        if call.is_over or self.is_silent:
            return
        if self.is_stopping or not self.is_listening:
            call.end(Ending.GOAWAY, LATENCY)
            return
        agenda = self.network.agenda
        now = agenda.now()
        if call.is_check:
            self.checks += 1
            takes = self._draw() * self.slowness
            begins = max(now, heapq.heappop(self._free_at))
            heapq.heappush(self._free_at, begins + takes)
        else:
            begins, takes = now, PROBE * self.slowness
        self.in_service[call] = None
        if begins + takes + LATENCY > call.deadline:
            agenda.at(call.deadline, partial(call.end, Ending.TIMED_OUT))
        agenda.at(begins + takes, partial(self._answer, call))

    def _draw(self):
        """Return the seconds that one check takes."""
        if not self._draws:
            self._draws = [each * self.service for each in EXPONENTIAL]
            self.network.random.shuffle(self._draws)
        return self._draws.pop()

    def _answer(self, call):
        # A crash has removed all calls.
        if call in self.in_service and not self.is_silent:
            call.connection.heard_at = self.network.agenda.now() + LATENCY
            call.end(None, LATENCY)
        self.in_service.pop(call, None)

    def freeze(self):
        """Accept connections and calls, and answer nothing any more."""
        self.is_silent = True
        for connection in list(self.connections):
            connection.watch_silence()

    def vanish(self):
        """Drop all packets, as if the machine lost its power."""
        self.network.unpublish(self)
        self.freeze()

    def crash(self):
        """End all connections at once, and refuse new ones."""
        self.is_listening = self.is_stopping = False
        self.in_service.clear()
        self._free_at = [0.0] * self.parallel
        for connection in list(self.connections):
            connection.lose(LATENCY)

    def stop(self):
        """Send GOAWAY, refuse new connections, and finish the calls in service."""
        self.is_stopping, self.is_listening = True, False
        for connection in list(self.connections):
            connection.go_away(LATENCY)

    def start(self):
        """Accept connections again."""
        self.is_listening, self.is_stopping, self.is_silent = True, False, False
        self.slowness = 1.0
        self.network.publish(self)

    async def restart(self, drain, down):
        """Stop in order within *drain* seconds, and start after *down* more."""
        self.stop()
        await anyio.sleep(drain)
        self.crash()
        await anyio.sleep(down)
        self.start()


class Network:
    """
    The replicas, and the DNS name that stands for them.

    Args:
        agenda: Calls functions at virtual times.
        random: The source of randomness for the network and its replicas.
        dns_lag: Seconds until workers see a change of the DNS record.

    Attributes:
        is_running: The first replicas are there. From then on, the lag counts.
    """

    def __init__(self, agenda, random, dns_lag):
        self.agenda = agenda
        self.random = random
        self.dns_lag = dns_lag
        self.is_running = False
        self.replicas = []
        self.published = {}
        self.hosts = {}

    def add(self, parallel, service):
        """Return a new replica, which listens and is in the DNS."""
        replica = Replica(self, len(self.replicas), parallel, service)
        self.replicas.append(replica)
        self.hosts[replica.address] = replica
        self.publish(replica)
        return replica

    def publish(self, replica):
        """Add *replica* to the DNS."""
        self._later(partial(self.published.__setitem__, replica.address, None))

    def unpublish(self, replica):
        """Remove *replica* from the DNS."""
        self._later(partial(self.published.pop, replica.address, None))

    def remove(self, replica):
        """Take the address of *replica* away: packets to it get no answer."""
        self.hosts.pop(replica.address, None)

    def _later(self, function):
        lag = self.dns_lag if self.is_running else 0.0
        self.agenda.at(self.agenda.now() + lag, function)

    def serving(self):
        """Return the replicas that answer checks."""
        return [
            each
            for each in self.replicas
            if each.is_listening and not each.is_silent and each.address in self.hosts
        ]


# -- the transport --------------------------------------------------------------------


_CODES = {Ending.TIMED_OUT: grpc.StatusCode.DEADLINE_EXCEEDED}


class Call:
    """A call in flight. Ends with an `Ending`, or with None if it was answered."""

    __slots__ = ("_ended", "connection", "deadline", "is_check")
    __slots__ += ("is_over", "is_watched", "outcome")

    def __init__(self, connection, deadline, *, is_check):
        self.connection = connection
        self.deadline = deadline
        self.is_check = is_check
        self.is_over = self.is_watched = False
        self.outcome = None
        self._ended = anyio.Event()

    def end(self, outcome, after=0.0):
        """End with *outcome*, *after* some seconds. Only the first end counts."""
        if after:
            agenda = self.connection.agenda
            agenda.at(agenda.now() + after, partial(self.end, outcome))
        elif not self.is_over:
            self.is_over = True
            self.outcome = outcome
            self._ended.set()

    async def wait(self):
        try:
            await self._ended.wait()
        finally:
            self.is_over = True
            self.connection.calls.pop(self, None)
        return self.outcome


class SimulatedConnection:
    """A connection to one replica, with the interface that the pool expects."""

    max_streams = 100

    def __init__(self, connector, replica):
        self.replica = replica
        self.agenda = replica.network.agenda
        self.calls = {}
        self.heard_at = self.busy_since = self.agenda.now()
        self.peer = replica.address.text
        self._connector = connector
        self._takes_calls = True
        self._is_closed = False
        self._silent_at = math.inf
        replica.connections[self] = None

    async def call(self, method, request, *, timeout, metadata):  # noqa: ARG002
        await self._ask(timeout, is_check=True)
        return ALLOWED

    async def probe(self, timeout, /):
        await self._ask(timeout, is_check=False)

    async def _ask(self, timeout, *, is_check):
        if self._is_closed:
            raise ConnectionLost("closed")
        if not self._takes_calls:
            raise EndedCall(Ending.NOT_SENT, grpc.StatusCode.UNAVAILABLE, "not sent")
        now = self.agenda.now()
        call = Call(self, now + timeout, is_check=is_check)
        if not self.calls:
            self.busy_since = now
        self.calls[call] = None
        self.agenda.at(now + LATENCY, partial(self.replica.receive, call))
        if self.replica.is_silent:
            self.watch_silence()
        ending = await call.wait()
        if ending is not None:
            code = _CODES.get(ending, grpc.StatusCode.UNAVAILABLE)
            raise EndedCall(ending, code, ending.name)

    def watch_silence(self):
        """Find out by a PING, after a second of silence, that the replica is dead."""
        for call in self.calls:
            if not call.is_watched:
                call.is_watched = True
                self.agenda.at(call.deadline, partial(call.end, Ending.TIMED_OUT))
        if not self.calls or self._silent_at < math.inf:
            return
        self._silent_at = max(self.busy_since, self.heard_at) + SILENCE + PING_TIMEOUT
        now = self.agenda.now()
        self.agenda.at(max(now, self._silent_at), self._is_silent)

    def _is_silent(self):
        self._silent_at = math.inf
        if self.replica.is_silent:
            self._connector.failed.add(self.replica.address)
            self.lose()

    def go_away(self, after=0.0):
        """Take no more calls: the replica has sent GOAWAY."""
        if after:
            self.agenda.at(self.agenda.now() + after, self.go_away)
        else:
            self._takes_calls = False

    def lose(self, after=0.0):
        """End all calls: the connection is lost."""
        if after:
            self.agenda.at(self.agenda.now() + after, self.lose)
            return
        self._takes_calls = False
        self.replica.connections.pop(self, None)
        for call in list(self.calls):
            call.end(Ending.CUT_OFF)

    def judge(self, error, /):
        return verdict(error, self.is_lost)

    def is_lost(self):
        return not self._takes_calls

    async def close(self, grace, /):  # noqa: ARG002
        self._is_closed = True
        self.lose()
        await anyio.lowlevel.checkpoint()


class SimulatedConnector:
    """Resolves the name, and connects to one of its addresses, as `native` does."""

    target = "topaz.internal:8282"
    spreads = True
    probes = True

    def __init__(self, network):
        self._network = network
        self.failed = dialing.FailedAddresses()
        self._opened = WeakSet()

    async def servers(self):
        await anyio.sleep(2 * LATENCY)
        return tuple(self._network.published)

    async def connect(self, timeout, /):  # noqa: ARG002
        await anyio.sleep(2 * LATENCY)  # DNS
        silent = []
        in_use = Counter(x.peer for x in self._opened if not x.is_lost())
        for address in self.failed.order(self._network.published, in_use):
            await anyio.sleep(HANDSHAKE)
            replica = self._network.hosts.get(address)
            if replica is None or replica.is_silent:
                # The next address has its turn in parallel, and this one comes last
                # from now on.
                await anyio.sleep(dialing.ATTEMPT_DELAY - HANDSHAKE)
                silent.append(address)
            elif replica.is_listening:
                for each in silent:
                    self.failed.add(each)
                self.failed.remove(address)
                replica.connects += 1
                connection = SimulatedConnection(self, replica)
                self._opened.add(connection)
                return connection
            else:
                self.failed.add(address, ConnectionRefusedError())
        for each in silent:
            self.failed.add(each)
        raise ConnectFailed("no replica accepts connections", reason="refused")


@contextlib.asynccontextmanager
async def network(seed, backend, dns_lag):
    """Yield a `Network`, and run its agenda."""
    agenda = AsyncioAgenda() if backend == "asyncio" else TrioAgenda()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(agenda.run)
        yield Network(agenda, random.Random(seed), dns_lag)
        tasks.cancel_scope.cancel()
