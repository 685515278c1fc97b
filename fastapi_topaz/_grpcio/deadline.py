"""
The deadlines of calls, which no replaced or stepped wall clock may move.

gRPC's core takes a deadline as a time of the system's wall clock, and converts it at
once. Libraries for tests replace `time.time`. Read here, a frozen time would be a
deadline that passed long ago, and each call would end at once.
"""

from __future__ import annotations

import sys
import time
from functools import partial


__all__ = ["core_deadline"]


# In objects of their own: freezegun replaces the functions that modules refer to.
if hasattr(time, "clock_gettime"):
    _wall_clock = partial(time.clock_gettime, time.CLOCK_REALTIME)
else:  # pragma: no cover  (Windows)
    _wall_clock = partial(time.time)
_LATE = 0.0

if sys.platform == "linux":
    # CLOCK_REALTIME_COARSE, because time-machine replaces CLOCK_REALTIME as well. It is
    # up to one tick late, which may not make a deadline early.
    _wall_clock = partial(time.clock_gettime, 5)
    _LATE = time.clock_getres(5)


def core_deadline(timeout: float) -> float:
    """Return the deadline for gRPC's core of a call that may take *timeout* seconds."""
    return _wall_clock() + _LATE + timeout
