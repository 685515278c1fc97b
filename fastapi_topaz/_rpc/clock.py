"""The clock of calls, which no test library and no stepped wall clock moves."""

from __future__ import annotations

import time
from functools import partial


__all__ = ["left", "monotonic"]


# In an object of its own: freezegun replaces the functions that modules refer to.
if hasattr(time, "clock_gettime"):
    monotonic = partial(time.clock_gettime, time.CLOCK_MONOTONIC)
else:  # pragma: no cover  (Windows)
    monotonic = partial(time.perf_counter)


def left(deadline: float | None) -> float | None:
    """Return the seconds until *deadline*, which is one of `monotonic()`."""
    return None if deadline is None else max(0.0, deadline - monotonic())
