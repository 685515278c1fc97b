"""Waiting for other threads and processes, without guessing how long they take."""

from __future__ import annotations

import time

import anyio


async def eventually(predicate, timeout=10.0):
    """Return the first true value of *predicate*; fail with the last one."""
    deadline = anyio.current_time() + timeout
    while not (value := predicate()):
        assert anyio.current_time() < deadline, (
            f"not true within {timeout} s, the last value was {value!r}"
        )
        await anyio.sleep(0.005)
    return value


async def eventually_at_most(measure, before, timeout=20.0):
    """Return when no number of *measure()* is above *before*; fail with both."""

    def fallen():
        return all(value <= before[name] for name, value in measure().items())

    try:
        await eventually(fallen, timeout)
    except AssertionError:
        raise AssertionError(f"{measure()} is above {before}") from None


def until(condition, seconds=20.0):
    """Block the thread until *condition* is true; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.002)
