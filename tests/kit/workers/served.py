"""A server as users run it: a process with workers, with a captured log."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Self, TypeVar

import attrs
import psutil

from kit.processes import PATHS


if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet
    from pathlib import Path


__all__ = ["PATIENCE", "Answer", "Served", "Unanswered"]


T = TypeVar("T")

# Seconds for operations that take one or two, unless the server hangs.
PATIENCE = 45.0

WHERE = re.compile(r"(?:Listening at:|running on|Running on) http://127\.0\.0\.1:(\d+)")


class Unanswered(Exception):  # noqa: N818
    """The connection was refused, or closed before the end of the answer."""


@attrs.frozen
class Answer:
    """
    The result of a request.

    Attributes:
        pid: The worker, if it let the request in.
        built_in: The process that the application was built in.
    """

    status: int
    pid: int | None = None
    built_in: int | None = None


class Served:
    """
    The server that `python -m *arguments*` starts.

    A context manager: afterwards none of its processes is left, and its log is in the
    output of the test.
    """

    def __init__(self, arguments: list[str], log: Path, **environment: str) -> None:
        self._log = log
        self._port = 0
        # The results of the requests; threads append to them.
        self.answers: list[Answer] = []
        self.unanswered: list[str] = []
        self.repeated: list[str] = []
        self.cut: list[str] = []
        paths = [*map(str, PATHS), os.environ.get("PYTHONPATH", "")]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # Servers search this folder first for imports.
                cwd=log.parent,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                    "PYTHONUNBUFFERED": "1",
                    **environment,
                },
                # Its own process group identifies its processes, even if they become
                # orphans.
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Repeatedly, because a server replaces the workers that it loses.
        while alive := self.alive():
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
        self.process.wait()
        print(self.log)  # noqa: T201  (pytest shows it if the test has failed)

    @property
    def pid(self) -> int:
        return self.process.pid

    def answered(self) -> Counter[int | None]:
        """Return how many requests each worker has let in and answered."""
        return Counter(answer.pid for answer in self.answers)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def port(self) -> int:
        """Its address, once it has logged it."""
        if not self._port:
            where = self.until(lambda: WHERE.search(self.log))
            assert where is not None
            self._port = int(where[1])
        return self._port

    def alive(self) -> set[int]:
        """Return the processes of its group."""
        pids = set()
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(process.pid) != self.pid:
                    continue
                if process.status() != psutil.STATUS_ZOMBIE:
                    pids.add(process.pid)
        return pids

    def until(self, condition: Callable[[], T]) -> T:
        """Return the first true value of *condition*; fail with the last one."""
        deadline = time.monotonic() + PATIENCE
        while not (value := condition()):
            assert time.monotonic() < deadline, (
                f"{condition.__qualname__} was {value!r} for {PATIENCE:g} s\n{self.log}"
            )
            time.sleep(0.01)
        return value

    def ask(self, path: str = "/quick", *, final: bool = True) -> Answer:
        """
        Send one request on a new connection, and record its result.

        Args:
            final: Whether it counts as failed if it gets no byte of an answer.

        Raises:
            Unanswered: It reached no worker, or its worker ended before the answer.
        """
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(client):
            try:
                client.request("GET", path, headers={"Connection": "close"})
                response = client.getresponse()
            except ConnectionError as error:
                (self.unanswered if final else self.repeated).append(repr(error))
                raise Unanswered(repr(error)) from error
            try:
                body = json.loads(response.read())
            except (ConnectionError, http.client.IncompleteRead) as error:
                self.cut.append(repr(error))
                raise Unanswered(repr(error)) from error
        answer = Answer(response.status, body.get("pid"), body.get("built_in"))
        self.answers.append(answer)
        return answer

    def asked_first(self) -> Answer:
        """Send requests until one is answered, and return the answer."""

        def answer() -> Answer | None:
            try:
                return self.ask(final=False)
            except Unanswered:
                return None

        first = self.until(answer)
        assert first is not None
        return first

    def workers(self, count: int, *, but: AbstractSet[int] = frozenset()) -> set[int]:
        """Send requests until *count* workers have answered, besides those in *but*."""
        found: set[int] = set()

        def answered() -> bool:
            with contextlib.suppress(Unanswered):
                answer = self.ask(final=False)
                assert answer.pid is not None, f"{answer}\n{self.log}"
                found.add(answer.pid)
            return len(found - but) >= count

        self.until(answered)
        return found - but

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop, and return its exit code once all of its processes ended."""
        self.send(number)
        return self.ended()

    def listening(self, pid: int) -> bool:
        """Whether the process *pid* has a listening socket."""
        try:
            connections = psutil.Process(pid).net_connections("tcp")
        except psutil.NoSuchProcess:
            return False
        return any(one.status == psutil.CONN_LISTEN for one in connections)

    def ended(self) -> int:
        """Return its exit code once all of its processes have ended."""
        self.until(lambda: self.process.poll() is not None)
        self.until(lambda: not self.alive())
        return self.process.returncode
