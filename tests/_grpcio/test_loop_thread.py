"""Test the thread whose asyncio loop drives gRPC on trio."""

from __future__ import annotations

import threading

import pytest
import trio

from fastapi_topaz import ConnectFailed, ConnectionPool
from kit.threads import in_a_thread


# Far longer than a test takes.
PATIENCE = 20.0


@pytest.mark.parametrize("anyio_backend", ["trio"], indirect=True)
async def test_an_error_is_raised_where_it_is_awaited():
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


def test_a_result_after_the_end_of_trio_is_dropped():
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
async def test_a_loop_that_cannot_be_created_is_a_failed_attempt(
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


def test_a_bug_in_the_loop_thread_is_reported(monkeypatch):
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
