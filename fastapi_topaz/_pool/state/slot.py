"""The records of a pool's state: slots for connections, and claims of callers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, final

import attrs


if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi_topaz._pool.state.status import CloseReason


__all__ = ["Check", "Claim", "Slot"]


@attrs.define(eq=False)
class Slot:
    """
    Room for one connection, and what the pool knows about that connection.

    Strictly private. Compared by identity. All times are seconds on the pool's clock.
    """

    connection: Any = None
    leases: int = 0
    # The maximum number of leases: the option, or fewer if the server allows fewer.
    streams: int = 1
    # The round of attempts to which this attempt belongs, and when it began.
    round: int = 0
    started_at: float = 0.0
    # The attempt takes so long that other attempts may begin in its place.
    overdue: bool = False
    # It was not needed lately: it gets new leases only if the others are full.
    rests: bool = False
    opened_at: float = 0.0
    # When the pool grew by it. A replacement has the time of the slot that it replaces.
    grown_at: float = 0.0
    last_used_at: float = 0.0
    # When the connection last proved that it works: it was opened, or a call or a probe
    # was answered.
    proven_at: float = 0.0
    # False: no call or probe was ever answered. True: one was, after the last failure
    # of the pool. "before": only before that failure. These are flags and not times,
    # because two times may be equal.
    answered: bool | Literal["before"] = False
    # When a call last timed out without an answer.
    timed_out_at: float = float("-inf")
    expires_at: float = float("inf")
    # A call or a probe failed at `suspected_at`, or its last proof is too old. The pool
    # gives no new lease of it until it answers a probe.
    suspect: bool = False
    suspected_at: float = 0.0
    probing: bool = False
    # The refusals in a row ("the server cannot serve"), and when the next probe is due.
    refusals: int = 0
    probe_at: float = 0.0
    # A probe ended too late to prove anything. It is repeated only once.
    excused: bool = False
    # A call on it was cut off, and the other connections are suspect because of that.
    broken: bool = False
    last_error: str | None = None
    # Why the pool closes it, or None. It closes only when its last lease is back,
    # because otherwise the calls of its callers would fail.
    retired: CloseReason | None = None

    def watch(self, connection: Any) -> None:
        """Take *connection*, and use its `is_lost` from now on, if it has one."""
        self.connection = connection
        try:
            self.is_lost = getattr(connection, "is_lost", None)
        except Exception:  # noqa: BLE001  (a connection may raise anything)
            self.is_lost = None

    def limit_streams(self, most: int) -> None:
        """Allow *most* leases, or fewer if the connection has a lower `max_streams`."""
        self.streams = most
        try:
            limit = getattr(self.connection, "max_streams", None)
            if isinstance(limit, int | float) and limit < most:
                # A server that allows none now may allow some later.
                self.streams = max(1, int(limit))
        except Exception as error:  # noqa: BLE001  (a connection may raise anything)
            self.last_error = f"max_streams raised {type(error).__name__}"

    def is_gone(self) -> bool:
        """Return whether the connection reports that its server has gone away."""
        if self.is_lost is None:
            return False
        try:
            # Not bool(): looking it up and calling it costs more than the rest.
            return True if self.is_lost() else False  # noqa: SIM210
        except Exception as error:  # noqa: BLE001  (a connection may raise anything)
            self.cannot_tell(error)
            return False

    def cannot_tell(self, error: Exception) -> None:
        """Do not call `is_lost` again, which raised *error*: it would at each lease."""
        self.is_lost = None
        self.last_error = f"is_lost() raised {type(error).__name__}"

    # The connection's own is_lost(), or None if it has none.
    is_lost: Callable[[], bool] | None = None


class Claim:
    """
    One caller's claim to a stream: it waits, is served, and is given back.

    Strictly private. It is also the borrower of the caller's token in the limiter. So
    the limiter keeps no object of the caller alive.
    """

    # Class attributes instead of an __init__, for speed: each acquire() makes a claim,
    # and most claims set only the first two. To set all of them took longer than
    # everything else here.
    slot: Slot | None = None
    # When it was served, on the pool's clock. The stream is in use from this moment, so
    # the lease begins then. The task of a waiting caller runs a moment later.
    acquired_at = 0.0
    # Seconds from the beginning of the wait to `acquired_at`.
    waited = 0.0
    # The error that the caller raises instead of being served.
    failure: Exception | None = None
    # The handle was used in a wrong way, which raised an error. So if the handle is
    # garbage-collected then, that is not a leak.
    refused = False
    # How its last call ended: the server answered, or did not in time, or the
    # connection ended. None of them, if the call was cancelled.
    answered = False
    unanswered = False
    cut_off = False
    # The waiting task, for the search for nested leases.
    waiter: object = None
    # The end of the wait. A claim is dismissed at its deadline, or with a failure.
    deadline = float("inf")
    dismissed = False
    # Whether the limiter has lent it a token. The caller's task sets this when it runs,
    # so it may be later than the limiter's own record.
    has_token = False
    # Wakes a caller that has a token and sleeps until it gets a stream.
    wake: Callable[[], None] | None = None


@final
class Check(Claim):
    """
    The claim of a caller that needs its answer within a budget. Strictly private.

    A class of its own, because a look at the class costs less than at an attribute.
    """

    # The seconds that it had at first, and when it needs its answer, on the pool's
    # clock.
    budget: float
    due: float
