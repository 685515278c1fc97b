"""Forks of a process whose pool is open on the native transport, with a server."""

from __future__ import annotations

import os
import textwrap

import pytest

from fastapi_topaz import AuthorizerOptions, ConnectionPool
from kit.backends import backends
from kit.pools import make_pool
from kit.processes import AuthorizerProcess


pytestmark = [
    pytest.mark.real_clock,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork"),
]

PRELUDE = """
import asyncio, gc, multiprocessing, os, socket, sys, threading, traceback, warnings
import anyio, anyio.to_thread
# Trio finds the signal handling of its parent, and uses its own.
warnings.filterwarnings("ignore", "It looks like Trio", RuntimeWarning)
# Python 3.12 and newer warn of each fork beside a thread. These programs fork so.
warnings.filterwarnings("ignore", ".*is multi-threaded", DeprecationWarning)
from fastapi_topaz import AuthorizerOptions, ConnectionPool, PoolError, PoolMisuse

backend, url, ca = sys.argv[1:]
options = AuthorizerOptions(url=url, cert_file_path=ca or None, insecure=not ca)

def make_pool(**settings):
    settings = {"min_connections": 0, "max_connections": 3, **settings}
    pool = ConnectionPool(transport="native", **settings)
    pool.configure(options)
    return pool

pool = make_pool()

async def ask(pool=pool, seconds=0, timeout=20):
    async with pool.acquire() as conn:
        answer = await conn.decisions(
            policy_path="app",
            timeout=timeout,
            resource_context={"seconds": str(seconds)},
        )
        assert answer == {"allowed": True}

def run(main, *args):
    if backend == "uvloop":
        anyio.run(main, *args, backend_options={"use_uvloop": True})
    else:
        anyio.run(main, *args, backend=backend)

def in_thread(function, *args):
    # Trio takes the fork of a running loop for a running loop, but not in a thread.
    failed = []
    def target():
        try:
            function(*args)
        except BaseException:
            failed.append(True)
            traceback.print_exc()
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return not failed

def fork(child):
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = 0 if child() else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pid

def reap(pid):
    _, status = os.waitpid(pid, 0)
    assert status == 0, status

def sockets(pool):
    slots = pool._open_pool.state.open
    return [slot.connection._wire._sock for slot in slots]
"""


@pytest.fixture
def execute(run_program):
    """Run a program, and check that it ends well and says nothing on stderr."""

    def execute(program, backend, server):
        code = f"{PRELUDE}\n{textwrap.dedent(program)}"
        options = server.options
        arguments = (backend, options.url, options.cert_file_path or "")
        ended = run_program(code, *arguments, strict=False)
        assert (ended.code, ended.err) == (0, ""), ended.err
        return ended.out.splitlines()

    return execute


@pytest.fixture(scope="module")
def server():
    with AuthorizerProcess() as running:
        yield running


@pytest.fixture(scope="module")
def tls_server():
    with AuthorizerProcess(tls=True) as running:
        yield running


class Counted:
    """The connections and checks of a server since the start of a test."""

    def __init__(self, server):
        self._server = server
        self._before = self._now()

    def _now(self):
        counts = self._server.counts
        return counts["accepted"], counts["calls"].get("Is", 0)

    @property
    def since(self):
        pairs = zip(self._now(), self._before, strict=True)
        return tuple(now - before for now, before in pairs)


all_backends = pytest.mark.parametrize("backend", ["asyncio", "uvloop", "trio"])


@pytest.mark.costly
@all_backends
def test_each_child_is_answered_and_its_parent_loses_nothing(backend, server, execute):
    children = 10
    program = f"""
        CHILDREN = {children}

        def use():
            run(use_pool)

        async def use_pool():
            assert pool.status().total == 0 and not pool.status().failing
            async with pool:
                await ask()
                await ask()

        async def main():
            await ask()
            async with anyio.create_task_group() as tasks:
                # In flight while the children run.
                for _ in range(2):
                    tasks.start_soon(ask, pool, 2)
                while pool.status().streams_in_use < 2:
                    await anyio.sleep(0.01)
                for begin in range(0, CHILDREN, 5):
                    pids = [fork(lambda: in_thread(use)) for _ in range(5)]
                    for pid in pids:
                        await anyio.to_thread.run_sync(reap, pid)
                    await ask()
            print(pool._counters.connects, sum(pool._counters.closes.values()))
            await pool.close()
        run(main)
    """
    counted = Counted(server)
    connects, closes = map(int, execute(program, backend, server)[-1].split())
    assert closes == 0
    # One for each child, which closed it, and those of the parent.
    assert counted.since == (
        children + connects,
        2 * children + children // 5 + 3,
    )
    assert connects <= 3
    assert server.counts["open"] == 0


@all_backends
def test_a_child_closes_its_copies_of_the_sockets_and_writes_nothing(
    backend, server, execute
):
    # The parent holds the other end, so it sees each byte and each end.
    program = """
        async def main():
            await ask()
            (sock,) = sockets(pool)
            before = os.fstat(sock.fileno())
            def child():
                assert sock.fileno() == -1
                # A copy that is closed twice may be another file by then.
                assert not any(
                    os.fstat(int(fd)).st_ino == before.st_ino
                    for fd in os.listdir("/proc/self/fd")
                    if os.path.exists(f"/proc/self/fd/{fd}")
                )
                return True
            if os.path.exists("/proc/self/fd"):
                reap(fork(child))
            assert os.fstat(sock.fileno()).st_ino == before.st_ino
            await ask()
            assert pool._counters.connects == 1
            await pool.close()
        run(main)
    """
    execute(program, backend, server)


@all_backends
def test_a_child_over_tls_is_answered(backend, tls_server, execute):
    program = """
        from fastapi_topaz._http2.tls import tls_context
        from fastapi_topaz._rpc.target import Target

        def use():
            run(use_pool)

        async def use_pool():
            async with pool:
                await ask()

        async def main():
            await ask()
            target = Target(url=url, cert_file_path=ca)
            inherited = tls_context(target)
            assert tls_context(target) is inherited
            def child():
                # Another thread may have locked it during the fork.
                assert tls_context(target) is not inherited
                return in_thread(use)
            for _ in range(3):
                reap(fork(child))
                await ask()
            print(pool._counters.connects)
            await pool.close()
        run(main)
    """
    counted = Counted(tls_server)
    assert execute(program, backend, tls_server) == ["1"]
    connects, _ = counted.since
    assert connects == 4


@all_backends
def test_a_lease_of_the_parent_is_released_without_effect_in_the_child(
    backend, server, execute
):
    program = """
        async def use(lease):
            # Before the child opens its pool, and after that.
            for _ in range(2):
                for call in (lease.decisions(policy_path="app"), lease.info()):
                    try:
                        await call
                    except PoolMisuse as error:
                        print(error)
                async with pool.acquire() as own:
                    await own.info()
                    assert pool.status().streams_in_use == 1
            await pool.release(lease)
            assert pool.status().streams_in_use == 0
            try:
                await pool.release(lease)
            except ValueError:
                print("released before")
            await pool.close()
            await pool.close()

        async def main():
            async with pool.acquire() as lease:
                other = await pool.acquire()
                third = await pool.acquire()
                def child():
                    nonlocal third
                    third = None  # garbage
                    gc.collect()
                    async def release():
                        await pool.release(other)
                    return in_thread(run, release) and in_thread(run, use, lease)
                reap(fork(child))
                assert pool.status().streams_in_use == 3
                assert await lease.decisions(policy_path="app") == {"allowed": True}
                await pool.release(other)
                await pool.release(third)
            await pool.close()
            counters = pool._counters
            print("parent", counters.connects, counters.reclaimed, os.getpid())
        run(main)
    """
    *refused, again, last = execute(program, backend, server)
    assert last.startswith("parent 3 0 ")
    parent = last.split()[-1]
    assert again == "released before"
    assert len(refused) == 4
    for line in refused:
        assert f"acquired in process {parent}" in line
        assert "acquire() another one" in line


@all_backends
def test_the_block_of_a_lease_may_end_in_the_child(backend, server, execute):
    # As after os.fork() in a request: the child goes on in the same functions.
    program = """
        async def main():
            await ask()
            child = True
            async with pool.acquire():
                pid = os.fork()
            if not pid:
                os._exit(0 if in_thread(run, ask) else 1)
            await anyio.to_thread.run_sync(reap, pid)
            await ask()
            assert pool._counters.connects == 1
            await pool.close()
        run(main)
    """
    execute(program, backend, server)


@all_backends
def test_a_fork_in_a_thread_may_use_the_pool(backend, server, execute):
    program = """
        def fork_and_ask():
            def child():
                run(ask)
                return True
            reap(fork(child))

        async def main():
            await ask()
            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(anyio.to_thread.run_sync, fork_and_ask)
                for _ in range(20):
                    await ask()
            await ask(seconds=0.2)
            await pool.close()
        run(main)
    """
    execute(program, backend, server)


@all_backends
def test_multiprocessing_by_fork_may_use_the_pool(backend, server, execute):
    program = """
        def use():
            run(ask)

        def start():
            processes = [context.Process(target=use) for _ in range(3)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
                assert process.exitcode == 0

        async def main():
            await ask()
            await anyio.to_thread.run_sync(start)
            await ask()
            assert pool._counters.connects == 1
            await pool.close()
        context = multiprocessing.get_context("fork")
        run(main)
    """
    execute(program, backend, server)


def test_a_child_may_fork_again(server, execute):
    program = """
        def use(generations):
            async def main():
                await ask()
                if generations:
                    pid = fork(lambda: in_thread(use, generations - 1))
                    await anyio.to_thread.run_sync(reap, pid)
                await ask()
                print(generations, pool._counters.connects, pool._counters.acquisitions)
                await pool.close()
            run(main)
        use(3)
    """
    for backend in ("asyncio", "trio"):
        lines = execute(program, backend, server)
        assert lines == ["0 1 2", "1 1 2", "2 1 2", "3 1 2"]


def test_the_event_loop_of_the_parent_cannot_be_used(server, execute):
    # On asyncio it is no running loop in the child. Trio does not notice the fork.
    program = """
        async def main():
            await ask()
            pid = os.fork()
            if not pid:
                try:
                    await ask()
                except PoolMisuse as error:
                    print(error)
                    sys.stdout.flush()
                    os._exit(0)
                os._exit(1)
            await anyio.to_thread.run_sync(reap, pid)
            await ask()
            await pool.close()
        run(main)
    """
    (said,) = execute(program, "trio", server)
    assert "still runs the event loop of its parent" in said
    assert "start a new event loop in the child" in said


@backends
def test_a_pool_that_was_closed_or_is_closing_stays_closed_in_the_child(
    backend, server, execute
):
    program = """
        async def refused():
            try:
                await ask()
            except PoolError as error:
                print(type(error).__name__)
            await pool.initialize()
            await ask()
            await pool.close()

        async def main():
            lease = await pool.acquire()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pool.close)
                while not pool._open_pool.state.shut:
                    await anyio.sleep(0)
                reap(fork(lambda: in_thread(run, refused)))
                await pool.release(lease)
            reap(fork(lambda: in_thread(run, refused)))
        run(main)
    """
    assert execute(program, backend, server) == ["PoolClosed", "PoolClosed"]


@pytest.mark.parametrize("backend", ["asyncio", "uvloop"])
def test_a_child_may_use_the_pool_beside_an_idle_loop_and_end_normally(
    backend, server, execute
):
    # As the workers of gunicorn --preload, whose parent used the pool. At the end of
    # the interpreter, everything inherited is destroyed, in silence.
    program = """
        if backend == "uvloop":
            import uvloop
            loop = uvloop.new_event_loop()
        else:
            loop = asyncio.new_event_loop()
        loop.run_until_complete(ask())
        for _ in range(3):
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                run(ask)
                run(pool.close)
                sys.exit()
            reap(pid)
        loop.run_until_complete(ask())
        assert pool._counters.connects == 1
        loop.run_until_complete(pool.close())
        loop.close()
    """
    counted = Counted(server)
    execute(program, backend, server)
    connects, _ = counted.since
    assert connects == 4


@pytest.mark.parametrize("backend", ["asyncio", "uvloop"])
def test_the_idle_loop_of_the_parent_cannot_be_used(backend, server, execute):
    program = """
        if backend == "uvloop":
            import uvloop
            loop = uvloop.new_event_loop()
        else:
            loop = asyncio.new_event_loop()
        loop.run_until_complete(ask())
        def child():
            for use in (ask, pool.initialize, pool.close, pool.acquire().__aenter__):
                try:
                    loop.run_until_complete(use())
                except PoolMisuse as error:
                    print(error)
            return True
        reap(fork(child))
        loop.run_until_complete(ask())
        assert pool._counters.connects == 1
        loop.run_until_complete(pool.close())
        loop.close()
    """
    lines = execute(program, backend, server)
    assert len(lines) == 4
    for said in lines:
        assert "start a new event loop in the child" in said


def test_a_pool_of_a_connector_that_does_not_survive_a_fork_is_misused():
    assert not ConnectionPool(transport="native").status().failing
    for transport, survives in (("native", True), ("grpcio", False)):
        pool = ConnectionPool(transport=transport)
        pool.configure(AuthorizerOptions(url="127.0.0.1:1", insecure=True))
        assert pool._connector.survives_fork is survives
    assert not getattr(make_pool()._connector, "survives_fork", False)
