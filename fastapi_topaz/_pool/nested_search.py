"""How often a pool searches for nested leases. The search itself is in `nesting`."""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastapi_topaz._pool.state.pool_state import PoolState


__all__ = ["NestedSearch"]


KEPT_FOR = 0.1
"""Seconds for which the result of a search is used. It takes a millisecond."""

MOST = 100
"""The most waiting tasks in one search."""


class NestedSearch:
    """
    Counts the leases of one open pool that tasks hold while they wait for another one.

    Strictly private.

    Args:
        count: Counts the leases that some tasks hold.
        state: The state of the pool.
        now: Returns the time in seconds.
    """

    __slots__ = ("_at", "_count", "_found", "_now", "_state")

    def __init__(
        self,
        count: Callable[[Iterator[object]], int],
        state: PoolState,
        now: Callable[[], float],
    ) -> None:
        self._count = count
        self._state = state
        self._now = now
        self._found, self._at = (0, 0), -math.inf

    def __call__(self) -> tuple[int, int]:
        """
        Return the number of leases held by tasks that wait for another one, and of all.

        The first number is a lower bound; it is 0 if it is less than half of all. Both
        numbers are up to `KEPT_FOR` seconds old, because a search takes time.
        """
        now, in_use = self._now(), self._state.in_use
        if in_use >= self._state.limit:
            if now - self._at >= KEPT_FOR:
                waiting = islice(self._state.waiting, MOST)
                held = self._count(claim.waiter for claim in waiting)
                # A few nested leases do not explain a timeout: a pool that is too small
                # also has some. If at least half of all leases are nested, the error
                # names them as the cause.
                self._found = (held if 2 * held >= in_use else 0, in_use)
                self._at = now
        elif now - self._at >= KEPT_FOR:
            return 0, 0
        return self._found
