"""
The errors of `fastapi_topaz`.

Every error derives from [TopazError][fastapi_topaz.TopazError].
None of them ever means "allowed": a caller that catches one must refuse.
"""

from __future__ import annotations

from typing import Final, Literal


__all__ = [
    "ConnectFailed",
    "ConnectionLost",
    "FailureReason",
    "PoolClosed",
    "PoolError",
    "PoolMisuse",
    "PoolSaturated",
    "PoolTimeout",
    "TopazError",
]


FailureReason = Literal[
    "refused", "resolve", "tls", "timeout", "unanswered", "unavailable", "other"
]


class TopazError(Exception):
    """Base class of all errors raised by this package."""


class PoolError(TopazError):
    """
    The pool cannot do what was asked.

    Base class of all errors of a pool.
    """


class PoolMisuse(PoolError, RuntimeError):  # noqa: N818
    """
    The application uses the pool in a way that cannot work; trying again cannot help.

    Raised if the pool is used on another event loop than the one it is open on, in a
    process that was forked while gRPC connections were open, without a configured
    authorizer, or through a lease that was released. The message says what to do.
    """


class PoolTimeout(PoolError, TimeoutError):  # noqa: N818
    """
    No connection became available within the timeout.

    The message holds the pool's counts; the last connect error, if there is
    one, is the `__cause__`.
    """


class PoolClosed(PoolError, RuntimeError):  # noqa: N818
    """The pool is closed, or was closed while the caller waited."""


class PoolSaturated(PoolError):  # noqa: N818
    """`max_waiting` callers wait already; this one was refused at once."""


class ConnectFailed(PoolError, ConnectionError):  # noqa: N818
    """
    A connection could not be established, and nothing else can serve the caller.

    Attributes:
        reason: Why, as one of a few words (they are the values of the metric
            attribute `reason`): `refused`, `resolve`, `tls`, `timeout`, `unanswered`
            (connections were made and ended before they answered anything, or with
            their first answer), `unavailable` (the other side answers that its server
            cannot be reached, as a proxy does), `other`.
        permanent: True if trying again cannot help until somebody changes the
            configuration or the server, as with a certificate of the wrong CA.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: FailureReason = "other",
        permanent: bool = False,
    ) -> None:
        super().__init__(message)
        self.reason: Final = reason
        self.permanent: Final = permanent


class ConnectionLost(PoolError, ConnectionError):  # noqa: N818
    """
    The connection was closed under a call that was using it.

    Whether the server acted on the request is unknown. The calls of an
    authorizer are reads, so they are safe to repeat on another connection.
    """
