"""
nginx and HAProxy as processes that a test starts, reloads, stops and kills.

Both listen on 127.0.0.1 for HTTP/2 in plaintext, and forward each call to one of the
*upstreams*. The environment variables NGINX and HAPROXY name the binaries.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import tempfile
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from fastapi_topaz import AuthorizerOptions


if TYPE_CHECKING:
    from collections.abc import Callable, Collection


PATIENCE = 20.0
"""Seconds for a process to listen, reload or end, which takes well under one."""


class ProxyCall(NamedTuple):
    """A call that a proxy has answered, from its log."""

    port: int
    """The port of the client, which identifies the connection."""
    method: str
    """The name of the gRPC method, such as `Is`."""
    status: int
    """The HTTP status. It is 200 for each answer of an authorizer."""


class ProxyProcess:
    """
    A proxy with its configuration in a temporary folder. Use it in a `with`.

    After its end it can be started again on the same port. Its settings and upstreams
    may be changed between.

    Args:
        upstreams: The ports of the authorizers on 127.0.0.1.
        settings: See the class of the proxy.
    """

    variable: ClassVar[str]
    """The environment variable that names the binary."""

    def __init__(self, upstreams: Collection[int], **settings: str) -> None:
        self.upstreams = upstreams
        self.settings = settings
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"127.0.0.1:{self.port}"
        self.options = AuthorizerOptions(url=self.url, insecure=True)
        # Not pytest's folder, which only its user can read. The folder is kept after an
        # end, because a failed test shows the log.
        self._temporary = tempfile.TemporaryDirectory(prefix="proxies-")
        self.folder = Path(self._temporary.name)
        self._log = self.folder / "log"
        self._process: subprocess.Popen | None = None
        self._guard: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.end(signal.SIGKILL)
        self._temporary.cleanup()

    # -- the differences between the proxies

    def configuration(self) -> str:
        """Return the text of the configuration file."""
        raise NotImplementedError

    def command(self, file: Path) -> list[str]:
        """Return the arguments that keep it in the foreground with this *file*."""
        raise NotImplementedError

    reload_signal: ClassVar[signal.Signals]
    reload_texts: ClassVar[tuple[str, str]]
    """Its log texts when it has got that signal, and when its old worker is to end."""

    # -- starting and stopping

    def start(self) -> None:
        """Return when it listens."""
        file = self.folder / "configuration"
        file.write_text(textwrap.dedent(self.configuration()).lstrip())
        # nginx reads its listening sockets from the variable NGINX.
        environment = {k: v for k, v in os.environ.items() if k != self.variable}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [os.environ[self.variable], *self.command(file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                # Its workers are in their own process group, so that they can be killed
                # with it.
                start_new_session=True,
            )
        # They end with this process, even if it is killed: its end of the pipe closes.
        self._guard = subprocess.Popen(
            ["sh", "-c", f"read _; kill -s KILL -- -{self._process.pid}"],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._wait(self._listens, "does not listen")
        except BaseException:
            self.end(signal.SIGKILL)
            raise

    def reload(self) -> None:
        """Reload the configuration; return when the old workers are about to end."""
        heeded, reloaded = (self._counter(text) for text in self.reload_texts)
        sent_at = -math.inf

        def has_reloaded() -> bool:
            nonlocal sent_at
            # HAProxy drops a signal that it gets during its start.
            if not heeded() and time.monotonic() > sent_at + 1:
                self.send(self.reload_signal)
                sent_at = time.monotonic()
            return reloaded()

        self._wait(has_reloaded, "does not reload")

    def _counter(self, text: str) -> Callable[[], bool]:
        before = self.log.count(text)
        return lambda: self.log.count(text) > before

    def send(self, number: signal.Signals) -> None:
        """Send a signal to its first process."""
        self._process.send_signal(number)

    def end(self, number: signal.Signals) -> None:
        """Send it a signal, and return when all its processes have ended."""
        process, self._process = self._process, None
        process.send_signal(number)
        try:
            process.wait(PATIENCE)
        finally:
            # The workers outlive a first process that was killed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._guard.kill()
            self._guard.communicate()

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), PATIENCE).close()
        except OSError:
            return False
        return True

    def _wait(self, condition: Callable[[], bool], failure: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                why = "has ended" if ended else f"{failure} within {PATIENCE} s"
                raise RuntimeError(f"{self.variable} {why}:\n{self.log}")
            time.sleep(0.01)

    # -- its log

    @property
    def log(self) -> str:
        """Its log, without the calls."""
        return "".join(line for line in self._lines() if not line.startswith(_CALL))

    @property
    def calls(self) -> list[ProxyCall]:
        """
        The calls it has answered. It logs them after the answer, so tests wait for
        them.
        """
        calls = []
        for line in self._lines():
            if line.startswith(_CALL) and line.endswith("\n"):
                port, path, status = line.removeprefix(_CALL).split()
                method = path.rpartition("/")[2]
                calls.append(ProxyCall(int(port), method, int(status)))
        return calls

    def _lines(self) -> list[str]:
        return self._log.read_text().splitlines(keepends=True)


_CALL = "call "


class Nginx(ProxyProcess):
    """
    nginx with `grpc_pass`.

    Settings: `http`, `server` and `location`, lines for these blocks of its
    configuration.
    """

    variable = "NGINX"
    reload_signal = signal.SIGHUP
    reload_texts = ("SIGHUP) received", "gracefully shutting down")

    def command(self, file: Path) -> list[str]:
        return ["-p", str(self.folder), "-e", "stderr", "-c", str(file)]

    def configuration(self) -> str:
        # Workers of root otherwise use the user `nobody`, which may be missing.
        user = "user root root;" if os.geteuid() == 0 else ""
        bodies = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        folders = "\n".join(f"{name}_temp_path {name};" for name in bodies)
        servers = "\n".join(f"server 127.0.0.1:{port};" for port in self.upstreams)
        refusals = "\n".join(
            f"if (-f {self._refusal(status)}) {{ return {status}; }}"
            for status in (429, 502, 503, 504)
        )
        return f"""
            daemon off;
            # One, so that its log tells of each reload once.
            worker_processes 1;
            pid pid;
            error_log stderr notice;
            {user}
            events {{ worker_connections 1024; }}
            http {{
                log_format call "{_CALL}$remote_port $uri $status";
                access_log {self._log} call;
                {folders}
                # Its default, 1,000, is reached within seconds.
                keepalive_requests 1000000;
                {self.settings.get("http", "")}
                upstream authorizers {{ {servers} keepalive 128; }}
                server {{
                    listen {self.url} http2;
                    {self.settings.get("server", "")}
                    location / {{
                        {refusals}
                        {self.settings.get("location", "")}
                        grpc_pass grpc://authorizers;
                    }}
                }}
            }}
        """

    def _refusal(self, status: int) -> Path:
        return self.folder / f"refuses-{status}"

    def refuse(self, status: int) -> None:
        """Answer all calls with this HTTP status: 429, 502, 503 or 504."""
        self._refusal(status).touch()

    def forward(self) -> None:
        """Forward all calls, after `refuse`."""
        for refusal in self.folder.glob("refuses-*"):
            refusal.unlink()


class Haproxy(ProxyProcess):
    """
    HAProxy as a master and a worker.

    Settings: `defaults`, lines for this section of its configuration.
    """

    variable = "HAPROXY"
    reload_signal = signal.SIGUSR2
    reload_texts = ("Reloading HAProxy", ") : Proxy calls stopped")

    def command(self, file: Path) -> list[str]:
        return ["-W", "-f", str(file)]

    def configuration(self) -> str:
        servers = "\n".join(
            f"server s{port} 127.0.0.1:{port} proto h2" for port in self.upstreams
        )
        return f"""
            global
                log stdout format raw local0
                nbthread 2
            defaults
                mode http
                log global
                option dontlognull
                log-format "{_CALL}%cp %HP %ST"
                # Else it pauses for a second before it says that a server is down.
                retries 0
                timeout connect 5s
                timeout client 60s
                timeout server 60s
                {self.settings.get("defaults", "")}
            frontend calls
                bind {self.url} proto h2
                default_backend authorizers
            backend authorizers
                {servers}
        """
