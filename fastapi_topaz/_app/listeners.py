"""
Tells whether the server that runs this application begins to shut down.

ASGI has no event for it. `lifespan.shutdown` comes after the last response, so an
endless response would wait for itself. uvicorn would even wait without a limit. But
each server first stops to listen. So a response ends once a socket that listened when
it began is closed. If that was the socket of another server in this process, the
response ends too early. That does no harm if its client repeats the request.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path


__all__ = ["Listeners"]


class Listeners:
    """The sockets of this process that listen now."""

    def __init__(self) -> None:
        self._sockets = list(_listening())

    def is_one_closed(self) -> bool:
        """Return whether one of the sockets is closed since."""
        # The number of a closed file may be that of another file now.
        return any(_identity(number) != known for number, known in self._sockets)


def _listening() -> list[tuple[int, tuple[int, int]]]:
    found = []
    for number in _open_files():
        known = _identity(number)
        if known is not None and _listens(number):
            found.append((number, known))
    return found


def _open_files() -> list[int]:
    # A list of the system: there may be a million possible numbers.
    for folder in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return [int(path.name) for path in Path(folder).iterdir()]
    return []


def _identity(number: int) -> tuple[int, int] | None:
    """Return what tells one socket from another. None: *number* is no open socket."""
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None


def _listens(number: int) -> bool:
    try:
        copy = os.dup(number)
    except OSError:
        return False
    try:
        sock = socket.socket(fileno=copy)
    except OSError:
        # Another thread has closed it, and another file has its number.
        os.close(copy)
        return False
    with sock, contextlib.suppress(OSError):
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    return False
