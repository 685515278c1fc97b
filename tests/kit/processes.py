"""
An embedded authorizer in a process of its own.

gRPC's core does not survive a fork, so tests that fork need their server elsewhere. And
only a process can be frozen by a signal. Run as a program, this module is that process.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil

import fastapi_topaz
from fastapi_topaz import AuthorizerOptions
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.waiting import until


if TYPE_CHECKING:
    from fastapi_topaz.testing import Check


__all__ = ["PATHS", "AuthorizerProcess", "freeze"]


PATHS = (Path(fastapi_topaz.__file__).parents[1], Path(__file__).parents[1])
"""Where another process imports the package and this kit from."""


class AuthorizerProcess:
    """
    A running authorizer, for a `with`.

    It allows each check, after as many seconds as `seconds` in the resource says.
    """

    def __init__(self, *, tls: bool = False) -> None:
        self._tls = tls
        self._frozen = False

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(int(self._tls))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS))},
        )
        said = self._read()
        self.url: str = said["url"]
        self.options = AuthorizerOptions(
            url=said["url"], cert_file_path=said["ca"], insecure=not self._tls
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()
        _, _ = self._process.communicate(timeout=30)  # it ends with its stdin

    def freeze(self) -> None:
        """Stop the process. The system still accepts connections for it."""
        self._frozen = True
        freeze(self._process.pid)

    def thaw(self) -> None:
        """Let the process go on."""
        if self._frozen:
            self._frozen = False
            self._process.send_signal(signal.SIGCONT)

    @property
    def counts(self) -> dict[str, Any]:
        """How many connections were accepted and are open, and the calls by method."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        return said


def freeze(pid: int) -> None:
    """Send SIGSTOP to a process; return when it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    process = psutil.Process(pid)
    until(lambda: process.status() == psutil.STATUS_STOPPED)


async def allow(check: Check) -> bool:
    await asyncio.sleep(float((check.resource or {}).get("seconds", 0)))
    return True


def main() -> None:
    with EmbeddedAuthorizer(allow, tls=sys.argv[1] == "1") as authorizer:
        say({"url": authorizer.url, "ca": authorizer.ca_cert_path})
        for _ in sys.stdin:
            say(
                {
                    "accepted": authorizer.connections_accepted,
                    "open": authorizer.connections_open,
                    "calls": authorizer.calls,
                }
            )


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
