"""Test generated stubs on a lease: their calls, their arguments and their errors."""

from __future__ import annotations

import gc
import inspect

import anyio
import grpc
import grpc.aio
import pytest
from aserto.authorizer.v2 import AuthorizerStub, InfoRequest
from google.protobuf.wrappers_pb2 import Int64Value, StringValue

from fastapi_topaz import (
    ConnectionLost,
    ConnectionPool,
    GrpcConnector,
    PoolMisuse,
    Target,
)
from fastapi_topaz.testing import FakeConnector
from kit.greeter import SERVICE, GreeterStub, greeter_server
from kit.waiting import eventually


wire = pytest.mark.real_clock
KEY = "a key that must stay secret"


def name(value):
    return StringValue(value=value)


@pytest.fixture
def greeter():
    with greeter_server() as running:
        yield running


@pytest.fixture
def connector(greeter, transport):
    return GrpcConnector(Target(url=greeter.url, insecure=True), transport)


def in_memory(answer=None, **options):
    """Return a pool of fake connections, whose calls return their request."""
    connector = FakeConnector(answer=answer)
    options = {"min_connections": 0, "max_connections": 1, **options}
    return ConnectionPool(connector=connector, **options)


# -- on the wire --------------------------------------------------------------------


@wire
async def test_the_unary_methods_of_a_stub_are_awaited(connector, greeter):
    async with ConnectionPool(connector=connector) as pool, pool.acquire() as conn:
        stub = conn.stub(GreeterStub)
        assert type(stub) is GreeterStub
        assert await stub.SayHello(name("Ann")) == name("Hello, Ann")
        assert await stub.Count(name("Ann")) == Int64Value(value=3)
    assert [asked for asked, *_ in greeter.asked] == ["Ann", "Ann"]


@wire
async def test_the_timeout_of_a_call_is_its_deadline(connector, greeter):
    async with ConnectionPool(connector=connector) as pool, pool.acquire() as conn:
        stub = conn.stub(GreeterStub)
        await stub.SayHello(name("Ann"), timeout=40)
        await stub.SayHello(name("Ann"), timeout=None)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SayHello(name("slow"), timeout=0.05)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    (_, _, left), (_, _, unlimited) = greeter.asked[:2]
    assert 0 < left < 50  # gRPC rounds it up
    # gRPC's server says None, or a deadline that is hundreds of years away.
    assert unlimited is None or unlimited > 1e6


@wire
@pytest.mark.parametrize("form", [list, tuple, lambda pairs: grpc.aio.Metadata(*pairs)])
async def test_metadata_has_the_forms_of_grpc_aio(connector, greeter, form):
    pairs = form([("x-user", "ann"), ("x-raw-bin", b"\x00\xff")])
    async with ConnectionPool(connector=connector) as pool, pool.acquire() as conn:
        stub = conn.stub(GreeterStub)
        await stub.SayHello(name("Ann"), metadata=pairs)
        await stub.SayHello(name("Ann"), metadata=None)
        await stub.SayHello(name("Ann"), metadata=form([]))
    (_, with_pairs, _), *others = greeter.asked
    assert with_pairs["x-user"] == "ann"
    assert with_pairs["x-raw-bin"] == b"\x00\xff"
    assert all("x-user" not in metadata for _, metadata, _ in others)


@wire
async def test_a_status_of_the_service_is_raised_as_with_grpc_aio(connector, greeter):
    async with ConnectionPool(connector=connector) as pool, pool.acquire() as conn:
        stub = conn.stub(GreeterStub)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SayHello(name("stranger"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert caught.value.details() == "stranger is not here"
        assert await stub.SayHello(name("Ann")) == name("Hello, Ann")
        assert pool.status().suspect == 0


@wire
async def test_an_unreadable_response_is_an_error(connector, greeter):
    async with ConnectionPool(connector=connector) as pool, pool.acquire() as conn:
        stub = conn.stub(GreeterStub)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SayHello(name("garbage"))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert f"{SERVICE}/SayHello cannot be read" in caught.value.details()
        assert pool.status().suspect == 0


@wire
async def test_a_cancelled_call_of_a_stub_leaves_its_lease_usable(connector, greeter):
    async with ConnectionPool(connector=connector) as pool, pool.acquire() as conn:
        stub = conn.stub(GreeterStub)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(stub.SayHello, name("slow"))
                await eventually(lambda: greeter.asked)
                scope.cancel()
        assert scope.cancelled_caught
        greeter.go_on.set()
        assert await stub.SayHello(name("Ann")) == name("Hello, Ann")


@wire
async def test_concurrent_calls_of_a_stub_share_one_connection(connector, greeter):
    answers = {}
    async with ConnectionPool(connector=connector) as pool, pool.acquire() as conn:
        stub = conn.stub(GreeterStub)

        async def greet(who):
            answers[who] = (await stub.SayHello(name(who))).value

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(greet, str(number))
    assert answers == {str(number): f"Hello, {number}" for number in range(20)}
    assert len(greeter.peers) == 1


@wire
@pytest.mark.parametrize("transport", ["native", "grpcio"])
async def test_the_generated_stub_of_the_authorizer_works(
    embedded_authorizer, transport
):
    pool = ConnectionPool(transport=transport)
    pool.configure(embedded_authorizer.options)
    async with pool, pool.acquire() as conn:
        answer = await conn.stub(AuthorizerStub).Info(InfoRequest(), timeout=20)
        assert answer.version == (await conn.info()).version


# -- arguments ----------------------------------------------------------------------


async def test_a_connection_of_any_connector_gets_metadata_as_pairs():
    got = []

    class Recording:
        async def call(self, method, request, *, timeout, metadata):
            got.append((method, request, timeout, tuple(metadata)))
            return request

        async def probe(self, timeout): ...

        async def close(self, grace): ...

    class Connector:
        async def connect(self, timeout):
            return Recording()

    pairs = (("x-user", "ann"),)
    forms = [None, (), [], list(pairs), grpc.aio.Metadata(*pairs)]
    async with ConnectionPool(connector=Connector()) as pool, pool.acquire() as conn:
        stub = conn.stub(GreeterStub)
        for form in forms:
            await stub.SayHello(name("Ann"), metadata=form, timeout=3)
    sent = (f"{SERVICE}/SayHello", name("Ann").SerializeToString(), 3)
    assert got == [(*sent, each) for each in ((), (), (), pairs, pairs)]


@pytest.mark.parametrize(
    "argument, value",
    [
        ("credentials", grpc.access_token_call_credentials(KEY)),
        ("credentials", KEY),
        ("wait_for_ready", True),
        ("wait_for_ready", False),
        ("compression", grpc.Compression.Gzip),
        ("compression", grpc.Compression.NoCompression),
    ],
)
async def test_an_unsupported_argument_is_named_and_not_shown(argument, value):
    async with in_memory() as pool, pool.acquire() as conn:
        stub = conn.stub(GreeterStub)
        with pytest.raises(ValueError, match=f"^{argument} must be None") as caught:
            await stub.SayHello(name("Ann"), **{argument: value})
        assert f"{SERVICE}/SayHello" in str(caught.value)
        assert KEY not in str(caught.value)
        assert conn.connection.calls == 0
        supported = {"credentials": None, "wait_for_ready": None, "compression": None}
        assert await stub.SayHello(name("Ann"), **supported) == name("Ann")


@pytest.mark.parametrize(
    "wrong, error",
    [
        ({"metadata": KEY}, TypeError),
        ({"metadata": {"authorization": KEY}}, TypeError),
        ({"metadata": [("Authorization", KEY)]}, ValueError),
        ({"metadata": [("authorization", f"{KEY}\n")]}, ValueError),
        ({"metadata": grpc.aio.Metadata(("authorization", 3))}, TypeError),
        ({"metadata": grpc.aio.Metadata(("Authorization", KEY))}, ValueError),
        ({"timeout": -1}, ValueError),
        ({"timeout": float("nan")}, ValueError),
        ({"timeout": "soon"}, TypeError),
    ],
)
async def test_an_argument_that_cannot_be_sent_is_refused(wrong, error):
    (argument,) = wrong
    async with in_memory() as pool, pool.acquire() as conn:
        with pytest.raises(error, match=argument) as caught:
            await conn.stub(GreeterStub).SayHello(name("Ann"), **wrong)
        assert KEY not in str(caught.value)
        assert conn.connection.calls == 0


@pytest.mark.parametrize("request_", [{}, None, "Ann", b"Ann"])
async def test_a_request_of_the_wrong_type_is_not_sent(request_):
    async with in_memory() as pool, pool.acquire() as conn:
        with pytest.raises(TypeError, match="SerializeToString"):
            await conn.stub(GreeterStub).SayHello(request_)
        assert conn.connection.calls == 0


# -- streams ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, streams",
    [
        ("ListHellos", "responses"),
        ("CollectNames", "requests"),
        ("Chat", "requests and responses"),
    ],
)
async def test_a_streaming_method_is_not_implemented(method, streams):
    async with in_memory() as pool, pool.acquire() as conn:
        stub = conn.stub(GreeterStub)
        calls = [(), (name("Ann"),), (iter([name("Ann")]),)]
        for arguments in calls:
            with pytest.raises(NotImplementedError) as caught:
                getattr(stub, method)(*arguments, timeout=1)
            assert str(caught.value).startswith(
                f"{SERVICE}/{method} streams its {streams}."
            )
        assert await stub.SayHello(name("Ann")) == name("Ann")


# -- stub classes -------------------------------------------------------------------


class Demanding:
    """A stub that needs more than a channel."""

    def __init__(self, channel, host):
        raise AssertionError("unreachable")


class Servicer:
    """A generated servicer takes no channel."""


class Raising:
    def __init__(self, channel):
        raise OSError("no schema")


class Blocking:
    """Uses a method of a channel that calls on a lease do not have."""

    def __init__(self, channel):
        channel.subscribe(print)


@pytest.mark.parametrize(
    "wrong, kind",
    [
        (None, "NoneType"),
        ("GreeterStub", "str"),
        (name("Ann"), "StringValue"),
        (object(), "object"),
        (grpc, "module"),
        (lambda channel: channel, "function"),
    ],
    ids=["None", "str", "message", "object", "module", "function"],
)
async def test_something_other_than_a_class_is_refused(wrong, kind):
    async with in_memory() as pool, pool.acquire() as conn:
        with pytest.raises(TypeError, match=f"class of a generated stub.*a {kind}$"):
            conn.stub(wrong)


@pytest.mark.parametrize(
    "wrong, why, cause",
    [
        (Demanding, "'host'", TypeError),
        (Servicer, "takes no arguments", TypeError),
        (StringValue, "TypeError", TypeError),
        (int, "TypeError", TypeError),
        (Raising, "OSError: no schema", OSError),
        (Blocking, "has no 'subscribe'", AttributeError),
    ],
)
async def test_a_class_that_is_no_stub_is_refused(wrong, why, cause):
    async with in_memory() as pool, pool.acquire() as conn:
        with pytest.raises(TypeError, match=rf"cannot make {wrong.__name__}") as caught:
            conn.stub(wrong)
        assert why in str(caught.value)
        assert type(caught.value.__cause__) is cause
        # The lease is unaffected.
        assert await conn.stub(GreeterStub).SayHello(name("Ann")) == name("Ann")


async def test_a_stub_of_another_library_gets_an_error_that_explains_it():
    class GrpclibMethod:
        def __init__(self, channel):
            self.channel = channel

        async def __call__(self, message):
            return self.channel.request("/a.B/C", message)

    class OtherStub:
        def __init__(self, channel):
            self.SayHello = GrpclibMethod(channel)

    async with in_memory() as pool, pool.acquire() as conn:
        stub = conn.stub(OtherStub)
        with pytest.raises(AttributeError, match=r"no 'request'.*grpcio-tools"):
            await stub.SayHello(name("Ann"))


# -- the lease ----------------------------------------------------------------------


async def test_a_stub_works_until_its_lease_is_released():
    async with in_memory() as pool:
        async with pool.acquire() as conn:
            stub = conn.stub(GreeterStub)
            assert await stub.SayHello(name("Ann")) == name("Ann")
        with pytest.raises(PoolMisuse, match="was released"):
            await stub.SayHello(name("Ann"))
        with pytest.raises(PoolMisuse, match="was released"):
            conn.stub(GreeterStub)
        # A new lease of the same connection does not revive it.
        async with pool.acquire() as again:
            with pytest.raises(PoolMisuse, match="was released"):
                await stub.SayHello(name("Ann"))
            stub = again.stub(GreeterStub)
            assert await stub.SayHello(name("Ann")) == name("Ann")


async def test_a_lost_call_of_a_stub_makes_its_connection_suspect():
    async with in_memory(health_check_interval=0) as pool, pool.acquire() as conn:
        stub = conn.stub(GreeterStub)
        conn.connection.alive = False
        with pytest.raises(ConnectionLost):
            await stub.SayHello(name("Ann"))
        assert pool.status().suspect == 1


async def test_an_answer_to_a_stub_proves_its_connection():
    async with in_memory(health_check_interval=30) as pool, pool.acquire() as conn:
        stub = conn.stub(GreeterStub)
        before = conn.connection.probes
        for _ in range(4):
            await anyio.sleep(20)
            await stub.SayHello(name("Ann"))
        assert conn.connection.probes == before


async def test_a_connection_without_calls_is_named():
    class Silent:
        async def probe(self, timeout): ...

        async def close(self, grace): ...

    class Connector:
        async def connect(self, timeout):
            return Silent()

    async with ConnectionPool(connector=Connector()) as pool, pool.acquire() as conn:
        stub = conn.stub(GreeterStub)
        with pytest.raises(TypeError, match="carries no gRPC calls"):
            await stub.SayHello(name("Ann"))


async def test_the_stub_of_a_pool_is_an_error_that_shows_the_lease():
    pool = in_memory()
    with pytest.raises(AttributeError, match=r"async with pool\.acquire"):
        pool.stub(GreeterStub)


async def test_a_dropped_stub_frees_its_lease_without_the_garbage_collector():
    async with in_memory() as pool:
        gc.collect()
        gc.disable()
        try:
            stub = (await pool.acquire()).stub(GreeterStub)
            assert pool.status().streams_in_use == 1
            with pytest.warns(ResourceWarning, match="was garbage-collected"):
                del stub
            await anyio.sleep(0.1)
            assert pool.status().streams_in_use == 0
        finally:
            gc.enable()


async def test_a_method_has_the_parameters_of_a_grpc_aio_method():
    async with in_memory() as pool, pool.acquire() as conn:
        ours = inspect.signature(conn.stub(GreeterStub).SayHello).parameters.values()
    theirs = inspect.signature(grpc.aio.UnaryUnaryMultiCallable.__call__).parameters
    assert [(each.name, each.kind, each.default) for each in ours] == [
        (each.name, each.kind, each.default)
        for each in theirs.values()
        if each.name != "self"
    ]


async def test_the_repr_of_a_method_names_it():
    async with in_memory() as pool, pool.acquire() as conn:
        stub = conn.stub(GreeterStub)
        assert f"{SERVICE}/SayHello" in repr(stub.SayHello)
        assert f"{SERVICE}/Chat" in repr(stub.Chat)
