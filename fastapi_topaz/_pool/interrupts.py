"""
Protects the functions of the pool from KeyboardInterrupt (Ctrl-C) on trio.

Trio raises KeyboardInterrupt at any line of the task that runs at that moment. In a
task of the pool it would end the pool, while the application goes on. During the
release of a lease it would lose the lease. If a protected function runs, trio delays
the interrupt: it raises it in the main task, when that task waits.

asyncio cancels the main task instead, so it needs no protection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar


if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["protect", "protected"]


Function = TypeVar("Function", bound="Callable[..., Any]")

_PROTECTED: list[Callable[..., Any]] = []


def protected(function: Function) -> Function:
    """Mark *function* for `protect` and return it unchanged, so calls cost no more."""
    _PROTECTED.append(function)
    return function


def protect() -> None:
    """Enable trio's protection of all marked functions, as a pool opens on trio."""
    # Imported here, because applications on asyncio do not need trio.
    import trio  # noqa: PLC0415

    for function in _PROTECTED:
        trio.lowlevel.enable_ki_protection(function)
