"""What is left of each module: what seldom happens, one behaviour at a time."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import math
import sys
import threading
from concurrent.futures import Future

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import httpx
import pytest
import trio
from aserto.authorizer.v2 import DecisionTreeResponse
from fastapi import FastAPI
from grpc._cython import cygrpc
from rich.console import Console

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectFailed,
    ConnectionPool,
    Identity,
    IdentityType,
    PoolClosed,
    PoolError,
    PoolTimeout,
    TopazConfig,
    _error_text,
    cli,
)
from fastapi_topaz._authorizer import messages as _messages
from fastapi_topaz._authorizer import resource as _resource
from fastapi_topaz._cli import demo as _demo
from fastapi_topaz._cli import demo_command as _demo_command
from fastapi_topaz._grpcio import call as _call
from fastapi_topaz._grpcio import channel as _channel
from fastapi_topaz._grpcio import connection as _connection
from fastapi_topaz._grpcio import failures as _failures
from fastapi_topaz._grpcio.connector import GrpcConnector
from fastapi_topaz._pool import owner_loop as _host
from fastapi_topaz._pool.state.pool_state import PoolState
from fastapi_topaz.testing import FakeConnection, FakeConnector, hang, ok


INFO = "/aserto.authorizer.v2.Authorizer/Info"
TOPAZ = AuthorizerOptions(url="topaz.test:8282", insecure=True)
# Far beyond what a test takes.
PATIENCE = 20.0


def make(connector=None, **options):
    options.setdefault("min_connections", 0)
    return ConnectionPool(connector=connector or FakeConnector(), **options)


def lines(caplog, level):
    return [r.getMessage() for r in caplog.records if r.levelno == level]


def in_a_thread(function):
    """Run *function* in a thread without a loop, and return what it raised."""
    raised = []

    def run():
        try:
            function()
        except BaseException as error:  # noqa: BLE001  (it is asserted on)
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    return raised[0] if raised else None


class Making(FakeConnector):
    """Makes connections of the class it is given."""

    def __init__(self, kind, **options):
        super().__init__(**options)
        self.kind = kind

    async def connect(self, timeout):
        made = await super().connect(timeout)
        made.__class__ = self.kind
        return made


# -- __main__ and cli -----------------------------------------------------------------


def test_importing_the_console_script_runs_nothing():
    """As those do who look through all modules of a package."""
    importlib.import_module("fastapi_topaz.__main__")


def test_ctrl_c_while_the_command_is_loaded_has_no_traceback(monkeypatch, capsys):
    class Pressed:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "fastapi_topaz._cli.demo_command":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "fastapi_topaz._cli.demo_command")
    monkeypatch.setattr(sys, "meta_path", [Pressed, *sys.meta_path])

    with pytest.raises(SystemExit) as ended:
        cli.main(["demo"])

    assert ended.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_command_that_returns_was_a_success(monkeypatch):
    monkeypatch.setattr(_demo_command, "commands", lambda **_: None)

    with pytest.raises(SystemExit) as ended:
        cli.main([])

    assert ended.value.code is None


# -- _config --------------------------------------------------------------------------


def test_a_configuration_shows_where_it_leads_and_no_secret():
    config = TopazConfig(
        authorizer_options=AuthorizerOptions(url="topaz.test:8282", api_key="secret"),
        policy_path_root="app",
        identity_provider=lambda _: Identity(IdentityType.NONE),
    )
    assert repr(config) == "<TopazConfig 'app' to topaz.test:8282>"


# -- _connections ---------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_cancellation_of_ones_own_after_the_deadline_is_a_timeout():
    """Not one that has the scope's as its context, which anyio would know."""

    class Late(FakeConnector):
        async def connect(self, timeout):
            with contextlib.suppress(asyncio.CancelledError):
                await anyio.sleep_forever()
            raise asyncio.CancelledError

    async with make(Late(), connection_timeout=2, max_retries=0) as pool:
        with pytest.raises(ConnectFailed, match="not established within") as caught:
            await pool.acquire()
        assert caught.value.reason == "timeout"
        assert repr(pool).startswith("<ConnectionPool open")


@pytest.mark.parametrize("anyio_backend", ["trio"], indirect=True)
async def test_a_cancellation_of_asyncio_is_a_failure_on_trio():
    class Bridged(FakeConnector):
        async def connect(self, timeout):
            raise asyncio.CancelledError

    async with make(Bridged(), max_retries=0) as pool:
        with pytest.raises(ConnectFailed, match="was cancelled on asyncio"):
            await pool.acquire()
        assert repr(pool).startswith("<ConnectionPool open")


# -- _demo ----------------------------------------------------------------------------


@contextlib.contextmanager
def in_the_end(event):
    """Set *event* in the end."""
    try:
        yield
    finally:
        event.set()


@contextlib.contextmanager
def demo_threads():
    """See that no server of the demo is left in the end."""
    yield
    for thread in threading.enumerate():
        if thread.name == "demo-server":
            thread.join(PATIENCE)
            assert not thread.is_alive()


def app_that_waits(*, to_start=None, to_stop=None):
    """Return an application that starts and stops when it may."""

    async def until(event):
        if event is not None:
            await anyio.to_thread.run_sync(event.wait, PATIENCE)

    @contextlib.asynccontextmanager
    async def lifespan(_app):
        await until(to_start)
        yield
        await until(to_stop)

    return FastAPI(lifespan=lifespan)


@pytest.mark.real_clock
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_server_that_starts_too_late_is_given_up_and_stops_by_itself(
    backend, monkeypatch
):
    monkeypatch.setattr(_demo, "PATIENCE", 0.01)
    may = threading.Event()
    with (
        demo_threads(),
        in_the_end(may),
        pytest.raises(_demo.DemoFailed, match="did not start in time"),
        _demo.serving(app_that_waits(to_start=may), backend),
    ):
        pytest.fail("it cannot have started")


@pytest.mark.real_clock
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_server_that_does_not_stop_is_told_of(backend, monkeypatch):
    may = threading.Event()

    def serve_and_stop():
        with _demo.serving(app_that_waits(to_stop=may), backend) as url:
            assert httpx.get(f"{url}/nothing", trust_env=False).status_code == 404
            monkeypatch.setattr(_demo, "PATIENCE", 0.01)

    with demo_threads(), in_the_end(may):
        with pytest.raises(_demo.DemoFailed, match="did not stop in time"):
            serve_and_stop()
        assert "demo-server" in {thread.name for thread in threading.enumerate()}


def test_a_server_that_breaks_down_later_has_started(caplog):
    started = Future()
    running = _demo.Running("http://127.0.0.1:1", stop=lambda: None)

    def serve(_app, future):
        future.set_result(running)
        raise OSError("no space left")

    _demo._guarded(serve, FastAPI(), started)

    assert started.result() is running
    assert lines(caplog, logging.ERROR) == ["the server broke down"]


@pytest.mark.real_clock
@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_demo_whose_server_is_gone_gives_up_and_says_so(free_tcp_port):
    advanced = []
    tally = await _demo.send(
        f"http://127.0.0.1:{free_tcp_port}",
        requests=1000,
        concurrency=5,
        strict=True,
        progress=lambda: advanced.append(1),
    )
    # As many as are under way when the tenth has failed.
    assert 10 <= tally.failed == tally.requests == len(advanced) < 20
    ((failure, times),) = tally.failures.most_common()
    assert failure.startswith("not answered: ConnectError")
    assert times == tally.failed
    assert math.isnan(tally.percentile(0.99))
    assert (tally.halfway, tally.afterwards) == (None, None)

    console = Console(width=100)
    with console.capture() as capture:
        console.print(_demo_command._results(tally, None), _demo_command._pool(tally))
    assert "n/a" in capture.get()
    assert "afterwards" not in capture.get()


@pytest.mark.parametrize(
    "status, expected, counted",
    [
        (200, 200, (1, 0, {})),
        (403, 403, (0, 1, {})),
        (200, None, (1, 0, {})),
        (403, None, (0, 1, {})),
        (200, 403, (0, 0, {"answered 200 instead of 403": 1})),
        (403, 200, (0, 0, {"answered 403 instead of 200": 1})),
        (503, None, (0, 0, {"answered 503": 1})),
    ],
)
def test_an_answer_is_counted_as_what_it_is(status, expected, counted):
    tally = _demo.Tally()
    tally.count(status, expected)
    assert (tally.allowed, tally.denied, dict(tally.failures)) == counted
    assert tally.requests == 1


# -- _entry and _snapshot -------------------------------------------------------------


async def test_a_connection_that_cannot_say_whether_it_is_lost_serves():
    class Untold(FakeConnection):
        @property
        def is_lost(self):
            raise RuntimeError("ask somebody else")

    async with make(Making(Untold)) as pool:
        async with pool.acquire() as conn:
            assert await conn.call("/a/b", b"works") == b"works"
        assert pool.status().idle == 1


async def test_a_connection_that_cannot_say_where_it_leads_is_shown_without():
    class Nowhere(FakeConnection):
        @property
        def peer(self):
            raise RuntimeError("nobody knows")

    async with make(Making(Nowhere)) as pool:
        async with pool.acquire():
            (told,) = pool.connections()
        assert (told.peer, told.condition) == (None, "busy")


# -- _error_text ----------------------------------------------------------------------


class Sullen(Exception):  # noqa: N818
    """Says nothing of itself."""

    def __str__(self):
        raise RuntimeError("ask somebody else")

    @property
    def code(self):
        raise RuntimeError("ask somebody else")


def test_an_error_that_cannot_be_asked_is_called_by_its_class():
    assert _error_text.safe_text(Sullen()) == "Sullen"
    assert _error_text.error_kind(Sullen()) == "Sullen"


# -- _host ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_what_comes_after_the_end_of_the_loop_is_not_called(backend):
    async def main():
        return _host.OwnerLoop()

    owner = anyio.run(main, backend=backend)
    called = []
    owner.call_soon(lambda: called.append(1))
    assert called == []


async def test_a_thread_without_a_loop_is_told_so():
    async with make(name="main") as pool:
        error = in_a_thread(pool.drain)
        assert isinstance(error, PoolError)
        assert "is used on no event loop" in str(error)
        assert repr(pool).startswith("<ConnectionPool 'main' open")


# -- _lease ---------------------------------------------------------------------------


async def test_a_lease_that_gets_lost_as_the_pool_ends_is_not_given_back(caplog):
    pool = make(max_connections=1)
    leases = []

    class Drops(logging.Handler):
        """Drops the lease in the last moment: garbage is collected at any."""

        def emit(self, record):
            if "still out" in record.getMessage():
                leases.clear()

    handler = Drops()
    logging.getLogger("fastapi_topaz.pool").addHandler(handler)
    try:
        async with pool:
            leases.append(await pool.acquire())
            with pytest.warns(ResourceWarning, match="garbage-collected"):
                await pool.close(grace=0)
    finally:
        logging.getLogger("fastapi_topaz.pool").removeHandler(handler)
    assert leases == []
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()
    assert pool._counters.reclaimed == 0
    assert not any("took back" in line for line in lines(caplog, logging.WARNING))


async def test_a_connection_of_another_kind_carries_no_calls():
    class Plain:
        async def probe(self, timeout):
            pass

        async def close(self, grace):
            pass

    class Plainly(FakeConnector):
        async def connect(self, timeout):
            return Plain()

    async with make(Plainly()) as pool, pool.acquire() as conn:
        with pytest.raises(TypeError, match="carries no gRPC calls"):
            await conn.info()
        assert isinstance(conn.connection, Plain)


@pytest.mark.parametrize("metadata", [["key"], [("key",)], [("a", "b", "c")], [7]])
async def test_metadata_that_is_no_pairs_is_refused_without_showing_it(metadata):
    async with make() as pool, pool.acquire() as conn:
        with pytest.raises(TypeError, match="metadata must be pairs of str, got a"):
            await conn.call("/a/b", b"", metadata=metadata)
        assert conn.connection.calls == 0


# -- _maintenance ---------------------------------------------------------------------


async def test_a_bug_in_the_host_closes_the_pool_and_nothing_else(caplog, monkeypatch):
    connector = FakeConnector()
    pool = make(connector, max_connections=1, idle_check_interval=10, name="main")

    def reap(_state, _now):
        raise RuntimeError("a bug")

    async def wait():
        with pytest.raises(PoolClosed, match="closed while waiting"):
            await pool.acquire(timeout=60)

    async with pool:
        held = await pool.acquire()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.sleep(1)
            with monkeypatch.context() as patch:
                patch.setattr(PoolState, "reap", reap)
                await anyio.sleep(10)
        (record,) = [r for r in caplog.records if r.levelno == logging.CRITICAL]
        assert record.getMessage() == "pool 'main': its host task failed"
        assert repr(record.exc_info[1].exceptions) == "(RuntimeError('a bug'),)"
        # Nor is it said that somebody forgot to close it.
        assert lines(caplog, logging.ERROR) == []
        assert connector.open == []
        await pool.release(held)
        # The next use opens it anew.
        async with pool.acquire() as conn:
            assert await conn.call("/a/b", b"works") == b"works"
    assert connector.open == []


async def test_a_connection_that_cannot_refresh_liveness_stays(caplog):
    class Blind(FakeConnection):
        def refresh_liveness(self):
            raise RuntimeError("too dark")

    async with make(Making(Blind), name="main") as pool:
        async with pool.acquire():
            pass
        await anyio.sleep(5)
        assert pool.status().idle == 1
        failed = "pool 'main': refresh_liveness() failed"
        assert lines(caplog, logging.DEBUG).count(failed) >= 3


# -- _messages ------------------------------------------------------------------------


async def test_an_identity_of_a_kind_that_may_change_is_encoded_each_time():
    class Changing(Identity):
        pass

    def asked(identity):
        return _messages.is_request("app.GET", ("allowed",), identity, None, None, None)

    changing = Changing(IdentityType.SUB, "alice")
    first = asked(changing)
    assert first == asked(Identity(IdentityType.SUB, "alice"))
    object.__setattr__(changing, "value", "bob")
    assert asked(changing) == asked(Identity(IdentityType.SUB, "bob")) != first


async def test_a_decision_in_a_tree_that_is_no_boolean_is_an_error():
    tree = DecisionTreeResponse()
    tree.path["app.GET"] = {"allowed": True, "level": "high"}
    connector = FakeConnector(answer=lambda *_: tree.SerializeToString())

    async with make(connector) as pool, pool.acquire() as conn:
        with pytest.raises(TypeError, match="'level' of"):
            await conn.decision_tree(policy_path="app")


# -- _pool ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["connector", "meter_provider"])
def test_what_cannot_be_that_is_refused_by_its_name(name):
    with pytest.raises(TypeError, match=f"{name} must .* got 'text'"):
        ConnectionPool(**{name: "text"})


def test_a_truth_that_is_none_is_refused():
    with pytest.raises(TypeError, match="semantic_conventions must be"):
        ConnectionPool(semantic_conventions=1)


async def test_an_open_pool_cannot_be_led_elsewhere():
    pool = ConnectionPool(min_connections=0)
    pool.configure(TOPAZ)
    async with pool:
        pool.configure(TOPAZ)
        with pytest.raises(PoolError, match="is open; close\\(\\) it to configure it"):
            pool.configure(AuthorizerOptions(url="elsewhere:8282"))
        assert pool.authorizer_options == TOPAZ
    pool.configure(AuthorizerOptions(url="elsewhere:8282"))
    assert pool.authorizer_options.url == "elsewhere:8282"


async def test_a_pool_with_a_connector_of_its_own_is_not_led_elsewhere():
    connector = FakeConnector()
    pool = make(connector)
    pool.configure(TOPAZ)
    assert pool.authorizer_options is None
    async with pool, pool.acquire() as conn:
        assert conn.connection in connector.connections


def test_what_cannot_even_be_shown_is_refused_by_its_class():
    class Unseen:
        def __repr__(self):
            raise RuntimeError("do not look")

    with pytest.raises(TypeError, match="got a Unseen that cannot be shown"):
        ConnectionPool(connector=Unseen())


def test_a_pool_that_is_not_open_has_nothing_to_drain():
    pool = make()
    pool.drain()
    assert pool.status().total == 0
    assert repr(pool).startswith("<ConnectionPool new")


async def test_a_lease_cannot_be_released_on_another_loop():
    async with make(name="main") as pool:
        conn = await pool.acquire()
        error = in_a_thread(lambda: anyio.run(pool.release, conn))
        assert isinstance(error, PoolError)
        assert "pool 'main' is open on the event loop" in str(error)
        assert pool.status().streams_in_use == 1
        await pool.release(conn)
        assert pool.status().streams_in_use == 0


async def test_a_lease_released_before_its_destroyed_block_is_done_goes_back_once():
    async with make(max_connections=1) as pool:
        leases = []

        async def hold():
            async with pool.acquire() as conn:
                leases.append(conn)
                await anyio.sleep(10)

        async with pool.acquire():
            pass
        task = hold().__await__()
        task.send(None)
        task.close()
        await pool.release(leases[0])
        assert pool.status().streams_in_use == 0
        async with pool.acquire():
            # By now the loop had its turn.
            await anyio.sleep(1)
            assert pool.status().streams_in_use == 1


class Lingering(FakeConnection):
    """Takes a second to close."""

    async def close(self, grace):
        await anyio.sleep(1)
        await super().close(grace)


async def cancelled_start(pool):
    """Open *pool* and give that up, so that it closes again, which takes a second."""
    with anyio.move_on_after(1):
        await pool.initialize()
    assert repr(pool).startswith("<ConnectionPool closing")


async def test_who_waits_for_the_end_of_a_cancelled_start_may_give_up():
    script = Making(Lingering, script=[ok(), hang()])
    pool = make(script, min_connections=2, eager_init=True)
    await cancelled_start(pool)
    with anyio.move_on_after(0.5) as scope:
        await pool.acquire()
    assert scope.cancelled_caught
    assert pool._counters.cancelled == 1
    async with pool.acquire() as conn:
        assert await conn.call("/a/b", b"works") == b"works"
    await pool.close()
    assert script.open == []


async def test_who_waits_for_the_end_of_a_cancelled_start_may_find_it_closed():
    script = Making(Lingering, script=[ok(), hang()])
    pool = make(script, min_connections=2, eager_init=True)
    await cancelled_start(pool)
    await pool.close()
    with pytest.raises(PoolClosed, match="is closed"):
        await pool.acquire()


# -- _resource ------------------------------------------------------------------------


def test_whatever_protobuf_refuses_is_told_of_by_its_place_and_not_its_value():
    class Fields(dict):
        def __missing__(self, key):
            raise ValueError("refused: secret")

    class Strict:
        """A message of a protobuf that is stricter than those known."""

        fields = Fields()

        def SetInParent(self):  # noqa: N802  (protobuf's name)
            pass

    with pytest.raises(ValueError, match="cannot be sent") as caught:
        _resource.fill(Strict(), {"id": "secret"})
    assert str(caught.value) == "resource_context['id'] cannot be sent"
    assert caught.value.__suppress_context__


# -- _runtime -------------------------------------------------------------------------


async def test_a_stream_that_is_free_beyond_the_limit_is_not_lent():
    pool = make(max_connections=2, streams_per_connection=2)
    async with pool:
        first, second, third = [await pool.acquire() for _ in range(3)]
        assert first.connection is second.connection is not third.connection
        pool.resize(0, 1)
        await pool.release(first)
        # Two of two are lent, and one of them by a connection that is to go.
        assert (pool.status().streams_in_use, pool.status().leaving) == (2, 1)
        with pytest.raises(PoolTimeout):
            await pool.acquire(timeout=0)
        await pool.release(third)
        async with pool.acquire(timeout=0) as conn:
            assert conn.connection is second.connection
        await pool.release(second)


async def test_a_verdict_of_another_kind_accuses_nobody():
    class Vague(FakeConnection):
        def judge(self, error):
            return "so so"

    def answer(_method, _request):
        raise OSError("no answer")

    async with make(Making(Vague, answer=answer)) as pool:
        async with pool.acquire() as conn:
            with pytest.raises(OSError, match="no answer"):
                await conn.call("/a/b", b"")
        (told,) = pool.connections()
        assert (told.condition, told.last_error) == ("idle", "no answer")


async def test_an_open_pool_is_told_from_others_in_a_debugger():
    async with make(name="main") as pool:
        assert repr(pool._open_pool).startswith("<OpenPool of pool 'main' total=0 ")


# -- _state ---------------------------------------------------------------------------


async def test_a_second_resize_passes_over_what_leaves_already():
    pool = make(max_connections=3)
    async with pool:
        leases = [await pool.acquire() for _ in range(3)]
        pool.resize(0, 2)
        assert pool.status().leaving == 1
        pool.resize(0, 1)
        assert pool.status().leaving == 2
        for lease in leases:
            await pool.release(lease)
        await anyio.sleep(1)
        assert (pool.status().total, pool.status().leaving) == (1, 0)


# -- _telemetry -----------------------------------------------------------------------


def test_a_provider_of_meters_that_are_none_is_refused():
    class Provider:
        def get_meter(self, *_):
            return object()

    with pytest.raises(TypeError, match="meter_provider must be a MeterProvider"):
        make(meter_provider=Provider())


# -- _grpcio.call ----------------------------------------------------------------------


class Core:
    """What `DirectCall` sees of the core of grpc.aio, as far as a test says."""

    def __init__(self, work, status=None):
        self.work = work
        self.status = status

    # The channel of the core, and the channel of grpc.aio around it.
    @property
    def _channel(self):
        return self

    def call(self, *_args):
        return self

    def unary_unary(self, *_args):
        return self.work()

    def is_ok(self):
        return False

    is_locally_cancelled = is_ok


def begun(core):
    ended = []
    call = _call.DirectCall(core, INFO, b"", None, (), ended.append)
    return call, ended


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_call_may_wait_more_than_once():
    first, second = asyncio.Future(), asyncio.Future()

    async def work():
        return await first + await second

    call, ended = begun(Core(work))
    first.set_result(b"an ")
    await asyncio.sleep(0)
    assert ended == []
    second.set_result(b"answer")
    await asyncio.sleep(0)
    assert ended == [call]
    assert call.outcome() == b"an answer"


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_what_the_core_raises_is_the_outcome_without_its_frames():
    waits = asyncio.Future()

    async def work():
        await waits
        raise cygrpc.InternalError("a batch failed")

    call, ended = begun(Core(work))
    waits.set_result(None)
    await asyncio.sleep(0)
    assert ended == [call]
    outcome = call.outcome()
    assert isinstance(outcome, cygrpc.InternalError)
    assert outcome.__traceback__ is None


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_core_that_says_of_a_call_that_goes_on_that_it_ended_is_found_out():
    waits = asyncio.Future()

    async def goes_on():
        await waits

    call, ended = begun(Core(goes_on, status=goes_on))
    waits.set_result(None)
    await asyncio.sleep(0)
    waits = asyncio.Future()
    assert ended == [call]
    with pytest.raises(RuntimeError, match="of a call that goes on"):
        call.outcome()


@pytest.mark.parametrize("odd", [asyncio.CancelledError(), KeyError(99)])
async def test_a_call_of_grpc_that_ends_oddly_has_no_answer(odd):
    """As one whose channel was closed does, and a status that gRPC does not know."""

    class Begun:
        _interceptors = ("somebody's",)

        def __call__(self, request, *, timeout, metadata):
            assert self._interceptors == ()
            return self

        class _call_response:  # noqa: N801
            @staticmethod
            def add_done_callback(callback):
                pass

        def __await__(self):
            raise odd
            yield

    class Channel:
        @staticmethod
        def unary_unary(method):
            return Begun()

    call = _call.TaskCall(Channel(), INFO, b"", None, (), lambda _: None)
    assert call.outcome() is None


# -- _grpcio.channel and _grpcio.connection -------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_channel_that_connects_while_its_reason_is_asked_for_is_ready(
    monkeypatch,
):
    states = [grpc.ChannelConnectivity.TRANSIENT_FAILURE]
    asked = []

    class Channel:
        def get_state(self, *, try_to_connect):
            return states[-1]

        async def wait_for_state_change(self, state):
            assert state is not states[-1]

    class Answered:
        def __init__(self, channel, method, request, timeout, metadata, on_end):
            asked.append(method)
            states.append(grpc.ChannelConnectivity.READY)
            on_end(self)

        def outcome(self):
            return b"an answer"

    monkeypatch.setattr(_channel, "call_class", lambda: Answered)
    await _channel.until_ready(Channel(), TOPAZ.target)
    assert asked == [INFO]


@pytest.mark.real_clock
async def test_an_attempt_that_gives_no_reason_in_time_says_so(monkeypatch):
    async def never(_channel, _options):
        await asyncio.sleep(PATIENCE)

    monkeypatch.setattr(_connection, "until_ready", never)
    with anyio.fail_after(PATIENCE), pytest.raises(ConnectFailed) as caught:
        await GrpcConnector(TOPAZ.target).connect(0.05)
    assert caught.value.reason == "timeout"
    assert not caught.value.permanent
    assert "not ready within connection_timeout=0.05 s" in str(caught.value)


def test_a_reason_that_nobody_knows_is_passed_on():
    failed = _failures.connect_failed("the moon is full", TOPAZ.target)
    assert str(failed) == "cannot connect to topaz.test:8282: the moon is full"
    assert (failed.reason, failed.permanent) == ("other", False)


# -- _grpcio.loop_thread -------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["trio"], indirect=True)
async def test_an_error_lands_where_it_is_awaited():
    from fastapi_topaz._grpcio.loop_thread import _Landing

    landing = _Landing()
    stepped = []
    landing.add_done_callback(stepped.append)

    async def work():
        await landing

    running = work()
    assert running.send(None) is landing
    assert in_a_thread(lambda: landing.set_exception(OSError("cut"))) is None
    assert not landing.done()
    await trio.testing.wait_all_tasks_blocked()
    assert stepped == [landing]
    with pytest.raises(OSError, match="cut"):
        running.send(None)


def test_what_lands_after_the_end_of_trio_is_dropped():
    from fastapi_topaz._grpcio.loop_thread import _Landing

    stepped = []

    async def main():
        landing = _Landing()
        landing.add_done_callback(stepped.append)
        return landing

    trio.run(main).set_result(None)
    assert stepped == []


@pytest.mark.real_clock
@pytest.mark.parametrize("anyio_backend", ["trio"], indirect=True)
async def test_a_loop_that_cannot_be_made_is_a_failed_attempt(
    monkeypatch, embedded_authorizer
):
    from fastapi_topaz._grpcio import loop_thread as _loop_thread

    def none_left():
        raise OSError("Too many open files")

    pool = ConnectionPool(min_connections=0, max_retries=0)
    pool.configure(embedded_authorizer.options)
    async with pool:
        with monkeypatch.context() as patch:
            patch.setattr(_loop_thread, "_Loop", none_left)
            with pytest.raises(ConnectFailed, match="Too many open files"):
                await pool.acquire()
        names = {thread.name for thread in threading.enumerate()}
        assert "fastapi_topaz gRPC" not in names
        async with pool.acquire(timeout=PATIENCE) as conn:
            assert await conn.info()


def test_a_bug_in_the_loop_thread_is_told_of(monkeypatch):
    from fastapi_topaz._grpcio.loop_thread import LoopThread

    class Broken(LoopThread):
        async def _serve(self):
            self._started.set()
            raise RuntimeError("a bug")

    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    thread = Broken()
    thread._thread.start()
    thread.join()
    (args,) = told
    assert repr(args.exc_value) == "RuntimeError('a bug')"
    assert args.thread.name == "fastapi_topaz gRPC"


# -- _grpcio.peer ---------------------------------------------------------------------


def unreadable(_number):
    raise RuntimeError("no book")


@contextlib.asynccontextmanager
async def connected(options):
    connection = await GrpcConnector(options.target).connect(PATIENCE)
    try:
        yield connection
    finally:
        with anyio.CancelScope(shield=True):
            await connection.close(0)


BOOKS = [
    "channelz_get_top_channels",
    "channelz_get_channel",
    "channelz_get_subchannel",
]


@pytest.mark.real_clock
@pytest.mark.parametrize("book", BOOKS)
async def test_a_connection_works_where_its_peer_cannot_be_read(
    book, monkeypatch, embedded_authorizer
):
    monkeypatch.setattr(cygrpc, book, unreadable)
    async with connected(embedded_authorizer.options) as connection:
        assert connection.peer is None
        connection.refresh_liveness()
        assert not connection.is_lost()
        await connection.probe(PATIENCE)


@pytest.mark.real_clock
async def test_an_address_without_a_socket_is_nobodys_peer(
    monkeypatch, embedded_authorizer
):
    # As that of a server that was tried, and did not answer.
    monkeypatch.setattr(
        cygrpc, "channelz_get_subchannel", lambda _: b'{"subchannel": {}}'
    )
    async with connected(embedded_authorizer.options) as connection:
        assert connection.peer is None


@pytest.mark.real_clock
async def test_a_socket_that_cannot_be_read_is_not_taken_for_lost(
    monkeypatch, embedded_authorizer
):
    async with connected(embedded_authorizer.options) as connection:
        assert connection.peer is not None
        monkeypatch.setattr(cygrpc, "channelz_get_socket", unreadable)
        connection.refresh_liveness()
        assert not connection.is_lost()
        await connection.probe(PATIENCE)
