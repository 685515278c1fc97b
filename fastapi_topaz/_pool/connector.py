"""The protocols that a pool needs: `Connector`, `Connection` and `Verdict`."""

from __future__ import annotations

import enum
import logging
from typing import Protocol


__all__ = ["Connection", "Connector", "Verdict", "names_of"]


logger = logging.getLogger("fastapi_topaz.pool")


class Verdict(enum.Enum):
    """
    The meaning of a failed call for the connection that carried it.

    A suspect connection gets no new leases until it answers a probe.
    """

    ANSWERED = "answered"
    """The server answered with an error of its own: the connection works."""
    REFUSED = "refused"
    """A proxy or the server answered that it cannot serve now. The pool leases the
    connection again after an answered probe, and does not close it."""
    UNAVAILABLE = "unavailable"
    """The server is not reachable: the connection becomes suspect."""
    BROKEN = "broken"
    """The connection was cut: it and the pool's other connections become suspect."""
    SILENT = "silent"
    """No answer came in time. After a second such call in a row the connection becomes
    suspect."""


class Connection(Protocol):
    """One established connection, of any kind."""

    async def probe(self, timeout: float, /) -> None:
        """
        Check that the server answers within *timeout* seconds.

        Raises:
            Exception: The server does not answer. If the connection is suspect already,
                the pool closes it. Otherwise the pool probes it again.
        """

    async def close(self, grace: float, /) -> None:
        """
        Close the connection. Calls in flight have *grace* seconds to end.

        The pool calls this once for each connection, also after errors. It must not
        wait much longer than *grace*.
        """


class Connector(Protocol):
    """
    Makes the connections of a pool.

    A connector needs `async connect(timeout)`. These members are optional:

    - `target` (str): the server's name in messages.
    - `validate()`: `initialize()` calls it. It raises errors that no retry can repair,
      such as a missing file.
    - `spreads` (bool, default False): connections may lead to different servers. After
      one connection is lost, the pool replaces the others, one by one. So a server that
      restarted gets its share of connections again.
    - `servers()`, a coroutine function: returns the servers that a connection may lead
      to, as hashable objects. If `spreads` is true, the pool asks about every 30 s. If
      there is a new server, the pool replaces its connections, one by one.
    - `probes` (bool, default False): the pool probes each new connection, and leases it
      only after an answer. Until then it does not count as connected. The gRPC
      connector sets it. If it is false, the pool leases a new connection at once.

    - `survives_fork` (bool, default False): a process that was forked while the pool
      was open may open connections of its own. Then the first use of the pool there
      drops the inherited connections, and calls none of their methods. If it is false,
      each use raises `PoolMisuse`.

    Each connection needs `async probe(timeout)`, which raises if the server does not
    answer, and `async close(grace)`. If it also has `async call(method, request, *,
    timeout, metadata)`, from bytes to bytes, its leases make gRPC calls. None of these
    may shield itself from cancellation for long, because the pool ends them by
    cancellation.

    If the connector sets `probes` and the connection has `async greet(timeout)`, that
    is its first probe. It may raise `ConnectFailed`.

    If the connection has `async run()`, the pool runs it in a task of its task group,
    from the moment the connection is made. It must end when the connection is closed.
    If the pool ends first, it cancels that task.

    These members of a connection are optional, and none of them is a coroutine
    function:

    - `judge(error)`: returns the `Verdict` on the connection after a call raised
      *error*, or None if the error says nothing about the connection.
    - `is_lost()`: returns whether the server has gone away. So the pool notices a loss
      before a call fails. It asks before each lease and every second.
    - `refresh_liveness()`: checks whether the server is still there, so that the next
      `is_lost()` is right. The pool calls it every second, on one connection in turn.
    - `peer`: the address of the server. It is read from any thread.
    - `max_streams`: a number, the most leases that the server serves at once on this
      connection. The pool reads it once, when the connection is made.
    - `abandon()`: closes the connection without waiting. It is called if the event loop
      is closed while the pool is open, in the thread that closes the loop.
    """

    async def connect(self, timeout: float, /) -> Connection:
        """
        Establish one connection within *timeout* seconds.

        Raises:
            ConnectFailed: The connection failed; the message gives the cause. Any other
                exception also counts as a failed attempt, which may be repeated.
        """
        ...


def names_of(connector: Connector, label: str) -> tuple[str, str]:
    """
    Return the name of the server in messages, and in metrics (the series).

    If the connector has no `target`, messages show its repr(). Metrics show its class
    name, because the memory address in a repr() would make a new series at each start.
    """
    series = type(connector).__name__
    try:
        target = getattr(connector, "target", None)
        if target is not None:
            return str(target), str(target)
        return str(connector), series
    except Exception:  # noqa: BLE001  (a connector may raise anything)
        logger.debug("%s: cannot read the attribute `target` of its connector", label)
        return series, series
