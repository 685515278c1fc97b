"""
The asyncio loop on which gRPC runs when the application runs on trio.

One thread serves the whole process, for as long as somebody holds it: every
connection does, from its first attempt to its end. So the thread comes with the
first connection and is gone when the last one is closed.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

import trio


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


__all__ = ["LoopThread"]


P = ParamSpec("P")
T = TypeVar("T")


class _Landing:
    """
    What a call that begins in trio's thread has for a future, and no more than that.

    It is awaited by the coroutine of that call alone, whose steps are all taken by
    trio. So the one callback is there before trio has a turn to call it, and no lock is
    needed; the thread of the loop only tells that the time has come.
    """

    __slots__ = ("_asyncio_future_blocking", "_callback", "_error", "_token")

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._error: BaseException | None = None

    def __await__(self) -> Iterator[_Landing]:
        yield self
        if self._error is not None:
            raise self._error

    def add_done_callback(self, callback: Callable[[_Landing], object]) -> None:
        self._callback = callback

    def set_result(self, _result: object) -> None:
        """Have the callback called in trio's thread; called in that of the loop."""
        try:  # noqa: SIM105  (once for each call, and two calls less)
            self._token.run_sync_soon(self._land)
        except trio.RunFinishedError:
            pass  # nobody left to tell

    def set_exception(self, error: BaseException) -> None:
        """Have the error raised where it is awaited."""
        self._error = error
        self.set_result(None)

    def cancelled(self) -> bool:
        """Say no: nobody cancels it."""
        return False

    done = cancelled

    def _land(self) -> None:
        self._callback(self)


class _Loop(asyncio.SelectorEventLoop):
    """A loop on which gRPC calls can be begun in trio's thread."""

    owner: int | None = None

    def create_future(self) -> Any:
        """Return a future that belongs where it is made: here, or in trio's thread."""
        if self.owner in (None, threading.get_ident()):
            return super().create_future()
        return _Landing()


class LoopThread:
    """
    A thread that runs an asyncio loop.

    Strictly private.
    """

    _lock: ClassVar = threading.Lock()
    _shared: ClassVar[LoopThread | None] = None

    def __init__(self) -> None:
        self._holders = 0
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._on_exit: Callable[[], None] | None = None
        self._thread = threading.Thread(
            target=self._main, name="fastapi_topaz gRPC", daemon=True
        )

    @classmethod
    def hold(cls) -> LoopThread:
        """
        Return the process's loop thread, running; pair with `let_go`.

        Raises:
            OSError: It cannot have a loop, as when no file descriptor is left.
        """
        with cls._lock:
            self = cls._shared
            if self is None:
                self = cls()
                # About 0.2 ms, once: the thread only has to enter its loop.
                self._thread.start()
                self._started.wait()
                if self._failure is not None:
                    self.join()
                    raise self._failure
                cls._shared = self
            self._holders += 1
            return self

    def let_go(self, on_exit: Callable[[], None]) -> bool:
        """
        Give the thread back; the last holder stops it.

        Returns:
            True if that was the last one; *on_exit* is then called in the thread as
            the last thing it does, and `join()` will not take long after that.
        """
        with self._lock:
            self._holders -= 1
            if self._holders:
                return False
            LoopThread._shared = None
        self._on_exit = on_exit
        self.call_soon(self._stopping.set)
        return True

    def call_soon(self, function: Callable[..., object], *args: object) -> None:
        """Call *function* in the loop, soon; callable from any thread."""
        self.loop.call_soon_threadsafe(function, *args)

    def lend(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *function* here and now, as if the loop ran in this thread."""
        # gRPC looks for the loop of a call it begins. There may be another one here:
        # trio can be the guest of asyncio.
        before = asyncio._get_running_loop()  # noqa: SLF001
        asyncio._set_running_loop(self.loop)  # noqa: SLF001
        try:
            return function(*args, **kwargs)
        finally:
            asyncio._set_running_loop(before)  # noqa: SLF001

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_Loop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            if self._started.is_set():
                raise
            # Somebody waits for the start, and would wait for ever.
            self._failure = error
            self._started.set()
        if self._on_exit is not None:
            self._on_exit()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        assert isinstance(self.loop, _Loop)  # noqa: S101
        self.loop.owner = threading.get_ident()
        self._stopping = asyncio.Event()
        self._started.set()
        await self._stopping.wait()
        # gRPC's tasks of calls cancelled a moment ago end by themselves; cutting
        # them off prints "Task was destroyed but it is pending".
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        if rest:  # pragma: no cover  (if calls were cancelled just then)
            await asyncio.wait(rest, timeout=2)
