"""The clock of ages: it never goes back, and it also counts while a machine sleeps."""

from __future__ import annotations

import time
from typing import Final


__all__ = ["boot_time"]


# Not the clock of an event loop: each run of trio has another one. Not time.monotonic()
# on Linux: it stands still while a virtual machine is suspended, so a revoked right
# would live on.
_BOOT: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)


def boot_time() -> float:
    """Return seconds since an unknown moment, the same for all threads and loops."""
    return time.monotonic() if _BOOT is None else time.clock_gettime(_BOOT)
