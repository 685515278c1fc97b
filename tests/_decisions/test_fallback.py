"""What decides if the authorizer cannot be asked, and what never allows."""

from __future__ import annotations

import logging

import grpc
import pytest

from fastapi_topaz import (
    AuthorizerOptions,
    CircuitOpen,
    ConnectFailed,
    ConnectionLost,
    CredentialsFailed,
    Decision,
    DecisionCache,
    Identity,
    IdentityType,
    PoolClosed,
    PoolMisuse,
    PoolSaturated,
    PoolTimeout,
    TopazConfig,
    require_policy_allowed,
    require_policy_auto,
)
from fastapi_topaz._decisions.fallback import Fallback, Fallbacks
from fastapi_topaz._rpc.statuses import Ending, LateCredentials
from kit.decisions import Subject


STRATEGIES = [
    *("deny", "cache_then_error", "cache_then_deny", "cache_then_allow", "allow"),
]
ALICE = Subject(resource={"id": "1"})


def status(code):
    metadata = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, metadata, metadata, "")


def caused(error, cause):
    error.__cause__ = cause
    return error


def late():
    return LateCredentials(Ending.STATUS, grpc.StatusCode.DEADLINE_EXCEEDED, "")


CODES = ["UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN", "INTERNAL"]
NO_DECISION = {
    **{code: lambda code=code: status(grpc.StatusCode[code]) for code in CODES},
    "lost": lambda: ConnectionLost("x"),
    "refused": lambda: ConnectFailed("x", reason="refused"),
    "timeout": lambda: PoolTimeout("x"),
    "saturated": lambda: PoolSaturated("x"),
    "open": lambda: CircuitOpen("x"),
}
LASTING = {
    **{
        code.name: lambda code=code: status(code)
        for code in grpc.StatusCode
        if code.name not in [*CODES, "OK"]
    },
    "wrong CA": lambda: ConnectFailed("x", reason="tls", permanent=True),
    "timeout by a wrong CA": lambda: caused(
        PoolTimeout("x"), ConnectFailed("x", permanent=True)
    ),
    "closed": lambda: PoolClosed("x"),
    "misuse": lambda: PoolMisuse("x"),
    "credentials": lambda: CredentialsFailed("x"),
    "late credentials": late,
    "a mistake": lambda: ValueError("x"),
    "a timeout of the application": lambda: TimeoutError("x"),
}


class Failing:
    def __init__(self, error):
        self.error = error

    async def __call__(self, question, /):
        raise self.error


def fallback_of(strategy, error, *, stale=None, unsafe=True, on_fallback=None):
    shared = Fallbacks(lambda _q: stale, allow_unsafe=unsafe, on_fallback=on_fallback)
    return Fallback(Failing(error), strategy, shared), shared


async def outcome(strategy, error, **options):
    """Return "error", or the decision and what was counted."""
    fallback, shared = fallback_of(strategy, error, **options)
    try:
        decision = await fallback(ALICE.question())
    except type(error) as raised:
        return "error" if raised is error and not shared.uses else raised
    assert sum(shared.uses.values()) == 1
    return decision.allowed, decision.origin


EXPECTED = {
    # Without an older answer, with one that allows, with one that denies.
    "deny": [(False, "fallback")] * 3,
    "cache_then_error": ["error", (True, "stale"), (False, "stale")],
    "cache_then_deny": [(False, "fallback"), (True, "stale"), (False, "stale")],
    "cache_then_allow": [(True, "fallback"), (True, "stale"), (False, "stale")],
    "allow": [(True, "fallback")] * 3,
}
STALE = [None, Decision(True, "stale", 40.0), Decision(False, "stale", 40.0)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NO_DECISION)
async def test_each_fallback_decides_if_there_is_no_decision(strategy, name):
    for stale, expected in zip(STALE, EXPECTED[strategy], strict=True):
        found = await outcome(strategy, NO_DECISION[name](), stale=stale)
        assert found == expected


@pytest.mark.parametrize("strategy", [*STRATEGIES, "callable"])
@pytest.mark.parametrize("name", LASTING)
async def test_no_fallback_decides_on_an_error_that_only_a_change_repairs(
    strategy, name
):
    if strategy == "callable":
        strategy = lambda *_: True  # noqa: E731
    for stale in STALE:
        assert await outcome(strategy, LASTING[name](), stale=stale) == "error"


# -- callables ------------------------------------------------------------------------


def returning(value):
    def sync(*_):
        return value

    async def later(*_):
        return value

    return [sync, later]


@pytest.mark.parametrize("value", [False, None, 1, "yes", [True], object()])
async def test_a_callable_allows_only_by_returning_true(value):
    for decide in returning(value):
        found = await outcome(decide, ConnectionLost("x"), stale=STALE[1])
        assert found == (False, "fallback")


async def test_a_callable_that_returns_true_allows_if_that_is_permitted():
    for decide in returning(True):
        error = ConnectionLost("x")
        assert await outcome(decide, error) == (True, "fallback")
        assert await outcome(decide, error, stale=STALE[1]) == (True, "stale")
        assert await outcome(decide, error, stale=STALE[2]) == (True, "fallback")


async def test_without_permission_a_callable_may_only_repeat_an_older_answer(caplog):
    for decide in returning(True):
        error = ConnectionLost("x")
        assert await outcome(decide, error, unsafe=False) == "error"
        found = await outcome(decide, error, unsafe=False, stale=STALE[2])
        assert found == "error"
        found = await outcome(decide, error, unsafe=False, stale=STALE[1])
        assert found == (True, "stale")
    assert "allow_unsafe_fallback is not True" in caplog.text


async def test_a_callable_that_raises_leaves_the_error_of_the_check(caplog):
    def broken(*_):
        raise KeyError("s3cr3t")

    async def broken_later(*_):
        raise KeyError("s3cr3t")

    for decide in (broken, broken_later):
        assert await outcome(decide, ConnectionLost("x")) == "error"
    assert "the fallback failed" in caplog.text


async def test_a_callable_gets_the_request_the_question_and_the_error():
    got = []
    error = ConnectionLost("x")
    fallback, _ = fallback_of(lambda *args: got.append(args), error, stale=STALE[2])
    http = object()
    await fallback(ALICE.question(http=http))
    assert got == [(http, ALICE.path, {"id": "1"}, False, error)]


# -- what is told ---------------------------------------------------------------------


async def test_each_use_is_counted_logged_and_reported(caplog):
    told = []
    for strategy, stale in (("allow", None), ("cache_then_deny", STALE[1])):
        fallback, shared = fallback_of(
            *(strategy, ConnectionLost("x")),
            stale=stale,
            on_fallback=lambda *args: told.append(args),
        )
        for _ in range(3):
            await fallback(ALICE.question())
        assert shared.uses == {(strategy, stale is not None, "allowed"): 3}
    lines = [r for r in caplog.records if "the fallback" in r.getMessage()]
    # One line for each, and then only a count.
    assert [line.levelname for line in lines] == ["WARNING"] * 2
    assert "the authorizer did not decide this" in lines[0].getMessage()
    assert "an answer 40 s old" in lines[1].getMessage()
    assert (
        told
        == [(None, ALICE.path, None, True)] * 3 + [(None, ALICE.path, True, True)] * 3
    )


@pytest.mark.parametrize("stale", [None, STALE[2]])
async def test_a_denial_by_a_fallback_is_a_warning(stale, caplog):
    fallback, _ = fallback_of("cache_then_deny", ConnectionLost("x"), stale=stale)
    for _ in range(3):
        assert (await fallback(ALICE.question())).allowed is False
    (line,) = caplog.records
    assert line.levelname == "WARNING"
    assert "the fallback 'cache_then_deny' denied a check of" in line.getMessage()


async def test_a_report_that_fails_changes_nothing(caplog):
    def broken(*_):
        raise KeyError

    fallback, _ = fallback_of("deny", ConnectionLost("x"), on_fallback=broken)
    assert (await fallback(ALICE.question())).allowed is False
    assert "on_fallback failed" in caplog.text


# -- the configuration ----------------------------------------------------------------


def config(**options):
    return TopazConfig(
        authorizer_options=AuthorizerOptions(insecure=True),
        policy_path_root="app",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
        **options,
    )


@pytest.mark.parametrize("strategy", ["allow", "cache_then_allow"])
def test_a_fallback_that_may_allow_needs_permission(strategy):
    with pytest.raises(ValueError, match="allow_unsafe_fallback=True"):
        config(fallback=strategy, decision_cache=DecisionCache())
    safe = config(decision_cache=DecisionCache())
    for guard in (
        lambda: require_policy_allowed(safe, "app.x", fallback=strategy),
        lambda: require_policy_auto(safe, fallback=strategy),
    ):
        with pytest.raises(ValueError, match="allow_unsafe_fallback=True"):
            guard()


@pytest.mark.parametrize("value", ["", "Allow", "cache", None, 1, True, ["allow"]])
def test_an_unknown_fallback_is_refused(value):
    with pytest.raises(ValueError, match="fallback must be one of"):
        config(fallback=value, allow_unsafe_fallback=True)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_permission_is_a_bool(value):
    with pytest.raises(TypeError, match="allow_unsafe_fallback"):
        config(allow_unsafe_fallback=value)


@pytest.mark.parametrize("strategy", ["cache_then_deny", "cache_then_error"])
def test_a_fallback_to_the_cache_needs_a_cache(strategy):
    with pytest.raises(ValueError, match="decision_cache=DecisionCache"):
        config(fallback=strategy)
    with pytest.raises(ValueError, match="decision_cache=DecisionCache"):
        require_policy_auto(config(), fallback=strategy)


def test_permission_is_logged_as_a_warning_at_the_start(caplog):
    config(fallback="deny")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    config(fallback="allow", allow_unsafe_fallback=True)
    (line,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "fallback='allow'" in line.getMessage()
    assert "allow_unsafe_fallback=True" in line.getMessage()


@pytest.mark.parametrize(
    "options, error",
    [
        ({"decision_cache": object()}, "decision_cache must be a DecisionCache"),
        ({"circuit_breaker": object()}, "circuit_breaker must be a CircuitBreaker"),
        ({"on_fallback": 1}, "on_fallback must be callable"),
    ],
)
def test_a_wrong_layer_is_named(options, error):
    with pytest.raises(TypeError, match=error):
        config(**options)
