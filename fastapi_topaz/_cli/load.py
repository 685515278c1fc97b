"""
A load test: calls at a rate, or as many as a number of workers make.

Nothing here prints. The command shows the `Tally` while the test runs.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel
import attrs
import grpc

from fastapi_topaz._app.undecided import HINTS
from fastapi_topaz._cli.output import Messages
from fastapi_topaz._error_text import error_kind, log_text


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup


__all__ = ["LATE", "WORKERS", "Latencies", "Plan", "Tally", "run"]


WORKERS: Final = 10
"""The calls at once without a rate, by default."""

LATE: Final = 2.0
"""Seconds after which a call that is due is not made any more."""


@attrs.frozen(kw_only=True)
class Plan:
    """
    How much load to make.

    Args:
        duration: Seconds for which calls begin.
        rate: Calls that begin per second. None means that each call begins as soon as
            one of *concurrency* workers is free.
        concurrency: The most calls at once. None, the default, means no limit with a
            *rate*, because a limit would hide that the server is slower than the rate.
            Without a rate, it means `WORKERS`.
    """

    duration: float
    rate: float | None = None
    concurrency: int | None = None

    @property
    def workers(self) -> int:
        """The workers without a rate."""
        return WORKERS if self.concurrency is None else self.concurrency


class Latencies:
    """
    A histogram of times. It takes constant memory, and is right to about 1 %.

    Buckets are logarithmic: each bound is 2 % above the one before.
    """

    _STEP: Final = math.log(1.02)
    _LEAST: Final = 1e-6

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self.count = 0
        self.most = math.nan

    def add(self, seconds: float) -> None:
        """Record one time."""
        bucket = math.log(max(seconds, self._LEAST) / self._LEAST) / self._STEP
        self._buckets[int(bucket)] += 1
        self.count += 1
        self.most = seconds if math.isnan(self.most) else max(self.most, seconds)

    def quantile(self, share: float) -> float:
        """Return the time in seconds that *share* of all times do not exceed."""
        rank = max(1, math.ceil(share * self.count))
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= rank:
                middle = self._LEAST * math.exp((bucket + 0.5) * self._STEP)
                return min(middle, self.most)
        return math.nan


@attrs.define
class Tally:
    """
    What happened so far.

    Attributes:
        outcomes: How calls ended, by decision or by kind of error.
        failed: The calls that ended with an error.
        latencies: The times of the answered calls. With a rate, a time begins when the
            call was due, so a stalled test does not hide how long callers wait.
        running: The calls at this moment.
        missed: The calls that were due while *concurrency* others were running. They
            were not made.
        late: The calls that this machine could not begin within `LATE` seconds after
            they were due. They were not made.
        behind: The most seconds between the time when a call was due and its begin.
        cut_off: The calls that the end of the test interrupted.
        elapsed: Seconds since the begin.
        causes: Why calls failed.
    """

    outcomes: Counter[str] = attrs.Factory(Counter)
    failed: int = 0
    latencies: Latencies = attrs.Factory(Latencies)
    running: int = 0
    missed: int = 0
    late: int = 0
    behind: float = 0.0
    cut_off: int = 0
    elapsed: float = 0.0
    causes: Messages = attrs.Factory(Messages)

    @property
    def calls(self) -> int:
        """The calls that ended."""
        return self.outcomes.total()

    @property
    def not_made(self) -> int:
        """The calls that were due and were not made: the rate was not reached."""
        return self.missed + self.late

    @property
    def due(self) -> int:
        """The calls that were due, with those that were not made."""
        return self.calls + self.running + self.cut_off + self.not_made

    @property
    def rate(self) -> float:
        """The calls that ended per second."""
        return self.calls / self.elapsed if self.elapsed else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as a dict, ready for JSON. Times are in seconds."""
        quantiles = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
        times = {
            name: self.latencies.quantile(each) for name, each in quantiles.items()
        }
        times["max"] = self.latencies.most
        return {
            "calls": self.calls,
            "failed": self.failed,
            "outcomes": dict(self.outcomes.most_common()),
            "missed": self.missed,
            "late": self.late,
            "behind": self.behind,
            "cut_off": self.cut_off,
            "elapsed": self.elapsed,
            "rate": self.rate,
            # JSON has no NaN.
            "latency": {
                name: None if math.isnan(each) else each for name, each in times.items()
            },
        }


async def run(plan: Plan, call: Callable[[], Awaitable[str]], tally: Tally) -> None:
    """
    Make the load of *plan* with *call*, and count it in *tally*.

    *call* returns the name of an outcome, or raises. It must limit its own time,
    because the test ends only after its last call. If this is cancelled, the tally
    counts the running calls as cut off.
    """
    begin = anyio.current_time()
    test = _Test(plan, call, tally, begin)
    try:
        async with anyio.create_task_group() as tasks:
            if plan.rate is None:
                for _ in range(plan.workers):
                    tasks.start_soon(test.work)
            else:
                await test.pace(tasks, plan.rate)
    finally:
        tally.elapsed = anyio.current_time() - begin
        tally.cut_off, tally.running = tally.running, 0


@attrs.frozen
class _Test:
    """The tasks of one test, which began at *begin*."""

    plan: Plan
    call: Callable[[], Awaitable[str]]
    tally: Tally
    begin: float

    async def work(self) -> None:
        """Make calls, one after the other."""
        while (now := anyio.current_time()) < self.begin + self.plan.duration:
            self.tally.running += 1
            await self._one(now)
            # A call that fails at once must not keep the other tasks from running.
            await anyio.lowlevel.checkpoint()

    async def pace(self, tasks: TaskGroup, rate: float) -> None:
        """Begin calls at *rate*, and count those that cannot begin."""
        tally, most = self.tally, self.plan.concurrency
        for number in range(math.ceil(self.plan.duration * rate)):
            due = self.begin + number / rate
            await anyio.sleep_until(due)
            behind = anyio.current_time() - due
            if behind > LATE:
                tally.late += 1
                continue
            if most is not None and tally.running >= most:
                tally.missed += 1
                continue
            tally.behind = max(tally.behind, behind)
            tally.running += 1
            tasks.start_soon(self._one, due)
        await anyio.sleep_until(self.begin + self.plan.duration)

    async def _one(self, due: float) -> None:
        tally = self.tally
        try:
            outcome = await self.call()
        except Exception as error:  # noqa: BLE001  (an outcome)
            outcome = error_kind(error)
            tally.failed += 1
            tally.causes.add(_cause(error))
        else:
            tally.latencies.add(anyio.current_time() - due)
        # Not after a cancellation: then the call is cut off.
        tally.running -= 1
        tally.outcomes[outcome] += 1


def _cause(error: Exception) -> str:
    """Return why a call failed, without details of the server."""
    kind, text = error_kind(error), log_text(error)
    if text == kind == "DEADLINE_EXCEEDED":
        return f"{kind}: no answer in time"
    code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
    if text == kind and code in HINTS:
        return f"{kind}: {HINTS[code]}"
    return kind if text == kind else f"{kind}: {text}"
