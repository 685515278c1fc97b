"""What a process survives: an end without a close, and the end of its descriptors."""

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
    """A program that leaves three leases out; an end is a backend, or rude."""
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


@pytest.mark.parametrize("action", ["always", "error"])
def test_a_run_that_ends_with_leases_out_is_warned_of_with_their_number(action, url):
    program = left_open(url, "asyncio", "trio")
    result = run(program, "-W", f"{action}::ResourceWarning")
    assert_ended_well(result)
    for backend in ("asyncio", "trio"):
        unclosed = f"pool {backend!r} was not closed before its event loop ended, with "
        assert result.stderr.count(unclosed + "3 leases out") == 1
    # Made an error, it is logged instead: raised, it would end trio's whole run.
    assert ("ResourceWarning" in result.stderr) == (action == "always")


def test_a_loop_that_is_closed_under_an_open_pool_ends_without_a_traceback(url):
    assert_ended_well(run(left_open(url, "loop.close"), "-W", "always"))


# -- F31: no file descriptor is left --------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_without_file_descriptors_a_pool_serves_what_it_has_and_says_what_is_missing(
    backend, url
):
    program = f"""
        import anyio, os, resource, threading
        # Else the import would be what fails.
        import fastapi_topaz._grpcio.trio_connection
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
    result = run(program)
    assert result.returncode == 0, result.stderr
    *refused, reasons, threads = result.stdout.splitlines()
    assert [line.split()[:3] for line in refused] == [
        *[["cold", "other", "False"]] * 3,
        ["warm", "other", "False"],
    ]
    for line in refused:
        # Python says the one, and what the pool makes of gRPC's text is the other.
        assert "Too many open files" in line or "no file descriptor left" in line
    assert reasons == "reasons other"
    assert threads == "[]"
