"""An authorizer that knows which worker asks, and can delay the answer on request."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import TYPE_CHECKING

import psutil

from fastapi_topaz.testing import EmbeddedAuthorizer


if TYPE_CHECKING:
    from fastapi_topaz.testing import Check


__all__ = ["Authorizer"]


class Authorizer(EmbeddedAuthorizer):
    """
    Allows all checks of `kit.workers.app`, and `held` after `let_go`.

    Attributes:
        asked: How many checks came from each process.
        holding: How many checks of each process wait for `let_go`.
        peak: The maximum number of open sockets when a check came.
    """

    def __init__(self) -> None:
        super().__init__(
            {"workers.GET.quick": self._quick, "workers.GET.held": self._held}
        )
        self.asked: Counter[int] = Counter()
        self.holding: Counter[int] = Counter()
        self.peak = 0
        self._free = threading.Event()

    def _quick(self, check: Check) -> bool:
        self.asked[int(check.resource["pid"])] += 1
        self.peak = max(self.peak, self.connections_open)
        return True

    async def _held(self, check: Check) -> bool:
        pid = int(check.resource["pid"])
        self._quick(check)
        self.holding[pid] += 1
        try:
            # Set in another thread, so it is not an event of this loop.
            while not self._free.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        finally:
            self.holding[pid] -= 1
        return True

    def let_go(self) -> None:
        """Answer held checks, and later ones at once."""
        self._free.set()

    def sockets(self) -> set[int]:
        """Return the local ports of connected clients, as the server sees them."""
        return {
            connection.raddr.port
            for connection in psutil.Process().net_connections("tcp")
            if connection.laddr.port == self.port and connection.raddr
        }

    def sockets_of(self, pid: int) -> set[int]:
        """Return the ports that belong to the process *pid*."""
        return {
            connection.laddr.port
            for connection in psutil.Process(pid).net_connections("tcp")
            if connection.raddr and connection.raddr.port == self.port
        }
