"""Clients that send requests all the time, and clients with a delayed answer."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Self

from .served import PATIENCE, Unanswered


if TYPE_CHECKING:
    from .served import Answer, Served


__all__ = ["CLIENTS", "Load", "ask_aside"]


CLIENTS = 6


class Load:
    """
    Sends requests to *served* on *clients* threads, one after the other on each.

    Each request uses a new connection. A server may close a kept-alive connection just
    when the next request is sent on it. Each of these servers can do this at any time.

    Args:
        clients: How many requests run at the same time.
        repeats: How often in a row a client repeats a request without any answer, as
            browsers and proxies do with a GET.

    Attributes:
        refused: For each client that stopped because no server listened, the reason.
    """

    def __init__(
        self, served: Served, *, clients: int = CLIENTS, repeats: int = 0
    ) -> None:
        self.refused: list[str] = []
        self._served = served
        self._repeats = repeats
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def __enter__(self) -> Self:
        before = len(self._served.answers)
        for thread in self._threads:
            thread.start()
        # So that the next action of the test happens under load.
        enough = before + len(self._threads)
        self._served.until(lambda: len(self._served.answers) >= enough)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE)
        hanging = [thread for thread in self._threads if thread.is_alive()]
        assert not hanging, self._served.log

    def _run(self) -> None:
        while not self._stop.is_set():
            for repeat in range(self._repeats + 1):
                try:
                    self._served.ask(final=repeat == self._repeats)
                except Unanswered as error:
                    if isinstance(error.__cause__, ConnectionRefusedError):
                        self.refused.append(str(error))
                        return
                    continue
                break


def ask_aside(served: Served, path: str) -> Future[Answer]:
    """Send one request from a separate thread."""
    answer: Future[Answer] = Future()

    def ask() -> None:
        try:
            answer.set_result(served.ask(path))
        except BaseException as error:  # noqa: BLE001  (the future raises it)
            answer.set_exception(error)

    # Stopping: no answer within PATIENCE is an error.
    threading.Thread(target=ask).start()
    return answer
