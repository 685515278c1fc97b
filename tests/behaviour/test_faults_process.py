"""A process that ends without closing its pool, or has no file descriptors left."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from fastapi_topaz.testing import EmbeddedAuthorizer


pytestmark = pytest.mark.real_clock

PATH = "myapp.GET.documents"


@pytest.fixture
def url():
    with EmbeddedAuthorizer({PATH: True}) as authorizer:
        yield authorizer.url


def run(program, *options):
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


# -- F22: the pool is not closed ------------------------------------------------------


def left_open(url, *ends):
    """Return a program that leaves three leases open; *end* is a backend, or rude."""
    return f"""
        import anyio, asyncio, threading
        from fastapi_topaz import AuthorizerOptions, ConnectionPool

        leases = []

        async def main():
            await pool.initialize()
            for _ in range(3):
                leases.append(conn := await pool.acquire())
                await conn.decisions(policy_path={PATH!r})

        for end in {ends!r}:
            pool = ConnectionPool(name=end, min_connections=2, eager_init=True)
            pool.configure(AuthorizerOptions(url={url!r}, insecure=True))
            if end == "loop.close":
                loop = asyncio.new_event_loop()
                loop.run_until_complete(main())
                loop.close()
            else:
                anyio.run(main, backend=end)
            print(pool.status())
        print([t.name for t in threading.enumerate() if "topaz" in t.name])
    """


def assert_ended_well(result):
    assert result.returncode == 0, result.stderr
    *statuses, threads = result.stdout.splitlines()
    assert set(statuses) == {"total=0 busy=0 waiting=0 connecting=0"}
    assert threads == "[]"
    for trouble in ("Traceback", "loop is closed", "never awaited", "destroyed"):
        assert trouble not in result.stderr


@pytest.mark.native
@pytest.mark.parametrize("action", ["always", "error"])
def test_a_run_that_ends_with_open_leases_logs_a_warning_with_their_count(action, url):
    program = left_open(url, "asyncio", "trio")
    result = run(program, "-W", f"{action}::ResourceWarning")
    assert_ended_well(result)
    for backend in ("asyncio", "trio"):
        unclosed = f"pool {backend!r} was not closed before its event loop ended, with "
        assert result.stderr.count(unclosed + "3 leases out") == 1
    # A warning raised as an error is logged instead: it would end trio's whole run.
    assert ("ResourceWarning" in result.stderr) == (action == "always")


def test_closing_the_loop_of_an_open_pool_prints_no_traceback(url):
    assert_ended_well(run(left_open(url, "loop.close"), "-W", "always"))


# -- F31: no file descriptors left ----------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_without_file_descriptors_open_connections_serve_and_the_error_says_why(
    backend, url, run_program
):
    program = f"""
        import anyio, os, resource, threading
        # Otherwise the import would fail.
        import fastapi_topaz._http2.asyncio_io
        import fastapi_topaz._http2.trio_io
        from fastapi_topaz import (
            AuthorizerOptions, ConnectFailed, ConnectionPool, PoolTimeout
        )

        LIMIT = 256
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, most))

        def eaten():
            fds = []
            try:
                while True:
                    fds.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                return fds

        pool = ConnectionPool(min_connections=0, max_connections=2, max_retries=0)
        pool.configure(AuthorizerOptions(url={url!r}, insecure=True))

        async def ask(conn):
            assert await conn.decisions(policy_path={PATH!r}) == {{"allowed": True}}

        async def connect():
            # Until the pool does not remember a failure any more.
            while True:
                try:
                    return await pool.acquire(timeout=20)
                except ConnectFailed:
                    pass

        async def main():
            async with pool:
                fds = eaten()
                for _ in range(3):
                    try:
                        await pool.acquire(timeout=20)
                    except ConnectFailed as error:
                        print("cold", error.reason, error.permanent, error)
                while fds:
                    os.close(fds.pop())
                first = await connect()
                await ask(first)

                fds = eaten()
                await ask(first)
                cause = None
                while cause is None:
                    try:
                        await pool.acquire(timeout=0.1)
                    except PoolTimeout as error:
                        cause = error.__cause__
                print("warm", cause.reason, cause.permanent, cause)
                assert pool.status().total == 1
                await ask(first)
                await pool.release(first)
                for _ in range(10):
                    async with pool.acquire(timeout=0) as conn:
                        await ask(conn)
                while fds:
                    os.close(fds.pop())

                leases = [await connect(), await connect()]
                for conn in leases:
                    await ask(conn)
                    await pool.release(conn)
                assert pool.status().total == 2
                print("reasons", *pool._counters.connect_failures)
            print([t.name for t in threading.enumerate() if "topaz" in t.name])

        anyio.run(main, backend={backend!r})
    """
    ended = run_program(program, strict=False)
    assert ended.code == 0, ended.err
    *refused, reasons, threads = ended.out.splitlines()
    assert [line.split()[:3] for line in refused] == [
        *[["cold", "other", "False"]] * 3,
        ["warm", "other", "False"],
    ]
    for line in refused:
        # Python's error says one, and the pool's reading of gRPC's text says the other.
        assert "Too many open files" in line or "no file descriptor left" in line
    assert reasons == "reasons other"
    assert threads == "[]"
