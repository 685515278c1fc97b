"""The protocols through which a pool meets the thing it pools."""

from __future__ import annotations

import enum
from typing import Protocol


__all__ = ["Connection", "Connector", "Verdict"]


class Verdict(enum.Enum):
    """What a failed call says of the connection it was made on."""

    ANSWERED = "answered"
    """The other side answered, with an error of its own: the connection is well."""
    REFUSED = "refused"
    """The other side answered that its server cannot be had, as a proxy does. The
    connection is not leased until a probe is answered, and it is not closed."""
    UNAVAILABLE = "unavailable"
    """The other side cannot be had: the connection is suspect."""
    BROKEN = "broken"
    """The connection was cut: it is suspect, and so are those beside it."""
    SILENT = "silent"
    """No answer came in time: suspect if the next call gets none either."""


class Connection(Protocol):
    """One established connection, of whatever kind."""

    async def probe(self, timeout: float, /) -> None:
        """
        Return if the other side answers within *timeout* seconds.

        Raises:
            Exception: It does not; the pool closes the connection if it is suspect
                already, and probes it again if not.
        """

    async def close(self, grace: float, /) -> None:
        """
        Close the connection; calls in flight have *grace* seconds to end.

        Called once, whatever happened before. Must not wait much longer than
        *grace*.
        """


class Connector(Protocol):
    """
    Makes the connections of a pool.

    An attribute `target` (str), if there is one, names the other side in messages.
    A method `validate()`, if there is one, is called by `initialize()` and raises
    what no retry can mend, such as a missing file.

    An attribute `spreads` (bool), if true, says that connections may lead to different
    servers. After one was lost the pool then replaces the others, one by one, so that
    a server that restarted gets its share again.

    An attribute `probes` (bool), if true, has the pool probe each new connection: it
    counts as connected, and is leased, only when that was answered. The connector of
    gRPC does so. Without it a new connection is leased at once. If the connection has
    `async greet(timeout)`, that is its first probe; it may raise `ConnectFailed`.

    What it makes needs `async probe(timeout)`, which raises if the other side does not
    answer, and `async close(grace)`. With `async call(method, request, *, timeout,
    metadata)` from bytes to bytes, leases of it make gRPC calls. None of these may
    shield itself from cancellation for long: the pool ends them by cancelling.

    The rest is used where it is there, and none of it is a coroutine. `judge(error)`
    returns the `Verdict` that the error of a call is on the connection, or None if it
    says nothing. `is_lost()`, asked before each lease and every second, tells that the
    other side has gone away, so that no call has to find out; `refresh_liveness()` is
    called now and then so that it may. `peer` is the address of the other side, and is
    read from any thread. `abandon()` closes the connection without waiting: it is
    called if the event loop was closed under an open pool, in the thread that closed
    the loop.
    """

    async def connect(self, timeout: float, /) -> Connection:
        """
        Establish one connection within *timeout* seconds.

        Raises:
            ConnectFailed: It could not be established, and why. Any other exception
                counts as a failure that may be retried.
        """
        ...
