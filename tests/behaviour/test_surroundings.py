"""The pool in a notebook, with callers in threads, and with Ctrl-C."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import trio
import uvloop
from anyio.from_thread import start_blocking_portal
from starlette.requests import Request

from fastapi_topaz import ConnectionPool, Identity, IdentityType, TopazConfig
from fastapi_topaz.testing import EmbeddedAuthorizer


pytestmark = pytest.mark.real_clock

ALLOWED, DENIED = "myapp.GET.documents", "myapp.GET.secrets"


def a_document_request():
    return Request({"type": "http", "path": "/documents", "headers": []})


@pytest.fixture
def authorizer():
    with EmbeddedAuthorizer({ALLOWED: True, DENIED: False}) as running:
        yield running


@pytest.fixture
def config(authorizer):
    pool = ConnectionPool(min_connections=1, max_connections=3)
    pool.configure(authorizer.options)
    return TopazConfig(
        authorizer_options=authorizer.options,
        policy_path_root="myapp",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
        connection_pool=pool,
    )


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_notebook_cells_share_one_pool(authorizer, config, make_loop):
    """The loop stops between two cells, even while a lease is open."""
    pool = config.connection_pool
    loop = make_loop()
    try:
        loop.run_until_complete(pool.initialize())
        conn = loop.run_until_complete(pool.acquire())
        for _ in range(3):
            for path, allowed in ((ALLOWED, True), (DENIED, False)):
                asked = conn.decisions(policy_path=path)
                assert loop.run_until_complete(asked) == {"allowed": allowed}
                asked = config.is_allowed(a_document_request(), path)
                assert loop.run_until_complete(asked) is allowed
        loop.run_until_complete(pool.release(conn))
        assert pool.status().busy == 0
        loop.run_until_complete(pool.close())
    finally:
        loop.close()
    assert authorizer.connections_accepted <= 3


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_threads_check_through_a_portal_and_each_gets_its_own_answer(config, backend):
    pool = config.connection_pool

    def ask(number):
        path, allowed = ((ALLOWED, True), (DENIED, False))[number % 2]
        return portal.call(config.is_allowed, a_document_request(), path) is allowed

    with start_blocking_portal(backend) as portal:
        with (
            portal.wrap_async_context_manager(pool),
            ThreadPoolExecutor(max_workers=12) as threads,
        ):
            assert all(threads.map(ask, range(200)))
            assert pool.status().busy == 0
        assert pool.status().total == 0


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_ctrl_c_in_a_script_ends_a_waiting_check(authorizer, backend):
    program = f"""
        import anyio
        from fastapi_topaz import AuthorizerOptions, ConnectionPool

        async def main():
            pool = ConnectionPool()
            pool.configure(AuthorizerOptions(url={authorizer.url!r}, insecure=True))
            async with pool, pool.acquire() as conn:
                await conn.decisions(policy_path={ALLOWED!r})
                print("asks", flush=True)
                await conn.decisions(policy_path="myapp.waits", timeout=60)

        anyio.run(main, backend={backend!r})
    """

    async def never(_check):
        await asyncio.sleep(60)

    authorizer.policies = {ALLOWED: True, "myapp.waits": never}
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        try:
            assert process.stdout.readline() == "asks\n"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT, errors
    assert errors.endswith("KeyboardInterrupt\n")
    for trouble in ("Exception ignored", "never awaited", "was destroyed", "PoolError"):
        assert trouble not in errors


def only_interrupts(error):
    if isinstance(error, BaseExceptionGroup):
        return all(only_interrupts(each) for each in error.exceptions)
    return isinstance(error, KeyboardInterrupt)


class Presser:
    """Presses Ctrl-C at one line of the package, counted from the start."""

    def __init__(self, line):
        self.left = line

    def __call__(self, frame, event, _argument):
        if not frame.f_globals.get("__name__", "").startswith("fastapi_topaz._"):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self


async def check_under(presser, authorizer, connected):
    async def check():
        async with pool.acquire() as conn:
            await conn.decisions(policy_path=ALLOWED)

    pool = ConnectionPool(min_connections=0)
    pool.configure(authorizer.options)
    async with pool:
        if connected:
            await check()
        sys.settrace(presser)
        try:
            await check()
        finally:
            sys.settrace(None)


@pytest.mark.native
@pytest.mark.parametrize(
    "connected, step",
    [
        pytest.param(True, 7, id="connected"),
        pytest.param(False, 31, id="first"),
        pytest.param(
            *(True, 1),
            id="connected, each line",
            marks=[pytest.mark.slow, pytest.mark.timeout(600)],
        ),
        pytest.param(
            *(False, 1),
            id="first, each line",
            marks=[pytest.mark.nightly, pytest.mark.timeout(600)],
        ),
    ],
)
def test_ctrl_c_on_trio_at_any_line_of_a_check_raises_and_loses_no_lease(
    authorizer, caplog, connected, step
):
    """Trio raises KeyboardInterrupt between any two lines, in the pool's tasks too."""
    caplog.set_level(logging.WARNING)
    # Without it, trio leaves the signal to this handler.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for line in itertools.count(1, step):
        presser = Presser(line)
        try:
            trio.run(check_under, presser, authorizer, connected)
        except BaseException as error:
            if not only_interrupts(error):
                raise
        else:
            break
    assert presser.left > 0, f"Ctrl-C at line {line} had no effect"
    assert line > 200
    # The pool does not warn of an open lease either.
    assert caplog.records == []
