"""What the state of a pool is made of: slots for connections, and claims to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import attrs


if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["Claim", "Slot"]


@attrs.define(eq=False)
class Slot:
    """
    One slot for a connection, and what the pool knows about it.

    Strictly private. Compared by identity.
    """

    connection: Any = None
    leases: int = 0
    # Which round of connecting it was begun in, when, and whether others may be begun
    # in its stead because it takes so long.
    round: int = 0
    started_at: float = 0.0
    overdue: bool = False
    opened_at: float = 0.0
    # The same moment, as `perf_counter` has it.
    alive_since: float = 0.0
    last_used_at: float = 0.0
    # When it was made, a call was answered, or a probe was.
    proven_at: float = 0.0
    # Whether a call or a probe was ever answered on it: True if that was after the last
    # failure of the pool. So each answer stores a constant, and needs no comparison of
    # times, which may be equal.
    answered: bool | Literal["before"] = False
    # When a call last ended without an answer, its time being over.
    timed_out_at: float = float("-inf")
    expires_at: float = float("inf")
    # Accused by a call or a probe at that time: no new lease until a probe clears it.
    suspect: bool = False
    suspected_at: float = 0.0
    probing: bool = False
    # How often in a row the other side has refused, and when the next probe is due.
    refusals: int = 0
    probe_at: float = 0.0
    # One probe that ended too late to prove anything was repeated.
    excused: bool = False
    # Its siblings were told already that it broke.
    broken: bool = False
    last_error: str | None = None
    # Why it is to go. It closes when its last lease is back, because closing it
    # under a caller would fail that caller's call.
    retired: str | None = None

    def watch(self, connection: Any) -> None:
        """Ask *connection* from now on whether it is lost, if it can tell."""
        try:
            self.is_lost = getattr(connection, "is_lost", None)
        except Exception:  # noqa: BLE001  (a connection may raise anything)
            self.is_lost = None

    def is_gone(self) -> bool:
        """Say whether the connection says that its other side has gone away."""
        if self.is_lost is None:
            return False
        try:
            return bool(self.is_lost())
        except Exception as error:  # noqa: BLE001  (a connection may raise anything)
            # It cannot tell, and is not asked again.
            self.is_lost = None
            self.last_error = f"is_lost() raised {type(error).__name__}"
            return False

    # Tells whether the other side has gone away, if the connection can tell.
    is_lost: Callable[[], bool] | None = None


class Claim:
    """
    One caller's claim to a stream: waiting, then served, then given back.

    Strictly private. Also the borrower of the caller's token in the limiter, so
    that nothing the caller holds is kept alive by the pool.
    """

    # Defaults of the class and no __init__: one is made for each acquire(), most end
    # with only the first two ever set, and setting all took longer than all else here.
    slot: Slot | None = None
    # When it was served: by `perf_counter`, and by the clock of the pool, which only
    # the search for leaks needs.
    held_since = 0.0
    acquired_at = 0.0
    # How long it was waited for.
    waited = 0.0
    failure: Exception | None = None
    # Its handle was used in a wrong way, which raised an error: dropping it is no leak.
    refused = False
    # The coroutine of the task that waits for it.
    waiter: object = None
    # Until when it may wait, and whether it was sent away: then, or with the failure.
    deadline = float("inf")
    dismissed = False
    # Whether the limiter has lent it a token, as far as the caller knows by now, and
    # what wakes a caller that holds one and sleeps until it is served.
    has_token = False
    wake: Callable[[], None] | None = None
