"""
What a forked child must not touch.

gRPC cannot survive `os.fork()` with an open channel: in the child every call
hangs or the process dies, and even garbage-collecting an inherited channel breaks
the parent's. Nothing in the child can repair that, so it is recognised and refused.
A closed channel that was not collected yet does the same, so it is collected first.
"""

from __future__ import annotations

import gc
import os
import weakref


__all__ = ["current", "forget", "inherited_from", "watch"]


class _Process:
    """The process this interpreter is; one compare tells whether it forked."""

    __slots__ = ("pid",)

    def __init__(self) -> None:
        self.pid = os.getpid()


# Reading an attribute is a third of the price of os.getpid(), which matters on
# every acquire.
current = _Process()

_open: weakref.WeakSet[object] = weakref.WeakSet()
# Those that still exist: the thread that polls for grpc.aio ends with the last one.
_closed: weakref.WeakSet[object] = weakref.WeakSet()
_inherited: list[object] = []
_parent: list[int] = []


def watch(channel: object) -> None:
    """Remember *channel* as one that must be closed before the process forks."""
    _open.add(channel)


def forget(channel: object) -> None:
    """Take back `watch`: *channel* is closed, and nobody needs it any more."""
    _open.discard(channel)
    _closed.add(channel)


def inherited_from() -> int | None:
    """Return the pid of a parent that forked with open channels, if one did."""
    return _parent[-1] if _parent else None


def _before_fork() -> None:
    # Closing leaves reference cycles behind, and collected in the child they hang it.
    if _closed:
        gc.collect()


def _after_fork_in_child() -> None:
    # Held for ever: collecting one of them in the child breaks the parent's.
    left = [*_open, *_closed]
    if left:
        _inherited.extend(left)
        _parent.append(current.pid)
    current.pid = os.getpid()


if hasattr(os, "register_at_fork"):  # pragma: no branch  (not on Windows)
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
