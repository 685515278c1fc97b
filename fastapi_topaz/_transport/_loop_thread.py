"""
The asyncio loop on which gRPC runs when the application runs on trio.

One thread serves the whole process, for as long as somebody holds it: every
connection does, from its first attempt to its end. So the thread comes with the
first connection and is gone when the last one is closed.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, ClassVar


if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["LoopThread"]


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

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
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
        self._stopping = asyncio.Event()
        self._started.set()
        await self._stopping.wait()
        # gRPC's tasks of calls cancelled a moment ago end by themselves; cutting
        # them off prints "Task was destroyed but it is pending".
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        if rest:
            await asyncio.wait(rest, timeout=2)
