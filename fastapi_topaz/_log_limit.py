"""
Limits the log volume: one line per reason and interval, and a count of the rest.

During an outage, each request and each connection has an event to log. The first event
of a reason is logged at once. Further events are counted for INTERVAL seconds, and the
next line of this reason shows the count.
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING

import attrs


if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["INTERVAL", "MOST_REASONS", "OTHER", "LogLimit"]


INTERVAL = 10.0
"""Minimum time between two lines of the same reason, in seconds."""

MOST_REASONS = 32
"""Reasons with a count of their own. One is OTHER, which all further reasons share."""

OTHER = "other reasons"


@attrs.define
class _Reason:
    """When a reason was last logged, and how many events were only counted since."""

    level: int
    logged_at: float = -math.inf
    held: int = 0


class LogLimit:
    """
    A logger that limits the lines of each reason.

    It needs no timer. The next line of a reason, or `flush`, reports the count. If
    threads share the object, a count may be wrong by a few events.

    Args:
        logger: The logger that gets the lines.
        label: The beginning of the lines that report only a count.
        clock: Returns the time in seconds. None, the default, means `time.monotonic`.

    Attributes:
        held: The number of events that were counted and not yet reported.
    """

    def __init__(
        self,
        logger: logging.Logger,
        label: str,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._logger = logger
        self._label = label
        self.clock = clock
        self._reasons: dict[str, _Reason] = {}
        self.held = 0

    def report(
        self,
        level: int,
        reason: str,
        message: str,
        *args: object,
        exc_info: BaseException | bool | None = None,
        all_counts: bool = False,
    ) -> None:
        """
        Log *message*, or count it if *reason* was logged less than INTERVAL ago.

        Lines below INFO are not limited.

        Args:
            level: As in the module `logging`.
            reason: The kind of event with a short code, such as a status or the name
                of a class. Never text from outside, because it may appear in the log.
            message: The line, formatted with *args*.
            args: As in the module `logging`.
            exc_info: As in the module `logging`.
            all_counts: Whether the line also reports the counts of all other reasons.
                For lines that report the end of an outage.
        """
        if not self._logger.isEnabledFor(level):
            return
        if level < logging.INFO:
            self._logger.log(level, message, *args, exc_info=exc_info, stacklevel=2)
            return
        now = self._now()
        known = self._entry(reason, now, level)
        if _is_recent(known, now):
            known.held += 1
            self.held += 1
            return
        if known.held:
            message += " (and %d more in the last %.0f s)"
            args = (*args, known.held, _age(known, now))
        self._reported(known, now, level)
        if all_counts and self.held:
            message += "; not logged meanwhile: %s"
            args = (*args, self._take_counts(now))
        self._logger.log(level, message, *args, exc_info=exc_info, stacklevel=2)
        self.flush()

    def flush(self, *, everything: bool = False) -> None:
        """
        Report the counts of the reasons whose INTERVAL is over.

        Args:
            everything: Report all counts now. Use it if no further line may follow.
        """
        if not self.held:
            return
        now = self._now()
        for reason, known in list(self._reasons.items()):
            if everything or not _is_recent(known, now):
                self._tell_count(reason, known, now)

    def _tell_count(self, reason: str, known: _Reason, now: float) -> None:
        count, age = known.held, _age(known, now)
        if count:
            self._reported(known, now, known.level)
            self._logger.log(
                known.level,
                "%s: %s: %d more in the last %.0f s",
                *(self._label, reason, count, age),
                stacklevel=3,
            )

    def _take_counts(self, now: float) -> str:
        counts = []
        for reason, known in list(self._reasons.items()):
            if known.held:
                counts.append(f"{reason} ({known.held})")
                self._reported(known, now, known.level)
        return ", ".join(counts)

    def _now(self) -> float:
        return time.monotonic() if self.clock is None else self.clock()

    def _entry(self, reason: str, now: float, level: int) -> _Reason:
        """Return the entry that counts the events of *reason*."""
        known = self._reasons.get(reason)
        if known is None:
            if len(self._reasons) >= MOST_REASONS - 1:
                reason = self._make_room(reason, now)
            known = self._reasons.setdefault(reason, _Reason(level))
        return known

    def _make_room(self, reason: str, now: float) -> str:
        """
        Remove the reason with the oldest line and return *reason*.

        If even that line is recent, remove nothing and return OTHER.
        """
        # A copy, as elsewhere here: another thread may add a reason.
        reasons = list(self._reasons.items())
        quietest, known = min(reasons, key=lambda item: item[1].logged_at)
        if _is_recent(known, now):
            return OTHER
        self._tell_count(quietest, known, now)
        self._reasons.pop(quietest, None)
        return reason

    def _reported(self, known: _Reason, now: float, level: int) -> None:
        self.held -= known.held
        known.held = 0
        known.logged_at = now
        known.level = level


def _is_recent(known: _Reason, now: float) -> bool:
    # If the clock goes back, a reason must still be logged. Tests freeze clocks, and
    # each run of trio has its own clock.
    return 0 <= now - known.logged_at < INTERVAL


def _age(known: _Reason, now: float) -> float:
    return max(0.0, now - known.logged_at)
