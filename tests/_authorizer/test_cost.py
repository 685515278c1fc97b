"""Test the countable cost promises of the pool, without timing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import pickle
import random
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import weakref
from collections import Counter
from unittest.mock import Mock

import anyio
import anyio.lowlevel
import psutil
import pytest
from aserto.authorizer.v2 import Decision, IsRequest, IsResponse

from fastapi_topaz import ConnectionPool, Identity, IdentityType
from fastapi_topaz._authorizer import messages as _messages
from fastapi_topaz.testing import FakeConnector, slow
from kit.backends import asyncio_only
from kit.pools import assert_whole, make_pool, queued
from kit.waiting import eventually, eventually_at_most


# -- an acquire without a wait --------------------------------------------------------


def at_once(awaitable):
    """Return the result of *awaitable*. Fail if it suspends."""
    steps = awaitable.__await__()
    try:
        suspended_on = next(steps)
    except StopIteration as finished:
        return finished.value
    steps.close()
    pytest.fail(f"it suspended on {suspended_on!r}")


@pytest.mark.parametrize("streams", [1, 5])
async def test_an_acquire_of_a_free_stream_and_a_release_end_in_one_step(streams):
    async with make_pool(max_connections=1, streams_per_connection=streams) as pool:
        async with pool.acquire():
            pass
        for timeout in (None, 0, 3):
            conn = at_once(pool.acquire(timeout=timeout))
            at_once(pool.release(conn))
            acquire = pool.acquire(timeout=timeout)
            at_once(acquire.__aenter__())
            at_once(acquire.__aexit__(None, None, None))
        assert pool.status().streams_in_use == 0


@contextlib.contextmanager
def frugal(monkeypatch):
    """Fail if any code creates a cancel scope, an event or a lock."""
    with monkeypatch.context() as patch:
        for name in ("CancelScope", "Event", "Lock", "fail_after", "move_on_after"):
            patch.setattr(anyio, name, Mock(side_effect=AssertionError(name)))
        yield


@pytest.mark.parametrize("streams", [1, 5])
async def test_an_acquire_of_a_free_stream_uses_no_scope_event_or_lock(
    streams, monkeypatch
):
    async with make_pool(max_connections=1, streams_per_connection=streams) as pool:
        held = [await pool.acquire() for _ in range(streams)]

        async def waiter():
            async with pool.acquire():
                pass

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(waiter)
            await queued(pool, 1)
            # A caller with less time than the earlier ones does need a scope.
            with frugal(monkeypatch), pytest.raises(AssertionError, match="CancelSc"):
                await pool.acquire(timeout=1)
            for conn in held:
                await pool.release(conn)
        with frugal(monkeypatch):
            for _ in range(3):
                held = [at_once(pool.acquire()) for _ in range(streams)]
                for conn in held:
                    at_once(pool.release(conn))


async def test_waiters_with_equal_timeouts_use_no_scope_of_their_own(monkeypatch):
    scopes = Counter()
    taken = anyio.CancelScope

    def counted(*args, **options):
        scopes[anyio.get_current_task().name] += 1
        return taken(*args, **options)

    async with make_pool(max_connections=2, acquire_timeout=50) as pool:
        held = [await pool.acquire() for _ in range(2)]

        async def caller(timeout):
            async with pool.acquire(timeout=timeout):
                await anyio.lowlevel.checkpoint()

        monkeypatch.setattr(anyio, "CancelScope", counted)
        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(caller, None, name="patient")
            await queued(pool, 100)
            for _ in range(3):
                tasks.start_soon(caller, 10, name="in a hurry")
            await queued(pool, 103)
            for conn in held:
                await pool.release(conn)
        assert scopes["patient"] == 0
        assert scopes["in a hurry"] == 3


# -- a check --------------------------------------------------------------------------


def answering(**decisions):
    """Return a connector to an authorizer that always returns these decisions."""
    fields = [{"decision": name, "is": value} for name, value in decisions.items()]
    answer = IsResponse(decisions=[Decision(**one) for one in fields])
    asked = []

    def reply(_method, request):
        asked.append(request)
        return answer.SerializeToString()

    connector = FakeConnector(answer=reply)
    connector.asked = asked
    return connector


@pytest.fixture
def built(monkeypatch):
    """Count the messages that are built or parsed, by name."""
    count = Counter()
    # Another test may have sent the same question.
    _messages._question.cache_clear()
    _messages._decisions_of.cache_clear()

    def counting(name, function):
        def wrapper(*args, **options):
            count[name] += 1
            return function(*args, **options)

        return wrapper

    for name in ("IsRequest", "PolicyContext", "IdentityContext", "PolicyInstance"):
        original = getattr(_messages, name)
        monkeypatch.setattr(_messages, name, counting(name, original))

    class Response:
        FromString = staticmethod(counting("IsResponse", IsResponse.FromString))

    monkeypatch.setattr(_messages, "IsResponse", Response)
    return count


async def test_an_unchanged_question_is_encoded_once(built):
    connector = answering(allowed=True)
    alice = Identity(IdentityType.SUB, "alice")
    question = {
        "policy_path": "myapp.GET.documents",
        "identity": alice,
        "policy_instance_name": "blue",
    }
    async with make_pool(connector) as pool, pool.acquire() as conn:
        for _ in range(100):
            assert await conn.decisions(**question) == {"allowed": True}
        once = {
            "IsRequest": 2,  # the question and the identity
            "PolicyContext": 1,
            "IdentityContext": 1,
            "PolicyInstance": 1,
            "IsResponse": 1,
        }
        assert built == once
        assert len(set(connector.asked)) == 1
        sent = IsRequest.FromString(connector.asked[-1])
        assert sent.policy_context.path == "myapp.GET.documents"
        assert list(sent.policy_context.decisions) == ["allowed"]
        assert sent.identity_context.identity == "alice"
        assert sent.policy_instance.name == "blue"
        # Only the request-specific parts are built again.
        for number in range(50):
            await conn.decisions(**question, resource_context={"id": number})
        assert built == once | {"IsRequest": 2 + 50}
        sent = IsRequest.FromString(connector.asked[-1])
        assert sent.resource_context.fields["id"].number_value == 49
        assert sent.identity_context.identity == "alice"


async def test_an_identity_is_encoded_once_for_all_questions(built):
    connector = answering(allowed=True)
    alice = Identity(IdentityType.SUB, "alice")
    async with make_pool(connector) as pool, pool.acquire() as conn:
        for number in range(20):
            await conn.decisions(policy_path=f"myapp.p{number}", identity=alice)
        assert built["IdentityContext"] == 1
        assert built["PolicyContext"] == 20
        for _ in range(20):
            await conn.decisions(policy_path="myapp.p0")
        assert built["IdentityContext"] <= 2, (
            "the anonymous identity, once in a process"
        )
        assert built["PolicyContext"] == 20
    sent = [IsRequest.FromString(request) for request in connector.asked]
    assert [one.identity_context.identity for one in sent] == ["alice"] * 20 + [""] * 20


async def test_changed_arguments_are_not_read_from_the_cache():
    connector = answering(allowed=True, visible=True)
    decisions = ["allowed"]
    async with make_pool(connector) as pool, pool.acquire() as conn:
        for name in ("alice", "bob"):
            for path in ("myapp.a", "myapp.b"):
                for instance in (None, "blue"):
                    await conn.decisions(
                        policy_path=path,
                        decisions=decisions,
                        identity=Identity(IdentityType.SUB, name),
                        policy_instance_name=instance,
                    )
        decisions.append("visible")
        await conn.decisions(policy_path="myapp.a", decisions=decisions)
    sent = [IsRequest.FromString(request) for request in connector.asked]
    assert [
        (
            one.identity_context.identity,
            one.policy_context.path,
            one.policy_instance.name,
        )
        for one in sent[:-1]
    ] == list(itertools.product(["alice", "bob"], ["myapp.a", "myapp.b"], ["", "blue"]))
    assert list(sent[0].policy_context.decisions) == ["allowed"]
    assert list(sent[-1].policy_context.decisions) == ["allowed", "visible"]


async def test_a_used_identity_keeps_its_repr_and_equality():
    token = "secret-token"
    used, fresh = (Identity(IdentityType.JWT, token) for _ in range(2))
    other = Identity(IdentityType.JWT, "another")
    async with make_pool(answering(allowed=True)) as pool, pool.acquire() as conn:
        await conn.decisions(policy_path="myapp.a", identity=used)
        await conn.decisions(policy_path="myapp.a", identity=other)
        assert used.encoded, "otherwise this test proves nothing"
        for text in (repr(used), str(used), f"{used}", repr([used])):
            assert token not in text
        assert repr(used) == repr(fresh)
        assert used == fresh
        assert hash(used) == hash(fresh)
        assert used != other
        # The request contains no data of another identity, and arrives unchanged.
        pickled = pickle.dumps(used)
        assert b"another" not in pickled
        arrived = pickle.loads(pickled)
        assert arrived == used
        assert repr(arrived) == repr(fresh)
        answer = await conn.decisions(policy_path="myapp.a", identity=arrived)
        assert answer == {"allowed": True}


async def test_no_cache_keeps_an_identity_alive():
    async with make_pool(answering(allowed=True)) as pool, pool.acquire() as conn:
        gone = []
        for number in range(10):
            identity = Identity(IdentityType.JWT, f"token-{number}")
            await conn.decisions(policy_path="myapp.a", identity=identity)
            gone.append(weakref.ref(identity))
        del identity
        gc.collect()
        assert [ref() for ref in gone] == [None] * 10


async def test_equal_answers_are_equal_and_separate_dicts():
    connector = answering(allowed=True, visible=False)
    async with make_pool(connector) as pool, pool.acquire() as conn:
        both = {"policy_path": "myapp.a", "decisions": ("allowed", "visible")}
        answers = [await conn.decisions(**both) for _ in range(5)]
        assert answers == [{"allowed": True, "visible": False}] * 5
        assert len(set(map(id, answers))) == 5
        answers[0]["visible"] = True
        answers[1].clear()
        assert answers[2:] == [{"allowed": True, "visible": False}] * 3
        again = await conn.decisions(**both)
        assert again == {"allowed": True, "visible": False}


async def test_the_caches_of_questions_and_answers_are_bounded():
    kept = _messages._question, _messages._decisions_of
    async with make_pool() as pool, pool.acquire() as conn:
        for number in range(3000):
            answer = IsResponse(
                decisions=[Decision(**{"decision": f"d{number}", "is": True})]
            ).SerializeToString()
            conn.connection.connector.answer = lambda _method, _request, a=answer: a
            names = (f"d{number}",)
            path = f"myapp.documents.d{number}"
            answer = await conn.decisions(policy_path=path, decisions=names)
            assert answer == dict.fromkeys(names, True)
    for cache in kept:
        info = cache.cache_info()
        assert info.currsize == info.maxsize <= 1024


# -- objects and memory ---------------------------------------------------------------


def ours():
    """Return the number of objects of this package, by class."""
    gc.collect()
    kinds = (type(each) for each in gc.get_objects())
    return Counter(
        kind.__qualname__
        for kind in kinds
        if str(kind.__module__).startswith("fastapi_topaz")
    )


async def cycle(pool, count):
    """Acquire and release, alone and in turn with another waiting task."""

    async def both():
        for _ in range(count // 20):
            async with pool.acquire():
                await anyio.lowlevel.checkpoint()

    for number in range(count - 2 * (count // 20)):
        async with pool.acquire():
            pass
        if not number % 100:
            await anyio.lowlevel.checkpoint()  # the pool's own tasks need turns
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(both)
        tasks.start_soon(both)


@pytest.mark.costly
@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_thousands_of_leases_leave_no_objects_and_no_memory(count):
    async with make_pool(max_connections=1) as pool:
        await cycle(pool, count // 5)
        objects = ours()
        tracemalloc.start()
        try:
            await cycle(pool, count // 5)
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            await cycle(pool, count)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert ours() == objects
        assert after - before < 16 * 1024
        assert pool._counters.acquisitions == count + 2 * (count // 5)
        assert pool.status().waiting == 0


MILLION = """
import gc, sys
import anyio, anyio.lowlevel, psutil
from fastapi_topaz import ConnectionPool
from fastapi_topaz.testing import FakeConnector, slow

async def main():
    async with ConnectionPool(connector=FakeConnector()) as pool:
        async def rss(count):
            for number in range(count):
                async with pool.acquire():
                    pass
                if not number % 100:
                    await anyio.lowlevel.checkpoint()
            gc.collect()
            return psutil.Process().memory_info().rss

        before = await rss(50_000)
        return await rss(1_000_000) - before

print(anyio.run(main, backend=sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_million_leases_do_not_grow_the_process(backend):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MILLION), backend],
        check=True,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert int(done.stdout) < 2**20


# -- files and threads ----------------------------------------------------------------


async def settled(measure, looks=40):
    """Return the value of *measure* once it was equal *looks* times in a row."""
    seen = []

    def same():
        seen.append(measure())
        return len(seen) >= looks and all(one == seen[-1] for one in seen[-looks:])

    await eventually(same)
    return seen[-1]


@pytest.mark.costly
@pytest.mark.real_clock
@pytest.mark.parametrize(
    "rounds",
    [
        pytest.param(1, id="100"),
        pytest.param(10, id="1000", marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
    ],
)
async def test_opened_and_closed_connections_leave_no_file_and_no_thread(
    rounds, embedded_authorizer
):
    authorizer = embedded_authorizer
    process = psutil.Process()

    def measure():
        return {
            "fds": process.num_fds(),
            "threads": threading.active_count(),
            "sockets": authorizer.connections_open,
        }

    async def open_and_close(count):
        pool = ConnectionPool(
            min_connections=count,
            max_connections=count,
            eager_init=True,
            connection_timeout=60,
        )
        pool.configure(authorizer.options)
        async with pool:
            assert pool.status().total == count
        await eventually(lambda: authorizer.connections_open == 0)

    # Files and threads that gRPC opens once in a process and keeps.
    await open_and_close(100)
    authorizer.reset_counters()
    before = await settled(measure)
    native = process.num_threads()
    for _ in range(rounds):
        await open_and_close(100)
    assert authorizer.connections_accepted == 100 * rounds
    await eventually_at_most(measure, before)
    # gRPC has a pool of non-Python threads, which grows by a few under load.
    await eventually(lambda: process.num_threads() <= native + 8)


# -- mass cancellation ----------------------------------------------------------------


rounds = pytest.mark.parametrize(
    "rounds", [1, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)

WAITERS = 1000


def crowded():
    """Return a pool with 12 streams, whose connections take a moment to connect."""
    return make_pool(
        FakeConnector(default=slow(0.002)),
        max_connections=4,
        streams_per_connection=3,
        acquire_timeout=1000,
    )


async def cancel_some(rng, pool, is_done, cancel):
    """Cancel many waiters at various moments, and return their numbers."""
    cancelled = set()
    living = list(range(WAITERS))
    for step in range(WAITERS):
        if not step % 10:
            living = [number for number in living if not is_done(number)]
        if not living:
            break
        # Half of them are about to be served: callers are served in order.
        near = rng.random() < 0.5
        number = rng.choice(living[:20] if near else living)
        if not is_done(number):
            cancel(number)
            cancelled.add(number)
        # Cancel some in one tick, some in the next ticks, some when leases were
        # returned, and some while leases wait for connections and not for each other.
        if rng.random() < 0.02:
            pool.drain()
        if rng.random() < 0.3:
            await anyio.lowlevel.checkpoint()
        if rng.random() < 0.1:
            await anyio.sleep(rng.uniform(0, 0.03))
    return cancelled


@rounds
async def test_1000_waiters_cancelled_at_random_lose_no_place(rounds):
    rng = random.Random(rounds)

    async def waiter(pool, scope, ended):
        with scope:
            async with pool.acquire():
                await anyio.sleep(rng.uniform(0.001, 0.02))
            # Otherwise an acquire() that swallows the cancellation would not be
            # noticed.
            await anyio.lowlevel.checkpoint_if_cancelled()
            ended.append("served")
        if scope.cancelled_caught:
            ended.append("cancelled")

    async with crowded() as pool:
        for _ in range(rounds):
            scopes = [anyio.CancelScope() for _ in range(WAITERS)]
            ends = [[] for _ in range(WAITERS)]
            async with anyio.create_task_group() as tasks:
                for scope, ended in zip(scopes, ends, strict=True):
                    tasks.start_soon(waiter, pool, scope, ended)
                await queued(pool, WAITERS - 12)
                cancelled = await cancel_some(
                    rng,
                    pool,
                    lambda number, ends=ends: ends[number],
                    lambda number, scopes=scopes: scopes[number].cancel(),
                )
            assert 100 < len(cancelled) < WAITERS - 100
            assert ends == [
                ["cancelled" if number in cancelled else "served"]
                for number in range(WAITERS)
            ]
            await assert_whole(pool)


@rounds
@asyncio_only
async def test_1000_waiters_cancelled_natively_lose_no_place_and_no_cancellation(
    rounds,
):
    rng = random.Random(rounds)

    async def waiter(pool):
        async with pool.acquire():
            await asyncio.sleep(rng.uniform(0.001, 0.02))
        return "served"

    async with crowded() as pool:
        for _ in range(rounds):
            tasks = [asyncio.create_task(waiter(pool)) for _ in range(WAITERS)]
            await queued(pool, WAITERS - 12)
            cancelled = await cancel_some(
                rng,
                pool,
                lambda number, tasks=tasks: tasks[number].done(),
                lambda number, tasks=tasks: tasks[number].cancel(),
            )
            await asyncio.wait(tasks)
            assert 100 < len(cancelled) < WAITERS - 100
            assert [
                "cancelled" if task.cancelled() else task.result() for task in tasks
            ] == [
                "cancelled" if number in cancelled else "served"
                for number in range(WAITERS)
            ]
            await assert_whole(pool)
