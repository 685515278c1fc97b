"""
Which functions Ctrl-C does not end halfway.

Trio raises KeyboardInterrupt at any line of the task that runs at that moment. In a
task of the pool it would end the pool, and the application would go on. In the release
of a lease it would lose the lease. In a protected function trio waits until the main
task waits, and raises it there.

asyncio cancels the main task instead, so it needs none of this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar


if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["protect", "protected"]


Function = TypeVar("Function", bound="Callable[..., Any]")

_PROTECTED: list[Callable[..., Any]] = []


def protected(function: Function) -> Function:
    """Mark *function*, which calls of it do not notice; see `protect`."""
    _PROTECTED.append(function)
    return function


def protect() -> None:
    """Tell trio of all marked functions; to be called when a pool opens on trio."""
    # Here and not above: asyncio applications need no trio installed.
    import trio  # noqa: PLC0415

    for function in _PROTECTED:
        trio.lowlevel.enable_ki_protection(function)
