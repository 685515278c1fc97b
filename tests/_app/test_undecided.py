"""Test that each check without a decision is logged: once, and rate-limited."""

from __future__ import annotations

import logging

import anyio
import grpc
import grpc.aio
import pytest
from fastapi import HTTPException
from starlette.requests import Request

from fastapi_topaz import (
    AuthorizerOptions,
    CircuitOpen,
    ConnectFailed,
    ConnectionLost,
    ConnectionPool,
    CredentialsFailed,
    Decision,
    Identity,
    IdentityType,
    PoolClosed,
    PoolMisuse,
    PoolSaturated,
    PoolTimeout,
    TopazConfig,
    TopazError,
    require_policy_allowed,
)
from fastapi_topaz.testing import FakeConnector, fail, hang
from kit.allowing import allowing
from kit.logs import lines
from kit.secrets import IDENTITY, KEY, RESOURCE, secrets_in


PATH = "app.GET.__card"
LINE = f"no decision on {PATH}: "


class Ask:
    """Raises *error*, or allows if it is None."""

    def __init__(self, error=None):
        self.error = error

    async def __call__(self, _question, /):
        await anyio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        return Decision(allowed=True)


def config_of(connector=None, **options):
    pool = options.pop("connection_pool", None) or ConnectionPool(
        connector=connector or allowing(), min_connections=0
    )
    config = TopazConfig(
        **{
            "authorizer_options": AuthorizerOptions(api_key=KEY, insecure=True),
            "policy_path_root": "app",
            "identity_provider": lambda _r: Identity(IdentityType.SUB, IDENTITY),
            "connection_pool": pool,
            "check_timeout": 2,
            **options,
        }
    )
    config._log_limit.clock = anyio.current_time
    return config


def asking(ask, **options):
    """Return a configuration whose layers below the outermost are *ask*."""
    config = config_of(**options)
    config._below = ask
    config._ask = config._asking("error")
    return config


def a_request():
    scope = {"type": "http", "headers": [], "path_params": {"card": RESOURCE}}
    return Request(scope)


async def manually(config):
    return await config.is_allowed(
        a_request(), PATH, resource_context={"a": RESOURCE}, metadata=[("k", RESOURCE)]
    )


async def decided(config):
    return (await config.decide(a_request(), PATH)).allowed


async def handled(config):
    try:
        return await config.is_allowed(a_request(), PATH, max_age=0)
    except Exception:  # noqa: BLE001  (the application expects it)
        return False


async def guarded(config):
    await require_policy_allowed(config, PATH)(a_request())
    return True


async def guarded_with_a_fallback(config):
    await require_policy_allowed(config, PATH, fallback="error")(a_request())
    return True


ASKERS = [manually, decided, handled, guarded, guarded_with_a_fallback]
askers = pytest.mark.parametrize("asks", ASKERS, ids=lambda asks: asks.__name__)


async def failing(asks, config):
    """Make a check that does not allow."""
    try:
        allowed = await asks(config)
    except (HTTPException, TopazError, grpc.aio.AioRpcError):
        allowed = False
    assert allowed is False


def status(code):
    empty = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, empty, empty, details=f"no {IDENTITY} here")


ERRORS = {
    **{
        each.name: status(each)
        for each in grpc.StatusCode
        if each is not grpc.StatusCode.OK
    },
    "connect": ConnectFailed("nothing listens"),
    "lost": ConnectionLost("it ended"),
    "timeout": PoolTimeout("none became free"),
    "saturated": PoolSaturated("too many", retry_after=3),
    "circuit": CircuitOpen("earlier checks failed"),
    "credentials": CredentialsFailed("ValueError in credentials.py:7"),
    "closed": PoolClosed("it is closed"),
    "misuse": PoolMisuse("another event loop"),
}


@askers
@pytest.mark.parametrize("name", ERRORS)
async def test_each_failure_is_one_line_for_each_check(asks, name, caplog):
    error = ERRORS[name]
    config = asking(Ask(error))
    await failing(asks, config)
    (line,) = lines(caplog)
    assert line.startswith(LINE)
    assert name in line or str(error) in line or "no answer within 2 s" in line
    (record,) = caplog.records
    is_misuse = isinstance(error, PoolMisuse)
    assert record.levelno == (logging.ERROR if is_misuse else logging.WARNING)
    assert record.name == "fastapi_topaz.fastapi"
    assert record.exc_info is None
    assert not secrets_in(caplog.text)


@askers
async def test_further_failures_are_counted_and_the_count_is_exact(asks, caplog):
    ask = Ask(ERRORS["connect"])
    config = asking(ask)
    for _ in range(5):
        await failing(asks, config)
    assert len(lines(caplog)) == 1
    await anyio.sleep(10)
    await failing(asks, config)
    assert lines(caplog)[1].endswith("(and 4 more in the last 10 s)")
    await failing(asks, config)
    await anyio.sleep(10)
    # A check that gets its decision reports the rest.
    ask.error = None
    assert await asks(config) is True
    assert lines(caplog)[2:] == [
        "checks: no decision: ConnectFailed: 1 more in the last 10 s"
    ]


async def test_guards_and_checks_of_the_application_share_the_limit(caplog):
    config = asking(Ask(ERRORS["UNAVAILABLE"]))
    for asks in ASKERS:
        await failing(asks, config)
    assert len(lines(caplog)) == 1
    async with config.lifespan(None):
        pass
    assert lines(caplog)[1:] == [
        "checks: no decision: UNAVAILABLE: 4 more in the last 0 s"
    ]


@askers
async def test_a_decision_is_not_logged(asks, caplog):
    config = asking(Ask())
    assert await asks(config) is True
    assert not lines(caplog)


@askers
async def test_a_cancelled_check_is_not_logged(asks, caplog):
    config = config_of(FakeConnector(default=hang()), check_timeout=5)
    async with config.connection_pool:
        with anyio.move_on_after(1) as scope:
            await asks(config)
        assert scope.cancelled_caught
        await anyio.sleep(10)
    assert not lines(caplog, part="no decision")


@askers
async def test_a_check_that_a_fallback_decides_is_not_logged_as_undecided(asks, caplog):
    config = config_of(FakeConnector(default=fail()), fallback="deny")
    async with config.connection_pool:
        await failing(asks, config)
    # One guard has the fallback "error", so it gets no decision.
    expected = 1 if asks is guarded_with_a_fallback else 0
    assert len(lines(caplog, part="no decision on")) == expected


def refused():
    return config_of(FakeConnector(default=fail()))


def silent():
    return config_of(FakeConnector(default=hang()))


def answers(code):
    def answer(_method, _request):
        raise status(code)

    return config_of(FakeConnector(answer=answer))


# What happens, without a layer replaced: the fault, and the kind in the line.
FAULTS = {
    "nothing listens": (refused, "refused by the script"),
    "no answer to a connect": (silent, "no connection"),
    "wrong key": (
        lambda: answers(grpc.StatusCode.UNAUTHENTICATED),
        "the api_key or credentials are missing or wrong",
    ),
    "no such policy": (
        lambda: answers(grpc.StatusCode.INVALID_ARGUMENT),
        "there is no such policy",
    ),
    "a hanging policy": (
        lambda: answers(grpc.StatusCode.DEADLINE_EXCEEDED),
        "no answer within 2 s (check_timeout)",
    ),
}


@askers
@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_is_logged_with_its_reason(asks, name, caplog):
    make, part = FAULTS[name]
    config = make()
    async with config.connection_pool:
        await failing(asks, config)
    (line,) = lines(caplog, logger="fastapi_topaz.fastapi")
    assert line.startswith(LINE)
    assert part in line
    assert not secrets_in(caplog.text)


@askers
async def test_an_error_before_the_question_is_not_logged(asks, caplog):
    def provider(_request):
        raise HTTPException(401)

    config = config_of(identity_provider=provider)
    await failing(asks, config)
    assert not lines(caplog)
