"""The backoff: how long to wait between two rounds of attempts to connect."""

from __future__ import annotations


__all__ = ["BASE", "CAP", "DEMAND_CAP", "FLOOR", "full_jitter"]


BASE = 0.1
"""Seconds. The longest pause after the first failure. It doubles with each failure."""

CAP = 2.0
"""Seconds. The longest pause if no caller waits."""

DEMAND_CAP = 0.5
"""Seconds. The longest pause while a caller waits, to find a recovered server soon."""

FLOOR = 0.05
"""Seconds. The shortest pause: the pool never makes more than 20 attempts a second."""


def full_jitter(failures: int, share: float, cap: float = CAP) -> float:
    """
    Return the seconds to wait after *failures* failed rounds in a row.

    The pause grows exponentially up to *cap* seconds. Then it is multiplied by *share*,
    a random number in [0, 1). The jitter comes after the cap: otherwise all processes
    of a fleet would reach the cap and retry at the same moments.
    """
    return max(FLOOR, share * min(cap, BASE * 2.0 ** (min(failures, 32) - 1)))
