"""Test that a server that ends each connection costs few connects and little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import grpc
import psutil
import pytest

from fastapi_topaz import (
    ConnectFailed,
    ConnectionLost,
    ConnectionPool,
    TopazError,
    Verdict,
)
from fastapi_topaz.connector import GrpcConnector, chosen_transport
from kit.channels import hosted
from kit.configs import POLICY, REQUEST, config_of
from kit.faultkit.frames import ACK, HEAD, SETTINGS, answer, frame
from kit.waiting import eventually


pytestmark = pytest.mark.real_clock

PATIENCE = 20.0
CONNECTS, MIB, CPU = 20, 20, 2.0
"""The allowed cost of one check: connects, MiB of memory, seconds of CPU time."""
METHOD = "/aserto.authorizer.v2.Authorizer/Is"
GRPC = tuple(map(int, grpc.__version__.split(".")[:2]))
MAX_CONCURRENT_STREAMS = 3
REFUSED_STREAM, ENHANCE_YOUR_CALM = 7, 11
LAST = 2**31 - 1
"""The last stream id in a GOAWAY that only warns."""


def settings(wire):
    wire.settings({})


def goaway(code=0, **options):
    """Return a greeting that ends the connection and leaves the socket open."""

    def greeting(wire):
        settings(wire)
        wire.goaway(code, **options)

    return greeting


def closing(greeting):
    def then_close(wire):
        greeting(wire)
        wire.close()

    return then_close


def goaways(wire):
    settings(wire)
    for number in range(50):
        wire.goaway(last=LAST - 2 * number)


def no_streams(wire):
    wire.settings({MAX_CONCURRENT_STREAMS: 0})


def no_streams_and_goaway(wire):
    no_streams(wire)
    wire.goaway()


def acknowledged(wire):
    # Without its own SETTINGS frame.
    wire.send(frame(SETTINGS, ACK, 0))
    wire.goaway()


# Servers by their greeting. Their answers do not matter: they answer well if the
# request comes in time.
GREETINGS = {
    **{f"GOAWAY with code {code}": goaway(code) for code in (*range(13), 2**32 - 1)},
    "GOAWAY for later streams": goaway(last=LAST),
    "GOAWAY for all but the first stream": goaway(last=1),
    "GOAWAY with a long text": goaway(ENHANCE_YOUR_CALM, debug=b"x" * 10_000),
    "GOAWAY, and a close": closing(goaway()),
    "many GOAWAYs": goaways,
    "a close": closing(settings),
    "a close at once": closing(lambda _wire: None),
    "GOAWAY without SETTINGS": lambda wire: wire.goaway(),
    "GOAWAY after an ACK": acknowledged,
    "no streams": no_streams,
    "no streams, and GOAWAY": no_streams_and_goaway,
}


def go(**options):
    return lambda wire, _stream, _method: wire.goaway(**options)


def go_and_close(wire, _stream, _method):
    wire.goaway()
    wire.close()


def refuse_and_go(wire, stream, _method):
    wire.reset(stream, REFUSED_STREAM)
    wire.goaway()


def push_back(wire, stream, _method):
    # gRPC would retry at once if a retry policy allowed it.
    tail = [("grpc-status", "14"), ("grpc-retry-pushback-ms", "0")]
    wire.headers(stream, [*HEAD, *tail], end=True)


# Servers by their reaction to each request.
SCRIPTS = {
    "GOAWAY": go(),
    "GOAWAY too_many_pings": go(code=ENHANCE_YOUR_CALM, debug=b"too_many_pings"),
    "GOAWAY after this request": lambda wire, stream, _method: wire.goaway(last=stream),
    "GOAWAY for later requests": go(last=LAST),
    "GOAWAY, and a close": go_and_close,
    "a close": lambda wire, _stream, _method: wire.close(),
    "REFUSED_STREAM": lambda wire, stream, _method: wire.reset(stream, REFUSED_STREAM),
    "ENHANCE_YOUR_CALM": lambda wire, stream, _method: wire.reset(
        stream, ENHANCE_YOUR_CALM
    ),
    "REFUSED_STREAM and GOAWAY": refuse_and_go,
    "UNAVAILABLE, to be retried at once": push_back,
}


# With these servers a check ends at its deadline.
SILENT = {"no streams", "no streams, and GOAWAY"}
SILENT |= {"GOAWAY after this request", "GOAWAY for later requests"}
SHORT, ENOUGH = 2.0, 5.0


def flooded_config(frame_server, timeout=PATIENCE, **options):
    pool = ConnectionPool(**{"streams_per_connection": 10, **options})
    return config_of(pool, frame_server.options, check_timeout=timeout)


def mib():
    """Return the memory of this process in MiB."""
    return psutil.Process().memory_info().rss / 2**20


async def ends_of(config, callers):
    """Return the outcomes of the checks of *callers* callers, with counts."""
    ends = Counter()

    async def check():
        try:
            ends[await config.is_allowed(REQUEST, POLICY)] += 1
        except (grpc.aio.AioRpcError, TopazError) as error:
            ends[type(error).__name__] += 1

    async with config.connection_pool, anyio.create_task_group() as tasks:
        for _ in range(callers):
            tasks.start_soon(check)
    return ends


few_or_many = pytest.mark.parametrize(
    "callers", [pytest.param(1, marks=pytest.mark.slow), 20]
)

# Some of these faults cost one caller each, others many callers.
AT_ONCE = [
    *((name, 1) for name in GREETINGS),
    *((name, 20) for name in GREETINGS if "code" not in name),
    ("GOAWAY with code 0", 20),
]


@pytest.mark.parametrize("name, callers", AT_ONCE)
async def test_connections_ended_at_once_are_few_and_use_little_memory(
    frame_server, name, callers
):
    frame_server.greeting = GREETINGS[name]
    # The pool makes no second attempt, so that only the attempts of gRPC count.
    timeout = SHORT if name in SILENT else ENOUGH
    config = flooded_config(frame_server, timeout, min_connections=0, max_retries=0)
    before = mib()
    ends = await ends_of(config, callers)
    assert mib() - before < MIB
    assert ends.total() == callers
    assert False not in ends
    # 20 callers take longer on a busy machine: the pool makes four attempts a second.
    assert 1 <= frame_server.accepted <= CONNECTS * (1 if callers == 1 else 2)


@few_or_many
@pytest.mark.parametrize("name", SCRIPTS)
async def test_connections_ended_by_each_call_are_few_and_use_little_memory(
    frame_server, name, callers
):
    frame_server.script = SCRIPTS[name]
    config = flooded_config(frame_server, SHORT if name in SILENT else ENOUGH)
    before = mib()
    ends = await ends_of(config, callers)
    assert mib() - before < MIB
    assert ends.total() == callers
    assert not {True, False} & ends.keys()
    assert 1 <= frame_server.accepted <= CONNECTS


@few_or_many
async def test_connections_ended_with_their_first_answer_are_few(frame_server, callers):
    """No call can use such a connection, even though its first probe was answered."""

    def go_and_answer(wire, stream, method):
        wire.goaway(last=stream)
        answer()(wire, stream, method)

    frame_server.script = go_and_answer
    config = flooded_config(frame_server, SHORT)
    ends = await ends_of(config, callers)
    assert ends.total() == callers
    assert False not in ends
    assert 1 <= frame_server.accepted <= CONNECTS + callers


def cost_of(frame_server, backend, callers):
    """Return the cost of the checks of *callers* callers in a separate process."""
    program = Path(__file__).parents[1] / "kit" / "flooded.py"
    command = [sys.executable, program, frame_server.url, backend, str(callers), "5"]
    run = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.costly
@pytest.mark.parametrize(
    "greeting, script, backend, callers",
    [
        (goaway(), answer(), "asyncio", 1),
        (goaway(), answer(), "trio", 20),
        (goaway(ENHANCE_YOUR_CALM), answer(), "asyncio", 20),
        (goaways, go(), "trio", 1),
        (settings, SCRIPTS["GOAWAY too_many_pings"], "asyncio", 20),
    ],
)
def test_a_check_against_a_server_that_sends_goaway_is_cheap(
    frame_server, greeting, script, backend, callers
):
    """With its own retries, gRPC uses hundreds of MiB a second until the deadline."""
    frame_server.greeting, frame_server.script = greeting, script
    cost = cost_of(frame_server, backend, callers)
    assert Counter(cost["ends"]).total() == callers
    # Each check ends with its reason, long before its deadline.
    assert "DEADLINE_EXCEEDED" not in cost["ends"]
    assert cost["mib"] < MIB
    assert cost["cpu"] < CPU
    assert frame_server.accepted <= CONNECTS


@pytest.mark.xfail(
    chosen_transport(None) == "grpcio" and GRPC >= (1, 84),
    reason="gRPC's core aborts the process: it has no name for the code",
    strict=False,
)
@pytest.mark.parametrize("code", [13, 70_007])
def test_a_goaway_with_a_rare_code_uses_little_memory(frame_server, code):
    """HTTP_1_1_REQUIRED, and the GOAWAY that Apache's httpd sends (AH03069)."""
    frame_server.greeting = goaway(code)
    assert cost_of(frame_server, "asyncio", 1)["mib"] < MIB


# The native transport sees that the socket is closed before its SETTINGS are
# acknowledged. For gRPC's core a connection is ready before that.
ENDED = [
    "ended the connection as soon as it was ready",
    "closed the connection before it was ready",
]


async def test_an_attempt_makes_one_connection(frame_server):
    # If asked for its state, gRPC would reconnect at once, again and again.
    frame_server.greeting = closing(settings)
    connector = GrpcConnector(frame_server.options.target)
    failed = Counter()
    for attempt in range(1, 31):
        try:
            connection = await connector.connect(PATIENCE)
        except ConnectFailed as error:
            failed[any(text in str(error) for text in ENDED)] += 1
        else:
            await connection.close(0)
        assert frame_server.accepted == attempt
    assert failed[True] >= 1


ARGUMENTS = {"timeout": PATIENCE, "metadata": ()}


@asynccontextmanager
async def connected(frame_server):
    """Yield a connection with its task, if it needs one."""
    connection = await GrpcConnector(frame_server.options.target).connect(PATIENCE)
    async with hosted(connection):
        yield connection


@asynccontextmanager
async def ended(frame_server, end=go_and_close):
    """Yield a connection that was answered once and then ended."""
    async with connected(frame_server) as connection:
        frame_server.script = lambda *request: (answer()(*request), end(*request))
        await connection.call(METHOD, b"", **ARGUMENTS)
        await eventually(connection.is_lost)
        frame_server.script = answer()
        yield connection


# A probe of the native transport never connects: it would say nothing about this
# connection. `tests/_http2/test_successors.py` has the calls.
@pytest.mark.grpcio
@pytest.mark.parametrize("end", [go(), go_and_close, go(last=LAST)])
async def test_a_call_on_an_ended_connection_connects_once(frame_server, end):
    # So a lease survives a GOAWAY. The pool still replaces the connection.
    async with ended(frame_server, end) as connection:
        assert await connection.call(METHOD, b"", **ARGUMENTS)
        await connection.probe(PATIENCE)
        assert await connection.call(METHOD, b"", timeout=None, metadata=())
        assert connection.is_lost()
    assert (frame_server.accepted, frame_server.calls) == (2, {"Is": 3, "Info": 1})


async def test_calls_on_a_repeatedly_ended_connection_connect_rarely(
    frame_server,
):
    calls = 20
    async with ended(frame_server) as connection:
        frame_server.greeting = closing(settings)
        for _ in range(calls):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await connection.call(METHOD, b"", **ARGUMENTS)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            verdict = connection.judge(caught.value)
            assert verdict in {Verdict.UNAVAILABLE, Verdict.BROKEN}
    # Some calls reach gRPC before it notices that the socket is closed, more of them on
    # a busy machine. One such call makes up to dozens of connections.
    assert frame_server.accepted <= 1 + 10 * calls


async def test_a_call_that_cannot_reconnect_reports_why(frame_server):
    async with ended(frame_server) as connection:
        frame_server.greeting = closing(lambda _wire: None)
        for ask in (
            lambda: connection.call(METHOD, b"", **ARGUMENTS),
            lambda: connection.probe(PATIENCE),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="was not sent") as caught:
                await ask()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "the server closed the connection" in caught.value.details()


async def test_a_reconnecting_call_keeps_its_deadline(frame_server):
    async with ended(frame_server) as connection:
        frame_server.greeting = lambda _wire: None
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await connection.call(METHOD, b"", timeout=0.2, metadata=())
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_reconnecting_call_ends_if_its_connection_is_closed(frame_server):
    async with ended(frame_server) as connection:
        frame_server.greeting = lambda _wire: None
        before = frame_server.accepted

        async def ask():
            with pytest.raises(ConnectionLost):
                await connection.call(METHOD, b"", **ARGUMENTS)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await eventually(lambda: frame_server.accepted > before)
            await connection.close(0)
        with pytest.raises(ConnectionLost):
            await connection.call(METHOD, b"", **ARGUMENTS)


async def test_a_caller_can_be_cancelled_while_its_call_reconnects(frame_server):
    async with ended(frame_server) as connection:
        frame_server.greeting = lambda _wire: None
        before = frame_server.accepted
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: connection.call(METHOD, b"", **ARGUMENTS))
            await eventually(lambda: frame_server.accepted > before)
            tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    "script",
    ["GOAWAY", "GOAWAY, and a close", "REFUSED_STREAM", "REFUSED_STREAM and GOAWAY"],
)
async def test_a_call_that_the_server_did_not_begin_is_retried(frame_server, script):
    """The check replaces the retries that gRPC does not make."""
    met = []

    def once(wire, stream, method):
        if method == "Is" and not met:
            met.append(stream)
            SCRIPTS[script](wire, stream, method)
        else:
            answer()(wire, stream, method)

    frame_server.script = once
    async with (config := flooded_config(frame_server)).connection_pool:
        assert await config.is_allowed(REQUEST, POLICY) is True
    # One more call if the first connection got it again before its GOAWAY.
    assert frame_server.calls["Is"] in (
        {2, 3} if script == "REFUSED_STREAM and GOAWAY" else {2}
    )


@pytest.mark.parametrize("times", [1, 2] * 5)
async def test_a_call_excluded_by_goaway_is_sent_again_once(frame_server, times):
    # As gRPC's own retries would do, but only once.
    rest = [go()] * times

    def script(*request):
        (rest.pop() if rest else answer())(*request)

    frame_server.script = script
    async with connected(frame_server) as connection:
        if times == 1:
            assert await connection.call(METHOD, b"", **ARGUMENTS)
        else:
            with pytest.raises(grpc.aio.AioRpcError, match="GOAWAY received"):
                await connection.call(METHOD, b"", **ARGUMENTS)
    assert (frame_server.accepted, frame_server.calls) == (2, {"Is": 2})


async def test_a_call_that_the_server_may_have_begun_is_not_retried(frame_server):
    async with connected(frame_server) as connection:
        frame_server.script = lambda wire, stream, _method: (
            wire.goaway(last=stream),
            wire.close(),
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await connection.call(METHOD, b"", **ARGUMENTS)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (frame_server.accepted, frame_server.calls) == (1, {"Is": 1})


async def test_callers_of_an_ended_connection_share_the_next_one(frame_server):
    # A cancelled caller does not take the connection from the others.
    greeted, answers = [], []
    async with ended(frame_server) as connection:
        frame_server.greeting = greeted.append

        async def ask():
            answers.append(await connection.call(METHOD, b"", **ARGUMENTS))

        async with anyio.create_task_group() as tasks:
            for _ in range(9):
                tasks.start_soon(ask)
            # One of them connects. Trio starts tasks in random order, and if the caller
            # that connects is cancelled, another one connects again.
            await eventually(lambda: greeted)
            async with anyio.create_task_group() as impatient:
                impatient.start_soon(ask)
                await anyio.wait_all_tasks_blocked()
                impatient.cancel_scope.cancel()
            settings(greeted[0])
    assert len(answers) == 9
    assert frame_server.accepted == 2
