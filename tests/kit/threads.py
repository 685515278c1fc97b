"""Running a function in another thread than the thread of the test."""

from __future__ import annotations

import threading


def in_a_thread(function):
    """Return the error that *function* raises in its own thread, or its result."""
    outcome = []

    def run():
        try:
            outcome.append(function())
        except BaseException as error:  # noqa: BLE001  (the outcome)
            outcome.append(error)

    thread = threading.Thread(target=run, name="the other thread")
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return outcome[0]
