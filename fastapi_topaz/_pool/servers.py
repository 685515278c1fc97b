"""Notices new servers behind the name of the target, so that they get connections."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any, Final

from fastapi_topaz._error_text import safe_text
from fastapi_topaz._pool.interrupts import protected


if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastapi_topaz._pool.open_pool import OpenPool


__all__ = ["KnownServers", "watch_servers"]


FIRST_LOOK: Final = 1.0
"""Seconds from the opening of a pool until it asks for the servers the first time."""

LOOK: Final = 30.0
"""Seconds between two questions, half of them or up to half as many more at random."""

REMEMBERED: Final = 600.0
"""
Seconds for which a server is known. A name server may return only some of many
addresses, others each time. They must not look new.
"""


class KnownServers:
    """
    The servers that were seen in the last `REMEMBERED` seconds before the last answer.

    A server that was away for a shorter time shows by the longer answer: a name server
    that returns some of many addresses returns equally many each time.
    """

    def __init__(self) -> None:
        self._seen_at: dict[object, float] = {}
        self._looked_at = 0.0
        self._count = 0

    def see(self, servers: Iterable[object], now: float) -> bool:
        """
        Record *servers*; return whether one is new or came back.

        The first ones are not new.
        """
        found = dict.fromkeys(servers, now)
        if not found:
            return False
        count, self._count = self._count, len(found)
        # Not since now: the pool may have been idle, or the name server down.
        since, self._looked_at = self._looked_at - REMEMBERED, now
        known = {server: at for server, at in self._seen_at.items() if at > since}
        self._seen_at = known | found
        return count > 0 and (len(found) > count or len(self._seen_at) > len(known))


@protected
async def watch_servers(open_pool: OpenPool) -> None:
    """Spread the connections again if the connector finds a new server."""
    connector: Any = open_pool.connector
    known = KnownServers()
    pause = FIRST_LOOK
    while True:
        await open_pool.clock.sleep(pause)
        pause = LOOK * (0.5 + random.random())  # noqa: S311  (nothing secret)
        if not open_pool.state.open:
            continue
        try:
            with (
                open_pool.clock.deadline(open_pool.now() + LOOK),
                open_pool.busy_task(),
            ):
                if known.see(await connector.servers(), open_pool.now()):
                    open_pool.state.rotation.grown(open_pool.now())
                    open_pool.connections_changed()
        except Exception as error:  # noqa: BLE001  (a connector may raise anything)
            open_pool.log_limit.report(
                logging.DEBUG,
                "cannot find the servers",
                "%s: cannot find the servers of %s: %s",
                *(open_pool.label, open_pool.target, safe_text(error)),
            )
