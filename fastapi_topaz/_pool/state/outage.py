"""
The refused connections: the other side answers that it cannot serve now.

A proxy answers so if its server is down; a server answers so while it starts or stops.
The connection itself works, so closing it would not help. The pool gives no leases of
it until a probe is answered.

A refusal alone is not an outage. A rate limit refuses only a share of all calls, and
one of several proxies may have lost its server. So the pool probes a refused connection
at once, and again after a short pause. If nothing at all is answered meanwhile, this is
a *silence*: probes become rare. After `GRACE` seconds of silence the pool declares an
outage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Collection

    from fastapi_topaz._pool.state.slot import Slot


__all__ = ["Outage"]


GRACE = 0.5
"""Seconds without any answer before an outage is declared."""

FIRST_PAUSE = 0.05
"""Seconds after the first refused probe. Each further pause is twice the last one."""

PAUSE = 0.3
"""Seconds. The longest pause between two probes. A pool makes at most 4 a second."""

AT_ONCE = 2
"""The most probes of refused connections at a time."""

OVERDUE = 0.4
"""
Seconds. The longest time that callers in an outage wait for the next probe, because
that probe may hang.
"""

ATTEMPT = 1.0
"""
Seconds between two attempts to connect while nothing is answered. A new connection may
lead to another server.
"""


class Outage:
    """
    The refused connections, the times of their probes, and the outage.

    Strictly private. All times are seconds on the pool's clock.

    Attributes:
        refused: The slots whose connections get no leases until a probe is answered, in
            the order of their probes.
        error: The error of the last refused probe. None if no refused connection is
            left: each one has answered or closed.
        declared: Whether an outage is declared. Then callers get `error`.
    """

    def __init__(self) -> None:
        self.refused: dict[Slot, None] = {}
        self.error: Exception | None = None
        self.declared = False
        self._declared_at = float("-inf")
        # The silence: refused probes in a row, without any answer. `_silent` counts
        # them in rounds, `_silent_since` is its start, and `_counted_at` is the time of
        # the last count.
        self._silent = 0
        self._refused_at = self._answered_at = float("-inf")
        self._silent_since = self._counted_at = float("-inf")
        self._pause_until = self._attempt_at = self._next_probe_at = float("-inf")

    @property
    def is_silent(self) -> bool:
        """Whether a probe was refused, and no connection has answered meanwhile."""
        return self._silent > 0

    def add(self, slot: Slot, refusals: int, now: float) -> None:
        """Add *slot*, to be probed at once; *refusals* calls on it were refused."""
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
        Record that a probe of *slot* was refused with *error*.

        The probe began at *began*. The last answer on any connection came at
        *answered_at*.
        """
        if slot not in self.refused:
            self.add(slot, 0, now)
        self.error = error
        self._refused_at = now
        slot.refusals += 1
        slot.probe_at = self._next_probe(slot, now)
        # Count from the start of the silence. Without one, count from the time at which
        # this slot was suspected: an answer on another connection since then shows that
        # there is no silence. A silence may be newer than the suspicion of this slot,
        # so its own start is used.
        since = min(now, self._silent_since if self._silent else slot.suspected_at)
        # A time later than now comes from before the clock was set back: ignore it.
        if since < answered_at <= now or since <= self._answered_at <= now:
            self._end_silence()
            return
        self._silent_since = since
        if began >= self._counted_at:  # probes under way together count once
            self._silent += 1
            self._counted_at = now
        self._pause_until = now + self._pause(self._silent)

    def declare(self, usable: Collection[Slot], now: float) -> bool:
        """
        Declare an outage if all *usable* connections are refused in a long silence.

        Return True only if this call declares it.
        """
        if self.declared or not self.is_total(usable):
            return False
        if not self._silent or now - self._silent_since < GRACE:
            return False
        self.declared, self._declared_at = True, now
        return True

    def is_total(self, usable: Collection[Slot]) -> bool:
        """Return whether all *usable* connections were refused; False without any."""
        return bool(usable) and all(
            slot in self.refused and slot.refusals for slot in usable
        )

    def is_overdue(self, now: float) -> bool:
        """Return whether an outage is declared, and no probe ended for `OVERDUE` s."""
        return self.declared and not _is_ahead(self._refused_at + OVERDUE, now, OVERDUE)

    def saw_answer(self, answered_at: float) -> None:
        """End the outage if the last answer, at *answered_at*, is newer than it."""
        if answered_at > self._declared_at:
            self.declared = False
            self._drop_error()

    def answered(self, slot: Slot, now: float) -> None:
        """
        End the outage, because *slot* has answered a probe.

        The other refused connections are probed at once, as they may answer, too.
        """
        self._answered_at = now
        if self._silent or self.declared:
            for other in self.refused:
                other.probe_at = float("-inf")
        self.declared = False
        self.forget(slot)
        self._end_silence()

    def forget(self, slot: Slot) -> None:
        """Remove *slot*: it is not refused any more, or suspect for another reason."""
        self.refused.pop(slot, None)
        if not self.refused:
            # No connection is left to probe, so attempts to connect need not be rare.
            self._end_silence()
        self._drop_error()

    def due(self, now: float) -> Slot | None:
        """Return a slot to probe now, or None. Sets `probing` of the slot."""
        for slot in self.refused:
            if not slot.probing and not self._must_wait(slot, now):
                # Moved to the end, so that each slot has its turn.
                del self.refused[slot]
                self.refused[slot] = None
                slot.probing = True
                if self._is_paced(slot):
                    # Set now and not after the probe, which may hang: the next probe
                    # then begins after the pause, and not earlier.
                    self._pause_until = now + self._pause(self._silent)
                return slot
        return None

    def next_at(self, now: float) -> float:
        """Return when to call `due` again, if nothing happens before."""
        # The upper limit helps if the clock is set back: waiting callers must not wait
        # until it reaches its old time again.
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
        """
        Record that an attempt to connect has begun.

        In a silence this delays the next attempt and the next probe, because the
        attempt shows as much as a probe.
        """
        if self._silent:
            self._attempt_at = now + ATTEMPT
            self._pause_until = now + PAUSE

    def clock_is(self, now: float) -> None:
        """Limit the wait for the next attempt, in case the clock was set back."""
        self._attempt_at = min(self._attempt_at, now + ATTEMPT)

    @property
    def next_attempt(self) -> float:
        """The time at which the next attempt to connect may begin."""
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
        # Each slot gets its own time. Otherwise all refused slots would be probed at
        # the same time.
        at = max(now, min(self._next_probe_at, now + self._longest() - PAUSE)) + PAUSE
        self._next_probe_at = at
        return at

    def _pause(self, number: int) -> float:
        # In an outage each pause is the longest, also for a new connection.
        short = FIRST_PAUSE * 2.0 ** min(number - 1, 32)
        return PAUSE if self.declared else min(PAUSE, short)

    def _is_paced(self, slot: Slot) -> bool:
        # A slot without a refusal of its own is probed at once: it may work.
        return self._silent > 0 and slot.refusals > 0

    def _under_way(self) -> int:
        return sum(slot.probing for slot in self.refused)

    def _longest(self) -> float:
        return PAUSE * max(1, len(self.refused))

    def _drop_error(self) -> None:
        # While an outage is declared, waiting callers still fail with this error.
        if not self.refused and not self.declared:
            self.error = None

    def _end_silence(self) -> None:
        self._silent = 0
        self._counted_at = self._pause_until = self._attempt_at = float("-inf")


def _is_ahead(moment: float, now: float, longest: float) -> bool:
    """
    Return whether *moment* is in the future, by at most twice the *longest* pause.

    A later moment can only come from before the clock was set back: it counts as past.
    """
    return 0 < moment - now <= 2 * longest
