"""
What a fork does to connections, and in which process the code runs.

A forked child inherits the sockets of the native transport. They belong to its parent,
so the child closes its copies at once. That sends nothing, and the parent's event loop
still watches its own: an epoll forgets a socket when its last copy is closed.

gRPC cannot survive `os.fork()` with an open channel. In the child, every call hangs
or the process dies. If the child garbage-collects an inherited channel, it breaks the
channel of the parent. The child cannot repair this, so the pool detects it and raises
an error. A closed channel that is not yet garbage-collected does the same harm. So
closed channels are collected before the fork.
"""

from __future__ import annotations

import gc
import os
import weakref
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import socket


__all__ = [
    "close_in_child",
    "current",
    "forget",
    "inherited_from",
    "keep",
    "watch",
]


class _Process:
    """The pid of this process. A different pid means that the process has forked."""

    __slots__ = ("pid",)

    def __init__(self) -> None:
        self.pid = os.getpid()


# Each acquire() reads the pid. To read an attribute takes a third of the time of
# os.getpid().
current = _Process()

_open: weakref.WeakSet[object] = weakref.WeakSet()
# Closed channels that are not garbage-collected yet. The polling thread of grpc.aio
# ends when the last one is collected.
_closed: weakref.WeakSet[object] = weakref.WeakSet()
_inherited: list[object] = []
_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
_parent: list[int] = []


def watch(channel: object) -> None:
    """Register *channel* as open. It must be closed before the process forks."""
    _open.add(channel)


def forget(channel: object) -> None:
    """Undo `watch`: *channel* is closed and no longer used."""
    _open.discard(channel)
    _closed.add(channel)


def inherited_from() -> int | None:
    """Return the pid of the parent if it forked with open channels, else None."""
    return _parent[-1] if _parent else None


def close_in_child(sock: socket.socket) -> None:
    """Have each forked child close its copy of *sock*, before any other code runs."""
    _sockets.add(sock)


def keep(inherited: object) -> None:
    """
    Keep *inherited*, which belongs to the parent, until this process ends.

    If an event loop or its tasks were collected in the child, their clean-up would
    change the parent's epoll, or write to the pipe that wakes the parent's loop.
    """
    _inherited.append(inherited)


def _before_fork() -> None:
    # A closed channel leaves reference cycles. If the child collects them, it hangs.
    if _closed:
        gc.collect()


def _after_fork_in_child() -> None:
    # Now and not at the first use. Otherwise a child that never uses the pool keeps
    # them open when its parent closes them. On trio the tasks of the parent also exist
    # in the child, and they may read.
    for sock in list(_sockets):
        sock.close()
    # Never released: if the child collects a channel, it breaks the parent's channel.
    left = [*_open, *_closed]
    if left:
        _inherited.extend(left)
        _parent.append(current.pid)
    current.pid = os.getpid()


if hasattr(os, "register_at_fork"):  # pragma: no branch  (not on Windows)
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
