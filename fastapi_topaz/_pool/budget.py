"""The time in which the caller of a pool needs its answer."""

from __future__ import annotations

import anyio


__all__ = ["Budget"]


class Budget:
    """
    The time in which a check has to end; all its attempts share it.

    Args:
        seconds: How long, from now on.

    Attributes:
        seconds: The whole budget.
        sent: The seconds that were left when the last attempt got its connection, or
            None.
    """

    __slots__ = ("_deadline", "seconds", "sent")

    def __init__(self, seconds: float) -> None:
        self.seconds: float = seconds
        self.sent: float | None = None
        self._deadline = anyio.current_time() + seconds

    def left(self) -> float:
        """Return the seconds left, at least 0."""
        # Never more than the original budget, even if the loop's clock goes back.
        return min(self.seconds, max(0.0, self._deadline - anyio.current_time()))
