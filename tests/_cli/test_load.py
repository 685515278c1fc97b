"""Test the load test: its schedule and its numbers in virtual time."""

from __future__ import annotations

import math
import random

import anyio
import grpc
import pytest

from fastapi_topaz._app.undecided import HINTS
from fastapi_topaz._cli import load as _load
from fastapi_topaz._cli.load import LATE, WORKERS, Latencies, Plan, Tally, run
from fastapi_topaz._rpc.statuses import EndedCall, Ending
from fastapi_topaz.exceptions import PoolSaturated, PoolTimeout


def answering(after):
    async def call():
        await anyio.sleep(after)
        return "allowed"

    return call


async def tally_of(call, **plan):
    tally = Tally()
    await run(Plan(**{"duration": 10.0, "concurrency": 5, **plan}), call, tally)
    return tally


async def test_calls_begin_at_the_rate():
    begun = []

    async def call():
        begun.append(anyio.current_time())
        return "denied"

    begin = anyio.current_time()
    tally = await tally_of(call, rate=4.0, duration=2.0)

    assert [at - begin for at in begun] == pytest.approx([n / 4 for n in range(8)])
    assert dict(tally.outcomes) == {"denied": 8}
    assert tally.elapsed == pytest.approx(2.0)
    assert tally.rate == pytest.approx(4.0)
    assert (tally.failed, tally.missed, tally.cut_off, tally.running) == (0, 0, 0, 0)


async def test_with_a_rate_no_more_calls_run_than_allowed_and_the_others_are_counted():
    tally = await tally_of(answering(1.05), rate=10.0, duration=2.0, concurrency=3)

    # In each 1.1 seconds, three calls are made and the others are missed.
    assert tally.calls == 6
    assert tally.missed == tally.not_made == 14
    assert tally.due == 20


async def test_with_a_rate_there_is_no_limit_unless_one_is_given():
    tally = await tally_of(answering(60), rate=100.0, duration=2.0, concurrency=None)

    assert tally.calls == tally.due == 200
    assert tally.not_made == 0


async def test_without_a_rate_and_a_limit_there_are_ten_workers():
    tally = await tally_of(answering(1), duration=1.0, concurrency=None)

    assert tally.calls == WORKERS == 10


async def test_calls_that_begin_far_too_late_are_not_made_and_counted(monkeypatch):
    wait, numbers = anyio.sleep_until, iter(range(8))

    async def sleep_until(due):
        # As if the machine stood still before the third call, for all of the rest.
        stall = LATE + 1 if next(numbers, 0) in {2, 3} else 0.4
        await wait(due + stall)

    monkeypatch.setattr(_load.anyio, "sleep_until", sleep_until)
    tally = await tally_of(answering(0), rate=1.0, duration=5.0)

    # The fourth call is due within that time.
    assert (tally.calls, tally.late, tally.missed) == (3, 2, 0)
    assert tally.behind == pytest.approx(2.0)
    assert (tally.due, tally.not_made) == (5, 2)


async def test_without_a_rate_each_worker_makes_the_next_call_at_once():
    tally = await tally_of(answering(0.5), duration=2.0, concurrency=3)

    assert tally.calls == 3 * 4
    assert tally.latencies.quantile(0.5) == pytest.approx(0.5, rel=0.02)
    assert tally.elapsed == pytest.approx(2.0)


async def test_the_last_calls_may_end_after_the_duration():
    tally = await tally_of(answering(1.5), duration=2.0, concurrency=1)

    assert tally.calls == 2
    assert tally.elapsed == pytest.approx(3.0)


async def test_errors_are_outcomes_by_kind_without_a_latency():
    errors = iter(
        [
            PoolTimeout("secret 1"),
            PoolTimeout("secret 2"),
            EndedCall(Ending.STATUS, grpc.StatusCode.UNAUTHENTICATED, "secret 3"),
        ]
    )

    async def call():
        for error in errors:
            raise error
        await anyio.sleep(1)
        return "allowed"

    tally = await tally_of(call, duration=1.0, concurrency=1)

    assert dict(tally.outcomes) == {
        "PoolTimeout": 2,
        "UNAUTHENTICATED": 1,
        "allowed": 1,
    }
    assert tally.failed == 3
    assert tally.latencies.count == 1


async def test_the_cause_is_the_most_frequent_one_and_not_the_first():
    causes = [
        PoolTimeout("a connection is suspect"),
        *(PoolSaturated(f"about {number}.5 s of queue") for number in range(3)),
        EndedCall(Ending.TIMED_OUT, grpc.StatusCode.DEADLINE_EXCEEDED, "secret"),
    ]
    errors = iter(causes)

    async def call():
        raise next(errors)

    tally = await tally_of(call, rate=1.0, duration=5.0)

    # Numbers do not make a cause another one.
    cause, times = tally.causes.most_frequent()
    assert (cause, times) == ("PoolSaturated: about 0.5 s of queue", 3)


@pytest.mark.parametrize(
    "code, cause",
    [
        ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED: no answer in time"),
        (
            "INVALID_ARGUMENT",
            f"INVALID_ARGUMENT: {HINTS[grpc.StatusCode.INVALID_ARGUMENT]}",
        ),
        ("ABORTED", "ABORTED"),
    ],
)
async def test_the_cause_does_not_show_the_details_of_a_status(code, cause):
    async def call():
        raise EndedCall(Ending.STATUS, grpc.StatusCode[code], "secret")

    tally = await tally_of(call, rate=1.0, duration=1.0)

    assert tally.causes.most_frequent() == (cause, 1)


@pytest.mark.real_clock
async def test_calls_that_fail_at_once_let_other_tasks_run():
    async def call():
        raise PoolTimeout("at once")

    tally = Tally()
    with anyio.move_on_after(0.05) as scope:
        await run(Plan(duration=3600, concurrency=2), call, tally)
    assert scope.cancelled_caught
    assert tally.failed > 0


async def test_a_cancelled_test_counts_its_running_calls_as_cut_off():
    tally = Tally()
    with anyio.move_on_after(1.25):
        await run(Plan(duration=60.0, concurrency=3), answering(0.5), tally)

    assert dict(tally.outcomes) == {"allowed": 6}
    assert (tally.cut_off, tally.running) == (3, 0)
    assert tally.elapsed == pytest.approx(1.25)


def test_quantiles_are_right_to_two_percent():
    times = [random.Random(1).lognormvariate(-5, 2) for _ in range(10_000)]
    latencies = Latencies()
    for each in times:
        latencies.add(each)

    times.sort()
    for share in (0.0001, 0.5, 0.9, 0.99, 1.0):
        exact = times[max(0, math.ceil(share * len(times)) - 1)]
        assert latencies.quantile(share) == pytest.approx(exact, rel=0.02)
    assert latencies.most == times[-1]


def test_without_answers_there_are_no_quantiles():
    assert math.isnan(Latencies().quantile(0.5))
    assert set(Tally().as_dict()["latency"].values()) == {None}
    assert Tally().rate == 0


def test_a_time_of_zero_is_counted():
    latencies = Latencies()
    latencies.add(0.0)
    assert latencies.quantile(1.0) == 0.0
