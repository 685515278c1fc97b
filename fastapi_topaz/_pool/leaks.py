"""Detects leaks: leases held for longer than `leak_threshold`, with task and place."""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import attrs


if TYPE_CHECKING:
    from types import CodeType

    from fastapi_topaz._pool.state.slot import Claim
    from fastapi_topaz._pool.state.status import PoolCounters


__all__ = ["Leaks"]


logger = logging.getLogger("fastapi_topaz.pool")

PAUSE = 0.05
"""The minimum seconds between two searches, for a threshold that is smaller."""

STACK_DEPTH = 8
"""The number of stack frames shown for the place where a lease was taken."""

# The folder of the whole package: a lease may be taken by its application layer.
_PACKAGE = str(Path(__file__).parent.parent) + os.sep


@attrs.frozen
class _Holder:
    """The task and the place that took a lease. Only a log line makes it text."""

    task: str
    # Code and line number, innermost frame first. A frame itself would keep all local
    # variables of its function alive.
    places: tuple[tuple[CodeType, int], ...]

    @classmethod
    def here(cls) -> _Holder:
        """Return the running task, and its position in code outside the pool."""
        outside = (
            (frame.f_code, line)
            for frame, line in traceback.walk_stack(inspect.currentframe())
            if not frame.f_code.co_filename.startswith(_PACKAGE)
        )
        places = tuple(itertools.islice(outside, STACK_DEPTH))
        try:
            task = anyio.get_current_task().name or "without a name"
        except RuntimeError:  # the coroutine is driven by hand, without a task
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
    The leases in use, and those among them that are late.

    Strictly private. A lease is late if it is held for longer than `leak_threshold`.
    """

    def __init__(self, label: str, threshold: float, counters: PoolCounters) -> None:
        self._label = label
        self._threshold = threshold
        self._counters = counters
        # Each claim with its holder. `_out` is in the order in which the leases were
        # taken, so the first one is due first. A late claim moves to `_late`.
        self._out: dict[Claim, _Holder] = {}
        self._late: dict[Claim, _Holder] = {}

    def taken(self, claim: Claim) -> None:
        """Record the running task as the holder of *claim*."""
        self._out[claim] = _Holder.here()

    def returned(self, claim: Claim, held: float) -> None:
        """Forget *claim* after *held* seconds. If it was late, log its return."""
        self._out.pop(claim, None)
        if self._late.pop(claim, None) is not None:
            logger.info(
                "%s: a late lease came back after %.1f s (others still late: %d)",
                self._label,
                held,
                len(self._late),
            )

    def holder(self, claim: Claim) -> object:
        """Return the holder of *claim*, which str() turns into text, or None."""
        return self._out.get(claim) or self._late.get(claim)

    def look(self, now: float) -> float:
        """Warn of each lease that became late; return the time of the next search."""
        due = now
        while self._out and due <= now:
            claim = next(iter(self._out))
            due = claim.acquired_at + self._threshold
            if due <= now:
                self._late[claim] = holder = self._out.pop(claim)
                self._counters.leaked += 1
                logger.warning(
                    "%s: a lease has been held for %.1f s (leak_threshold=%g s) by %s",
                    *(self._label, now - claim.acquired_at, self._threshold, holder),
                )
        # A lease that is taken later cannot be due earlier than this.
        return max(due if self._out else now + self._threshold, now + PAUSE)
