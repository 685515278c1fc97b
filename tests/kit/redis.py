"""A redis-server that a test starts, kills and starts again on the same port."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile

from kit.waiting import until


VARIABLE = "REDIS_SERVER"
"""The environment variable that names the binary."""


class Redis:
    """A redis-server on 127.0.0.1 that keeps nothing on disk. Use it in a `with`."""

    def __init__(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        self._folder = tempfile.TemporaryDirectory(prefix="redis-")
        self._process = self._guard = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.kill()
        self._folder.cleanup()

    def start(self):
        """Return when it listens."""
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._process = subprocess.Popen(
            [os.environ[VARIABLE], *options, "--dir", self._folder.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # It ends with this process, even if that is killed: the pipe closes.
        self._guard = subprocess.Popen(
            ["sh", "-c", f"read _; kill -s KILL {self._process.pid}"],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until(self._listens)

    def _listens(self):
        assert self._process.poll() is None, "redis-server has ended"
        try:
            socket.create_connection(("127.0.0.1", self.port), 5).close()
        except OSError:
            return False
        return True

    def kill(self):
        """Kill it, and return when it has ended."""
        if self._process is not None:
            self._guard.kill()
            self._guard.communicate()
            self._process.kill()
            self._process.wait()
            self._process = None
