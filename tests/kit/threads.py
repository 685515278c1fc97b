"""Other threads than that of the test."""

from __future__ import annotations

import threading


def in_a_thread(function):
    """Return what *function* raises in a thread of its own, or else returns."""
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
