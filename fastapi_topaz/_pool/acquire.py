"""The result of `pool.acquire()`: an awaitable and asynchronous context manager."""

from __future__ import annotations

import inspect
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from fastapi_topaz._pool.handle import Handle
from fastapi_topaz._pool.interrupts import protected
from fastapi_topaz._slips import LEASE_FORM, NotAsync, explain_absence
from fastapi_topaz.exceptions import PoolMisuse


if TYPE_CHECKING:
    from collections.abc import Generator
    from types import FrameType, TracebackType

    from fastapi_topaz._pool.budget import Budget


__all__ = ["Acquire", "explain_missing_await"]


H = TypeVar("H", bound=Handle)


class Lender(Protocol[H]):
    """The methods of the pool that `Acquire` needs."""

    def _acquire_nowait(self, budget: Budget | None) -> H | None: ...

    async def _acquire(self, timeout: float | None, budget: Budget | None) -> H: ...

    def _release(self, conn: H) -> None: ...


class Acquire(NotAsync, Generic[H]):
    """
    The result of `pool.acquire()`: await it, or enter it with `async with`.

    Strictly private.
    """

    _conn: H | None = None
    _entered = False
    _right_form = LEASE_FORM

    # The time within which the whole use of the lease must end. None: no limit.
    budget: Budget | None = None

    def __init__(self, pool: Lender[H], timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout

    def __repr__(self) -> str:
        # create_task() and similar functions need a coroutine and show this repr() in
        # their error.
        return (
            "<pool.acquire(), which is neither a coroutine nor a connection: "
            f"{LEASE_FORM}; to run it in a task, write an async function with this "
            "line>"
        )

    @protected
    def __await__(self) -> Generator[Any, Any, H]:
        conn = self._pool._acquire_nowait(self.budget)  # noqa: SLF001
        if conn is None:
            waiting = self._pool._acquire(self._timeout, self.budget)  # noqa: SLF001
            del self  # a traceback keeps this frame, and so its locals, alive
            conn = yield from waiting.__await__()
        return conn

    @protected
    async def __aenter__(self) -> H:
        if self._entered:
            raise PoolMisuse("this acquire() is entered already; call acquire() again")
        # Set before the wait. Otherwise a second task could enter this object during
        # the wait, and the lease of the first one would be lost.
        self._entered = True
        try:
            budget = self.budget
            conn = self._pool._acquire_nowait(budget)  # noqa: SLF001
            if conn is None:
                conn = await self._pool._acquire(self._timeout, budget)  # noqa: SLF001
        except BaseException:
            self._entered = False
            del self  # a traceback keeps this frame, and so its locals, alive
            raise
        self._conn = conn
        return conn

    @protected
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del exc, traceback  # otherwise this frame keeps both alive
        conn, self._conn = self._conn, None
        self._entered = False
        # The caller released it inside the block already.
        if conn is None or conn._claim is None:  # noqa: SLF001
            return
        if exc_type is GeneratorExit and not _is_orderly_end(conn):
            # The garbage collector may be ending this task. That can happen in the
            # middle of a change of the pool's state. So the event loop releases the
            # lease later.
            conn._open_pool.owner.call_soon(partial(self._give_back, conn))  # noqa: SLF001
        else:
            self._pool._release(conn)  # noqa: SLF001

    def _give_back(self, conn: H) -> None:
        if conn._claim is not None:  # noqa: SLF001
            self._pool._release(conn)  # noqa: SLF001

    if not TYPE_CHECKING:  # see `_slips`

        def __iter__(self):  # noqa: ANN204
            raise TypeError(f"pool.acquire() cannot be iterated: {LEASE_FORM}")

        __aiter__ = __iter__


def explain_missing_await(acquire: type[Acquire[Any]], handle: type[Handle]) -> None:
    """
    Make each public attribute of *handle* an error on *acquire* that shows the remedy.

    The mistake is `conn = pool.acquire()` without `await`.
    """
    # Not by __getattr__, which would slow down each access to an attribute.
    # asyncio.wait() looks for the last name.
    names = (*dir(handle), "add_done_callback")
    explain_absence(acquire, "pool.acquire() is not a connection", names)


explain_missing_await(Acquire, Handle)


_CHANGES_STATE = {
    f"fastapi_topaz._pool.{module}"
    for module in (
        *("open_pool", "leaks", "clock", "background", "connections", "readiness"),
        *("state.pool_state", "state.attempts", "state.rotation"),
    )
}


def _is_orderly_end(conn: Handle) -> bool:
    """
    Return whether a GeneratorExit comes from an orderly end of an async generator.

    Then the lease *conn* can be released at once. Garbage collection also ends
    coroutines with GeneratorExit, at any moment. If it interrupts a function of the
    pool, that function is on the stack, and a release would change the state under it.
    """
    if not conn._open_pool.owner.is_current_loop():  # noqa: SLF001
        return False
    frame: FrameType | None = sys._getframe()  # noqa: SLF001
    generator = False
    while frame is not None:
        if frame.f_globals.get("__name__") in _CHANGES_STATE:
            return False
        generator |= bool(frame.f_code.co_flags & inspect.CO_ASYNC_GENERATOR)
        frame = frame.f_back
    return generator
