"""Test questions, decisions, and the layers between them."""

from __future__ import annotations

import anyio
import attrs
import grpc
import grpc.aio
import pytest
from starlette.requests import Request

from fastapi_topaz import (
    ConnectFailed,
    ConnectionLost,
    ConnectionPool,
    Decision,
    Identity,
    IdentityType,
    PoolTimeout,
    TopazConfig,
)
from fastapi_topaz._app import config as _config
from fastapi_topaz._app.asking import Retry, RetryTokens
from fastapi_topaz._decisions.question import Question
from fastapi_topaz._pool.budget import Budget
from fastapi_topaz._pool.state.status import PoolCounters
from fastapi_topaz._rpc.statuses import EndedCall, Ending


PATH = "myapp.GET.documents"


def request():
    return Request({"type": "http", "path_params": {}, "headers": []})


def configured(authorizer, **options):
    return TopazConfig(
        authorizer_options=authorizer.options,
        policy_path_root="myapp",
        identity_provider=lambda _: Identity(IdentityType.SUB, "alice"),
        connection_pool=ConnectionPool(),
        **options,
    )


def question(path=PATH, decision="allowed", data=b"request", seconds=5.0):
    return Question(path, decision, data, Budget(seconds))


def ended(code, details=""):
    metadata = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, metadata, metadata, details)


def unavailable():
    return ended(grpc.StatusCode.UNAVAILABLE)


def cancelled():
    return ended(grpc.StatusCode.CANCELLED)


def unprocessed():
    code = grpc.StatusCode.UNAVAILABLE
    return EndedCall(Ending.GOAWAY, code, "GOAWAY received")


@attrs.define
class Script:
    """An `Ask` that raises its errors, one for each question, and then allows."""

    errors: list[Exception]
    asked: list[Question] = attrs.Factory(list)

    async def __call__(self, question, /):
        self.asked.append(question)
        if self.errors:
            raise self.errors.pop(0)
        return Decision(allowed=True)


# -- decisions and questions ----------------------------------------------------------


@pytest.mark.parametrize("allowed", [True, False])
def test_a_decision_has_no_truth_value(allowed):
    with pytest.raises(TypeError, match=r"write `if decision\.allowed`"):
        bool(Decision(allowed=allowed))


def test_a_decision_is_frozen_and_has_a_unique_id():
    decisions = [Decision(allowed=True) for _ in range(1000)]
    assert len({decision.id for decision in decisions}) == 1000
    with pytest.raises(AttributeError):
        decisions[0].allowed = False


async def test_questions_with_the_same_request_are_equal():
    one = question(seconds=5)
    await anyio.sleep(1)
    assert one == question(seconds=7)
    assert hash(one) == hash(question(seconds=7))
    for other in (question(path="x"), question(decision="x"), question(data=b"x")):
        assert one != other
    with pytest.raises(AttributeError):
        one.request = b""


async def test_a_question_repr_shows_no_identity_and_no_context():
    assert "request" not in repr(question())


async def test_a_budget_decreases_with_time_to_zero():
    budget = Budget(5)
    assert budget.left() == 5
    await anyio.sleep(2)
    assert budget.left() == pytest.approx(3)
    await anyio.sleep(9)
    assert budget.left() == 0


@pytest.mark.real_clock
@pytest.mark.parametrize("allowed", [True, False])
async def test_decide_returns_the_decision_of_the_authorizer(
    embedded_authorizer, allowed
):
    embedded_authorizer.policies = {PATH: allowed}
    config = configured(embedded_authorizer)
    async with config.connection_pool:
        decision = await config.decide(request(), PATH)
        other = await config.decide(request(), PATH)
        assert await config.is_allowed(request(), PATH) is allowed
    assert (decision.allowed, decision.origin, decision.age) == (
        allowed,
        "authorizer",
        0.0,
    )
    assert decision.id != other.id


@pytest.mark.real_clock
async def test_decide_takes_the_arguments_of_is_allowed(embedded_authorizer):
    embedded_authorizer.policies = {
        PATH: lambda check: {"visible": check.resource == {"owner": "alice"}}
    }
    config = configured(embedded_authorizer)
    async with config.connection_pool:
        for owner in ("alice", "bob"):
            decision = await config.decide(
                request(),
                PATH,
                decision="visible",
                resource_context={"owner": owner},
            )
            assert decision.allowed is (owner == "alice")
        with pytest.raises(ValueError, match="policy_path"):
            await config.decide(request(), "not a path")


@pytest.mark.real_clock
async def test_an_authorizer_error_is_not_a_decision(embedded_authorizer):
    embedded_authorizer.fail("INTERNAL")
    config = configured(embedded_authorizer)
    async with config.connection_pool:
        with pytest.raises(grpc.aio.AioRpcError):
            await config.decide(request(), PATH)


@pytest.mark.real_clock
async def test_a_question_is_encoded_once_for_all_its_attempts(
    embedded_authorizer, monkeypatch
):
    embedded_authorizer.policies = {PATH: True}
    encoded = []
    original = _config.is_request

    def is_request(*args):
        encoded.append(args)
        return original(*args)

    monkeypatch.setattr(_config, "is_request", is_request)
    config = configured(embedded_authorizer)
    async with config.connection_pool:
        embedded_authorizer.fail("UNAVAILABLE", times=1)
        assert (await config.decide(request(), PATH)).allowed
    assert len(encoded) == 1


# -- the retry ------------------------------------------------------------------------


def retry(ask, counters=None, tokens=None):
    counters = counters or PoolCounters()
    return Retry(ask, lambda: counters, tokens or RetryTokens(lambda: 10))


# Functions, because a leak test counts the existing gRPC errors.
@pytest.mark.parametrize(
    "lost",
    [unavailable, cancelled, lambda: ConnectionLost("x")],
    ids=["UNAVAILABLE", "CANCELLED", "lost"],
)
async def test_a_lost_answer_is_retried_once(lost):
    script, counters = Script([lost()]), PoolCounters()
    asked = question()
    assert (await retry(script, counters)(asked)).allowed
    assert script.asked == [asked, asked]
    assert counters.retries == 1


async def test_a_second_loss_is_not_retried():
    script, counters = Script([unavailable(), unavailable()]), PoolCounters()
    with pytest.raises(grpc.aio.AioRpcError):
        await retry(script, counters)(question())
    assert (len(script.asked), counters.retries) == (2, 1)


@pytest.mark.parametrize(
    "make_error",
    [
        lambda: ended(grpc.StatusCode.INTERNAL),
        lambda: ended(grpc.StatusCode.DEADLINE_EXCEEDED),
        lambda: PoolTimeout("x"),
        lambda: ConnectFailed("x"),
        lambda: ValueError("x"),
    ],
    ids=["INTERNAL", "DEADLINE_EXCEEDED", "PoolTimeout", "ConnectFailed", "ValueError"],
)
async def test_other_errors_are_not_retried(make_error):
    script = Script([make_error()])
    with pytest.raises(type(make_error())):
        await retry(script)(question())
    assert len(script.asked) == 1


async def test_the_first_loss_is_the_cause_of_the_later_error():
    lost, then = unavailable(), PoolTimeout("no connection")
    with pytest.raises(PoolTimeout) as caught:
        await retry(Script([lost, then]))(question())
    assert caught.value.__cause__ is lost


async def test_unprocessed_questions_are_resent_with_pauses_in_the_budget():
    script = Script([unprocessed() for _ in range(1000)])
    counters = PoolCounters()
    began = anyio.current_time()
    with pytest.raises(grpc.aio.AioRpcError):
        await retry(script, counters)(question(seconds=5.0))
    # Pauses: 0, 0, 0.01, 0.02, ... 0.32, then 0.5 each. The next one exceeds the
    # budget.
    took = anyio.current_time() - began
    assert took == pytest.approx(0.63 + 8 * 0.5)
    assert len(script.asked) == counters.retries + 1 == 17


async def test_no_retry_begins_without_remaining_budget():
    script = Script([unavailable()])

    async def slow(asked, /):
        await anyio.sleep(5)
        return await script(asked)

    with pytest.raises(grpc.aio.AioRpcError):
        await retry(slow)(question(seconds=5))
    assert len(script.asked) == 1


async def failing(retry, count):
    for _ in range(count):
        with pytest.raises(grpc.aio.AioRpcError):
            await retry(question())


async def test_retries_after_unavailable_answers_stop_when_the_tokens_are_used_up():
    script, counters = Script([unavailable() for _ in range(1000)]), PoolCounters()
    # 20 tokens, and a retry needs more than half of them.
    await failing(retry(script, counters), 100)
    assert len(script.asked) == 109
    assert (counters.retries, counters.retries_suppressed) == (9, 91)


async def test_more_capacity_gives_more_tokens():
    script, counters = Script([unavailable() for _ in range(1000)]), PoolCounters()
    await failing(retry(script, counters, RetryTokens(lambda: 100)), 200)
    assert counters.retries == 99


async def test_answers_give_tokens_back_but_not_more_than_there_were():
    script, counters = Script([]), PoolCounters()
    layer = retry(script, counters)
    for _ in range(1000):
        await layer(question())
    script.errors[:] = [unavailable() for _ in range(200)]
    await failing(layer, 100)
    assert counters.retries == 9
    script.errors.clear()
    for _ in range(115):
        await layer(question())
    script.errors[:] = [unavailable()]
    # 11.5 tokens came back, and this failure takes one.
    assert (await layer(question())).allowed
    assert counters.retries == 10


@pytest.mark.parametrize("lost", [lambda: ConnectionLost("x"), unprocessed])
async def test_checks_lost_with_their_connection_need_no_token(lost):
    tokens = RetryTokens(lambda: 1)
    while tokens.take():
        pass
    script, counters = Script([lost()]), PoolCounters()
    assert (await retry(script, counters, tokens)(question())).allowed
    assert (counters.retries, counters.retries_suppressed) == (1, 0)
