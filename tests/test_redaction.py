"""Frames of errors, and errors, contain no identity, resource context or key."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import os
import subprocess
import sys
import textwrap
from contextlib import AsyncExitStack

import anyio
import pytest

from fastapi_topaz import PooledConnection, PoolError
from fastapi_topaz._redaction import boundary, clear_frames
from fastapi_topaz.testing import FakeConnector, fail, ok
from kit.backends import backends
from kit.pools import make_pool
from kit.secrets import (
    IDENTITY,
    QUESTION,
    RESOURCE,
    SECRETS,
    assert_clean,
    error_of,
    frames,
    is_ours,
    leaks,
    secrets_in,
)


# -- searching for secrets ------------------------------------------------------------


@pytest.mark.parametrize("name", ["decisions", "decision_tree", "query", "compile"])
async def test_the_secret_search_finds_the_frames_that_the_boundary_clears(name):
    unguarded = getattr(PooledConnection, name).__wrapped__
    arguments = {**QUESTION, "policy_path": 3}
    if name in {"query", "compile"}:
        arguments["query"] = "x"
    async with make_pool() as pool, pool.acquire() as conn:
        error = await error_of(unguarded(conn, **arguments), TypeError)
    found = {secret for *_, held in leaks(error) for secret in held}
    assert found == {IDENTITY, RESOURCE}


def test_each_public_method_of_a_lease_clears_frames():
    methods = {
        name: method
        for name, method in inspect.getmembers(PooledConnection)
        if inspect.isfunction(method) and not name.startswith("_")
    }
    assert len(methods) == 9
    for name, method in methods.items():
        assert inspect.iscoroutinefunction(method) == (name != "stub"), name
        assert method.__wrapped__.__name__ == method.__name__ == name


async def refused(pool, how):
    """Let acquire() of *pool* fail, awaited or entered, and return the error."""

    async def enter():
        async with pool.acquire(timeout=1):
            pass

    return await error_of(
        pool.acquire(timeout=1) if how == "await" else enter(), PoolError
    )


@pytest.mark.parametrize("how", ["await", "enter"])
@pytest.mark.parametrize("cause", ["connect", "full", "closed"])
async def test_a_failed_acquire_keeps_no_object_of_the_pool_in_its_frames(how, cause):
    connector = FakeConnector(default=fail() if cause == "connect" else ok())
    pool = make_pool(connector, max_connections=1, max_retries=0)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(pool)
        if cause == "full":
            await stack.enter_async_context(pool.acquire())
        if cause == "closed":
            await pool.close()
        error = await refused(pool, how)
        kept = [
            (frame.f_code.co_name, name)
            for frame in frames(error)
            if is_ours(frame)
            for name, value in frame.f_locals.items()
            if type(value).__module__.startswith("fastapi_topaz")
        ]
        assert kept == []


# -- the mechanism --------------------------------------------------------------------


def code_of_the_package(source):
    """Run *source* as a module of this package, and return its namespace."""
    names = {"__name__": "fastapi_topaz._made_up"}
    exec(textwrap.dedent(source), names)
    return names


async def test_a_coroutine_that_caught_the_error_keeps_running():
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
            # The error no longer leads to the running coroutines.
            named = [frame.f_code.co_name for frame in frames(error)]
            assert not {"keeps", "generates"} & set(named)
            assert_clean(error)
        gate.set()
    results += generator
    assert results == [IDENTITY] * 3
    for error in errors:
        assert not any(IDENTITY in f.f_locals.values() for f in frames(error))


def test_group_members_causes_and_contexts_are_cleared_without_endless_loops():
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
def test_constructors_generated_by_attrs_belong_to_their_class(filename, cleared):
    # Before attrs 25 they run in globals without a module name.
    names = {}
    exec(compile("def init(secret): raise LookupError", filename, "exec"), names)
    with pytest.raises(LookupError) as caught:
        names["init"](IDENTITY)
    clear_frames(caught.value)
    (made,) = [f for f in frames(caught.value) if f.f_code.co_name == "init"]
    assert made.f_locals == ({} if cleared else {"secret": IDENTITY})


def test_running_frames_keep_their_variables():
    made = code_of_the_package("""
        def outer(secret, clear):
            try:
                raise LookupError("x")
            except LookupError as error:
                clear(error)
                return secret
    """)
    assert made["outer"](IDENTITY, clear_frames) == IDENTITY


def test_a_boundary_returns_values_and_reraises_errors_unchanged():
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


@pytest.mark.costly
@backends
@pytest.mark.real_clock
def test_sentry_receives_no_secret(backend, tmp_path):
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
        assert any(frame["vars"] for frame in shown), (
            "otherwise this test proves nothing"
        )
        assert not secrets_in(json.dumps(event))


@pytest.mark.costly
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
    assert "prepare    = " in shown, "otherwise no variable is shown"
    assert not secrets_in(shown)
