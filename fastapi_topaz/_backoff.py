"""How long to wait between two rounds of connecting."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["BASE", "CAP", "full_jitter"]


BASE = 0.1
CAP = 2.0


def full_jitter(failures: int, random: Callable[[], float]) -> float:
    """
    Return the seconds to wait after *failures* failed rounds in a row.

    Exponential, capped, and then multiplied by *random()* in [0, 1): jitter after
    the cap, because a capped delay without it brings a fleet back in step.
    """
    return random() * min(CAP, BASE * 2.0 ** (min(failures, 32) - 1))
