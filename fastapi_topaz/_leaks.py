"""
Leases that do not come back.

One that is out for longer than `leak_threshold` is told of, with who took it and where.
One that nobody can give back, because it is garbage, is taken back, threshold or not.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import traceback
import warnings
from functools import partial
from typing import TYPE_CHECKING

import anyio
import attrs


if TYPE_CHECKING:
    from types import CodeType

    from fastapi_topaz._entry import Lease
    from fastapi_topaz._runtime import Runtime
    from fastapi_topaz._status import PoolCounters


__all__ = ["Leaks", "abandoned"]


logger = logging.getLogger("fastapi_topaz.pool")

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
        return cls(anyio.get_current_task().name or "without a name", places)

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
        # In the order they were taken, with who took them and where.
        self._out: dict[Lease, _Holder] = {}
        self._late: set[Lease] = set()

    def taken(self, lease: Lease) -> None:
        """Note who took *lease*."""
        self._out[lease] = _Holder.here()

    def returned(self, lease: Lease, now: float) -> None:
        """Forget *lease*, and say so if it was told of."""
        self._out.pop(lease, None)
        if lease in self._late:
            self._late.remove(lease)
            logger.info(
                "%s: a lease that was late came back after %.1f s (still late: %d)",
                self._label,
                now - lease.acquired_at,
                len(self._late),
            )

    def holder(self, lease: Lease) -> object:
        """Return who took *lease*, and where, for a message."""
        return self._out[lease]

    def look(self, now: float) -> float:
        """Tell of each lease that is late by now, and return when to look again."""
        for lease, holder in self._out.items():
            if lease.acquired_at + self._threshold > now:
                return lease.acquired_at + self._threshold
            if lease not in self._late:
                self._late.add(lease)
                self._counters.leaked += 1
                logger.warning(
                    "%s: a lease is out for %.1f s (leak_threshold=%g s), held by %s",
                    self._label,
                    now - lease.acquired_at,
                    self._threshold,
                    holder,
                )
        # No lease taken from now on can be due any earlier.
        return now + self._threshold


def abandoned(runtime: Runtime, lease: Lease, conn: object) -> None:
    """
    Have *lease* taken back soon, whose *conn* is being destroyed; from any thread.

    Garbage is collected at any moment: here, nothing of the pool may be changed.
    """
    if runtime.done.is_set() or runtime.home.is_forked():
        return  # nothing is left that could be given back
    runtime.home.call_soon(partial(_reclaim, runtime, lease))
    warnings.warn(
        f"{runtime.label}: {conn!r} was garbage-collected and not released; use "
        "`async with pool.acquire()`, or release() it",
        ResourceWarning,
        stacklevel=3,
        source=conn,
    )


def _reclaim(runtime: Runtime, lease: Lease) -> None:
    if runtime.done.is_set():
        return
    held = runtime.now() - lease.acquired_at
    before = runtime.state.status()
    holder = "" if runtime.leaks is None else f", by {runtime.leaks.holder(lease)}"
    runtime.counters.reclaimed += 1
    runtime.release(lease)
    logger.warning(
        "%s: took back a lease that was garbage-collected after %.1f s and not "
        "released (streams in use: %d -> %d)%s",
        runtime.label,
        held,
        before.streams_in_use,
        runtime.state.in_use,
        holder,
    )
