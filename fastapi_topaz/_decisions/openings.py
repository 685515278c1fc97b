"""In which opening of its pool a question is asked: no answer outlives an opening."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from fastapi_topaz._decisions.keys import Keys


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastapi_topaz._authorizer.pool import ConnectionPool
    from fastapi_topaz._decisions.flights import Flight


__all__ = ["Opening", "Openings"]


class Opening:
    """
    One opening of the pool: one process, one event loop, and one authorizer.

    Attributes:
        keys: Makes its keys. Keys of two openings are never equal.
        flights: The questions under way, by key.
    """

    __slots__ = ("flights", "keys")

    def __init__(self) -> None:
        self.keys = Keys()
        self.flights: dict[bytes, Flight] = {}


class Openings:
    """
    Finds the opening of a pool.

    Args:
        pool: Returns the pool. An application may replace that of its configuration.
        companion: Runs as long as the pool is open, if given.
    """

    def __init__(
        self,
        pool: Callable[[], ConnectionPool],
        companion: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._pool = pool
        self._companion = companion
        self._opening: Opening | None = None
        self._known: Callable[[], Any] = lambda: None

    def current(self) -> Opening | None:
        """
        Return the opening in which a question is asked now; opens the pool if needed.

        Returns:
            None if the pool is not open here. Then the question must go to the pool,
            which raises the error, or waits.
        """
        pool = self._pool()
        open_pool = pool._open_pool  # noqa: SLF001
        if open_pool is None or not open_pool.owner.is_current_loop():
            try:
                open_pool = pool._first_use()  # noqa: SLF001
            except Exception:  # noqa: BLE001  (acquire() raises it again)
                return None
        if open_pool.state.shut:
            return None
        if self._opening is None or self._known() is not open_pool:
            # Weakly: a closed pool can be collected.
            self._known = weakref.ref(open_pool)
            self._opening = Opening()
            if self._companion is not None:
                pool._accompany(self._companion)  # noqa: SLF001
        return self._opening
