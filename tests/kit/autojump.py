"""An asyncio loop in virtual time: it jumps to the next timer instead of sleeping."""

from __future__ import annotations

import asyncio
import selectors

import trio


class AutojumpSelector(selectors.DefaultSelector):
    """Adds the timeout to the loop's clock when nothing is ready."""

    loop: AutojumpLoop

    def select(self, timeout=None):
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = super().select(0)
        if not ready:
            self.loop.now += timeout
        return ready


class AutojumpLoop(asyncio.SelectorEventLoop):
    """A loop with a clock that starts at 0 and moves only when every task waits."""

    def __init__(self):
        self.now = 0.0
        selector = AutojumpSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self):
        return self.now


def jump(seconds):
    """
    Move the virtual clock of the running loop, on both backends, but fire no timer.
    """
    try:
        asyncio.get_running_loop().now += seconds
    except RuntimeError:
        # Not `jump()`, which only moves it forwards.
        trio.lowlevel.current_clock()._virtual_base += seconds
