"""The last events of a pool, such as connects and closings, for people to read."""

from __future__ import annotations

import time
from collections import deque

import attrs

from fastapi_topaz._error_text import shortened
from fastapi_topaz._fork import current as process


__all__ = ["MOST_EVENTS", "Event", "Events"]


MOST_EVENTS = 100
"""The events that a pool keeps. One more replaces the oldest."""

LONGEST = 300
"""The most characters of a detail that an event keeps."""


@attrs.frozen
class Event:
    """
    One event, or several equal ones in a row.

    Attributes:
        kind: What happened. There are only a few different values.
        peer: The address of the server, or None.
        detail: Why it happened, or None. Its text may come from the server.
        at: When it happened last, in seconds since the epoch.
        count: How often it happened in a row.
    """

    kind: str
    peer: str | None
    detail: str | None
    at: float
    count: int


class Events:
    """
    Keeps the last events of a pool in this process.

    An outage repeats one event many times. Equal events in a row share one place, so
    they do not displace the events that led to it.
    """

    def __init__(self) -> None:
        self._begin()

    def add(
        self, kind: str, peer: str | None = None, detail: str | None = None
    ) -> None:
        """Record an event that happens now. *detail* has no personal data."""
        if self._pid != process.pid:
            self._begin()
        detail = None if detail is None else shortened(detail, LONGEST)
        kept, count = self._kept, 1
        if kept:
            last = kept[-1]
            if (last.kind, last.peer, last.detail) == (kind, peer, detail):
                count += kept.pop().count
        kept.append(Event(kind, peer, detail, time.time(), count))

    def recent(self) -> tuple[Event, ...]:
        """Return the events of this process, the newest first. Thread-safe."""
        # Those of the parent of a forked process are not its own.
        return tuple(self._kept.copy())[::-1] if self._pid == process.pid else ()

    def _begin(self) -> None:
        self._pid = process.pid
        self._kept: deque[Event] = deque(maxlen=MOST_EVENTS)
