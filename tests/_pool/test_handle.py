"""Test leases: the arguments of calls, the effect of failures, and the release."""

from __future__ import annotations

import itertools
import math

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import PoolError, PoolTimeout
from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz.testing import FakeConnector
from kit.pools import MakingAny, make_pool
from kit.threads import in_a_thread


async def test_a_connection_without_call_support_carries_no_calls():
    class Plain:
        async def probe(self, timeout):
            pass

        async def close(self, grace):
            pass

    class Plainly(FakeConnector):
        async def connect(self, timeout):
            return Plain()

    async with make_pool(Plainly()) as pool, pool.acquire() as conn:
        with pytest.raises(TypeError, match="carries no gRPC calls"):
            await conn.info()
        assert isinstance(conn.connection, Plain)


@pytest.mark.parametrize("metadata", [["key"], [("key",)], [("a", "b", "c")], [7]])
async def test_metadata_that_is_not_pairs_is_rejected_without_showing_it(metadata):
    async with make_pool() as pool, pool.acquire() as conn:
        with pytest.raises(TypeError, match="metadata must be pairs of str, got a"):
            await conn.call("/a/b", b"", metadata=metadata)
        assert conn.connection.calls == 0


# -- returning leases ---------------------------------------------------------------


async def test_a_lease_cannot_be_released_on_another_loop():
    async with make_pool(name="main") as pool:
        conn = await pool.acquire()
        error = in_a_thread(lambda: anyio.run(pool.release, conn))
        assert isinstance(error, PoolError)
        assert "pool 'main' is open on the event loop" in str(error)
        assert pool.status().streams_in_use == 1
        await pool.release(conn)
        assert pool.status().streams_in_use == 0


async def test_a_lease_released_before_its_destroyed_block_ends_returns_once():
    async with make_pool(max_connections=1) as pool:
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
            # By now the loop has run a turn.
            await anyio.sleep(1)
            assert pool.status().streams_in_use == 1


async def test_a_failed_acquire_can_be_entered_again():
    async with make_pool(max_connections=1) as pool:
        acquire = pool.acquire(timeout=0)
        async with pool.acquire():
            with pytest.raises(PoolTimeout):
                await acquire.__aenter__()
        async with acquire as conn:
            assert await conn.call("/a.B/C", b"works") == b"works"


def test_a_lease_of_a_closed_pool_is_released_once_on_any_loop():
    async def leave(pool):
        conn = await pool.acquire()
        await pool.close(0)
        return conn

    for first, second in itertools.product(["asyncio", "trio"], repeat=2):
        pool = make_pool()
        conn = anyio.run(leave, pool, backend=first)
        anyio.run(pool.release, conn, backend=second)
        with pytest.raises(ValueError, match="was released to the pool before"):
            anyio.run(pool.release, conn, backend=second)


# -- failed calls -------------------------------------------------------------------


class Plain:
    """A connection with calls and probes, and without `judge`."""

    probes = 0

    async def call(self, method, request, **options):
        raise ZeroDivisionError

    async def probe(self, timeout, /):
        self.probes += 1

    async def close(self, grace, /):
        pass


class Judging(Plain):
    def judge(self, error, /):
        return Verdict.UNAVAILABLE


async def test_a_connection_without_a_verdict_is_neither_blamed_nor_probed(caplog):
    async with make_pool(MakingAny(Plain)) as pool, pool.acquire() as conn:
        with pytest.raises(ZeroDivisionError):
            await conn.call("/a.B/C", b"")
        await anyio.sleep(0.1)
        assert conn.connection.probes == 0
        assert pool.connections()[0].last_error is None
        assert not [r for r in caplog.records if r.levelname == "WARNING"]


async def test_only_the_unavailable_connection_is_probed_at_once():
    async with make_pool(MakingAny(Judging), max_connections=2) as pool:
        first, second = [await pool.acquire() for _ in range(2)]
        await anyio.sleep(5)
        with pytest.raises(ZeroDivisionError):
            await first.call("/a.B/C", b"")
        slot = first._claim.slot
        assert slot.suspect
        assert slot.suspected_at == anyio.current_time()
        await anyio.sleep(0.1)
        assert not slot.suspect
        assert (first.connection.probes, second.connection.probes) == (1, 0)
        for conn in (first, second):
            await pool.release(conn)


# -- arguments of calls -------------------------------------------------------------


class Recording(Plain):
    """
    A connection that answers each call with its request and records its arguments.
    """

    async def call(self, method, request, **options):
        self.got = method, request, options
        return request


async def test_a_call_passes_its_arguments_to_the_connection():
    metadata = (("x-tenant", "a b"), ["x-key-bin", b"\0\xff"])
    async with make_pool(MakingAny(Recording)) as pool, pool.acquire() as conn:
        answer = await conn.call(
            "/a.B/C",
            "text",
            request_serializer=str.encode,
            response_deserializer=bytes.upper,
            timeout=3,
            metadata=metadata,
        )
        assert answer == b"TEXT"
        options = {"timeout": 3, "metadata": metadata}
        assert conn.connection.got == ("/a.B/C", b"text", options)
        assert await conn.call("/a.B/D", b"bytes") == b"bytes"
        options = {"timeout": None, "metadata": ()}
        assert conn.connection.got == ("/a.B/D", b"bytes", options)


@pytest.mark.parametrize(
    "timeout, carried",
    [(0, 0), (0.0, 0.0), (0.25, 0.25), (7, 7), (10**12, None), (1e12, None)],
)
async def test_a_call_passes_its_timeout_unless_it_is_very_long(timeout, carried):
    async with make_pool(MakingAny(Recording)) as pool, pool.acquire() as conn:
        await conn.call("/a.B/C", b"", timeout=timeout)
        assert conn.connection.got[2]["timeout"] == carried


@pytest.mark.parametrize("timeout", [-1, -1.0, math.inf, math.nan])
async def test_a_call_rejects_an_invalid_timeout(timeout):
    async with make_pool(MakingAny(Recording)) as pool, pool.acquire() as conn:
        with pytest.raises(ValueError, match=r"^timeout must be "):
            await conn.call("/a.B/C", b"", timeout=timeout)


@pytest.mark.parametrize(
    "metadata, error",
    [
        (iter([("key", "value")]), TypeError),
        ({"key": "value"}, TypeError),
        ([("Key", "value")], ValueError),
        ([("key", 7)], TypeError),
        ([("key", b"value")], TypeError),
        ([("key-bin", "value")], TypeError),
        ([("key", "one\ntwo")], ValueError),
        ([("key", "\xe9")], ValueError),
    ],
)
async def test_a_call_rejects_metadata_that_grpc_cannot_send(metadata, error):
    async with make_pool(MakingAny(Recording)) as pool, pool.acquire() as conn:
        with pytest.raises(error, match=r"^metadata "):
            await conn.call("/a.B/C", b"", metadata=metadata)
        assert not hasattr(conn.connection, "got")
