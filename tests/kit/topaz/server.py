"""A topazd process that a test starts, stops, freezes and kills."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import grpc
from aserto.authorizer.v2 import AuthorizerStub, InfoRequest

from fastapi_topaz import AuthorizerOptions
from fastapi_topaz.testing._certs import Certificates

from .config import POLICIES, Certificate, Config


if TYPE_CHECKING:
    from collections.abc import Sequence


EMBEDDED = (sys.executable, str(Path(__file__).parent / "embedded_topazd.py"))
"""The command that runs the embedded authorizer as if it were topazd."""

REAL = os.environ.get("TOPAZD")
"""The path of a topazd, if there is one."""

MISSING = "TOPAZD names no topazd: only the embedded authorizer is tested"

# Seconds for operations that take one second on a working machine.
PATIENCE = 60.0


class TopazdError(Exception):
    """topazd did not do what it was asked for; the message contains its output."""


class Topazd:
    """
    A separate topazd process, with the policies of a bundle beside this file.

    It keeps its ports, certificates and files over all restarts.

    Args:
        command: The program, and arguments that come before its own.
        home: A folder for its files.
        tls: Serve TLS with a certificate for 127.0.0.1.
        api_key: Admit only clients with this key; small letters and digits.
        patience: Seconds that it may take to answer, and to end.
        policies: The folder of its bundle.
    """

    def __init__(
        self,
        command: Sequence[str],
        home: Path,
        *,
        tls: bool = False,
        api_key: str | None = None,
        patience: float = PATIENCE,
        policies: Path = POLICIES,
    ) -> None:
        self.patience = patience
        self._command = tuple(command)
        self._home = home
        self._api_key = api_key
        self._authority = Certificates.issue() if tls else None
        # Both at the same time, because otherwise they might be the same.
        with free_port() as first, free_port() as second:
            self.port, gateway_port = (s.getsockname()[1] for s in (first, second))
        self.config_file = Config(
            port=self.port,
            gateway_port=gateway_port,
            certificate=self._certificate(),
            api_key=api_key,
            policies=policies,
        ).write(home / "config.yaml")
        self._log = home / "topazd.log"
        self._process: subprocess.Popen[bytes] | None = None
        # Its port may have been closed between these times of time.monotonic().
        self.outages: list[tuple[float, float]] = []
        self._ended = time.monotonic()

    def _certificate(self) -> Certificate | None:
        if self._authority is None:
            return None
        files = Certificate(
            key=self._home / "grpc.key",
            chain=self._home / "grpc.crt",
            authority=self._home / "grpc-ca.crt",
        )
        files.key.write_bytes(self._authority.private_key)
        files.chain.write_bytes(self._authority.chain)
        shutil.copy(self._authority.ca_path, files.authority)
        return files

    @property
    def options(self) -> AuthorizerOptions:
        """The options that a client needs to connect."""
        return AuthorizerOptions(
            url=f"127.0.0.1:{self.port}",
            api_key=self._api_key,
            cert_file_path=self._authority.ca_path if self._authority else None,
            insecure=self._authority is None,
        )

    @property
    def log(self) -> str:
        """Its output, over all restarts."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def version(self) -> str:
        """Return the answer to an info request."""
        told = subprocess.run(
            [*self._command, "version"],
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=self.patience,
            check=True,
        )
        return told.stdout.strip()

    def _environment(self) -> dict[str, str]:
        # Not the developer's environment: Topaz reads settings from there, and writes
        # files into the home directory.
        names = ("PATH", "LANG", "TMPDIR", "COVERAGE_PROCESS_CONFIG")
        kept = {name: os.environ[name] for name in names if name in os.environ}
        return {**kept, "HOME": str(self._home)}

    # -- starting and stopping

    def start(self) -> Self:
        """
        Start it, and return when it answers; do nothing if it runs.

        Raises:
            TopazdError: It ended at once, or never answered.
        """
        if self._process is not None:
            return self
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, "run", "--config-file", str(self.config_file)],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_for_answer(self._process)
        except TopazdError:
            self.kill()
            raise
        self.outages.append((self._ended, time.monotonic()))
        return self

    def _wait_for_answer(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self.patience
        with _channel(self.options) as channel:
            info = AuthorizerStub(channel).Info
            while True:
                try:
                    # Short, to notice soon that it has ended.
                    info(InfoRequest(), timeout=0.2, wait_for_ready=True)
                except grpc.RpcError as error:
                    problem = error.details()
                else:
                    problem = None
                # Another process may have answered on its port.
                if process.poll() is not None:
                    problem = f"it exited with {process.returncode}"
                elif problem is None:
                    return
                elif time.monotonic() < deadline:
                    continue
                raise TopazdError(f"topazd does not answer: {problem}\n{self.log}")

    def stop(self) -> None:
        """Ask it to end (SIGTERM), and wait for that; do nothing if it has ended."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it at once (SIGKILL); do nothing if it has ended."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._ended = time.monotonic()
        self._process.send_signal(how)
        try:
            # A kill needs no longer, even with a patience of 0.
            asked = how is signal.SIGTERM
            self._process.wait(self.patience if asked else PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(PATIENCE)
            raise TopazdError(f"topazd did not end on {how.name}\n{self.log}") from None
        finally:
            self._process = None

    def freeze(self) -> None:
        """Freeze it (SIGSTOP) with its sockets open; return when it has stopped."""
        assert self._process is not None, "topazd does not run"
        self._process.send_signal(signal.SIGSTOP)
        # Until all its threads have stopped, it may answer another call.
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def thaw(self) -> None:
        """Let it continue (SIGCONT)."""
        assert self._process is not None, "topazd does not run"
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Also if it is frozen: this is the only signal that works then.
        self.kill()


def free_port() -> socket.socket:
    """Return a socket bound to a port that is free once it is closed."""
    return socket.create_server(("127.0.0.1", 0))


def _channel(options: AuthorizerOptions) -> grpc.Channel:
    settings = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 100),
    ]
    if options.cert_file_path is None:
        return grpc.insecure_channel(options.url, options=settings)
    root = Path(options.cert_file_path).read_bytes()
    credentials = grpc.ssl_channel_credentials(root)
    return grpc.secure_channel(options.url, credentials, options=settings)
