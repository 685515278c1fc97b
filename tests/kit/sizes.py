"""The sizes of tests that run at night."""

from __future__ import annotations

import os


def at_night(count):
    """Return *count*, or a part of it if NIGHTLY_SHARE says so, such as 0.1."""
    return max(1, int(count * float(os.environ.get("NIGHTLY_SHARE", "1"))))
