"""
What may be told of an error, which is anybody's.

An authorizer may name in its details whom a check was about, so of an error with a
status only that is told.
"""

from __future__ import annotations

from typing import TypeVar


__all__ = ["alone", "kind_of", "told"]


E = TypeVar("E", bound=BaseException)


def told(error: BaseException) -> str:
    """Return what *error* says, or only its status if it has one."""
    try:
        return _status(error) or str(error) or repr(error)
    except Exception:  # noqa: BLE001  (anybody's error)
        return type(error).__name__


def kind_of(error: BaseException) -> str:
    """Return the status of *error* or the name of its class: one of a few words."""
    try:
        return _status(error) or type(error).__name__
    except Exception:  # noqa: BLE001  (anybody's error)
        return type(error).__name__


def alone(error: E) -> E:
    """
    Return *error*, to be logged without the error that was being handled meanwhile.

    Its traceback would end with that one, and with what that one says.
    """
    each: BaseException | None = error
    seen = set()
    while each is not None and each not in seen:
        seen.add(each)
        each.__suppress_context__ = True
        each = each.__cause__
    return error


def _status(error: BaseException) -> str:
    code = getattr(error, "code", None)
    if not callable(code):
        return ""
    status = code()
    return str(getattr(status, "name", status))
