"""
Equal questions at the same time share one call: the first caller asks for all.

No task is started, and no caller is shielded. If the caller that asks is cancelled, one
of the others asks, and the rest wait for that one.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import anyio
import grpc

from fastapi_topaz._error_text import safe_text
from fastapi_topaz._rpc.statuses import EndedCall, Ending
from fastapi_topaz.exceptions import TopazError


if TYPE_CHECKING:
    from fastapi_topaz._decisions.question import Decision
    from fastapi_topaz._pool.budget import Budget


__all__ = ["Flight"]


class Flight:
    """
    A question under way, and its end.

    Exactly one of three things ends it: a decision, an error, or the cancellation of
    the caller that asks. In the last case, `decision` and `error` stay None.

    Args:
        number: The number of the question; see `Invalidations`.
        asked_at: When the authorizer was asked.
        took_over: Whether an earlier caller was cancelled. Then the time that is left
            may be much shorter than `check_timeout`.

    Attributes:
        decision: The answer, once it is there.
    """

    __slots__ = (
        *("_error", "_landed", "_over", "_waiting", "asked_at", "decision"),
        *("number", "took_over"),
    )

    def __init__(self, number: int, asked_at: float, took_over: bool) -> None:
        self.number = number
        self.asked_at = asked_at
        self.took_over = took_over
        self.decision: Decision | None = None
        self._error: Exception | None = None
        self._waiting = 0
        self._over = False
        # Made by the first follower. Most questions have none.
        self._landed: anyio.Event | None = None

    async def wait(self, budget: Budget) -> None:
        """
        Wait until this ends, within the *budget* of the follower.

        Raises:
            Exception: A copy of the error of the caller that asked, which is its cause.
            grpc.aio.AioRpcError: DEADLINE_EXCEEDED: the budget ended first.
        """
        if self._landed is None:
            self._landed = anyio.Event()
        self._waiting += 1
        error: Exception | None = None
        try:
            with anyio.move_on_after(budget.left()):
                await self._landed.wait()
            error = self._error
        finally:
            self._waiting -= 1
            if not self._waiting:
                # It leads to the frames of the other caller, and so to its request.
                self._error = None
        if not self._over:
            raise EndedCall(
                Ending.TIMED_OUT,
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "an equal check is under way, and had no answer within check_timeout "
                f"({budget.seconds:g} s)",
            )
        try:
            if error is not None:
                raise _copy_of(error) from error
        finally:
            # It leads to this frame, which would lead to it.
            del error

    def fail(self, error: Exception, budget: Budget) -> None:
        """
        Have the followers fail as the caller that asked did, with *error*.

        If that caller took over, it may have had no time left. Then it says nothing
        about the authorizer, so another one asks.
        """
        if self._waiting and not (self.took_over and budget.left() <= 0):
            self._error = error

    def end(self) -> None:
        """Wake the followers."""
        self._over = True
        if self._landed is not None:
            self._landed.set()


def _copy_of(error: Exception) -> Exception:
    """Return a new exception like *error*, as two tasks must not raise the same one."""
    try:
        twin: Any = copy.copy(error)
    except Exception:  # noqa: BLE001  (a class of the application, whose code may raise)
        twin = None
    # Some classes are copied as their base class.
    if isinstance(twin, Exception) and isinstance(error, type(twin)):
        return twin
    return TopazError(f"the call that equal checks share failed: {safe_text(error)}")
