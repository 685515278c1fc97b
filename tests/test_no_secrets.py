"""No identity, resource context or key in the frames of errors, nor in the errors."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import json
import logging
import os
import subprocess
import sys
import textwrap
import traceback
from collections import UserDict, deque
from collections.abc import Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import attrs
import grpc
import grpc.aio
import pytest
import trio
from anyio.to_thread import run_sync
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.testclient import TestClient
from waiting import eventually

import fastapi_topaz
from fastapi_topaz import (
    AuthorizerOptions,
    ConnectFailed,
    ConnectionLost,
    ConnectionPool,
    Identity,
    IdentityType,
    PoolClosed,
    PooledConnection,
    PoolError,
    PoolTimeout,
    TopazConfig,
    require_policy_allowed,
    require_policy_auto,
)
from fastapi_topaz._authorizer import messages as _messages
from fastapi_topaz._redaction import boundary, clear_frames
from fastapi_topaz.testing import (
    EmbeddedAuthorizer,
    FakeConnection,
    FakeConnector,
    fail,
    ok,
)


IDENTITY, RESOURCE, KEY = "swordfish", "hunter2", "open-sesame"
SECRETS = (IDENTITY, RESOURCE, KEY)
ALICE = Identity(IdentityType.JWT, IDENTITY)
QUESTION = {
    "policy_path": "app.x",
    "decisions": ("allowed",),
    "identity": ALICE,
    "resource_context": {"card": RESOURCE},
}
PACKAGE = str(Path(fastapi_topaz.__file__).parent)


# -- looking for secrets --------------------------------------------------------------


def reachable(error):
    """Yield *error* and all errors that it leads to, each once."""
    found, seen = [error], set()
    while found:
        each = found.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        found += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            found += each.exceptions


def is_ours(frame):
    filename = frame.f_code.co_filename
    return filename.startswith(PACKAGE) or "generated" in filename


def frames(error):
    """Yield all frames that *error* leads to."""
    for each in reachable(error):
        for frame, _ in traceback.walk_tb(each.__traceback__):
            yield frame


def texts(value, seen):
    """Yield all texts that *value* holds, however deep."""
    if id(value) in seen:
        return
    seen[id(value)] = value
    try:
        yield repr(value)
    except Exception as error:  # noqa: BLE001  (half-built objects)
        yield type(error).__name__
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes | bytearray | memoryview):
        yield bytes(value).decode("latin-1")
    else:
        for part in parts(value):
            yield from texts(part, seen)


def parts(value):
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, list | tuple | set | frozenset | deque):
        return value
    if isinstance(value, BaseException):
        # AttributeError and UnicodeError keep what they failed with.
        names = ("args", "obj", "object", "value", "__dict__", "__notes__")
    elif attrs.has(type(value)):
        names = (*(field.name for field in attrs.fields(type(value))), "__dict__")
    elif inspect.iscoroutine(value) and value.cr_frame is not None:
        return value.cr_frame.f_locals.values()
    else:
        return ()
    return [getattr(value, name, None) for name in names]


def secrets_in(value):
    found = {}
    for text in texts(value, {}):
        found |= {secret: text for secret in SECRETS if secret in text}
    return found


def leaks(error):
    """Return where *error* leads to a secret in a frame of the package."""
    found = []
    for frame in frames(error):
        if is_ours(frame):
            for name, value in frame.f_locals.items():
                found += [(frame.f_code.co_qualname, name, secrets_in(value))]
    return [each for each in found if each[2]]


def assert_clean(error, *, shown=()):
    """Fail if *error* leads to a secret, but for errors of the classes *shown*."""
    assert leaks(error) == []
    for each in reachable(error):
        if not isinstance(each, shown):
            assert not secrets_in(each), repr(each)


async def error_of(awaitable, *expected):
    """Return what *awaitable* raises."""
    with pytest.raises(expected) as caught:
        await awaitable
    assert any(map(is_ours, frames(caught.value))), "or this shows nothing"
    return caught.value


@pytest.mark.parametrize("name", ["decisions", "decision_tree", "query", "compile"])
async def test_the_search_finds_what_the_boundary_deletes(name):
    unguarded = getattr(PooledConnection, name).__wrapped__
    arguments = {**QUESTION, "policy_path": 3}
    if name in {"query", "compile"}:
        arguments["query"] = "x"
    async with make() as pool, pool.acquire() as conn:
        error = await error_of(unguarded(conn, **arguments), TypeError)
    found = {secret for *_, held in leaks(error) for secret in held}
    assert found == {IDENTITY, RESOURCE}


def test_each_public_coroutine_of_a_lease_is_a_boundary():
    methods = {
        name: method
        for name, method in inspect.getmembers(PooledConnection)
        if inspect.isfunction(method) and not name.startswith("_")
    }
    assert len(methods) == 8
    for name, method in methods.items():
        assert inspect.iscoroutinefunction(method), name
        assert method.__wrapped__.__name__ == method.__name__ == name


# -- arguments ------------------------------------------------------------------------


def make(connector=None, **options):
    connector = connector or FakeConnector()
    return ConnectionPool(connector=connector, **{"min_connections": 0, **options})


class Foreign:
    """An identity of another library, whose repr tells all."""

    type, value = 3.5, IDENTITY

    def __repr__(self):
        return f"Foreign({self.value})"


class Raising(UserDict):
    def __getitem__(self, key):
        raise LookupError("the application's own")


SURROGATE = "\udc80"
BAD = [
    {"resource_context": {"card": RESOURCE, "bad": object()}},
    {"resource_context": {"card": [RESOURCE, {"deep": {RESOURCE}}]}},
    {"resource_context": {"card": {(RESOURCE, 1): 2}}},
    {"resource_context": {"card": RESOURCE, "bad": float("nan")}},
    {"resource_context": {"card": RESOURCE, "bad": 2**60}},
    {"resource_context": {"card": RESOURCE + SURROGATE}},
    {"resource_context": {"card": [RESOURCE + SURROGATE]}},
    {"resource_context": {"card": RESOURCE.encode()}},
    {"resource_context": RESOURCE},
    {"resource_context": [("card", RESOURCE)]},
    {"identity": IDENTITY},
    {"identity": (IdentityType.SUB, IDENTITY)},
    {"identity": Foreign()},
    {"identity": Identity(IdentityType.SUB, IDENTITY + SURROGATE)},
    {"policy_path": ""},
    {"policy_path": None},
    {"policy_path": "app." + SURROGATE},
    {"decisions": "allowed"},
    {"decisions": [3]},
    {"decisions": {"card": RESOURCE}},
    {"decisions": [RESOURCE, 3]},
    {"policy_instance_name": 3},
    {"policy_instance_label": SURROGATE},
    {"timeout": "soon"},
    {"timeout": float("nan")},
    {"identiy": ALICE},
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: next(iter(bad)))
@pytest.mark.parametrize("name", ["decisions", "decision_tree", "query", "compile"])
async def test_an_argument_that_cannot_be_sent(name, bad):
    query = {"query": "x", "input": RESOURCE} if name in {"query", "compile"} else {}
    if query and "policy_path" in bad and not bad["policy_path"]:
        bad = {"policy_path": 3}  # an empty one is allowed there
    async with make() as pool, pool.acquire() as conn:
        ask = getattr(conn, name)
        error = await error_of(
            ask(**{**QUESTION, **query, **bad}), TypeError, ValueError
        )
    assert_clean(error)


@pytest.mark.parametrize(
    "bad", [{"query": ""}, {"query": 3}, {"input": {"card": RESOURCE}}, {"options": 3}]
)
@pytest.mark.parametrize("name", ["query", "compile"])
async def test_a_query_that_cannot_be_sent(name, bad):
    async with make() as pool, pool.acquire() as conn:
        arguments = {**QUESTION, "query": "x", "input": RESOURCE, **bad}
        error = await error_of(getattr(conn, name)(**arguments), TypeError, ValueError)
    assert_clean(error)


@pytest.mark.parametrize(
    "bad",
    [
        {"method": 3},
        {"request": RESOURCE},
        {"request": {"card": RESOURCE}},
        {"request_serializer": len},
        {"metadata": KEY},
        {"metadata": [("authorization", KEY), KEY]},
        {"metadata": [("authorization", f"basic {KEY}"), ("x", 3)]},
        {"metadata": [("authorization", f"basic {KEY}\n")]},
        {"metadata": [("Authorization", f"basic {KEY}")]},
        {"metadata": {"authorization": f"basic {KEY}"}},
        {"timeout": -1},
    ],
    ids=str,
)
async def test_a_call_that_cannot_be_made(bad):
    good = {"method": "/a/b", "request": RESOURCE.encode()}
    good["metadata"] = [("authorization", f"basic {KEY}")]
    async with make() as pool, pool.acquire() as conn:
        error = await error_of(conn.call(**{**good, **bad}), TypeError, ValueError)
    assert_clean(error)


async def test_what_the_application_raises_keeps_the_frames_of_the_application():
    async with make() as pool, pool.acquire() as conn:
        context = Raising(card=RESOURCE)
        error = await error_of(
            conn.decisions(**{**QUESTION, "resource_context": context}), LookupError
        )
    assert_clean(error)
    # Frames of the standard library between belong to the package, which called them.
    (theirs,) = [f for f in frames(error) if f.f_code.co_name == "__getitem__"]
    assert theirs.f_locals["self"] is context
    between = [f for f in frames(error) if "collections" in f.f_code.co_filename]
    assert between
    assert not any(frame.f_locals for frame in between)


@pytest.mark.parametrize(
    "build",
    [
        lambda: AuthorizerOptions(api_key=KEY + "\n"),
        lambda: AuthorizerOptions(api_key=KEY.encode()),
        lambda: AuthorizerOptions(api_key=[KEY]),
        lambda: AuthorizerOptions(api_key=KEY, url=""),
        lambda: AuthorizerOptions(api_key=KEY, insecure="yes"),
        lambda: AuthorizerOptions(api_key=KEY, nothing=3),
        lambda: AuthorizerOptions(KEY),
        lambda: AuthorizerOptions.coerce(KEY),
        lambda: Identity(IDENTITY, IdentityType.SUB),
        lambda: Identity(17, IDENTITY),
        lambda: Identity(IdentityType.IDENTITY_TYPE_UNKNOWN, IDENTITY),
        lambda: Identity(IdentityType.SUB, IDENTITY.encode()),
        lambda: Identity(IdentityType.SUB, value=IDENTITY, kind=3),
        lambda: Identity.coerce(IDENTITY),
        lambda: Identity.coerce(Foreign()),
        lambda: make().configure(KEY),
        lambda: ConnectionPool().configure(Theirs()),
        lambda: TopazConfig(
            authorizer_options=Theirs(),
            policy_path_root="app",
            identity_provider=lambda _request: ALICE,
        ),
        lambda: TopazConfig(
            authorizer_options=AuthorizerOptions(api_key=KEY),
            policy_path_root="",
            identity_provider=lambda _request: ALICE,
        ),
        lambda: EmbeddedAuthorizer(api_key=KEY + "\n"),
    ],
    ids=lambda build: inspect.getsource(build).strip()[:50],
)
def test_what_cannot_be_built(build):
    with pytest.raises((TypeError, ValueError)) as caught:
        build()
    assert_clean(caught.value)


class Theirs:
    """Options of another library, whose repr tells all."""

    url, tenant_id, api_key = "localhost:1", None, KEY + "\n"

    def __repr__(self):
        return f"Theirs({self.api_key})"


def test_constructors_keep_their_signatures():
    assert str(inspect.signature(Identity)) == (
        "(type: 'IdentityType', value: 'str | None' = None) -> None"
    )
    assert list(inspect.signature(AuthorizerOptions).parameters) == [
        *("url", "tenant_id", "api_key", "cert_file_path", "insecure")
    ]
    assert "authorizer_options" in inspect.signature(TopazConfig).parameters


# -- calls of a real authorizer -------------------------------------------------------


@pytest.fixture
def authorizer():
    with EmbeddedAuthorizer(lambda _check: True, api_key=KEY) as running:
        yield running


@asynccontextmanager
async def leased(authorizer, **options):
    pool = ConnectionPool(**{"min_connections": 0, **options})
    pool.configure(authorizer.options)
    async with pool, pool.acquire() as conn:
        yield conn


QUESTIONS = {
    "decisions": QUESTION,
    "decision_tree": QUESTION,
    "query": {**QUESTION, "query": "x = 1", "input": RESOURCE},
    "compile": {**QUESTION, "query": "x = 1", "input": RESOURCE},
    "list_policies": {},
    "get_policy": {"id": "x"},
    "info": {},
    "call": {
        "method": "/aserto.authorizer.v2.Authorizer/Is",
        "request": _messages.is_request("app.x", ("allowed",), ALICE, None, None, None),
        "metadata": [("x-key", KEY)],
    },
}
calls = pytest.mark.parametrize("name", list(QUESTIONS))


@calls
@pytest.mark.real_clock
async def test_a_status_of_the_authorizer(name, authorizer):
    async with leased(authorizer) as conn:
        authorizer.fail("INTERNAL", "told", times=1)
        error = await error_of(
            getattr(conn, name)(**QUESTIONS[name]), grpc.aio.AioRpcError
        )
        assert error.details() == "told"
        assert_clean(error)
        # The connection works as before.
        assert (await conn.info()).version


@calls
@pytest.mark.real_clock
async def test_no_answer_in_time(name, authorizer):
    async with leased(authorizer) as conn:
        authorizer.delay = 30
        error = await error_of(
            getattr(conn, name)(**QUESTIONS[name], timeout=0.05), grpc.aio.AioRpcError
        )
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert_clean(error)


@calls
@pytest.mark.real_clock
async def test_a_connection_that_is_cut_under_the_call(name, authorizer):
    async with leased(authorizer) as conn, anyio.create_task_group() as tasks:
        authorizer.delay = 30

        async def cut():
            await eventually(lambda: authorizer.streams > 0)
            await run_sync(authorizer.drop_connections)

        tasks.start_soon(cut)
        error = await error_of(
            getattr(conn, name)(**QUESTIONS[name]),
            *(ConnectionLost, grpc.aio.AioRpcError),
        )
        assert_clean(error)


@pytest.mark.real_clock
async def test_a_pool_that_closes_under_the_call(authorizer):
    async with leased(authorizer) as conn, anyio.create_task_group() as tasks:
        authorizer.delay = 30

        async def close():
            await eventually(lambda: authorizer.streams > 0)
            await conn._pool.close(0)

        tasks.start_soon(close)
        error = await error_of(conn.decisions(**QUESTION), ConnectionLost)
        assert_clean(error)


@calls
async def test_a_lease_that_was_released(name):
    async with make() as pool:
        async with pool.acquire() as conn:
            pass
        error = await error_of(getattr(conn, name)(**QUESTIONS[name]), PoolError)
        assert_clean(error)


async def test_an_answer_that_cannot_be_read():
    connector = FakeConnector(answer=lambda _method, _request: b"\xff\xff")
    async with make(connector) as pool, pool.acquire() as conn:
        error = await error_of(conn.decisions(**QUESTION), grpc.aio.AioRpcError)
        assert_clean(error)


# -- cancellation ---------------------------------------------------------------------


@calls
@pytest.mark.real_clock
async def test_a_call_that_is_cancelled(name, authorizer):
    caught = []

    async def ask(conn):
        try:
            await getattr(conn, name)(**QUESTIONS[name])
        except BaseException as error:
            caught.append(error)
            raise

    async with leased(authorizer) as conn:
        authorizer.delay = 30
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask, conn)
                await eventually(lambda: authorizer.streams > 0)
                scope.cancel()
        assert scope.cancelled_caught
        (error,) = caught
        assert isinstance(error, asyncio.CancelledError | trio.Cancelled)
        assert_clean(error)
        authorizer.heal()
        assert (await conn.info()).version


async def test_a_call_that_is_closed_while_it_waits():
    async with make() as pool, pool.acquire() as conn:
        caught = []

        async def ask():
            try:
                await conn.decisions(**QUESTION)
            except GeneratorExit as error:
                caught.append(error)
                raise

        conn.connection.frozen = True
        call = ask()
        call.send(None)
        call.close()
        (error,) = caught
        assert_clean(error)
        conn.connection.frozen = False
        assert await conn.call("/a/b", b"works") == b"works"


# -- acquire() ------------------------------------------------------------------------


async def acquired_with(pool):
    async with pool.acquire():
        pytest.fail("there is nothing to lease")


async def awaited(pool):
    await pool.acquire()


@pytest.fixture
def down(tmp_path):
    """Return options of an authorizer that does not listen, and that want a key."""
    with EmbeddedAuthorizer(api_key=KEY, tls=True) as authorizer:
        options = authorizer.options
        pem = tmp_path / "ca.pem"
        pem.write_bytes(Path(options.cert_file_path).read_bytes())
    return attrs.evolve(options, cert_file_path=str(pem))


@pytest.mark.real_clock
@pytest.mark.parametrize("acquire", [acquired_with, awaited])
async def test_no_connection(acquire, down):
    pool = ConnectionPool(min_connections=0, max_retries=0)
    pool.configure(down)
    async with pool:
        errors = []

        async def caller():
            errors.append(await error_of(acquire(pool), ConnectFailed))

        # All of them share the pool's error as their cause.
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(caller)
        for error in errors:
            assert isinstance(error.__cause__, ConnectFailed)
            assert_clean(error)


@pytest.mark.real_clock
@pytest.mark.parametrize("content", ["no PEM: open-sesame", None])
async def test_a_certificate_that_cannot_be_read(content, down):
    path = anyio.Path(down.cert_file_path)
    await path.unlink()
    if content is not None:
        await path.write_text(content)
    pool = ConnectionPool(min_connections=0, max_retries=0)
    pool.configure(down)
    assert_clean(await error_of(pool.initialize(), ValueError))
    error = await error_of(acquired_with(pool), ConnectFailed)
    assert_clean(error)
    await pool.close()


@pytest.mark.parametrize("acquire", [acquired_with, awaited])
async def test_no_connection_in_time(acquire):
    connector = FakeConnector(default=fail())
    async with make(connector, acquire_timeout=0.01, max_retries=99) as pool:
        await error_of(acquire(pool), PoolTimeout)
        error = await error_of(acquire(pool), PoolTimeout)
        assert error.__cause__ is not None
        assert_clean(error)
        # The frame that waited holds nothing, not even the pool.
        for frame in frames(error):
            if is_ours(frame):
                assert pool not in frame.f_locals.values()


@pytest.mark.parametrize("acquire", [acquired_with, awaited])
async def test_a_closed_pool(acquire):
    pool = make()
    await pool.initialize()
    await pool.close()
    assert_clean(await error_of(acquire(pool), PoolClosed))


# -- checks of an application ---------------------------------------------------------


def request(**scope):
    scope = {"type": "http", "method": "GET", "path": f"/{RESOURCE}", **scope}
    scope.setdefault("headers", [(b"authorization", f"Bearer {IDENTITY}".encode())])
    return Request({"path_params": {"card": RESOURCE}, **scope})


def configured(options, **arguments):
    arguments.setdefault("identity_provider", lambda _request: ALICE)
    arguments.setdefault("resource_context_provider", lambda _r: {"more": RESOURCE})
    pool = ConnectionPool(min_connections=0, max_retries=0)
    return TopazConfig(
        **{"policy_path_root": "app", "connection_pool": pool, **arguments},
        authorizer_options=options,
    )


@pytest.mark.real_clock
@pytest.mark.parametrize("fault", ["status", "silent", "stopped"])
async def test_a_check_without_a_decision(fault, authorizer):
    config = configured(authorizer.options, check_timeout=0.5)
    async with config.connection_pool:
        assert await config.is_allowed(request(), "app.x")
        if fault == "status":
            authorizer.fail("UNAVAILABLE", "told")
        elif fault == "silent":
            authorizer.delay = 30
        else:
            await run_sync(authorizer.stop)
        error = await error_of(
            config.is_allowed(request(), "app.x", resource_context={"a": RESOURCE}),
            *(PoolError, grpc.aio.AioRpcError),
        )
        assert_clean(error)


async def test_a_check_that_is_lost_and_finds_no_other_connection():
    connector = FakeConnector([ok()], default=fail("nobody there"))
    pool = make(connector, max_retries=0)
    config = configured(AuthorizerOptions(api_key=KEY), connection_pool=pool)
    async with pool:
        async with pool.acquire() as conn:
            conn.connection.alive = False
        error = await error_of(config.is_allowed(request(), "app.x"), PoolError)
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
async def test_a_check_that_cannot_be_asked(bad):
    pool = make()
    config = configured(AuthorizerOptions(api_key=KEY), connection_pool=pool)
    async with pool:
        arguments = {"policy_path": "app.x", **bad}
        error = await error_of(
            config.is_allowed(request(), **arguments), TypeError, ValueError
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
async def test_an_error_of_a_provider_keeps_its_own_frames_alone(which, provider):
    pool = make()
    config = configured(
        AuthorizerOptions(api_key=KEY), connection_pool=pool, **{which: provider}
    )
    async with pool:
        error = await error_of(config.is_allowed(request(), "app.x"), ProviderError)
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
async def test_a_provider_that_returns_what_cannot_be_sent(which, value):
    pool = make()
    config = configured(
        *(AuthorizerOptions(api_key=KEY),),
        **{"connection_pool": pool, which: lambda _request: value},
    )
    async with pool:
        error = await error_of(
            config.is_allowed(request(), "app.x"), TypeError, ValueError
        )
        assert_clean(error)


# -- what a request of an application ends with ---------------------------------------

guards = pytest.mark.parametrize(
    "guard",
    [
        lambda config: require_policy_allowed(config, "app.x"),
        require_policy_auto,
    ],
    ids=["allowed", "auto"],
)
backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])
DETAILS = f"no {IDENTITY} here"


def application(config, guard):
    """Return an application, and the list of the errors that its requests end with."""
    app = FastAPI(lifespan=config.lifespan)
    errors = []

    @app.get("/{card}", dependencies=[Depends(guard(config))])
    async def index(card: str): ...

    @app.exception_handler(HTTPException)
    async def handle(request, error):
        # Here, because the error has no traceback once it was handled.
        assert any(map(is_ours, frames(error)))
        assert error.__cause__ is error.__context__ is None
        assert_clean(error)
        logging.getLogger("app").error("refused", exc_info=error)
        errors.append(error)
        return await http_exception_handler(request, error)

    return app, errors


@guards
@backends
@pytest.mark.parametrize(
    "code, status", [("UNAVAILABLE", 503), ("INTERNAL", 503), ("NOT_FOUND", 403)]
)
def test_a_refused_request_carries_no_text_of_the_authorizer(
    backend, guard, code, status, authorizer, caplog
):
    config = configured(authorizer.options)
    app, errors = application(config, guard)
    with TestClient(app, backend=backend) as client:
        authorizer.fail(code, DETAILS)
        answer = client.get(f"/{RESOURCE}")
    assert answer.status_code == status
    assert IDENTITY not in answer.text + str(answer.headers)
    assert len(errors) == 1
    assert code in caplog.text
    assert "HTTPException" in caplog.text
    assert not secrets_in(caplog.text)


@guards
@backends
def test_a_denied_request_holds_no_secret(backend, guard, authorizer):
    authorizer.policies = lambda _check: False
    app, errors = application(configured(authorizer.options), guard)
    with TestClient(app, backend=backend) as client:
        assert client.get(f"/{RESOURCE}").status_code == 403
    assert len(errors) == 1


@guards
@backends
def test_an_error_of_a_provider_leaves_the_dependency_without_secrets(
    backend, guard, authorizer
):
    app, _ = application(
        configured(authorizer.options, identity_provider=broken), guard
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

    async with make(Connector()) as pool, pool.acquire() as conn:
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


# -- the mechanism --------------------------------------------------------------------


def code_of_the_package(source):
    """Run *source* as a module of this package, and return its names."""
    names = {"__name__": "fastapi_topaz._made_up"}
    exec(textwrap.dedent(source), names)
    return names


async def test_a_coroutine_that_caught_the_error_and_goes_on_is_not_disturbed():
    made = code_of_the_package("""
        async def raises(secret):
            raise KeyError("shared")

        async def keeps(secret, errors, gate):
            try:
                await raises(secret)
            except KeyError as error:
                errors.append(error)
            await gate()
            return secret

        def generates(secret, errors):
            try:
                raise KeyError("shared")
            except KeyError as error:
                errors.append(error)
            yield secret
            yield secret

        def raises_again(error):
            raise error
    """)
    errors, results, gate = [], [], anyio.Event()

    async def run():
        results.append(await made["keeps"](IDENTITY, errors, gate.wait))

    generator = made["generates"](IDENTITY, errors)
    results.append(next(generator))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        while len(errors) < 2:
            await anyio.lowlevel.checkpoint()
        for error, again in itertools.product(errors, [False, True]):
            if again:
                with contextlib.suppress(KeyError):
                    made["raises_again"](error)
            clear_frames(error)
            # No longer does the error lead to those that go on.
            named = [frame.f_code.co_name for frame in frames(error)]
            assert not {"keeps", "generates"} & set(named)
            assert_clean(error)
        gate.set()
    results += generator
    assert results == [IDENTITY] * 3
    for error in errors:
        assert not any(IDENTITY in f.f_locals.values() for f in frames(error))


def test_members_causes_and_contexts_are_cleared_and_circles_end():
    made = code_of_the_package("""
        def fails(secret, cause=None):
            raise LookupError("x") from cause
    """)
    fails, errors = made["fails"], []
    for _ in range(4):
        try:
            fails(IDENTITY)
        except LookupError as error:
            errors.append(error)
    member, cause, context, last = errors
    group = ExceptionGroup("both", [member, ExceptionGroup("inner", [cause])])
    last.__cause__, group.__context__ = group, context
    context.__context__ = last
    clear_frames(last)
    ours = [f for f in frames(last) if f.f_code.co_name == "fails"]
    assert len(ours) == 4
    assert not any(frame.f_locals for frame in ours)


@pytest.mark.parametrize(
    "filename, cleared",
    [
        ("<attrs generated init fastapi_topaz._authorizer.options.Identity>", True),
        ("<attrs generated init theirs.Identity>", False),
        ("<string>", False),
    ],
)
def test_constructors_that_attrs_wrote_belong_to_their_class(filename, cleared):
    # Before attrs 25 they run in globals without a name.
    names = {}
    exec(compile("def init(secret): raise LookupError", filename, "exec"), names)
    with pytest.raises(LookupError) as caught:
        names["init"](IDENTITY)
    clear_frames(caught.value)
    (made,) = [f for f in frames(caught.value) if f.f_code.co_name == "init"]
    assert made.f_locals == ({} if cleared else {"secret": IDENTITY})


def test_frames_that_run_keep_their_variables():
    made = code_of_the_package("""
        def outer(secret, clear):
            try:
                raise LookupError("x")
            except LookupError as error:
                clear(error)
                return secret
    """)
    assert made["outer"](IDENTITY, clear_frames) == IDENTITY


def test_a_boundary_passes_on_what_it_is_given():
    def plain(one, *, two=2):
        """Say what it is."""
        return one, two

    async def later(one, *, two=2):
        return one, two

    assert boundary(plain)(1, two=3) == (1, 3)
    assert boundary(plain).__doc__ == "Say what it is."
    assert inspect.signature(boundary(plain)) == inspect.signature(plain)
    assert inspect.iscoroutinefunction(boundary(later))
    assert anyio.run(boundary(later), 1) == (1, 2)


# -- the tools that show frames -------------------------------------------------------

PROGRAM = """
    import os

    import anyio
    from fastapi_topaz import *
    from fastapi_topaz.testing import EmbeddedAuthorizer

    BACKEND = os.environ["BACKEND"]


    def question():
        identity, resource, key = os.environ["SECRETS"].split()
        return {
            "identity": Identity(IdentityType.JWT, identity),
            "resource_context": {"card": resource},
        }


    async def with_a_lease(prepare, **arguments):
        key = os.environ["SECRETS"].split()[2]
        with EmbeddedAuthorizer(lambda check: True, api_key=key) as authorizer:
            pool = ConnectionPool(min_connections=0)
            pool.configure(authorizer.options)
            del key
            async with pool, pool.acquire() as conn:
                prepare(authorizer)
                await conn.decisions(**question() | arguments)


    def a_status(authorizer):
        authorizer.fail("INTERNAL")


    def silence(authorizer):
        authorizer.delay = 30


    def nothing(authorizer):
        pass


    def run(prepare, **arguments):
        async def main():
            await with_a_lease(prepare, policy_path="app.x", **arguments)

        anyio.run(main, backend=BACKEND)


    CASES = {
        "status": lambda: run(a_status),
        "timeout": lambda: run(silence, timeout=0.05),
        "argument": lambda: run(nothing, decisions="allowed"),
        "keyword": lambda: run(nothing, nothing=3),
    }
"""

SENTRY = """
    import json

    import sentry_sdk
    from sentry_sdk.transport import Transport


    class Kept(Transport):
        events = []

        def capture_envelope(self, envelope):
            self.events.append(envelope.get_event())


    sentry_sdk.init(dsn="http://key@127.0.0.1:9/1", transport=Kept)
    for case in CASES.values():
        try:
            case()
        except Exception as error:
            sentry_sdk.capture_exception(error)

    # Sentry's own integration reports each answer of 503.
    from fastapi import Depends, FastAPI
    from fastapi.testclient import TestClient

    key = os.environ["SECRETS"].split()[2]
    with EmbeddedAuthorizer(lambda check: True, api_key=key) as authorizer:
        config = TopazConfig(
            authorizer_options=authorizer.options,
            policy_path_root="app",
            identity_provider=lambda request: question()["identity"],
            resource_context_provider=lambda request: question()["resource_context"],
        )
        app = FastAPI(lifespan=config.lifespan)
        guard = Depends(require_policy_auto(config))

        @app.get("/documents", dependencies=[guard])
        async def documents(): ...

        with TestClient(app, backend=BACKEND) as client:
            authorizer.fail("INTERNAL", f"no {os.environ['SECRETS']} here")
            client.get("/documents")
    sentry_sdk.flush()
    print(json.dumps(Kept.events))
"""


def run_program(tmp_path, backend, *arguments, status):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={
            **os.environ,
            "SECRETS": " ".join(SECRETS),
            "BACKEND": backend,
            # pytest itself is enough, and its plugins take long to import.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@backends
@pytest.mark.real_clock
def test_sentry_gets_no_secret(backend, tmp_path):
    pytest.importorskip("sentry_sdk", reason="sentry-sdk is not installed")
    program = textwrap.dedent(PROGRAM) + textwrap.dedent(SENTRY)
    (tmp_path / "program.py").write_text(program)
    events = json.loads(run_program(tmp_path, backend, "program.py", status=0))
    assert len(events) == 5
    assert events[-1]["exception"]["values"][-1]["type"] == "HTTPException"
    for event in events:
        shown = [
            frame
            for value in event["exception"]["values"]
            for frame in value["stacktrace"]["frames"]
        ]
        ours = [frame for frame in shown if frame["module"].startswith("fastapi_topaz")]
        assert ours
        assert any(frame["vars"] for frame in shown), "or this shows nothing"
        assert not secrets_in(json.dumps(event))


@backends
@pytest.mark.real_clock
def test_pytest_shows_no_secret(backend, tmp_path):
    program = textwrap.dedent(PROGRAM) + textwrap.dedent("""
        import pytest


        @pytest.mark.parametrize("case", list(CASES))
        def test_that_fails(case):
            CASES[case]()
    """)
    (tmp_path / "test_program.py").write_text(program)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    shown = run_program(
        *(tmp_path, backend, "-m", "pytest", "-l", "--tb=long"),
        *("-p", "no:cacheprovider"),
        status=1,
    )
    assert "4 failed" in shown
    assert "fastapi_topaz/_authorizer/pool.py" in shown
    assert "prepare    = " in shown, "or no variable is shown"
    assert not secrets_in(shown)
