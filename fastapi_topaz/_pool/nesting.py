"""
Finds nested leases: leases held by tasks that wait for another lease.

If every lease is held by such a task, no task can continue until one of them times out.
Nothing is recorded for this when a lease is taken. Instead the search looks into the
local variables of the waiting tasks, and only when a task got no lease in time.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from itertools import chain
from types import AsyncGeneratorType, CoroutineType, GeneratorType, MethodType
from typing import TYPE_CHECKING, Any

from fastapi_topaz._pool.acquire import Acquire
from fastapi_topaz._pool.handle import Handle


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import FrameType

    from fastapi_topaz._pool.open_pool import OpenPool


__all__ = ["count_nested"]


LIMIT = 1_000
"""The most objects in one search. A search of this size takes about a millisecond."""

# For these types, gc.get_referents() returns their locals and the object they await.
_SUSPENDED = (CoroutineType, GeneratorType, AsyncGeneratorType)

_CONTEXT_MANAGERS = (
    contextlib.AsyncExitStack,
    contextlib._AsyncGeneratorContextManager,  # noqa: SLF001  (has no public name)
)


def count_nested(coroutines: Iterable[object], open_pool: OpenPool) -> int:
    """
    Count the leases of *open_pool* that the *coroutines* and the call stack hold.

    The search covers the call stack of this thread. The count is a lower bound, because
    one search looks at `LIMIT` objects at most.
    """
    return held_by(chain(coroutines, _locals_of_callers()), open_pool)


def held_by(roots: Iterable[object], open_pool: OpenPool) -> int:
    """Count the leases of *open_pool* that the *roots*, such as coroutines, hold."""
    left = list(roots)
    seen: set[int] = set()
    leases = set()
    while left and len(seen) < LIMIT:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Handle):
            # A handle exists only after its claim was served. Without a claim it was
            # released.
            if each._open_pool is open_pool and each._claim is not None:  # noqa: SLF001
                leases.add(each._claim)  # noqa: SLF001
        else:
            left.extend(_next(each))
    return len(leases)


def _locals_of_callers() -> Iterator[object]:
    """Yield the local variables of all functions on the stack of this thread."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001
    while frame is not None:
        yield from list(frame.f_locals.values())
        frame = frame.f_back


def _next(each: Any) -> Iterable[object]:
    if isinstance(each, _SUSPENDED):
        return gc.get_referents(each)
    if isinstance(each, MethodType):  # such as the __aexit__ of an `async with`
        each = each.__self__
    if isinstance(each, Acquire):
        return [each._conn]  # noqa: SLF001
    if isinstance(each, _CONTEXT_MANAGERS):
        callbacks = getattr(each, "_exit_callbacks", ())
        return [getattr(each, "gen", None), *(exit_ for _, exit_ in callbacks)]
    return ()
