"""What `acquire()` gives: a handle that works until it is released, and no longer."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi_topaz._slips import LEASE_FORM, NotCopied, explain_absence
from fastapi_topaz.exceptions import ConnectionLost, PoolMisuse


if TYPE_CHECKING:
    from fastapi_topaz._pool.open_pool import Runtime
    from fastapi_topaz._pool.state.entry import Lease


__all__ = ["Handle"]


class Handle(NotCopied):
    """
    A lease of a connection. After its release every use of it raises `PoolMisuse`.

    Each `acquire()` gives a new one, also where it lends the same connection again.
    """

    __slots__ = ("__weakref__", "_lease", "_pool", "_runtime")

    _copy_form = "acquire() another one"

    # What a pool is made of is no part of the public types.
    def __init__(self, pool: object, runtime: Any, lease: Any) -> None:
        self._pool = pool
        self._runtime: Runtime = runtime
        self._lease: Lease | None = lease

    def __repr__(self) -> str:
        state = "released" if self._lease is None else "leased"
        return f"<{type(self).__name__} to {self._runtime.target} {state}>"

    def __del__(self) -> None:
        # No caller can release it now. Not here: garbage is collected at any
        # moment, in the midst of whatever the pool does, and in any thread.
        try:
            lease = self._lease
        except AttributeError:  # __init__ was not run
            return
        if lease is not None:
            self._lease = None
            _abandon(self._runtime, lease, self)

    if not TYPE_CHECKING:  # see `_slips`

        def __aenter__(self):  # noqa: ANN204
            if self._lease is not None:
                # The only reference may be the one that this statement dropped.
                self._lease.refused = True
            del self
            raise TypeError(
                "`await pool.acquire()` returned a lease, which is no context manager: "
                f"{LEASE_FORM}"
            )

        def __aexit__(self, *exc):  # noqa: ANN002, ANN204
            """Do nothing: `__aenter__` always raises."""

        __enter__, __exit__ = __aenter__, __aexit__

    @property
    def waited(self) -> float:
        """
        How long `acquire()` waited for it, in seconds; 0.0 if it did not have to.

        Raises:
            PoolMisuse: The lease was released.
        """
        return self._held().waited

    @property
    def connection(self) -> Any:
        """
        The object that the pool's connector made.

        Raises:
            PoolMisuse: The lease was released.
            ConnectionLost: The pool was closed, and its grace is over.
        """
        lease = self._held()
        # A leased connection is closed only by close(), when its grace is over.
        if lease.entry is None or lease.entry.connection is None:
            raise ConnectionLost(
                f"{self._runtime.label} was closed, and this connection to "
                f"{self._runtime.target} with it"
            )
        return lease.entry.connection

    def _held(self) -> Lease:
        if self._lease is None:
            raise PoolMisuse(
                "this connection was released to its pool; acquire() another one"
            )
        return self._lease


# Leases of other pools have these.
explain_absence(Handle, "a lease goes back by its pool", ("release", "close", "aclose"))


def _abandon(runtime: Runtime, lease: Lease, conn: object) -> None:
    """
    Have *lease* taken back soon, whose *conn* is being destroyed; from any thread.

    Garbage is collected at any moment: here, nothing of the pool may be changed.
    """
    if runtime.done.is_set() or runtime.home.is_forked():
        return  # nothing is left that could be given back
    runtime.home.call_soon(partial(_reclaim, runtime, lease))
    if lease.refused:
        return  # the caller got an error already
    warnings.warn(
        f"{runtime.label}: a lease of a connection to {runtime.target} was "
        "garbage-collected and not released; use `async with pool.acquire()`, or "
        "release() it",
        ResourceWarning,
        stacklevel=3,
        source=conn,
    )


def _reclaim(runtime: Runtime, lease: Lease) -> None:
    if runtime.done.is_set():
        return
    if lease.refused:
        runtime.release(lease)
        return
    before = runtime.state.in_use
    holder = None if runtime.leaks is None else runtime.leaks.holder(lease)
    runtime.counters.reclaimed += 1
    runtime.release(lease)
    runtime.log_limit.report(
        logging.WARNING,
        "lease garbage-collected",
        "%s: took back a lease that was garbage-collected after %.1f s and not "
        "released (streams in use: %d -> %d), held by %s",
        *(runtime.label, runtime.perf_counter() - lease.held_since),
        *(before, runtime.state.in_use),
        holder or "whom leak_threshold would tell",
    )
