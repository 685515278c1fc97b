"""
The errors of `fastapi_topaz`.

Every error derives from [TopazError][fastapi_topaz.TopazError].
No error means "allowed". If an application catches one, it must refuse the request.
"""

from __future__ import annotations

from typing import Final, Literal


__all__ = [
    "CircuitOpen",
    "ConnectFailed",
    "ConnectionLost",
    "CredentialsFailed",
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
"""Why connecting failed: see [ConnectFailed][fastapi_topaz.ConnectFailed]."""


class TopazError(Exception):
    """Base class of all errors raised by this package."""


class PoolError(TopazError):
    """
    Base class of all errors raised by a pool.

    The pool could not do what the caller asked for.
    """


class PoolMisuse(PoolError, RuntimeError):  # noqa: N818
    """
    The application uses the pool wrongly. Trying again cannot help.

    Raised if the application uses the pool:

    - on another event loop than the one on which the pool is open;
    - in a process that was forked while connections of the transport `grpcio` were
      open;
    - in a forked process, on the event loop of its parent;
    - without a configured authorizer;
    - through a lease that is released, or that was acquired before a fork.

    The message says what to do.
    """


class PoolTimeout(PoolError, TimeoutError):  # noqa: N818
    """
    No connection became available within the timeout.

    The message shows the pool's counts. If there is a last connect error, it is the
    `__cause__`.
    """


class PoolClosed(PoolError, RuntimeError):  # noqa: N818
    """The pool is closed, or was closed while the caller was waiting."""


class PoolSaturated(PoolError):  # noqa: N818
    """
    The pool refused a caller at once: it is overloaded.

    Either `max_waiting` callers wait already, or the answer to a check would come after
    the end of its budget.

    Attributes:
        retry_after: The seconds after which the queue is probably short enough, at
            least 0. None if the pool has no estimate.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after: Final = retry_after


class ConnectFailed(PoolError, ConnectionError):  # noqa: N818
    """
    The pool could not connect, and no other connection can serve the caller.

    Attributes:
        reason: Why connecting failed. The values are also those of the metric
            attribute `reason`: `refused`, `resolve`, `tls`, `timeout`, `unanswered`,
            `unavailable` and `other`. `unanswered` means that connections were made,
            but ended before or with their first answer. `unavailable` means that the
            other side, such as a proxy, answers that its server cannot be reached.
        permanent: True if trying again cannot help before the configuration or the
            server is changed. An example is a certificate signed by the wrong CA.
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
    The connection was closed while a call was using it.

    The pool does not know whether the server processed the request. The calls of an
    authorizer only read, so it is safe to repeat them on another connection.
    """


class CircuitOpen(PoolError):  # noqa: N818
    """
    The `CircuitBreaker` refused a check, because too many checks before it failed.

    Attributes:
        retry_after: Seconds until the breaker lets the next check through, if that is
            known. Otherwise an estimate.
    """

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after: Final = retry_after


class CredentialsFailed(PoolError):  # noqa: N818
    """
    The callable `credentials` of the application failed, so a call was not sent.

    It raised an error, or returned metadata that cannot be sent. The message names the
    class and the place of that error. It shows neither its text nor any metadata,
    because these may be secret.
    """
