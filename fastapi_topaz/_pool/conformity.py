"""
Checks that a connection from a connector has the methods the pool will call.

Without this check, a wrong method looks like a server that does not answer. The check
refuses only methods that are certainly wrong. A plain function, for example, may be a
wrapper that returns an awaitable.
"""

from __future__ import annotations

import dis
import functools
import inspect
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["defect_of"]


# For each method: its name, whether it is required, whether it is asynchronous, its
# form for messages, and arguments that it must accept.
_METHODS: tuple[tuple[str, bool, bool, str, tuple[Any, ...], dict[str, Any]], ...] = (
    ("probe", True, True, "async def probe(self, timeout)", (1.0,), {}),
    ("close", True, True, "async def close(self, grace)", (0.0,), {}),
    (
        "call",
        False,
        True,
        "async def call(self, method, request, *, timeout, metadata)",
        ("/package.Service/Method", b""),
        {"timeout": 1.0, "metadata": ()},
    ),
    ("run", False, True, "async def run(self)", (), {}),
    ("judge", False, False, "def judge(self, error)", (OSError(),), {}),
    ("is_lost", False, False, "def is_lost(self)", (), {}),
    ("refresh_liveness", False, False, "def refresh_liveness(self)", (), {}),
    ("abandon", False, False, "def abandon(self)", (), {}),
)


def defect_of(connection: object) -> str | None:
    """Return a description of the first wrong method of *connection*, or None."""
    for name, needed, asynchronous, form, args, kwargs in _METHODS:
        try:
            method = getattr(connection, name, None)
        except Exception as error:  # noqa: BLE001  (a connection may raise anything)
            if not needed:
                continue
            return f"its attribute {name} raises {type(error).__name__}; write: {form}"
        if method is None:
            if needed:
                return f"it has no method {name}; write: {form}"
            continue
        wrong = _wrong(method, asynchronous, args, kwargs)
        if wrong:
            return f"its {name} {wrong}; write: {form}"
    return _wrong_answer(connection)


def _wrong(  # noqa: PLR0911  (each kind of fault has its own message)
    method: object, asynchronous: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    if not callable(method):
        return f"is {type(method).__name__}, which cannot be called"
    function = _unwrapped(method)
    if inspect.isasyncgenfunction(function):
        return "is an asynchronous generator"
    if asynchronous and _returns_constant(function):
        return "is not an `async def` and returns nothing that can be awaited"
    if not asynchronous and inspect.iscoroutinefunction(function):
        return "is a coroutine function and must not be one"
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # some functions in C have no signature
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return f"has the parameters {signature} ({error})"
    return None


def _wrong_answer(connection: Any) -> str | None:
    # The pool calls is_lost() before each lease. Most objects that are not a bool, such
    # as a coroutine, count as true. Then every connection would look lost.
    try:
        lost = connection.is_lost()
        # `not lost` may raise, too: an object may define __bool__ so.
        if isinstance(lost, bool) or not lost:
            return None
    except Exception:  # noqa: BLE001  (there is no is_lost, or it raises: see Slot)
        return None
    if inspect.isawaitable(lost):
        if inspect.iscoroutine(lost):
            lost.close()
        kind = "an awaitable"
    else:
        kind = f"an object of the class {type(lost).__name__}"
    return f"its is_lost returns {kind}, which is always true; write: def is_lost(self)"


def _unwrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that a call of *method* runs, without partial() and self."""
    while True:
        if isinstance(method, functools.partial):
            method = method.func
        elif inspect.ismethod(method):
            method = method.__func__
        elif inspect.isfunction(method) or inspect.iscoroutinefunction(method):
            return method
        else:
            return type(method).__call__


def _returns_constant(function: Callable[..., Any]) -> bool:
    """
    Return whether *function* can only return constants, which are not awaitable.

    A plain generator function also counts: a generator is not awaitable either.
    """
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
        return False
    if function.__code__.co_flags & inspect.CO_ITERABLE_COROUTINE:
        return False
    if inspect.isgeneratorfunction(function):
        return True
    before = None
    for each in dis.get_instructions(function):
        if each.opname == "RETURN_VALUE" and before != "LOAD_CONST":
            return False
        before = each.opname
    return True
