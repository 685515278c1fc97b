"""The pool over real sockets, counted at the server, on every backend."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
import textwrap
import threading

import anyio
import anyio.lowlevel
import grpc
import psutil
import pytest
import trio

from fastapi_topaz import (
    ConnectFailed,
    ConnectionLost,
    ConnectionPool,
    PoolClosed,
    PoolTimeout,
)
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.waiting import eventually, eventually_at_most


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]

ASK = {"policy_path": "myapp.GET.documents"}


@pytest.fixture
def authorizer(embedded_authorizer):
    embedded_authorizer.policies = {ASK["policy_path"]: True}
    return embedded_authorizer


def make_configured(authorizer, **options):
    pool = ConnectionPool(**options)
    pool.configure(authorizer.options)
    return pool


def tasks_living():
    if "Trio" in type(anyio.lowlevel.current_token().native_token).__name__:
        return trio.lowlevel.current_statistics().tasks_living
    return len(asyncio.all_tasks())


# -- sockets ------------------------------------------------------------------------


async def test_an_eager_pool_opens_its_minimum(authorizer):
    async with make_configured(authorizer, min_connections=2, eager_init=True) as pool:
        assert authorizer.connections_accepted == 2
        assert pool.status().total == pool.status().idle == 2
    await eventually(lambda: authorizer.connections_open == 0)


@pytest.mark.parametrize("tls", [False, True])
async def test_10_leases_use_10_sockets_and_the_11th_caller_waits(tls):
    with EmbeddedAuthorizer({ASK["policy_path"]: True}, tls=tls) as authorizer:
        pool = make_configured(authorizer, min_connections=2, eager_init=True)
        async with pool:
            leases = [await pool.acquire() for _ in range(10)]
            for conn in leases:
                assert await conn.decisions(**ASK) == {"allowed": True}
            assert authorizer.connections_accepted == 10
            assert authorizer.connections_open == 10
            order = []

            async def caller(number):
                async with pool.acquire() as conn:
                    order.append(number)
                    await conn.decisions(**ASK)

            async with anyio.create_task_group() as tasks:
                for number in range(5):
                    tasks.start_soon(caller, number)
                    while pool.status().waiting <= number:
                        await anyio.lowlevel.checkpoint()
                with pytest.raises(PoolTimeout) as caught:
                    await pool.acquire(timeout=0.05)
                assert "total=10 busy=10 waiting=5 connecting=0" in str(caught.value)
                await pool.release(leases.pop())
            assert order == [0, 1, 2, 3, 4]
            for conn in leases:
                await pool.release(conn)
            assert authorizer.connections_accepted == 10


async def test_leases_on_streams_share_a_socket(authorizer):
    pool = make_configured(
        authorizer, min_connections=1, max_connections=1, streams_per_connection=20
    )
    authorizer.delay = 0.4
    async with pool, anyio.create_task_group() as tasks:

        async def caller():
            async with pool.acquire() as conn:
                await conn.decisions(**ASK)

        for _ in range(20):
            tasks.start_soon(caller)
        await eventually(lambda: authorizer.streams == 20)
        assert authorizer.connections_accepted == 1


async def test_reaped_connections_leave_no_socket(authorizer):
    pool = make_configured(
        authorizer, min_connections=1, max_idle_time=0.05, idle_check_interval=0.02
    )
    async with pool:
        leases = [await pool.acquire() for _ in range(5)]
        for conn in leases:
            await pool.release(conn)
        await eventually(lambda: authorizer.connections_open == 1)
        assert pool.status().total == 1


async def test_drain_opens_new_sockets_and_fails_no_call(authorizer):
    async with make_configured(authorizer, min_connections=3, eager_init=True) as pool:
        stop = False
        answers = []

        async def caller():
            while not stop:
                async with pool.acquire() as conn:
                    answers.append(await conn.decisions(**ASK))

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(caller)
            await eventually(lambda: len(answers) > 20)
            before = authorizer.connections_accepted
            pool.drain()
            await eventually(lambda: authorizer.connections_accepted >= before + 3)
            done = len(answers)
            await eventually(lambda: len(answers) > done + 20)
            stop = True
        assert all(answer == {"allowed": True} for answer in answers)


# -- restarts -----------------------------------------------------------------------


async def test_a_pool_survives_a_restart_of_its_authorizer(authorizer):
    async with make_configured(authorizer, min_connections=2, eager_init=True) as pool:
        authorizer.stop()

        async def asked():
            try:
                async with pool.acquire() as conn:
                    return await conn.decisions(**ASK)
            except (ConnectionError, grpc.aio.AioRpcError):
                return None

        assert await asked() is None
        authorizer.start()

        with anyio.fail_after(10):
            while await asked() != {"allowed": True}:
                await anyio.lowlevel.checkpoint()
        await eventually(lambda: pool.status().healthy_connections >= 1)


async def test_the_health_check_detects_a_frozen_authorizer(authorizer):
    pool = make_configured(
        authorizer,
        min_connections=1,
        eager_init=True,
        health_check_interval=0.1,
        health_check_timeout=0.2,
        connection_timeout=0.5,
    )
    async with pool:
        assert pool.status().healthy
        authorizer.freeze()
        await eventually(lambda: not pool.status().healthy)
        authorizer.thaw()
        await eventually(lambda: pool.status().healthy, timeout=20)


async def test_a_connect_error_names_the_cause(authorizer):
    authorizer.stop()
    async with make_configured(authorizer, max_retries=1) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire()
        assert caught.value.reason == "refused"
        assert authorizer.url in str(caught.value)
        assert "refused" in str(caught.value)


# -- closing ------------------------------------------------------------------------


async def test_closing_during_a_call_raises_connection_lost(authorizer):
    pool = make_configured(authorizer, min_connections=0)
    async with pool.acquire():
        pass
    authorizer.delay = 30.0
    outcome = []

    async def caller():
        try:
            async with pool.acquire() as conn:
                await conn.decisions(**ASK)
        except ConnectionLost as error:
            outcome.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller)
        await eventually(lambda: authorizer.streams == 1)
        await pool.close(grace=0.05)
    assert len(outcome) == 1
    await eventually(lambda: authorizer.connections_open == 0)


async def test_close_lets_a_call_finish_within_the_grace(authorizer):
    pool = make_configured(authorizer, min_connections=0)
    async with pool.acquire():
        pass  # this would also delay the probe of the new connection
    authorizer.delay = 0.3
    answers = []

    async def caller():
        async with pool.acquire() as conn:
            answers.append(await conn.decisions(**ASK))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller)
        await eventually(lambda: authorizer.streams == 1)
        await pool.close(grace=20)
    assert answers == [{"allowed": True}]


async def test_close_leaves_no_task_socket_or_thread(authorizer):
    tasks = tasks_living()
    threads = set(threading.enumerate())
    for _ in range(3):
        pool = make_configured(authorizer, min_connections=3, eager_init=True)
        async with pool, pool.acquire() as conn:
            await conn.decisions(**ASK)
    await eventually(lambda: tasks_living() == tasks)
    await eventually(lambda: authorizer.connections_open == 0)
    # All grpc.aio channels of a process share a poller, which the embedded authorizer
    # keeps alive. No channel of the pool may remain.
    left = {thread.name for thread in set(threading.enumerate()) - threads}
    assert not {name for name in left if "fastapi_topaz" in name}


# -- event loops and backends -------------------------------------------------------


@pytest.mark.native
def test_one_pool_object_works_on_one_backend_after_the_other(authorizer):
    pool = make_configured(authorizer, min_connections=2, eager_init=True)

    async def use():
        await pool.initialize()
        async with pool.acquire() as conn:
            answer = await conn.decisions(**ASK)
        await pool.close()
        return answer

    for backend in ("asyncio", "trio", "asyncio", "trio"):
        assert anyio.run(use, backend=backend) == {"allowed": True}
    assert authorizer.connections_accepted == 8


async def test_initialize_and_close_may_run_in_different_tasks(authorizer):
    pool = make_configured(authorizer, min_connections=2, eager_init=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.initialize)
    async with pool.acquire() as conn:
        assert await conn.decisions(**ASK)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pool.close)
    with pytest.raises(PoolClosed):
        await pool.acquire()
    await eventually(lambda: authorizer.connections_open == 0)


@pytest.mark.native
def test_two_pools_work_on_two_backends_at_once(authorizer):
    def use(backend):
        async def main():
            async with make_configured(authorizer, min_connections=1) as pool:
                for _ in range(50):
                    async with pool.acquire() as conn:
                        assert await conn.decisions(**ASK) == {"allowed": True}

        anyio.run(main, backend=backend)
        finished.append(backend)

    finished = []
    threads = [
        threading.Thread(target=use, args=(backend,))
        for backend in ("asyncio", "trio", "trio")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(finished) == ["asyncio", "trio", "trio"]
    assert not [t for t in threading.enumerate() if "fastapi_topaz" in t.name]


@pytest.mark.costly
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("end", ["return", "raise", "in flight"])
def test_a_pool_never_closed_leaves_no_process_and_no_traceback(
    backend, end, authorizer, run_program
):
    if end == "in flight":

        async def slow(_check):
            await asyncio.sleep(30)
            return True

        # Not `delay`, which would also delay the first probe of a connection.
        authorizer.policies = slow
    program = f"""
        import anyio, threading
        from fastapi_topaz import AuthorizerOptions, ConnectionPool

        class Expected(Exception): pass
        held = []

        async def main():
            pool = ConnectionPool(min_connections=2, eager_init=True)
            pool.configure(AuthorizerOptions(url={authorizer.url!r}, insecure=True))
            await pool.initialize()
            conn = await pool.acquire()
            held.append(conn)
            with anyio.move_on_after(0.3):
                await conn.decisions(policy_path="myapp.GET.documents")
            if {end!r} == "raise":
                raise Expected
            if {end!r} == "in flight":
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(ask, conn)
                    await anyio.sleep(0.1)
                    raise Expected

        async def ask(conn):
            await conn.decisions(policy_path="myapp.GET.documents")

        try:
            anyio.run(main, backend={backend!r})
        except* Expected:
            pass
        print([t.name for t in threading.enumerate() if "topaz" in t.name])
    """
    ended = run_program(program)
    unclosed, late = ended.err.splitlines()
    assert "was not closed before its event loop ended, with a lease out" in unclosed
    assert late == "the pool: closed before a lease came back"
    assert (ended.code, ended.out) == (0, "[]\n")


# -- cancellation -------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"], indirect=True)
@pytest.mark.parametrize("each", [20, pytest.param(200, marks=pytest.mark.slow)])
async def test_thousands_of_calls_cancelled_at_random_points_leak_nothing(
    authorizer, each
):
    rng = random.Random(7)
    process = psutil.Process()

    def measure():
        return {
            "fds": process.num_fds(),
            "threads": threading.active_count(),
            "tasks": tasks_living(),
            "sockets": authorizer.connections_open,
            "streams": authorizer.streams,
        }

    pool = make_configured(
        authorizer, min_connections=10, streams_per_connection=5, max_lifetime=0
    )
    async with pool:
        leases = [await pool.acquire() for _ in range(50)]
        for conn in leases:
            await conn.decisions(**ASK)
            await pool.release(conn)
        gc.collect()
        sockets = authorizer.connections_accepted
        before = measure()
        native = process.num_threads()
        cancelled = 0

        async def caller():
            nonlocal cancelled
            for _ in range(each):
                steps = rng.randrange(60)
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(cancel_later, scope, steps)
                        async with pool.acquire(timeout=60) as conn:
                            await conn.decisions(**ASK)
                        tasks.cancel_scope.cancel()
                cancelled += scope.cancelled_caught

        async def cancel_later(scope, steps):
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
            scope.cancel()

        async with anyio.create_task_group() as tasks:
            for _ in range(50):
                tasks.start_soon(caller)
        # Of 50 * each calls. How many are still under way depends on the machine.
        assert cancelled > each
        assert pool.status().streams_in_use == 0
        assert pool._open_pool.limiter.borrowed_tokens == 0
        leases = [await pool.acquire(timeout=10) for _ in range(50)]
        for conn in leases:
            assert await conn.decisions(**ASK) == {"allowed": True}
            await pool.release(conn)
        assert authorizer.connections_accepted == sockets, "no connection was lost"
        gc.collect()
        await eventually_at_most(measure, before)
        # gRPC has its own threads, outside Python. A few are added under load.
        assert process.num_threads() <= native + 8


# -- fork ---------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.grpcio
@pytest.mark.parametrize("opened", [False, True])
def test_after_a_fork_an_unopened_pool_works_and_an_opened_one_raises(
    opened, authorizer
):
    program = f"""
        import anyio, os, sys, threading
        from fastapi_topaz import AuthorizerOptions, ConnectionPool, PoolError

        # Only gRPC's core cannot be used after a fork.
        pool = ConnectionPool(name="shared", min_connections=1, transport="grpcio")
        pool.configure(AuthorizerOptions(url={authorizer.url!r}, insecure=True))

        async def ask():
            async with pool.acquire() as conn:
                return await conn.decisions(policy_path="myapp.GET.documents")

        async def fresh():
            other = ConnectionPool(transport="grpcio")
            other.configure(AuthorizerOptions(url={authorizer.url!r}, insecure=True))
            async with other.acquire():
                pass

        def child():
            async def main():
                if not {opened}:
                    print("child", await ask())
                    await pool.close()
                    return
                for use in (ask, pool.initialize, pool.close, fresh):
                    try:
                        await use()
                    except PoolError as error:
                        print("child", error)
                print("child", pool.status().total)
            # In a thread, because the loop of the parent runs in this one.
            thread = threading.Thread(target=anyio.run, args=(main,))
            thread.start()
            thread.join()

        def fork():
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    child()
                    code = 0
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            _, status = os.waitpid(pid, 0)
            print("exit", os.waitstatus_to_exitcode(status))

        async def main():
            if {opened}:
                print("parent", await ask())
            fork()
            print("parent", await ask())
            await pool.close()

        anyio.run(main)
    """
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            textwrap.dedent(program),
        ],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    assert "exit 0" in lines
    assert lines[-1] == "parent {'allowed': True}"
    if not opened:
        assert lines[0] == "child {'allowed': True}"
        return
    refused = [line for line in lines if line.startswith("child")]
    assert len(refused) == 5, lines
    for line in refused[:3]:
        assert "pool 'shared' was opened in process" in line
        assert "forked" in line
    assert "was forked from" in refused[3]
