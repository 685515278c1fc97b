"""Test that the errors of checks and requests hold no secrets."""

from __future__ import annotations

import logging
import traceback

import anyio
import grpc
import grpc.aio
import pytest
from anyio.to_thread import run_sync
from fastapi import Depends, FastAPI, HTTPException
from fastapi.exception_handlers import http_exception_handler
from fastapi.testclient import TestClient

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionLost,
    ConnectionPool,
    Identity,
    IdentityType,
    PoolError,
    TopazConfig,
    require_policy_allowed,
    require_policy_auto,
)
from fastapi_topaz.testing import (
    FakeConnection,
    FakeConnector,
    fail,
    ok,
)
from kit.backends import backends
from kit.pools import make_pool
from kit.secrets import (
    ALICE,
    IDENTITY,
    KEY,
    QUESTION,
    RESOURCE,
    SURROGATE,
    Foreign,
    assert_clean,
    error_of,
    frames,
    is_ours,
    leaks,
    secret_request,
    secrets_in,
)


# -- checks of an application -------------------------------------------------------


def secret_config(options, **arguments):
    arguments.setdefault("identity_provider", lambda _request: ALICE)
    arguments.setdefault("resource_context_provider", lambda _r: {"more": RESOURCE})
    pool = ConnectionPool(min_connections=0, max_retries=0)
    return TopazConfig(
        **{"policy_path_root": "app", "connection_pool": pool, **arguments},
        authorizer_options=options,
    )


@pytest.mark.real_clock
@pytest.mark.parametrize("fault", ["status", "silent", "stopped"])
async def test_a_check_without_a_decision_holds_no_secret(fault, keyed_authorizer):
    config = secret_config(keyed_authorizer.options, check_timeout=0.5)
    async with config.connection_pool:
        assert await config.is_allowed(secret_request(), "app.x")
        if fault == "status":
            keyed_authorizer.fail("UNAVAILABLE", "told")
        elif fault == "silent":
            keyed_authorizer.delay = 30
        else:
            await run_sync(keyed_authorizer.stop)
        error = await error_of(
            config.is_allowed(
                secret_request(), "app.x", resource_context={"a": RESOURCE}
            ),
            *(PoolError, grpc.aio.AioRpcError),
        )
        assert_clean(error)


async def test_a_lost_check_without_another_connection_holds_no_secret():
    connector = FakeConnector([ok()], default=fail("nobody there"))
    pool = make_pool(connector, max_retries=0)
    config = secret_config(AuthorizerOptions(api_key=KEY), connection_pool=pool)
    async with pool:
        async with pool.acquire() as conn:
            conn.connection.alive = False
        error = await error_of(config.is_allowed(secret_request(), "app.x"), PoolError)
        assert isinstance(error.__cause__, ConnectionLost)
        assert_clean(error)


@pytest.mark.parametrize(
    "bad",
    [
        {"decision": ""},
        {"decision": 3},
        {"policy_path": ""},
        {"resource_context": RESOURCE},
        {"resource_context": {"card": {RESOURCE}}},
        {"nothing": RESOURCE},
    ],
    ids=str,
)
async def test_a_check_that_cannot_be_encoded_holds_no_secret(bad):
    pool = make_pool()
    config = secret_config(AuthorizerOptions(api_key=KEY), connection_pool=pool)
    async with pool:
        arguments = {"policy_path": "app.x", **bad}
        error = await error_of(
            config.is_allowed(secret_request(), **arguments), TypeError, ValueError
        )
        assert_clean(error)


class ProviderError(Exception):
    pass


def broken(_request):
    token = IDENTITY
    raise ProviderError(f"{len(token)} characters")


async def broken_later(_request):
    token = IDENTITY
    await anyio.lowlevel.checkpoint()
    raise ProviderError(f"{len(token)} characters")


def broken_from_none(_request):
    token = IDENTITY
    try:
        raise KeyError("the cause")
    except KeyError:
        raise ProviderError(f"{len(token)} characters") from None


@pytest.mark.parametrize("provider", [broken, broken_later, broken_from_none])
@pytest.mark.parametrize("which", ["identity_provider", "resource_context_provider"])
async def test_a_provider_error_keeps_only_its_own_frames(which, provider):
    pool = make_pool()
    config = secret_config(
        AuthorizerOptions(api_key=KEY), connection_pool=pool, **{which: provider}
    )
    async with pool:
        error = await error_of(
            config.is_allowed(secret_request(), "app.x"), ProviderError
        )
    assert_clean(error)
    (theirs,) = [f for f in frames(error) if f.f_code is provider.__code__][:1]
    assert theirs.f_locals["token"] == IDENTITY
    if provider is broken_from_none:
        assert isinstance(error.__context__, KeyError)


@pytest.mark.parametrize(
    "which, value",
    [
        ("identity_provider", None),
        ("identity_provider", IDENTITY),
        ("identity_provider", {"sub": IDENTITY}),
        ("identity_provider", Foreign()),
        ("identity_provider", Identity(IdentityType.SUB, IDENTITY + SURROGATE)),
        ("resource_context_provider", None),
        ("resource_context_provider", RESOURCE),
        ("resource_context_provider", [RESOURCE]),
        ("resource_context_provider", {"more": {RESOURCE}}),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_an_unsendable_provider_result_holds_no_secret(which, value):
    pool = make_pool()
    config = secret_config(
        *(AuthorizerOptions(api_key=KEY),),
        **{"connection_pool": pool, which: lambda _request: value},
    )
    async with pool:
        error = await error_of(
            config.is_allowed(secret_request(), "app.x"), TypeError, ValueError
        )
        assert_clean(error)


# -- errors of requests -------------------------------------------------------------


guards = pytest.mark.parametrize(
    "guard",
    [
        lambda config: require_policy_allowed(config, "app.x"),
        require_policy_auto,
    ],
    ids=["allowed", "auto"],
)


DETAILS = f"no {IDENTITY} here"


def application(config, guard):
    """Return an application, and the list of the errors that end its requests."""
    app = FastAPI(lifespan=config.lifespan)
    errors = []

    @app.get("/{card}", dependencies=[Depends(guard(config))])
    async def index(card: str): ...

    @app.exception_handler(HTTPException)
    async def handle(secret_request, error):
        # Collect them here, because a handled error has no traceback.
        assert any(map(is_ours, frames(error)))
        assert error.__cause__ is error.__context__ is None
        assert_clean(error)
        logging.getLogger("app").error("refused", exc_info=error)
        errors.append(error)
        return await http_exception_handler(secret_request, error)

    return app, errors


@guards
@backends
@pytest.mark.parametrize(
    "code, status", [("UNAVAILABLE", 503), ("INTERNAL", 503), ("NOT_FOUND", 403)]
)
def test_a_rejected_request_has_no_text_of_the_authorizer(
    backend, guard, code, status, keyed_authorizer, caplog
):
    config = secret_config(keyed_authorizer.options)
    app, errors = application(config, guard)
    with TestClient(app, backend=backend) as client:
        keyed_authorizer.fail(code, DETAILS)
        answer = client.get(f"/{RESOURCE}")
    assert answer.status_code == status
    assert IDENTITY not in answer.text + str(answer.headers)
    assert len(errors) == 1
    assert code in caplog.text
    assert "HTTPException" in caplog.text
    assert not secrets_in(caplog.text)


@guards
@backends
def test_a_denied_request_holds_no_secret(backend, guard, keyed_authorizer):
    keyed_authorizer.policies = lambda _check: False
    app, errors = application(secret_config(keyed_authorizer.options), guard)
    with TestClient(app, backend=backend) as client:
        assert client.get(f"/{RESOURCE}").status_code == 403
    assert len(errors) == 1


@guards
@backends
def test_a_provider_error_leaves_the_dependency_without_secrets(
    backend, guard, keyed_authorizer
):
    app, _ = application(
        secret_config(keyed_authorizer.options, identity_provider=broken), guard
    )
    with (
        TestClient(app, backend=backend) as client,
        pytest.raises(ProviderError) as caught,
    ):
        client.get(f"/{RESOURCE}")
    assert any(map(is_ours, frames(caught.value)))
    assert_clean(caught.value)


async def test_a_log_record_with_a_traceback_holds_no_secret(caplog):
    class Unjust(FakeConnection):
        async def call(self, *_args, **_options):
            empty = grpc.aio.Metadata()
            code = grpc.StatusCode.UNAVAILABLE
            raise grpc.aio.AioRpcError(code, empty, empty, details=DETAILS)

        def judge(self, _error):
            raise ProviderError("no verdict")

    class Connector(FakeConnector):
        async def connect(self, timeout):
            await super().connect(timeout)
            return Unjust(self, 1)

    async with make_pool(Connector()) as pool, pool.acquire() as conn:
        with pytest.raises(grpc.aio.AioRpcError):
            await conn.decisions(**QUESTION)
    (record,) = [r for r in caplog.records if "judge() of a" in r.getMessage()]
    error = record.exc_info[1]
    assert isinstance(error, ProviderError)
    shown = [
        frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    assert shown == ["judge"]
    assert leaks(error) == []
