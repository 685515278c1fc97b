"""Test that misuse of a pool raises an error with the correct usage."""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import pickle
import re
import threading
import time
from contextlib import aclosing

import anyio
import anyio.lowlevel
import pytest
from aserto.authorizer.v2 import Decision, IsResponse
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from starlette.requests import Request  # noqa: TC002  (FastAPI reads it)

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionLost,
    ConnectionPool,
    Identity,
    IdentityType,
    PooledConnection,
    PoolMisuse,
    TopazConfig,
    _fork,
    require_policy_allowed,
    require_policy_auto,
)
from fastapi_topaz._app import config as _config
from fastapi_topaz._pool.acquire import explain_missing_await
from fastapi_topaz.testing import FakeConnector, slow
from kit.backends import asyncio_only
from kit.configs import Requests, config_of
from kit.pools import make_pool
from kit.threads import in_a_thread


def config_of_alice(pool, **options):
    alice = Identity(IdentityType.SUB, "alice")
    options = {"identity_provider": lambda _request: alice, **options}
    return config_of(pool, AuthorizerOptions(url="unused:1"), **options)


# -- a wrong loop, a fork, no configuration -------------------------------------------


@pytest.mark.parametrize("there", ["asyncio", "trio"])
async def test_use_on_another_loop_is_misuse_and_the_message_names_both_loops(there):
    async with make_pool(name="main") as pool:
        conn = await pool.acquire()

        async def acquire():
            async with pool.acquire():
                pass

        for use in (acquire, pool.initialize, pool.close, lambda: pool.release(conn)):

            async def call(use=use):
                await use()

            error = in_a_thread(lambda call=call: anyio.run(call, backend=there))
            assert type(error) is PoolMisuse
            assert isinstance(error, RuntimeError)
            told = str(error)
            loops = re.findall(r"event loop (?:\w+|of trio) (0x[0-9a-f]+)", told)
            assert len(set(loops)) == 2
            assert "thread 'MainThread'" in told
            assert "thread 'the other thread'" in told
            assert "close the pool on its own loop first" in told
        await pool.release(conn)


def test_the_misuse_message_says_that_the_owner_loop_is_not_running():
    pool = make_pool()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(pool.initialize())
    try:
        with pytest.raises(PoolMisuse, match=r"\(not running, thread 'MainThread'\)"):
            asyncio.run(pool.initialize())
    finally:
        loop.run_until_complete(pool.close())
        loop.close()


async def test_a_pool_without_an_authorizer_is_misuse():
    pool = ConnectionPool()
    for use in (pool.initialize, pool.acquire().__aenter__):
        with pytest.raises(PoolMisuse, match=r"call configure\(AuthorizerOptions"):
            await use()


async def test_using_a_released_lease_is_misuse():
    async with make_pool() as pool:
        conn = await pool.acquire()
        await pool.release(conn)
        with pytest.raises(PoolMisuse, match="acquire"):
            await conn.info()
        lease = pool.acquire()
        async with lease:
            with pytest.raises(PoolMisuse, match="call acquire"):
                await lease.__aenter__()


def guarded(config):
    """Return an application that guards its routes and has no lifespan."""
    app = FastAPI()

    @app.get("/auto", dependencies=[Depends(require_policy_auto(config))])
    @app.get("/allowed", dependencies=[Depends(require_policy_allowed(config, "a.b"))])
    async def route():
        return "open door"

    @app.get("/asks")
    async def asks(request: Request):
        return await config.is_allowed(request, "a.b")

    return app


def assert_misused(app, caplog, remedy):
    client = TestClient(app, raise_server_exceptions=False)
    for path in ("/auto", "/allowed", "/asks"):
        response = client.get(path)
        assert response.status_code == 500
        assert "Retry-After" not in response.headers
        assert "pool" not in response.text
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert sum(remedy in message for message in errors) == 1


@pytest.mark.real_clock
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"], indirect=True)
async def test_a_test_client_beside_a_running_lifespan_is_500_with_the_remedy(caplog):
    config = config_of_alice(make_pool())
    async with config.connection_pool:
        await anyio.to_thread.run_sync(
            assert_misused, guarded(config), caplog, "give each loop a pool of its own"
        )


@pytest.mark.real_clock
def test_a_pool_opened_before_a_fork_is_500_with_the_remedy(caplog, monkeypatch):
    config = config_of_alice(make_pool())

    async def main():
        async with config.connection_pool:
            monkeypatch.setattr(_fork.current, "pid", -1)
            await anyio.to_thread.run_sync(
                assert_misused, guarded(config), caplog, "open the pool in each worker"
            )
            monkeypatch.undo()

    asyncio.run(main())


@pytest.mark.grpcio
@pytest.mark.real_clock
def test_grpc_inherited_by_a_fork_is_500_with_the_remedy(caplog, monkeypatch):
    config = config_of_alice(ConnectionPool(max_retries=0))
    monkeypatch.setattr(_fork, "inherited_from", lambda: 1)
    app = guarded(config)
    app.router.lifespan_context = config.lifespan
    with TestClient(app):
        pass
    config.connection_pool._closed = False
    assert_misused(app, caplog, "open pools after the fork")


@pytest.mark.real_clock
def test_an_unconfigured_pool_is_500_with_the_remedy(caplog):
    config = config_of_alice(ConnectionPool())
    config.connection_pool = ConnectionPool()
    assert_misused(guarded(config), caplog, "call configure(AuthorizerOptions(...))")


# -- opening from several threads -----------------------------------------------------


class Validated(FakeConnector):
    """A connector whose validation takes 50 ms."""

    def __init__(self, error=None):
        super().__init__()
        self.error = error
        self.validated = 0

    def validate(self):
        self.validated += 1
        time.sleep(0.05)
        if self.error is not None:
            raise self.error


def race(use, count=4):
    """Return the outcomes of *use* on loops of *count* threads that start together."""
    outcomes = []
    start, end = threading.Barrier(count), threading.Barrier(count)

    async def main():
        start.wait(30)
        try:
            outcomes.append(await use())
        except Exception as error:  # noqa: BLE001  (the outcome)
            outcomes.append(error)
        # No loop ends before all threads have tried.
        await anyio.to_thread.run_sync(end.wait, 30)

    def run(backend):
        anyio.run(main, backend=backend)

    backends = ["asyncio", "trio"] * (count // 2)
    threads = [threading.Thread(target=run, args=[name]) for name in backends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcomes


@pytest.mark.filterwarnings("ignore:.*was not closed:ResourceWarning")
@pytest.mark.parametrize("first", ["initialize", "acquire"])
def test_only_one_of_several_threads_opens_the_pool(first):
    for _ in range(5):
        pool = make_pool(Validated())

        async def use(pool=pool):
            if first == "initialize":
                await pool.initialize()
            else:
                async with pool.acquire():
                    pass

        opened = []
        pool._metrics.attach = opened.append
        outcomes = race(use)
        assert len(opened) == 1
        kinds = [type(outcome) for outcome in outcomes]
        assert sorted(kinds, key=str) == sorted(
            [type(None), PoolMisuse, PoolMisuse, PoolMisuse], key=str
        )


async def test_a_failed_validation_does_not_block_later_attempts_to_open():
    connector = Validated(ValueError("no such file"))
    pool = make_pool(connector)
    for _ in range(2):
        with pytest.raises(ValueError, match="no such file"):
            await pool.initialize()
    connector.error = None
    async with pool:
        assert connector.validated == 3


# -- copies ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
async def test_a_pool_a_config_and_a_lease_cannot_be_copied(how):
    pool = make_pool()
    with pytest.raises(TypeError, match="a ConnectionPool cannot be copied or pickled"):
        how(pool)
    with pytest.raises(TypeError, match="a TopazConfig cannot be copied or pickled"):
        how(config_of_alice(make_pool()))
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        how({"nested": [pool]}) if how is not copy.copy else how(pool)
    async with pool, pool.acquire() as conn:
        with pytest.raises(TypeError, match="a PooledConnection cannot be copied"):
            how(conn)


# -- wrong syntax ---------------------------------------------------------------------

RIGHT = "async with pool.acquire() as conn"

SLIPS = {
    "async with await": "async with await pool.acquire() as conn: pass",
    "with": "with pool.acquire() as conn: pass",
    "for": "for conn in pool.acquire(): pass",
    "async for": "async for conn in pool.acquire(): pass",
    "with await": "with await pool.acquire() as conn: pass",
    "no await": "await pool.acquire().info()",
    "no acquire": "await pool.info()",
    "aclosing": "async with aclosing(pool.acquire()): pass",
    "release": "await pool.release(pool.acquire())",
}


@pytest.mark.parametrize("form", SLIPS.values(), ids=SLIPS)
async def test_a_wrong_acquire_syntax_raises_an_error_with_the_right_one(form):
    names = {"aclosing": aclosing}
    exec(f"async def slip(pool):\n    {form}", names)
    async with make_pool(max_connections=1) as pool:
        with pytest.raises(
            (TypeError, AttributeError, ValueError), match=re.escape(RIGHT)
        ):
            await names["slip"](pool)
        # No lease leaks: the lease of `await` is returned without a warning.
        async with pool.acquire(timeout=1):
            assert pool.status().streams_in_use == 1
        assert pool._counters.reclaimed == 0


async def test_a_lease_entered_by_mistake_is_still_usable():
    async with make_pool(max_connections=1) as pool:
        conn = await pool.acquire()
        with pytest.raises(TypeError, match=re.escape(RIGHT)):
            async with conn:
                pass
        assert conn.connection.number == 1
        await pool.release(conn)


@pytest.mark.parametrize("name", ["release", "close", "aclose"])
async def test_a_lease_released_with_another_pools_syntax_is_still_releasable(
    name,
):
    async with make_pool(max_connections=1) as pool:
        conn = await pool.acquire()
        with pytest.raises(AttributeError, match=re.escape(RIGHT)):
            await getattr(conn, name)()
        assert not hasattr(conn, name)
        await pool.release(conn)
        assert pool.status().streams_in_use == 0


async def test_a_pool_rejects_plain_with():
    with pytest.raises(TypeError, match="`async with pool:`"), make_pool():
        pass


@asyncio_only
async def test_coroutine_consumers_show_the_right_syntax_and_others_work():
    async with make_pool() as pool:
        loop = asyncio.get_running_loop()
        for create in (asyncio.create_task, loop.create_task):
            with pytest.raises(TypeError, match=re.escape(RIGHT)):
                create(pool.acquire())
        async with anyio.create_task_group() as tasks:
            with pytest.raises(TypeError, match=re.escape(RIGHT)):
                tasks.start_soon(pool.acquire)
        with pytest.raises(AttributeError, match=re.escape(RIGHT)):
            await asyncio.wait([pool.acquire()])
        conn = await asyncio.wait_for(pool.acquire(), 1)
        await pool.release(conn)
        for conn in await asyncio.gather(pool.acquire(), pool.acquire()):
            await pool.release(conn)


def test_an_acquire_object_is_awaitable_and_has_no_lease_attributes():
    acquire = make_pool().acquire()
    assert inspect.isawaitable(acquire)
    assert not inspect.iscoroutine(acquire)
    for name in ("connection", "decisions", "close", "_claim"):
        assert not hasattr(acquire, name)


@pytest.mark.parametrize("name", ["price", "aclose", "add_done_callback"])
def test_each_attribute_of_a_lease_is_explained_on_an_acquire(name):
    class Acquire:
        """Has no attribute yet, unlike the class of the package."""

    class Lease(PooledConnection):
        price = 7

    explain_missing_await(Acquire, Lease)
    error = f"pool.acquire() is not a connection and has no {name!r}: write `{RIGHT}"
    with pytest.raises(AttributeError, match="^" + re.escape(error)):
        getattr(Acquire(), name)


# -- arguments that cannot be sent ----------------------------------------------------


BAD = {
    "a set": ({"resource_context": {"ids": {1, 2}}}, TypeError),
    "a large number": ({"resource_context": {"id": 2**60}}, ValueError),
    "no text": ({"policy_path": 7}, TypeError),
    "nothing": ({"policy_path": ""}, ValueError),
}


@pytest.mark.parametrize("arguments, error", BAD.values(), ids=BAD)
async def test_an_unsendable_argument_raises_its_own_error_on_a_full_pool(
    arguments, error
):
    async with make_pool(max_connections=1) as pool, pool.acquire():
        config = config_of_alice(pool, check_timeout=1)
        request = Requests({"type": "http", "path_params": {}, "headers": []})
        began = anyio.current_time()
        with pytest.raises(error):
            await config.is_allowed(request, **{"policy_path": "a.b", **arguments})
        assert anyio.current_time() == began
        assert pool._counters.timeouts == 0


@pytest.mark.parametrize("context", [5, 0, "", "id=7", [], [("id", 7)]])
async def test_a_resource_context_that_is_not_a_mapping_is_named(context):
    async with make_pool() as pool:
        request = Requests({"type": "http", "path_params": {}, "headers": []})
        with pytest.raises(TypeError, match="resource_context must be a mapping, got"):
            await config_of_alice(pool).is_allowed(
                request, "a.b", resource_context=context
            )


@pytest.mark.real_clock
@pytest.mark.parametrize("url", ["127.0.0.1:1", "unused:1"])
def test_a_provider_with_an_unsendable_result_is_500_and_not_503(url):
    config = TopazConfig(
        authorizer_options=AuthorizerOptions(url=url, insecure=True),
        policy_path_root="myapp",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
        resource_context_provider=lambda _request: {"ids": {1, 2}},
        connection_pool=ConnectionPool(max_retries=0, acquire_timeout=0.1),
    )
    app = guarded(config)
    client = TestClient(app, raise_server_exceptions=False)
    for path in ("/auto", "/allowed", "/asks"):
        response = client.get(path)
        assert response.status_code == 500
        assert "Retry-After" not in response.headers


async def test_a_retried_check_is_encoded_once(monkeypatch):
    encoded, sent = [], []
    original = _config.is_request

    def counted(*args):
        encoded.append(original(*args))
        return encoded[-1]

    monkeypatch.setattr(_config, "is_request", counted)

    def answer(_method, request):
        sent.append(request)
        if len(sent) == 1:
            raise ConnectionLost("cut off")
        return IsResponse(decisions=[Decision(decision="allowed")]).SerializeToString()

    connector = FakeConnector(answer=answer, default=slow(0.01))
    async with make_pool(connector) as pool:
        config = config_of_alice(pool)
        request = Requests({"type": "http", "path_params": {}, "headers": []})
        assert await config.is_allowed(request, "myapp.GET.a") is False
    assert len(encoded) == 1
    assert sent == encoded * 2


@pytest.mark.parametrize("cls", [ConnectionPool, PooledConnection])
def test_only_missing_public_attributes_explain_themselves(cls):
    """Excludes `__del__`, which Python looks up when an object is freed."""
    absent = {name for name in dir(cls) if not hasattr(cls, name)}
    assert {"release", "info"} & absent
    assert not [name for name in absent if name.startswith("_")]
    assert not hasattr(ConnectionPool, "__del__")
    assert "__del__" not in dir(ConnectionPool)
