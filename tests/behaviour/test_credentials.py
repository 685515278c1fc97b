"""Test `credentials`: metadata that the application computes for each call."""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import time

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest
import sniffio
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectFailed,
    ConnectionPool,
    CredentialsFailed,
    GrpcConnector,
    Identity,
    IdentityType,
    Target,
    TopazConfig,
    require_policy_allowed,
)
from kit.configs import Requests
from kit.faultkit.http2 import Http2Server
from kit.h2peer import METHOD, SocketServer
from kit.secrets import KEY, assert_clean


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]

PROBE = "/grpc.health.v1.Health/Check"
BEARER = ("authorization", f"Bearer {KEY}")
REQUEST = Requests({"type": "http", "headers": []})


@pytest.fixture
def server():
    with SocketServer() as running:
        yield running


def pool_to(server, transport, credentials, *, metadata=(), **options):
    target = Target(
        url=server.url, insecure=True, credentials=credentials, metadata=metadata
    )
    options = {"min_connections": 0, "max_connections": 1, **options}
    return ConnectionPool(connector=GrpcConnector(target, transport), **options)


def headers_of(server, path=METHOD):
    """Return the header lists of the requests for *path*, of all connections."""
    each = [headers for peer in server.servers for headers in peer.headers.values()]
    return [headers for headers in each if (":path", path) in headers]


def values_of(server, key, path=METHOD):
    return [[v for k, v in headers if k == key] for headers in headers_of(server, path)]


class Rotating:
    """Returns another key for each call."""

    def __init__(self):
        self.numbers = itertools.count()

    def __call__(self):
        return [("x-key", f"key {next(self.numbers)}")]


class AsyncRotating(Rotating):
    async def __call__(self):
        await anyio.lowlevel.checkpoint()
        return super().__call__()


FORMS = {
    "function": lambda: Rotating().__call__,
    "object": Rotating,
    "coroutine function": lambda: AsyncRotating().__call__,
    "object with async": AsyncRotating,
    "partial": lambda: functools.partial(Rotating.__call__, Rotating()),
    "partial with async": lambda: functools.partial(AsyncRotating().__call__),
}


@pytest.mark.parametrize("form", FORMS)
async def test_each_call_and_each_probe_gets_its_own_metadata(server, transport, form):
    pool = pool_to(server, transport, FORMS[form]())
    async with pool, pool.acquire() as conn:
        for _ in range(3):
            assert await conn.call(METHOD, b"x", timeout=20) == b"x"
    probes = list(itertools.chain(*values_of(server, "x-key", PROBE)))
    calls = values_of(server, "x-key")
    assert probes == [f"key {number}" for number in range(len(probes))]
    assert probes
    assert calls == [[f"key {len(probes) + number}"] for number in range(3)]


@pytest.mark.parametrize(
    "form",
    [
        lambda pairs: pairs,
        tuple,
        lambda pairs: grpc.aio.Metadata(*pairs),
        lambda pairs: [list(pair) for pair in pairs],
    ],
)
async def test_they_are_sent_in_addition_to_the_other_metadata(server, transport, form):
    def credentials():
        return form([BEARER, ("x-raw-bin", b"\0\xff")])

    pool = pool_to(server, transport, credentials, metadata=[("x-static", "s")])
    async with pool, pool.acquire() as conn:
        await conn.call(METHOD, b"", metadata=[("x-call", "c")], timeout=20)
    (headers,) = headers_of(server)
    sent = dict(headers)
    assert sent["authorization"] == BEARER[1]
    assert (sent["x-static"], sent["x-call"]) == ("s", "c")
    assert sent["x-raw-bin"].rstrip("=") == "AP8"


@pytest.mark.parametrize("nothing", [(), [], grpc.aio.Metadata()], ids=repr)
async def test_they_may_be_empty(server, transport, nothing):
    pool = pool_to(server, transport, lambda: nothing)
    async with pool, pool.acquire() as conn:
        assert await conn.call(METHOD, b"x", timeout=20) == b"x"


async def test_the_callable_runs_in_the_task_of_the_call(
    server, transport, anyio_backend_name
):
    libraries, tasks = [], []

    async def credentials():
        libraries.append(sniffio.current_async_library())
        tasks.append(anyio.get_current_task().id)
        return ()

    pool = pool_to(server, transport, credentials)
    async with pool, pool.acquire() as conn:
        await conn.call(METHOD, b"", timeout=20)
    assert set(libraries) == {anyio_backend_name}
    assert tasks[-1] == anyio.get_current_task().id


# -- faults -------------------------------------------------------------------------


class LeakyError(Exception):
    """An error whose text and attributes hold a key."""

    def __init__(self):
        super().__init__(f"cannot use {KEY}")
        self.key = KEY


class Vault:
    """Credentials that fail from the second time on, until they are mended."""

    def __init__(self, fault):
        self.fault = fault
        self.asked = 0
        self.works = True

    def __call__(self):
        self.asked += 1
        return [BEARER] if self.works else self.fault()


def raising(error):
    def fault():
        raise error

    return fault


async def late_error():
    await anyio.lowlevel.checkpoint()
    raise LeakyError


def unavailable():
    none = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, none, none, KEY)


FAULTS = {
    "raises": (raising(LeakyError()), "raised LeakyError"),
    "raises later": (late_error, "raised LeakyError"),
    "raises an error of another call": (raising(unavailable()), "raised AioRpcError"),
    "raises a timeout": (raising(TimeoutError(KEY)), "raised TimeoutError"),
    "raises StopIteration": (raising(StopIteration(KEY)), "raised StopIteration"),
    "cancels itself": (raising(asyncio.CancelledError()), "raised CancelledError"),
    "None": (lambda: None, "returned a NoneType"),
    "False": (lambda: False, "returned a bool"),
    "empty str": (lambda: "", "returned a str"),
    "empty dict": (dict, "returned a dict"),
    "str": (lambda: KEY, "got str"),
    "bytes": (KEY.encode, "got bytes"),
    "dict": (lambda: {"authorization": KEY}, "got dict"),
    "iterator": (lambda: iter([BEARER]), "got list_iterator"),
    "one pair": (lambda: BEARER, "got a str"),
    "three": (lambda: [(*BEARER, KEY)], "pairs of str"),
    "swapped": (lambda: [(KEY + " ", "authorization")], "keys must be"),
    "upper case": (lambda: [("Authorization", KEY)], "keys must be"),
    "of the transport": (lambda: [("grpc-timeout", KEY)], "keys must be"),
    "of HTTP/2": (lambda: [(":authority", KEY)], "keys must be"),
    "line end": (lambda: [("authorization", f"{KEY}\r\nx: y")], "printable ASCII"),
    "not ASCII": (lambda: [BEARER, ("x-key", f"{KEY}\xe9")], "pair 2"),
    "value is bytes": (lambda: [("authorization", KEY.encode())], "is a bytes"),
    "value is str": (lambda: [("x-key-bin", KEY)], "is a str"),
    "value is None": (lambda: [("authorization", None)], "is a NoneType"),
    "key of the target": (lambda: [BEARER, ("x-static", KEY)], "'x-static'"),
}


@pytest.mark.costly
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_failed_callable_fails_the_call_closed(server, transport, fault):
    make, text = FAULTS[fault]
    vault = Vault(make)
    pool = pool_to(server, transport, vault, metadata=[("x-static", "s")])
    async with pool, pool.acquire() as conn:
        await conn.call(METHOD, b"", timeout=20)
        vault.works = False
        with pytest.raises(CredentialsFailed, match=text) as caught:
            await conn.call(METHOD, b"", timeout=20)
        assert_clean(caught.value)
        assert caught.value.__cause__ is caught.value.__context__ is None
        assert f"{METHOD} to {server.url} was not sent" in str(caught.value)
        # The connection is not to blame.
        assert pool.status().suspect == 0
        vault.works = True
        await conn.call(METHOD, b"", timeout=20)
    assert len(headers_of(server)) == 2
    assert server.accepted == 1


async def test_the_error_of_the_callable_is_located(server, transport):
    vault = Vault(raising(LeakyError()))
    pool = pool_to(server, transport, vault)
    async with pool, pool.acquire() as conn:
        vault.works = False
        with pytest.raises(CredentialsFailed, match=r"test_credentials\.py:\d+\)"):
            await conn.call(METHOD, b"")


@pytest.mark.parametrize("fault", ["raises", "raises later", "None", "dict"])
async def test_a_failed_callable_fails_the_first_probe(server, transport, fault):
    make, text = FAULTS[fault]
    vault = Vault(make)
    vault.works = False
    pool = pool_to(server, transport, vault, max_retries=0)
    async with pool:
        with pytest.raises(ConnectFailed, match=text) as caught:
            await pool.acquire()
        assert_clean(caught.value)
        assert "the first probe" in str(caught.value)
        assert headers_of(server, PROBE) == []
        vault.works = True
        async with pool.acquire() as conn:
            await conn.call(METHOD, b"", timeout=20)


async def test_a_callable_that_hangs_fails_the_first_probe_by_name(server, transport):
    target = Target(url=server.url, insecure=True, credentials=anyio.sleep_forever)
    connection = await GrpcConnector(target, transport).connect(30)
    with pytest.raises(ConnectFailed, match="credentials took longer") as caught:
        await connection.greet(0.05)
    assert caught.value.reason == "timeout"
    # A call that was not sent says nothing about its connection.
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await connection.call(METHOD, b"", timeout=0.05, metadata=())
    assert connection.judge(late.value) is None
    await connection.close(0)
    assert headers_of(server, PROBE) == []


async def test_a_failed_callable_fails_later_probes_and_then_recovers(
    server, transport, caplog
):
    vault = Vault(raising(LeakyError()))
    # 0.05 s between health checks.
    pool = pool_to(server, transport, vault, health_check_interval=0.05)
    async with pool:
        async with pool.acquire() as conn:
            await conn.call(METHOD, b"", timeout=20)
        vault.works = False
        with anyio.fail_after(20):
            while pool.status().total:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        vault.works = True
        async with pool.acquire(timeout=20) as conn:
            await conn.call(METHOD, b"", timeout=20)
    assert "the probe to" in caplog.text
    assert "raised LeakyError" in caplog.text
    assert KEY not in caplog.text


async def test_a_failed_check_is_not_repeated_and_never_allows(transport):
    with Http2Server() as server:
        vault = Vault(raising(unavailable()))
        options = AuthorizerOptions(
            url=server.options.url, insecure=True, credentials=vault
        )
        config = config_of(options, transport)
        async with config.connection_pool:
            assert await config.is_allowed(REQUEST, "app")
            vault.works, before = False, vault.asked
            with pytest.raises(CredentialsFailed) as caught:
                await config.is_allowed(REQUEST, "app")
            assert_clean(caught.value)
            assert vault.asked == before + 1
        assert server.calls["Is"] == 1


def config_of(options, transport):
    return TopazConfig(
        authorizer_options=options,
        policy_path_root="app",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
        connection_pool=ConnectionPool(
            transport=transport, min_connections=0, max_connections=1
        ),
    )


def test_a_route_answers_503_and_shows_no_secret(transport, caplog):
    with Http2Server() as server:
        vault = Vault(raising(LeakyError()))
        config = config_of(
            AuthorizerOptions(url=server.options.url, insecure=True, credentials=vault),
            transport,
        )
        app = FastAPI(lifespan=config.lifespan)
        guard = Depends(require_policy_allowed(config, "app.x"))
        app.get("/x", dependencies=[guard])(lambda: "passed")
        with TestClient(app) as client:
            assert client.get("/x").json() == "passed"
            vault.works = False
            answer = client.get("/x")
    assert answer.status_code == 503
    assert KEY not in answer.text
    assert "credentials raised LeakyError" in caplog.text
    assert KEY not in caplog.text


# -- time and cancellation ----------------------------------------------------------


async def test_the_callable_counts_within_the_timeout(server, transport):
    pause = 0.0

    async def credentials():
        await anyio.sleep(pause)
        return ()

    pool = pool_to(server, transport, credentials)
    async with pool, pool.acquire() as conn:
        pause = 0.5
        await conn.call(METHOD, b"", timeout=50)
        pause = math.inf
        with pytest.raises(grpc.aio.AioRpcError, match="credentials took") as caught:
            await conn.call(METHOD, b"", timeout=0.05)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # Twice in a row would make a silent connection suspect.
        with pytest.raises(grpc.aio.AioRpcError):
            await conn.call(METHOD, b"", timeout=0.05)
        assert pool.status().suspect == 0
        pause = 0.0
        await conn.call(METHOD, b"")
    (first, unlimited) = values_of(server, "grpc-timeout")
    assert seconds_of(*first) < 49.9  # gRPC rounds it up to 0.1 s
    assert unlimited == []


def seconds_of(text):
    units = {"H": 3600, "M": 60, "S": 1, "m": 1e-3, "u": 1e-6, "n": 1e-9}
    return int(text[:-1]) * units[text[-1]]


async def test_a_blocking_callable_also_counts_within_the_timeout(server, transport):
    pause = 0.0

    def credentials():
        time.sleep(pause)
        return ()

    pool = pool_to(server, transport, credentials)
    async with pool, pool.acquire() as conn:
        pause = 0.05
        with pytest.raises(grpc.aio.AioRpcError, match="credentials took") as caught:
            await conn.call(METHOD, b"", timeout=0.01)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert headers_of(server) == []


async def test_a_caller_who_is_cancelled_in_the_callable_leaves_the_lease_usable(
    server, transport
):
    waiting = anyio.Event()
    slow = False

    async def credentials():
        if slow:
            waiting.set()
            await anyio.sleep_forever()
        return ()

    pool = pool_to(server, transport, credentials)
    async with pool, pool.acquire() as conn:
        slow = True
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(conn.call, METHOD, b"")
                await waiting.wait()
                scope.cancel()
        assert scope.cancelled_caught
        slow = False
        assert await conn.call(METHOD, b"x", timeout=20) == b"x"
    assert len(headers_of(server)) == 1


# -- the option ---------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [KEY, [BEARER], 3, {"authorization": KEY}])
@pytest.mark.parametrize("cls", [Target, AuthorizerOptions])
def test_something_that_cannot_be_called_is_refused(wrong, cls):
    with pytest.raises(TypeError, match="credentials must be callable") as caught:
        cls(url="localhost:1", credentials=wrong)
    assert_clean(caught.value)


@pytest.mark.parametrize("cls", [Target, AuthorizerOptions])
def test_no_repr_shows_the_credentials(cls):
    secret = functools.partial(str, KEY)
    options = cls(url="localhost:1", credentials=secret)
    assert KEY not in repr(options)
    assert options == cls(url="localhost:1", credentials=secret)
    assert options != cls(url="localhost:1")
    assert hash(options) == hash(cls(url="localhost:1", credentials=secret))
