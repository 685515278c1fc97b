"""The lease that `acquire()` gives: a handle that works until it is released."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi_topaz._fork import current as process
from fastapi_topaz._slips import LEASE_FORM, NotCopied, explain_absence
from fastapi_topaz.exceptions import ConnectionLost, PoolMisuse


if TYPE_CHECKING:
    from fastapi_topaz._pool.open_pool import OpenPool
    from fastapi_topaz._pool.state.slot import Claim


__all__ = ["Handle"]


class Handle(NotCopied):
    """
    A lease of a connection. After its release every use of it raises `PoolMisuse`.

    Each `acquire()` gives a new handle, even if it lends the same connection again.
    """

    __slots__ = ("__weakref__", "_claim", "_open_pool", "_pool")

    _copy_form = "acquire() another one"

    # Typed as object and Any, so that private classes stay out of the public types.
    def __init__(self, pool: object, open_pool: Any, claim: Any) -> None:
        self._pool = pool
        self._open_pool: OpenPool = open_pool
        self._claim: Claim | None = claim

    def __repr__(self) -> str:
        state = "released" if self._claim is None else "leased"
        return f"<{type(self).__name__} to {self._open_pool.target} {state}>"

    def __del__(self) -> None:
        # No caller can release this lease now. It is not released here, because garbage
        # is collected in any thread, at any moment: also while the pool changes its
        # state. `_abandon` has the event loop release it.
        try:
            claim = self._claim
        except AttributeError:  # __init__ was not run
            return
        if claim is not None:
            self._claim = None
            _abandon(self._open_pool, claim, self)

    if not TYPE_CHECKING:  # see `_slips`

        def __aenter__(self):  # noqa: ANN204
            if self._claim is not None:
                # After the error, this lease may be garbage. Marked as refused, it is
                # taken back without a warning: the caller gets this error already.
                self._claim.refused = True
            del self
            raise TypeError(
                "`await pool.acquire()` returned a lease, which is not a context "
                f"manager: {LEASE_FORM}"
            )

        def __aexit__(self, *exc):  # noqa: ANN002, ANN204
            """Do nothing: `__aenter__` always raises."""

        __enter__, __exit__ = __aenter__, __aexit__

    @property
    def waited(self) -> float:
        """
        How long `acquire()` waited for this lease, in seconds; 0.0 without a wait.

        Raises:
            PoolMisuse: The lease was released.
        """
        return self._held().waited

    @property
    def connection(self) -> Any:
        """
        The object that `connect()` of the pool's connector returned.

        Raises:
            PoolMisuse: The lease was released.
            ConnectionLost: The pool was closed, and the grace of `close()` is over.
        """
        claim = self._held()
        # Only Pool.close() closes a leased connection, after its grace.
        if claim.slot is None or claim.slot.connection is None:
            raise ConnectionLost(
                f"{self._open_pool.label} was closed, and so was this connection to "
                f"{self._open_pool.target}"
            )
        return claim.slot.connection

    def _held(self) -> Claim:
        if self._claim is None:
            raise PoolMisuse(
                "this connection was released to its pool; acquire() another one"
            )
        owner = self._open_pool.owner
        if owner.pid != process.pid:
            raise PoolMisuse(
                f"this lease was acquired in process {owner.pid}, and process "
                f"{process.pid} was forked from it; acquire() another one"
            )
        return self._claim


# The leases of other pool libraries have these methods.
explain_absence(
    Handle,
    "a lease is given back by its pool",
    ("release", "close", "aclose"),
)


def _abandon(open_pool: OpenPool, claim: Claim, conn: object) -> None:
    """
    Schedule the release of *claim*, whose handle *conn* is being destroyed.

    This runs in any thread, and at any moment of the pool's work, because garbage is
    collected then. So it changes nothing in the pool: the event loop does that later.
    """
    if open_pool.done.is_set() or open_pool.owner.is_forked():
        return  # the pool is closed, or belongs to the parent process
    open_pool.owner.call_soon(partial(_reclaim, open_pool, claim))
    if claim.refused:
        return  # the caller got an error already
    warnings.warn(
        f"{open_pool.label}: a lease of a connection to {open_pool.target} was "
        "garbage-collected and not released; use `async with pool.acquire()`, or "
        "release() it",
        ResourceWarning,
        stacklevel=3,
        source=conn,
    )


def _reclaim(open_pool: OpenPool, claim: Claim) -> None:
    if open_pool.done.is_set():
        return
    if claim.refused:
        open_pool.release(claim)
        return
    before = open_pool.state.in_use
    holder = None if open_pool.leaks is None else open_pool.leaks.holder(claim)
    open_pool.counters.reclaimed += 1
    open_pool.release(claim)
    open_pool.log_limit.report(
        logging.WARNING,
        "lease garbage-collected",
        "%s: took back a lease that was garbage-collected after %.1f s and not "
        "released (streams in use: %d -> %d), held by %s",
        *(open_pool.label, open_pool.now() - claim.acquired_at),
        *(before, open_pool.state.in_use),
        holder or "an unknown task (set leak_threshold to record it)",
    )
