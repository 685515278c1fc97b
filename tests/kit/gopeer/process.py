"""The grpc-go server of this folder as a process that tests stop, kill and freeze."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from typing import Self

from fastapi_topaz import AuthorizerOptions


_PATIENCE = 20.0  # seconds to answer or end, which normally takes no noticeable time


class Gopeer:
    """
    A running server; use it in a `with`.

    *flags* are the flags of `main.go`, such as `max_streams=5`. After a signal ended
    it, it can be started again on the same port.
    """

    def __init__(self, **flags) -> None:
        self._flags = [f"--{name.replace('_', '-')}={flags[name]}" for name in flags]
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.url = f"127.0.0.1:{free.getsockname()[1]}"
        self.options = AuthorizerOptions(url=self.url, insecure=True)
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.end(signal.SIGKILL)

    def start(self) -> None:
        """Return when it listens."""
        self._process = subprocess.Popen(
            [os.environ["GOPEER"], f"--listen={self.url}", *self._flags],
            stdin=subprocess.PIPE,  # the server ends with this process
            stdout=subprocess.PIPE,
        )
        words = self._process.stdout.readline().split()
        if not words:
            self.end(signal.SIGKILL)
            raise RuntimeError("the server did not start; stderr says why")
        self.version = words[1].decode()
        self._counts = words[3].decode().split(":")

    @property
    def is_running(self) -> bool:
        """Whether it was started, and has not ended."""
        return self._process is not None

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def end(self, number: signal.Signals) -> None:
        """Send it a signal, and return when it has ended."""
        process, self._process = self._process, None
        process.send_signal(number)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdin.close()
            process.stdout.close()

    @property
    def counts(self) -> dict:
        """Its counts since its start, as `peer` in `main.go` names them."""
        with (
            socket.create_connection(self._counts, _PATIENCE) as connection,
            connection.makefile() as lines,
        ):
            return json.loads(lines.read())

    def count(self, name: str, kind: str | None = None) -> int:
        """Return one number of the counts."""
        counted = self.counts[name]
        return counted if kind is None else counted.get(kind, 0)
