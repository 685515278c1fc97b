"""
Measures leases in this process as `acquire.py` or `contended.py`, and prints one time.

`commits.py` starts this file, with the package of a commit in PYTHONPATH.
"""

from __future__ import annotations

import statistics
import sys

import acquire
import contended
from _peers import ours, run


LEASES = 12_000
TASKS, LEASES_OF_A_TASK = 200, 20
ROUNDS = 4


def measure(backend, case, share):
    """Return the microseconds of a lease."""
    if case == "waiting":
        count = max(1, round(LEASES_OF_A_TASK * share))
        queue = contended.Queue(ours(), backend, TASKS, count)
        queue.measure()  # to warm up
        return statistics.median(queue.measure() for _ in range(ROUNDS))
    peer = ours(streams_per_connection=50) if case == "50 streams" else ours()
    return run(backend, acquire.entered, peer.open, round(LEASES * share))


if __name__ == "__main__":
    backend, case, share = sys.argv[1:]
    print(measure(backend, case, float(share)))
