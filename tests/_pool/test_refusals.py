"""Test the messages of the errors of acquire()."""

from __future__ import annotations

import re

import anyio
import anyio.lowlevel
import pytest

from fastapi_topaz import ConnectFailed, PoolClosed, PoolMisuse, PoolTimeout
from fastapi_topaz.testing import FakeConnector, fail, hang, slow
from kit.pools import make_pool, queued


async def test_a_timeout_error_has_the_last_failure():
    connector = FakeConnector(default=fail("nobody there"))
    async with make_pool(connector, acquire_timeout=0) as pool:
        with pytest.raises(PoolTimeout) as caught:
            await pool.acquire()
        assert caught.value.__cause__ is None
        assert "failed" not in str(caught.value)
        await anyio.sleep(0.01)
        failed = "; the last attempt to connect failed: nobody there"
        with pytest.raises(PoolTimeout, match=failed) as caught:
            await pool.acquire()
        assert str(caught.value.__cause__) == "nobody there"


async def test_a_timeout_error_in_an_outage_has_the_refusal_of_the_server():
    connector = FakeConnector(answer=lambda _method, request: request)
    async with make_pool(connector, max_connections=1) as pool:
        async with pool.acquire() as conn:
            conn.connection.refuses = "503"
            with pytest.raises(ConnectionRefusedError):
                await conn.call("/a/b", b"?")
        with pytest.raises(ConnectFailed):
            await pool.acquire(timeout=1)
        refused = r"connecting=0\); fake answers that its server is not available: 503"
        with pytest.raises(PoolTimeout, match=refused):
            await pool.acquire(timeout=0)


async def test_a_timeout_error_says_whether_all_leases_are_out():
    connector = FakeConnector(default=slow(2))
    async with make_pool(connector, max_connections=2) as pool, pool.acquire():
        with pytest.raises(PoolTimeout) as caught:
            await pool.acquire(timeout=1)
        assert "leases are out" not in str(caught.value)
        async with pool.acquire():
            with pytest.raises(PoolTimeout, match="all 2 leases are out"):
                await pool.acquire(timeout=1)


async def test_a_timeout_error_of_a_check_names_the_adaptive_limit():
    limited = "all 16 leases are out that the server can answer .* reason start"
    options = {"max_connections": 1, "streams_per_connection": 50}

    async def hold():
        async with pool.acquire(budget=5):
            await anyio.sleep_forever()

    async with make_pool(**options) as pool, anyio.create_task_group() as tasks:
        for _ in range(16):
            tasks.start_soon(hold)
        await anyio.sleep(0.1)
        assert pool.status().limit == pool.status().streams_in_use
        with pytest.raises(PoolTimeout, match=limited):
            await pool.acquire(timeout=1, budget=5)
        tasks.cancel_scope.cancel()


async def test_an_error_of_overload_shows_short_times_with_two_digits():
    async with make_pool() as pool:
        error = pool._open_pool._refusals.overloaded(0.034, 0.9)
        assert "about 0.034 s of queue for fake, 0.9 s of budget" in str(error)


async def test_a_misuse_in_a_connector_is_misuse_for_the_caller():
    misuse = PoolMisuse("its channel belongs to another loop")
    async with make_pool(FakeConnector(default=fail(misuse))) as pool:
        with pytest.raises(PoolMisuse) as caught:
            await pool.acquire()
        assert str(caught.value) == f"the pool: {misuse}"
        assert caught.value is not misuse
        failed = caught.value.__cause__
        assert isinstance(failed, ConnectFailed)
        assert failed.__cause__ is misuse


async def test_a_failed_caller_gets_the_message_of_the_attempt():
    error = ConnectFailed("no", reason="tls", permanent=True)
    async with make_pool(FakeConnector(default=fail(error))) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire()
        assert (caught.value.reason, caught.value.permanent) == ("tls", True)
        assert caught.value.__cause__ is error


async def test_a_timed_out_attempt_is_not_permanent():
    connector = FakeConnector(default=hang())
    async with make_pool(connector, max_retries=0, connection_timeout=1) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire()
        assert (caught.value.reason, caught.value.permanent) == ("timeout", False)


async def test_each_acquire_error_ends_with_the_counts():
    async with make_pool(max_connections=2, connector=FakeConnector([slow(2)])) as pool:
        with pytest.raises(PoolTimeout) as caught:
            await pool.acquire(timeout=1)
        assert str(caught.value).endswith("connecting=1)")
    connector = FakeConnector(default=fail("no"))
    async with make_pool(connector, max_retries=0) as pool:
        with pytest.raises(ConnectFailed) as caught:
            await pool.acquire()
        assert re.search(r": no \(total=0 .*\)$", str(caught.value))
    async with make_pool(max_connections=1) as pool, anyio.create_task_group() as tasks:
        held = await pool.acquire()

        async def caller():
            with pytest.raises(PoolClosed) as caught:
                await pool.acquire()
            assert "closed while waiting (total=" in str(caught.value)

        tasks.start_soon(caller)
        await queued(pool, 1)
        await pool.close(0)
        await pool.release(held)


async def test_a_failure_without_details_is_not_permanent():
    async with make_pool() as pool:
        error = pool._open_pool._refusals.failed(OSError("no"))
        assert (error.reason, error.permanent) == ("other", False)


class Nameless:
    """A connector without the address of its server."""

    async def connect(self, timeout, /):
        return await FakeConnector().connect(timeout)

    def __repr__(self):
        return "somewhere"


class Unspeakable(Nameless):
    def __repr__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "connector, target", [(Nameless(), "somewhere"), (Unspeakable(), "Unspeakable")]
)
async def test_a_connector_without_a_target_is_shown_by_its_class(connector, target):
    async with make_pool(connector) as pool, pool.acquire() as conn:
        assert repr(conn) == f"<PooledConnection to {target} leased>"


async def test_an_invalid_timeout_is_named():
    with pytest.raises(ValueError, match="timeout must be at least 0 seconds"):
        make_pool().acquire(timeout=-1)
