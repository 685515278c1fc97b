"""
The connections that are refused: their other side answers that it cannot serve.

A proxy answers so for a server that is down, and a server that starts or stops. The
connection itself is well, so it would help nobody to close it. It gets no leases until
a probe is answered.

A refusal alone is no outage. A rate limit refuses a share of all calls, and one proxy
of several may be cut off from its server. So a refused connection is probed at once,
and again after a short pause. Only if nothing at all is answered meanwhile, probes
become rare, and after a while it is an outage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Collection

    from fastapi_topaz._pool.state.slot import Slot


__all__ = ["Outage"]


GRACE = 0.5
"""Seconds without any answer until it is an outage."""

FIRST_PAUSE = 0.05
"""Seconds between a refused probe and the next one. Each pause is twice the last."""

PAUSE = 0.3
"""Seconds between two probes at most, so that a pool makes at most 4 a second."""

AT_ONCE = 2
"""Probes of refused connections that are under way at a time."""

OVERDUE = 0.4
"""Seconds that callers in an outage wait for the next probe, which may hang."""

ATTEMPT = 1.0
"""Seconds between two attempts to connect while nothing is answered. Another
connection may lead to another server."""


class Outage:
    """
    The refused connections, when to probe them, and whether it is an outage.

    Strictly private.

    Attributes:
        refused: The connections that get no leases until a probe is answered, in the
            order in which they are probed.
        error: The last refusal of a probe; None if all was answered since.
        declared: Whether it is an outage, in which callers get the error.
    """

    def __init__(self) -> None:
        self.refused: dict[Slot, None] = {}
        self.error: Exception | None = None
        self.declared = False
        self._declared_at = float("-inf")
        # Refused probes in a row without any answer: how many rounds, since when, and
        # when the last one was counted.
        self._silent = 0
        self._refused_at = self._answered_at = float("-inf")
        self._silent_since = self._counted_at = float("-inf")
        self._pause_until = self._attempt_at = self._next_probe_at = float("-inf")

    @property
    def is_silent(self) -> bool:
        """Whether a probe was refused, and nothing was answered since before it."""
        return self._silent > 0

    def add(self, slot: Slot, refusals: int, now: float) -> None:
        """Probe *slot* soon: so many of its calls were *refused*, or none yet."""
        self.refused[slot] = None
        slot.refusals = refusals
        slot.probe_at = now

    def probe_refused(
        self,
        slot: Slot,
        error: Exception,
        began: float,
        answered_at: float,
        now: float,
    ) -> None:
        """
        Note that a probe of *slot*, which *began* then, was refused with *error*.

        The last answer on any connection came at *answered_at*.
        """
        if slot not in self.refused:
            self.add(slot, 0, now)
        self.error = error
        self._refused_at = now
        slot.refusals += 1
        slot.probe_at = self._next_probe(slot, now)
        # A connection that is refused for long, while others are answered, is no
        # silence; nor does it end one that began since.
        since = min(now, self._silent_since if self._silent else slot.suspected_at)
        # What is later than now is of a clock that was set back since.
        if since < answered_at <= now or since <= self._answered_at <= now:
            self._end_silence()
            return
        self._silent_since = since
        if began >= self._counted_at:  # those that were under way together count once
            self._silent += 1
            self._counted_at = now
        self._pause_until = now + self._pause(self._silent)

    def declare(self, usable: Collection[Slot], now: float) -> bool:
        """Declare an outage if all *usable* ones are refused; True if it is new."""
        if self.declared or not self.is_total(usable):
            return False
        if not self._silent or now - self._silent_since < GRACE:
            return False
        self.declared, self._declared_at = True, now
        return True

    def is_total(self, usable: Collection[Slot]) -> bool:
        """Say whether each *usable* connection was refused, and there are any."""
        return bool(usable) and all(
            slot in self.refused and slot.refusals for slot in usable
        )

    def is_overdue(self, now: float) -> bool:
        """Say whether in an outage the callers have waited for long for a probe."""
        return self.declared and not _is_ahead(self._refused_at + OVERDUE, now, OVERDUE)

    def saw_answer(self, answered_at: float) -> None:
        """Note when the last call was answered, which may be the end of an outage."""
        if answered_at > self._declared_at:
            self.declared = False

    def answered(self, slot: Slot, now: float) -> None:
        """Note that *slot* has answered a probe: the others may do so, too."""
        self._answered_at = now
        self.forget(slot)
        if self._silent or self.declared:
            for other in self.refused:
                other.probe_at = float("-inf")
        self.declared = False
        self._end_silence()

    def forget(self, slot: Slot) -> None:
        """*slot* is gone, or suspected for another reason."""
        self.refused.pop(slot, None)
        if not self.refused:
            # Nothing is left to be probed, so attempts to connect need not be rare.
            self._end_silence()
            if not self.declared:
                self.error = None

    def due(self, now: float) -> Slot | None:
        """Return a connection to be probed now; it counts as probed from now on."""
        for slot in self.refused:
            if not slot.probing and not self._must_wait(slot, now):
                # To the end, so that each has its turn.
                del self.refused[slot]
                self.refused[slot] = None
                slot.probing = True
                if self._is_paced(slot):
                    # Also if this one hangs, the next one is not made before.
                    self._pause_until = now + self._pause(self._silent)
                return slot
        return None

    def next_at(self, now: float) -> float:
        """Return when to look for a due one again, if nothing happens before."""
        # No later, because the clock may be set back, and callers wait.
        latest = now + OVERDUE if self.refused else float("inf")
        times = [latest]
        is_full = self._under_way() >= AT_ONCE
        for slot in self.refused:
            if self._is_paced(slot) and not slot.probing:
                times.append(max(slot.probe_at, self._pause_until))
            elif not (slot.probing or is_full):
                times.append(slot.probe_at)
        return min(times)

    def attempted(self, now: float) -> None:
        """Note that an attempt to connect was begun, which is as good as a probe."""
        if self._silent:
            self._attempt_at = now + ATTEMPT
            self._pause_until = now + PAUSE

    def clock_is(self, now: float) -> None:
        """Wait no longer than ever for an attempt, also if the clock was set back."""
        self._attempt_at = min(self._attempt_at, now + ATTEMPT)

    @property
    def next_attempt(self) -> float:
        """When the next attempt to connect may be made."""
        return self._attempt_at if self._silent else float("-inf")

    def _must_wait(self, slot: Slot, now: float) -> bool:
        if self._is_paced(slot):
            wait = _is_ahead(self._pause_until, now, PAUSE)
        else:
            wait = self._under_way() >= AT_ONCE
        return wait or _is_ahead(slot.probe_at, now, self._longest())

    def _next_probe(self, slot: Slot, now: float) -> float:
        pause = self._pause(max(1, slot.refusals - 1))
        if pause < PAUSE:
            return now + pause
        # Each at a time of its own, or all that were refused would be probed together.
        at = max(now, min(self._next_probe_at, now + self._longest() - PAUSE)) + PAUSE
        self._next_probe_at = at
        return at

    def _pause(self, number: int) -> float:
        # In an outage the longest, also for a connection that is new in it.
        short = FIRST_PAUSE * 2.0 ** min(number - 1, 32)
        return PAUSE if self.declared else min(PAUSE, short)

    def _is_paced(self, slot: Slot) -> bool:
        # What was not refused itself yet is probed at once: it may be well.
        return self._silent > 0 and slot.refusals > 0

    def _under_way(self) -> int:
        return sum(slot.probing for slot in self.refused)

    def _longest(self) -> float:
        return PAUSE * max(1, len(self.refused))

    def _end_silence(self) -> None:
        self._silent = 0
        self._counted_at = self._pause_until = self._attempt_at = float("-inf")


def _is_ahead(moment: float, now: float, longest: float) -> bool:
    """Say whether *moment* is to come; if the clock was set back it is not."""
    return 0 < moment - now <= 2 * longest
