"""
What may be told of an error, which is anybody's.

An authorizer may name in its details whom a check was about, so of an error with a
status only that is told.
"""

from __future__ import annotations

import re
import sys
from typing import TypeVar

from fastapi_topaz._redaction import clear_frames


__all__ = [
    "error_kind",
    "full_text",
    "log_text",
    "safe_text",
    "without_context",
]


E = TypeVar("E", bound=BaseException)

# gRPC's own words for an HTTP answer, of which the number alone is the server's.
_HARMLESS = re.compile(r"(^|: )Received http2 header with status: \d+$")

WORDS = 300
"""Characters of the details of an error that are told; a proxy may send a page."""


def safe_text(error: BaseException) -> str:
    """Return what *error* says, or only its status if it has one."""
    try:
        return _status(error) or str(error) or repr(error)
    except Exception:  # noqa: BLE001  (anybody's error)
        return type(error).__name__


def full_text(error: BaseException) -> str:
    """
    Return what *error* says with its details, for the caller who gets it.

    Not for the log: see `log_text`.
    """
    details = _details(error)
    return f"{safe_text(error)}: {details}" if details else safe_text(error)


def log_text(error: BaseException) -> str:
    """Return what *error* says for the log: without the details of its causes."""
    text = safe_text(error)
    cause = error.__cause__
    while cause is not None:
        details = _details(cause)
        if details and not _HARMLESS.search(details):
            text = text.replace(details, "(details in the error)")
        cause = cause.__cause__
    return text


def _details(error: BaseException) -> str:
    try:
        details = getattr(error, "details", None)
        text = str((details() if callable(details) else "") or "")
    except Exception:  # noqa: BLE001  (anybody's error)
        return ""
    safe_repr = text[:WORDS]
    return "".join(sign if sign.isprintable() else " " for sign in safe_repr).strip()


def error_kind(error: BaseException) -> str:
    """Return the status of *error* or the name of its class: one of a few words."""
    try:
        return _status(error) or type(error).__name__
    except Exception:  # noqa: BLE001  (anybody's error)
        return type(error).__name__


def without_context(error: E) -> E:
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
