"""The circuit breaker: what counts, when it opens, and how it closes again."""

from __future__ import annotations

import threading
from collections import deque

import anyio
import grpc
import pytest

from fastapi_topaz import (
    CircuitBreaker,
    CircuitOpen,
    ConnectFailed,
    ConnectionLost,
    CredentialsFailed,
    Decision,
    PoolSaturated,
    PoolTimeout,
)
from fastapi_topaz._decisions.breaker import MOST_POLICIES, Breaking
from fastapi_topaz._rpc.statuses import Ending, LateCredentials
from kit.decisions import Subject


ALICE = Subject()


class Pool:
    """Counts connections, as a pool does."""

    def __init__(self):
        self._counters = self
        self.connects = 0
        self.authorizer_options = None


class Server:
    """An `Ask` whose calls take *took* seconds and end with *error*, if given."""

    def __init__(self):
        self.error, self.took, self.waited, self.asked = None, 0.0, 0.0, 0

    async def __call__(self, question, /):
        self.asked += 1
        await anyio.sleep(self.waited)
        question.budget.sent = question.budget.left()
        await anyio.sleep(self.took)
        if self.error is not None:
            raise self.error()
        return Decision(allowed=False)


def status(name):
    metadata = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode[name], metadata, metadata, "")


def layer_of(**options):
    breaker = CircuitBreaker(**options)
    breaker._clock = anyio.current_time
    server, pool = Server(), Pool()
    layer = Breaking(server, breaker, lambda: pool)
    return layer, breaker, server, pool


async def ask(layer, times=1, **options):
    """Return how each check ended: the class of its error, or its decision."""
    ends = []
    for _ in range(times):
        try:
            ends.append((await layer(ALICE.question(**options))).allowed)
        except Exception as error:  # noqa: BLE001
            ends.append(type(error))
    return ends


FAILURES = {
    **{
        name: lambda name=name: status(name)
        for name in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN")
    },
    "INTERNAL": lambda: status("INTERNAL"),
    "lost": lambda: ConnectionLost("x"),
}
NOTHING = {
    "NOT_FOUND": lambda: status("NOT_FOUND"),
    "saturated": lambda: PoolSaturated("x"),
    "timeout": lambda: PoolTimeout("x"),
    "connect": lambda: ConnectFailed("x"),
    "credentials": lambda: CredentialsFailed("x"),
    "late credentials": lambda: LateCredentials(
        Ending.STATUS, grpc.StatusCode.DEADLINE_EXCEEDED, "x"
    ),
    "a mistake": lambda: ValueError("x"),
}
SUCCESSES = {
    name: lambda name=name: status(name)
    for name in (
        *("INVALID_ARGUMENT", "UNAUTHENTICATED", "PERMISSION_DENIED"),
        *("RESOURCE_EXHAUSTED", "UNIMPLEMENTED"),
    )
}


@pytest.mark.parametrize("name", FAILURES)
async def test_failures_in_a_row_open_it(name):
    layer, breaker, server, _ = layer_of()
    server.error = FAILURES[name]
    await ask(layer, 4)
    assert not breaker.status().is_open
    await ask(layer)
    assert breaker.status().is_open
    assert await ask(layer) == [CircuitOpen]
    assert server.asked == 5


@pytest.mark.parametrize("name", [*NOTHING, *SUCCESSES])
async def test_what_does_not_blame_the_server_never_opens_it(name):
    layer, breaker, server, _ = layer_of(failure_threshold=1, minimum_calls=1)
    server.error = {**NOTHING, **SUCCESSES}[name]
    await ask(layer, 20)
    assert breaker.status().state == "closed"
    assert server.asked == 20


async def test_denials_never_open_it():
    layer, breaker, _, _ = layer_of(failure_threshold=1, minimum_calls=1)
    assert await ask(layer, 20) == [False] * 20
    assert breaker.status().failure_count == 0


async def test_a_success_ends_a_series_and_nothing_else_does():
    layer, breaker, server, _ = layer_of(failure_threshold=3, minimum_calls=100)
    for name, count in (("INVALID_ARGUMENT", 0), ("NOT_FOUND", 2)):
        server.error = FAILURES["lost"]
        await ask(layer, 2)
        server.error = lambda name=name: status(name)
        await ask(layer)
        assert breaker.status().failure_count == count


async def test_a_part_of_failures_in_the_window_opens_it():
    layer, breaker, server, _ = layer_of(failure_threshold=100)
    for failed in [False, True] * 4:
        server.error = FAILURES["lost"] if failed else None
        await ask(layer)
    # The window has passed, so the next ones count alone.
    await anyio.sleep(10)
    for failed in [False, True] * 4 + [False]:
        server.error = FAILURES["lost"] if failed else None
        await ask(layer)
    assert breaker.status().state == "closed"
    server.error = FAILURES["lost"]
    await ask(layer)
    assert breaker.status().is_open


async def test_slow_answers_open_it_if_that_is_wanted():
    for slow, state in ((None, "closed"), (1.0, "open")):
        layer, breaker, server, _ = layer_of(slow_call_threshold=slow)
        server.took = 1.0
        await ask(layer, 10)
        assert breaker.status().state == state
        assert breaker.status().failure_count == 0


async def test_the_wait_for_a_connection_does_not_count():
    layer, breaker, server, _ = layer_of(slow_call_threshold=1.0, failure_threshold=1)
    server.waited = 4.9
    assert await ask(layer, 12) == [False] * 12
    # The rest of the time was too short for the call.
    server.error, server.took = FAILURES["DEADLINE_EXCEEDED"], 0.1
    await ask(layer, 12)
    assert breaker.status().state == "closed"
    server.waited, server.took = 0.0, 5.0
    await ask(layer)
    assert breaker.status().is_open


async def test_with_the_defaults_it_closes_after_two_trials():
    layer, breaker, server, _ = layer_of()
    server.error = FAILURES["lost"]
    await ask(layer, 5)
    await anyio.sleep(1)
    server.error = None
    assert await ask(layer) == [False]
    assert breaker.status().state == "half_open"
    assert await ask(layer, 3) == [False] * 3
    found = breaker.status()
    assert (found.state, found.failure_count, found.open_since) == ("closed", 0, None)


async def test_a_pause_doubles_up_to_the_recovery_timeout():
    layer, _, server, _ = layer_of(failure_threshold=1)
    layer._breaker._random = lambda: 0.0
    server.error = FAILURES["lost"]
    for pause in (1.0, 2.0, 4.0, 5.0, 5.0):
        assert await ask(layer) == [ConnectionLost]
        with pytest.raises(CircuitOpen) as caught:
            await layer(ALICE.question())
        assert caught.value.retry_after == pytest.approx(pause)
        await anyio.sleep(pause - 0.01)
        assert await ask(layer) == [CircuitOpen]
        await anyio.sleep(0.02)


async def test_a_new_connection_is_tried_at_once():
    layer, breaker, server, pool = layer_of(failure_threshold=1, success_threshold=1)
    server.error = FAILURES["lost"]
    await ask(layer)
    assert await ask(layer) == [CircuitOpen]
    pool.connects += 1
    server.error = None
    assert await ask(layer) == [False]
    assert breaker.status().state == "closed"


async def test_only_some_trials_run_at_the_same_time():
    layer, _, server, _ = layer_of(failure_threshold=1, half_open_max_requests=2)
    server.error = FAILURES["lost"]
    await ask(layer)
    await anyio.sleep(1)
    server.error, server.took, ends = None, 1.0, []

    async def trial():
        ends.extend(await ask(layer))

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(trial)
    assert ends.count(False) == 2
    assert ends.count(CircuitOpen) == 18


async def test_the_end_of_an_older_check_changes_nothing():
    layer, breaker, server, _ = layer_of(failure_threshold=1)
    server.took = 3.0
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, layer)
        await anyio.sleep(0.1)
        server.took, server.error = 0.0, FAILURES["lost"]
        await ask(layer)
        opened = breaker.status().open_since
        server.error = None
    found = breaker.status()
    assert found.is_open
    assert found.open_since == pytest.approx(opened, abs=5)
    assert found.failure_count == 1


async def test_each_policy_has_a_circuit_of_its_own_if_that_is_wanted():
    layer, breaker, server, _ = layer_of(scope="policy", failure_threshold=1)
    server.error = FAILURES["lost"]
    await ask(layer)
    server.error = None
    other = Subject("app.other")
    assert (await layer(other.question())).allowed is False
    assert await ask(layer) == [CircuitOpen]
    assert breaker.status().is_open
    for number in range(MOST_POLICIES + 10):
        await layer(Subject(f"app.p{number}").question())
    assert len(breaker._circuits) == MOST_POLICIES


async def test_changes_are_told_and_logged(caplog):
    told = []
    layer, _, server, _ = layer_of(
        failure_threshold=1, on_state_change=lambda *args: told.append(args)
    )
    server.error = FAILURES["lost"]
    await ask(layer)
    await anyio.sleep(1)
    server.error = None
    await ask(layer, 2)
    assert [each[:2] for each in told] == [
        ("closed", "open"),
        ("open", "half_open"),
        ("half_open", "closed"),
    ]
    assert "1 checks in a row failed" in caplog.text


async def test_a_callback_that_fails_changes_nothing(caplog):
    def broken(*_):
        raise KeyError("x")

    layer, breaker, server, _ = layer_of(failure_threshold=1, on_state_change=broken)
    server.error = FAILURES["lost"]
    assert await ask(layer) == [ConnectionLost]
    assert breaker.status().is_open
    assert "on_state_change failed" in caplog.text


async def test_reset_closes_it():
    layer, breaker, server, _ = layer_of(failure_threshold=1)
    server.error = FAILURES["lost"]
    await ask(layer)
    assert breaker.status().last_failure_time is not None
    breaker.reset()
    found = breaker.status()
    assert (found.state, found.failure_count, found.refused) == ("closed", 0, 0)
    assert found.last_failure_time is None
    server.error = None
    assert await ask(layer) == [False]


async def test_the_refusal_says_what_happened_and_when_to_try_again():
    layer, breaker, server, _ = layer_of(failure_threshold=1)
    server.error = FAILURES["DEADLINE_EXCEEDED"]
    await ask(layer)
    with pytest.raises(CircuitOpen, match="last one with DEADLINE_EXCEEDED") as caught:
        await layer(ALICE.question())
    assert 0 < caught.value.retry_after <= 1
    assert breaker.status().refused == 1


# -- parameters -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"failure_threshold": 0}, ValueError, "failure_threshold"),
        ({"success_threshold": 1.5}, TypeError, "success_threshold"),
        ({"half_open_max_requests": 0}, ValueError, "half_open_max_requests"),
        ({"recovery_timeout": 0}, ValueError, "recovery_timeout"),
        ({"window": "10"}, TypeError, "window"),
        ({"minimum_calls": 0}, ValueError, "minimum_calls"),
        ({"failure_ratio": 0}, ValueError, "failure_ratio"),
        ({"failure_ratio": float("nan")}, ValueError, "failure_ratio"),
        ({"failure_ratio": True}, TypeError, "failure_ratio"),
        ({"slow_call_threshold": 0}, ValueError, "slow_call_threshold"),
        ({"scope": "all"}, ValueError, "scope"),
        ({"on_state_change": 1}, TypeError, "on_state_change"),
        ({"fallback": "deny"}, TypeError, r"TopazConfig\(fallback"),
        ({"on_fallback": print}, TypeError, r"TopazConfig\(on_fallback"),
        ({"serve_stale_cache": True}, TypeError, "stale_ttl_seconds"),
        ({"stale_cache_ttl": 300}, TypeError, "stale_ttl_seconds"),
        ({"no_stale_for": []}, TypeError, r"DecisionCache\(exclude"),
        ({"timeout_ms": 5000}, TypeError, r"TopazConfig\(check_timeout"),
        ({"failure_exceptions": []}, TypeError, "gRPC statuses"),
        ({"typo": 1}, TypeError, "no argument 'typo'"),
    ],
)
def test_a_wrong_argument_is_named(options, error, text):
    with pytest.raises(error, match=text):
        CircuitBreaker(**options)


# -- threads --------------------------------------------------------------------------


class Raced(deque):
    """Buckets of a circuit that another thread resets while they are read."""

    reset = None

    def __iter__(self):
        for bucket in super().__iter__():
            self.thread = threading.Thread(target=self.reset)
            self.thread.start()
            # It waits for this thread, or it is done very soon.
            self.thread.join(0.2)
            yield bucket


async def test_a_reset_in_another_thread_fails_no_check():
    """A route that is no coroutine function runs in another thread, for example."""
    layer, breaker, server, _ = layer_of()
    server.error = lambda: status("UNAVAILABLE")
    now = anyio.current_time()
    breaker._clock = lambda: now
    buckets = breaker._circuit("")._buckets = Raced()
    buckets.reset = breaker.reset
    with pytest.raises(grpc.aio.AioRpcError):
        await layer(ALICE.question())
    buckets.thread.join(30)
    assert not buckets.thread.is_alive()
    assert breaker.status().failure_count == 0
    assert not buckets


def test_a_change_of_state_may_reset_the_breaker():
    """Its callback runs within the lock."""
    breaker = CircuitBreaker(on_state_change=lambda *_: breaker.reset())
    with breaker._alone():
        breaker._circuit("")._open("as the test says", 0.0, 0)
    assert breaker.status().state == "closed"
