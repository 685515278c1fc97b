"""How long to wait between two rounds of connecting."""

from __future__ import annotations


__all__ = ["BASE", "CAP", "DEMAND_CAP", "FLOOR", "full_jitter"]


BASE = 0.1
CAP = 2.0
DEMAND_CAP = 0.5
"""The cap while somebody waits: a server that is back is found in a moment."""

FLOOR = 0.05
"""Seconds. The least, so that no more than 20 attempts a second are ever made."""


def full_jitter(failures: int, share: float, cap: float = CAP) -> float:
    """
    Return the seconds to wait after *failures* failed rounds in a row.

    Exponential, capped, and then multiplied by *share*, a random number in [0, 1):
    jitter after the cap, because a capped delay without it brings a fleet back in
    step.
    """
    return max(FLOOR, share * min(cap, BASE * 2.0 ** (min(failures, 32) - 1)))
