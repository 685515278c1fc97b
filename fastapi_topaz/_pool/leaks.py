"""Leases that are out for longer than `leak_threshold`: who took them, and where."""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import traceback
from typing import TYPE_CHECKING

import anyio
import attrs

from fastapi_topaz._pool.clock import Clock


if TYPE_CHECKING:
    from types import CodeType

    from fastapi_topaz._pool.state.slot import Claim
    from fastapi_topaz._pool.state.status import PoolCounters


__all__ = ["Leaks"]


logger = logging.getLogger("fastapi_topaz.pool")

PAUSE = 0.05
"""Seconds between two looks at least, however small the threshold is."""

STACK_DEPTH = 8
"""Frames shown of the place where a lease was taken."""

_PACKAGE = os.path.dirname(__file__) + os.sep  # noqa: PTH120  (a prefix of file names)


@attrs.frozen
class _Holder:
    """Who took a lease, and where; made into text only if somebody is to read it."""

    task: str
    # Innermost first. Of the code and not of the frames, which hold all that is there.
    places: tuple[tuple[CodeType, int], ...]

    @classmethod
    def here(cls) -> _Holder:
        """Return the running task, and where its code outside of this package is."""
        outside = (
            (frame.f_code, line)
            for frame, line in traceback.walk_stack(inspect.currentframe())
            if not frame.f_code.co_filename.startswith(_PACKAGE)
        )
        places = tuple(itertools.islice(outside, STACK_DEPTH))
        try:
            task = anyio.get_current_task().name or "without a name"
        except RuntimeError:  # driven by hand, in no task
            task = "unknown"
        return cls(task, places)

    def __str__(self) -> str:
        stack = traceback.StackSummary.from_list(
            (code.co_filename, line, code.co_name, None)
            for code, line in reversed(self.places)
        )
        return f"task {self.task!r}, which took it here:\n{''.join(stack.format())}"


class Leaks:
    """
    The leases that are out, and which of them are late.

    Strictly private.
    """

    def __init__(self, label: str, threshold: float, counters: PoolCounters) -> None:
        self._label = label
        self._threshold = threshold
        self._counters = counters
        # With who took them and where; those that are out in the order they were taken,
        # until they are late.
        self._out: dict[Claim, _Holder] = {}
        self._late: dict[Claim, _Holder] = {}

    def taken(self, claim: Claim, now: float) -> None:
        """Note who took *claim*."""
        claim.acquired_at = now
        self._out[claim] = _Holder.here()

    def returned(self, claim: Claim, held: float) -> None:
        """Forget *claim*, which was *held* for so long, and log it if it was late."""
        self._out.pop(claim, None)
        if self._late.pop(claim, None) is not None:
            logger.info(
                "%s: a lease that was late came back after %.1f s (still late: %d)",
                self._label,
                held,
                len(self._late),
            )

    def holder(self, claim: Claim) -> object:
        """Return who has taken *claim*, and where, for a message."""
        return self._out.get(claim) or self._late.get(claim)

    def look(self, now: float) -> float:
        """Tell of each lease that is late by now, and return when to look again."""
        due = now
        while self._out and due <= now:
            claim = next(iter(self._out))
            due = claim.acquired_at + self._threshold
            if due <= now:
                self._late[claim] = holder = self._out.pop(claim)
                self._counters.leaked += 1
                held = Clock.perf_counter() - claim.held_since
                logger.warning(
                    "%s: a lease is out for %.1f s (leak_threshold=%g s), held by %s",
                    *(self._label, held, self._threshold, holder),
                )
        # No lease taken from now on can be due any earlier.
        return max(due if self._out else now + self._threshold, now + PAUSE)
