"""
Random faults of a server, and random cancellations, under a pool on real sockets.

The server knows of each call how often it came, and whether it said that it did not
process it. So a call that was sent twice, or a wrong outcome, cannot hide.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import anyio
import grpc
import pytest

from fastapi_topaz import ConnectionPool, GrpcConnector, Target, TopazError
from fastapi_topaz._rpc.statuses import is_unprocessed
from kit.faultkit.frames import HEAD, TAIL, FrameServer, answer, message
from kit.h2peer import descriptors
from kit.waiting import eventually


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]

METHOD = "/test.Service/Call"
USERS, CALLS = 20, 25
CANCELLED, FAULTY = 0.4, 0.25
STREAMS, WINDOW = 3, 4
LAST = 2**31 - 1

UNPROCESSED = "unprocessed"
ANSWERED = "answered"
MAYBE = "maybe"


class Chaos:
    """A script of a `FrameServer` that records what happened to each question."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.fates = defaultdict(list)
        # By connection: its GOAWAY said that later streams are not processed.
        self.last = {}

    def greeting(self, wire):
        kinds = [{}, {}, {STREAMS: 2}, {STREAMS: 1}, {WINDOW: 3}, {STREAMS: 100}]
        if self.random.random() > FAULTY / 3:
            wire.settings(self.random.choice(kinds))
            return
        match self.random.randrange(4):
            case 0:
                wire.close()
            case 1:
                wire.settings({})
                wire.close()
            case 2:
                wire.settings({})
                wire.goaway()
            case 3:
                wire.send(self.random.randbytes(30))

    def __call__(self, wire, stream, method):
        if method == "Check":  # the probe
            answer()(wire, stream, method)
            return
        question = wire.asked[stream]
        if stream > self.last.get(wire, LAST):
            self.fates[question].append(UNPROCESSED)
        elif self.random.random() > FAULTY:
            self.fates[question].append(ANSWERED)
            answer(body=message(question))(wire, stream, method)
        else:
            self.fail(wire, stream, question)

    def fail(self, wire, stream, question):
        fate, fault = self.random.choice(FAULTS)
        self.fates[question].append(fate)
        fault(self, wire, stream, message(question))

    def leave(self, wire, last):
        self.last[wire] = last
        wire.goaway(last=last)


def refuse_by_goaway(chaos, wire, stream, _body):
    chaos.leave(wire, max(0, stream - 2))


def reset_as_refused(_chaos, wire, stream, _body):
    wire.reset(stream, 7)


def announce_goaway_and_answer(chaos, wire, stream, body):
    wire.goaway(last=LAST)
    chaos.leave(wire, stream)
    answer(body=body)(wire, stream, "")


def answer_and_close(_chaos, wire, stream, body):
    answer(body=body)(wire, stream, "")
    wire.close()


def be_silent(*_):
    pass


def close(_chaos, wire, _stream, _body):
    wire.close()


def reset(chaos, wire, stream, _body):
    wire.reset(stream, chaos.random.choice([0, 1, 2, 5, 8, 11, 99]))


def close_before_the_trailers(_chaos, wire, stream, body):
    wire.headers(stream, HEAD)
    wire.data(stream, body)
    wire.close()


def end_without_a_message(_chaos, wire, stream, _body):
    wire.headers(stream, HEAD + TAIL, end=True)


def break_http2(chaos, wire, stream, _body):
    chaos.leave(wire, stream)
    wire.goaway(last=stream + 2)


def end_without_a_status(_chaos, wire, stream, body):
    wire.headers(stream, HEAD)
    wire.data(stream, body)
    wire.headers(stream, [("x", "y")], end=True)


FAULTS = [
    (UNPROCESSED, refuse_by_goaway),
    (UNPROCESSED, reset_as_refused),
    (ANSWERED, announce_goaway_and_answer),
    (ANSWERED, answer_and_close),
    *(
        (MAYBE, fault)
        for fault in (
            *(be_silent, close, reset, close_before_the_trailers),
            *(end_without_a_message, end_without_a_status),
            # Often: calls that wait to be written when it comes were not sent.
            *([break_http2] * 4),
        )
    ),
]


@pytest.mark.costly
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))]
)
async def test_no_call_is_sent_twice_or_ends_wrongly_and_nothing_is_left(seed):
    chaos, chance = Chaos(seed), random.Random(seed)
    ends = Counter()
    with FrameServer(chaos, chaos.greeting) as server:
        before = descriptors()
        connector = GrpcConnector(Target(url=server.url, insecure=True), "native")
        pool = ConnectionPool(
            connector=connector,
            min_connections=0,
            max_connections=5,
            streams_per_connection=4,
            connection_timeout=0.5,
            health_check_timeout=0.5,
        )

        async def ask(question):
            fates = chaos.fates[question]
            try:
                async with pool.acquire(timeout=5) as conn:
                    got = await conn.call(
                        METHOD, question, timeout=chance.choice([0.05, 0.3, 1.0])
                    )
            except grpc.aio.AioRpcError as error:
                ends["failed"] += 1
                if is_unprocessed(error):
                    assert set(fates) <= {UNPROCESSED}
            except TopazError:
                ends["no connection"] += 1
            else:
                ends["answered"] += 1
                assert got == question
                # Perhaps not as the last one: the threads of the server take turns.
                assert ANSWERED in fates

        async def user(number):
            for turn in range(CALLS):
                question = f"{number} {turn}".encode()
                short = chance.random() < CANCELLED
                patience = chance.choice([0.0001, 0.001, 0.01, 0.05]) if short else 30
                with anyio.move_on_after(patience):
                    await ask(question)
                processed = [x for x in chaos.fates[question] if x != UNPROCESSED]
                assert len(processed) <= 1, "it was sent twice"

        async with pool:
            async with anyio.create_task_group() as tasks:
                for number in range(USERS):
                    tasks.start_soon(user, number)
            assert pool.status().streams_in_use == 0
        await eventually(lambda: server.open == 0)
        await eventually(lambda: descriptors() <= before)
    assert ends["answered"] > USERS
    assert ends["failed"] > USERS / 4
