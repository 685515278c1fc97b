"""Test that the errors of calls and of acquire() hold no secrets."""

from __future__ import annotations

import asyncio
import inspect
from collections import UserDict
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import attrs
import grpc
import grpc.aio
import pytest
import trio
from anyio.to_thread import run_sync
from google.protobuf.wrappers_pb2 import StringValue

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectFailed,
    ConnectionLost,
    ConnectionPool,
    Identity,
    IdentityType,
    PoolClosed,
    PoolError,
    PoolTimeout,
    TopazConfig,
)
from fastapi_topaz._authorizer import messages as _messages
from fastapi_topaz.testing import EmbeddedAuthorizer, FakeConnector, fail
from kit.greeter import GreeterStub
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
)
from kit.waiting import eventually


# -- arguments ----------------------------------------------------------------------


class Raising(UserDict):
    def __getitem__(self, key):
        raise LookupError("the application's own")


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


@pytest.mark.costly
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: next(iter(bad)))
@pytest.mark.parametrize("name", ["decisions", "decision_tree", "query", "compile"])
async def test_an_unsendable_argument_leaves_no_secret(name, bad):
    query = {"query": "x", "input": RESOURCE} if name in {"query", "compile"} else {}
    if query and "policy_path" in bad and not bad["policy_path"]:
        bad = {"policy_path": 3}  # an empty path is allowed there
    async with make_pool() as pool, pool.acquire() as conn:
        ask = getattr(conn, name)
        error = await error_of(
            ask(**{**QUESTION, **query, **bad}), TypeError, ValueError
        )
    assert_clean(error)


@pytest.mark.parametrize(
    "bad", [{"query": ""}, {"query": 3}, {"input": {"card": RESOURCE}}, {"options": 3}]
)
@pytest.mark.parametrize("name", ["query", "compile"])
async def test_an_unsendable_query_leaves_no_secret(name, bad):
    async with make_pool() as pool, pool.acquire() as conn:
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
async def test_an_invalid_call_leaves_no_secret(bad):
    good = {"method": "/a/b", "request": RESOURCE.encode()}
    good["metadata"] = [("authorization", f"basic {KEY}")]
    async with make_pool() as pool, pool.acquire() as conn:
        error = await error_of(conn.call(**{**good, **bad}), TypeError, ValueError)
    assert_clean(error)


@pytest.mark.parametrize(
    "bad",
    [
        {"request": RESOURCE},
        {"request": {"card": RESOURCE}},
        {"credentials": KEY},
        {"compression": KEY},
        {"metadata": [("authorization", f"basic {KEY}\n")]},
        {"metadata": grpc.aio.Metadata(("authorization", f"basic {KEY}\n"))},
        {"timeout": -1},
        {"unknown": KEY},
    ],
    ids=str,
)
async def test_an_invalid_call_of_a_stub_leaves_no_secret(bad):
    good = {"request": StringValue(value=RESOURCE)}
    good["metadata"] = [("authorization", f"basic {KEY}")]
    async with make_pool() as pool, pool.acquire() as conn:
        stub = conn.stub(GreeterStub)

        async def ask():
            return await stub.SayHello(**{**good, **bad})

        error = await error_of(ask(), TypeError, ValueError)
    assert_clean(error)


async def test_an_unreadable_response_to_a_stub_leaves_no_secret():
    connector = FakeConnector(answer=lambda *_: b"\xff" + RESOURCE.encode())
    async with make_pool(connector) as pool, pool.acquire() as conn:
        call = conn.stub(GreeterStub).SayHello(StringValue(value=RESOURCE))
        error = await error_of(call, grpc.aio.AioRpcError)
    assert_clean(error)


async def test_a_failed_call_of_a_stub_leaves_no_secret():
    async with make_pool() as pool, pool.acquire() as conn:
        conn.connection.alive = False
        call = conn.stub(GreeterStub).SayHello(
            StringValue(value=RESOURCE), metadata=[("authorization", KEY)]
        )
        error = await error_of(call, ConnectionLost)
    assert_clean(error)


async def test_an_application_error_keeps_the_frames_of_the_application():
    async with make_pool() as pool, pool.acquire() as conn:
        context = Raising(card=RESOURCE)
        error = await error_of(
            conn.decisions(**{**QUESTION, "resource_context": context}), LookupError
        )
    assert_clean(error)
    # Frames of the standard library in between count as the package's own frames.
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
        lambda: make_pool().configure(KEY),
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
def test_an_invalid_constructor_argument_leaves_no_secret(build):
    with pytest.raises((TypeError, ValueError)) as caught:
        build()
    assert_clean(caught.value)


class Theirs:
    """Options of another library, with a repr that shows all values."""

    url, tenant_id, api_key = "localhost:1", None, KEY + "\n"

    def __repr__(self):
        return f"Theirs({self.api_key})"


def test_constructors_keep_their_signatures():
    assert str(inspect.signature(Identity)) == (
        "(type: 'IdentityType', value: 'str | None' = None) -> None"
    )
    assert list(inspect.signature(AuthorizerOptions).parameters) == [
        *("url", "tenant_id", "api_key", "cert_file_path", "insecure"),
        *("client_cert_path", "client_key_path", "authority", "server_name"),
        *("extra_metadata", "credentials", "max_message_bytes"),
    ]
    assert "authorizer_options" in inspect.signature(TopazConfig).parameters


# -- calls to a real authorizer -----------------------------------------------------


@asynccontextmanager
async def leased(keyed_authorizer, **options):
    pool = ConnectionPool(**{"min_connections": 0, **options})
    pool.configure(keyed_authorizer.options)
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
async def test_a_status_of_the_authorizer_leaves_no_secret(name, keyed_authorizer):
    async with leased(keyed_authorizer) as conn:
        keyed_authorizer.fail("INTERNAL", "told", times=1)
        error = await error_of(
            getattr(conn, name)(**QUESTIONS[name]), grpc.aio.AioRpcError
        )
        assert error.details() == "told"
        assert_clean(error)
        # The connection still works.
        assert (await conn.info()).version


@calls
@pytest.mark.real_clock
async def test_a_timeout_leaves_no_secret(name, keyed_authorizer):
    async with leased(keyed_authorizer) as conn:
        keyed_authorizer.delay = 30
        error = await error_of(
            getattr(conn, name)(**QUESTIONS[name], timeout=0.05), grpc.aio.AioRpcError
        )
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert_clean(error)


@calls
@pytest.mark.real_clock
async def test_a_connection_cut_during_a_call_leaves_no_secret(name, keyed_authorizer):
    async with leased(keyed_authorizer) as conn, anyio.create_task_group() as tasks:
        keyed_authorizer.delay = 30

        async def cut():
            await eventually(lambda: keyed_authorizer.streams > 0)
            await run_sync(keyed_authorizer.drop_connections)

        tasks.start_soon(cut)
        error = await error_of(
            getattr(conn, name)(**QUESTIONS[name]),
            *(ConnectionLost, grpc.aio.AioRpcError),
        )
        assert_clean(error)


@pytest.mark.real_clock
async def test_a_pool_closed_during_a_call_leaves_no_secret(keyed_authorizer):
    async with leased(keyed_authorizer) as conn, anyio.create_task_group() as tasks:
        keyed_authorizer.delay = 30

        async def close():
            await eventually(lambda: keyed_authorizer.streams > 0)
            await conn._pool.close(0)

        tasks.start_soon(close)
        error = await error_of(conn.decisions(**QUESTION), ConnectionLost)
        assert_clean(error)


@calls
async def test_a_released_lease_leaves_no_secret(name):
    async with make_pool() as pool:
        async with pool.acquire() as conn:
            pass
        error = await error_of(getattr(conn, name)(**QUESTIONS[name]), PoolError)
        assert_clean(error)


async def test_an_undecodable_answer_leaves_no_secret():
    connector = FakeConnector(answer=lambda _method, _request: b"\xff\xff")
    async with make_pool(connector) as pool, pool.acquire() as conn:
        error = await error_of(conn.decisions(**QUESTION), grpc.aio.AioRpcError)
        assert_clean(error)


# -- cancellation -------------------------------------------------------------------


@calls
@pytest.mark.real_clock
async def test_a_cancelled_call_leaves_no_secret(name, keyed_authorizer):
    caught = []

    async def ask(conn):
        try:
            await getattr(conn, name)(**QUESTIONS[name])
        except BaseException as error:
            caught.append(error)
            raise

    async with leased(keyed_authorizer) as conn:
        keyed_authorizer.delay = 30
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask, conn)
                await eventually(lambda: keyed_authorizer.streams > 0)
                scope.cancel()
        assert scope.cancelled_caught
        (error,) = caught
        assert isinstance(error, asyncio.CancelledError | trio.Cancelled)
        assert_clean(error)
        keyed_authorizer.heal()
        assert (await conn.info()).version


async def test_a_call_closed_while_it_waits_leaves_no_secret():
    async with make_pool() as pool, pool.acquire() as conn:
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


# -- acquire() ----------------------------------------------------------------------


async def acquired_with(pool):
    async with pool.acquire():
        pytest.fail("there is nothing to lease")


async def awaited(pool):
    await pool.acquire()


@pytest.fixture
def down(tmp_path):
    """Return options with a key, for an authorizer that does not listen."""
    with EmbeddedAuthorizer(api_key=KEY, tls=True) as keyed_authorizer:
        options = keyed_authorizer.options
        pem = tmp_path / "ca.pem"
        pem.write_bytes(Path(options.cert_file_path).read_bytes())
    return attrs.evolve(options, cert_file_path=str(pem))


@pytest.mark.real_clock
@pytest.mark.parametrize("acquire", [acquired_with, awaited])
async def test_a_failed_connect_leaves_no_secret(acquire, down):
    pool = ConnectionPool(min_connections=0, max_retries=0)
    pool.configure(down)
    async with pool:
        errors = []

        async def caller():
            errors.append(await error_of(acquire(pool), ConnectFailed))

        # All of the errors share the pool's error as their cause.
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(caller)
        for error in errors:
            assert isinstance(error.__cause__, ConnectFailed)
            assert_clean(error)


@pytest.mark.real_clock
@pytest.mark.parametrize("content", ["no PEM: open-sesame", None])
async def test_an_unreadable_certificate_leaves_no_secret(content, down):
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
async def test_an_acquire_timeout_leaves_no_secret(acquire):
    connector = FakeConnector(default=fail())
    async with make_pool(connector, acquire_timeout=0.01, max_retries=99) as pool:
        await error_of(acquire(pool), PoolTimeout)
        error = await error_of(acquire(pool), PoolTimeout)
        assert error.__cause__ is not None
        assert_clean(error)
        # The waiting frame holds nothing, not even the pool.
        for frame in frames(error):
            if is_ours(frame):
                assert pool not in frame.f_locals.values()


@pytest.mark.parametrize("acquire", [acquired_with, awaited])
async def test_a_closed_pool_error_leaves_no_secret(acquire):
    pool = make_pool()
    await pool.initialize()
    await pool.close()
    assert_clean(await error_of(acquire(pool), PoolClosed))
