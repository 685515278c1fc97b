"""
What may be told of an error, which is anybody's.

An authorizer may name in its details whom a check was about, so of an error with a
status only that is told.
"""

from __future__ import annotations

import sys
from typing import TypeVar

from fastapi_topaz._redaction import clear_frames


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

    Its traceback would end with that one, and with what that one says. Local variables
    of this package are deleted from it, because some handlers log these, too.
    """
    each: BaseException | None = error
    seen = set()
    while each is not None and each not in seen:
        seen.add(each)
        each.__suppress_context__ = True
        each = each.__cause__
    clear_frames(error)
    # The frame of the caller still runs: its variables may name the error of a check.
    traceback = error.__traceback__
    if traceback is not None and traceback.tb_frame is sys._getframe(1):  # noqa: SLF001
        error.__traceback__ = traceback.tb_next
    return error


def _status(error: BaseException) -> str:
    code = getattr(error, "code", None)
    if not callable(code):
        return ""
    status = code()
    return str(getattr(status, "name", status))
