"""
Texts of errors from any source, without personal data.

The details of a gRPC error may name the identity that a check was about. So if an
error has a status, its text is only that status.
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
    "shortened",
    "without_context",
]


E = TypeVar("E", bound=BaseException)

# The texts of both transports for an answer without a gRPC status. The number helps in
# the log. The rest of the details may come from the server.
_HTTP_STATUS = re.compile(r"(?:HTTP|Received http2 header with) status: (\d{3})\b")

WORDS = 300
"""Maximum characters of an error's details, because a proxy may send a whole page."""


def safe_text(error: BaseException) -> str:
    """Return the status of *error* if it has one, else its text."""
    try:
        return _status(error) or str(error) or repr(error)
    except Exception:  # noqa: BLE001  (a foreign class, whose methods may raise)
        return type(error).__name__


def full_text(error: BaseException) -> str:
    """
    Return the text of *error* with its details, for the error that a caller gets.

    Not for the log. Use `log_text` there.
    """
    details = _details(error)
    return f"{safe_text(error)}: {details}" if details else safe_text(error)


def log_text(error: BaseException) -> str:
    """Return the text of *error* for the log, without the details of its causes."""
    text = safe_text(error)
    cause = error.__cause__
    while cause is not None:
        details = _details(cause)
        if details:
            found = _HTTP_STATUS.search(details)
            status = f"HTTP status: {found[1]}; " if found else ""
            text = text.replace(details, f"({status}details in the error)")
        cause = cause.__cause__
    return text


def _details(error: BaseException) -> str:
    try:
        details = getattr(error, "details", None)
        text = str((details() if callable(details) else "") or "")
    except Exception:  # noqa: BLE001  (a foreign class, whose methods may raise)
        return ""
    safe_repr = text[:WORDS]
    return "".join(sign if sign.isprintable() else " " for sign in safe_repr).strip()


def shortened(text: str, longest: int) -> str:
    """
    Return the words of *text* that fit into *longest* characters.

    The last word is left out if it does not fit as a whole. So what hides a secret by
    the form of a word, such as that of a URL with a password, always sees all of it.
    """
    if len(text) <= longest:
        return text
    words = re.match(r"(.*)\s", text[: longest + 1], re.DOTALL)
    return f"{words[1]} …" if words else "…"


def error_kind(error: BaseException) -> str:
    """
    Return the status of *error*, or the name of its class.

    There are only a few different values.
    """
    try:
        return _status(error) or type(error).__name__
    except Exception:  # noqa: BLE001  (a foreign class, whose methods may raise)
        return type(error).__name__


def without_context(error: E) -> E:
    """
    Return *error*, changed so that logging does not show the error in its context.

    The context is the error that was handled when *error* was raised. Its text would
    appear in the traceback. This also deletes the local variables of this package's
    frames, because some log handlers show them.
    """
    each: BaseException | None = error
    seen = set()
    while each is not None and each not in seen:
        seen.add(each)
        each.__suppress_context__ = True
        each = each.__cause__
    clear_frames(error)
    # The caller's frame still runs, so it cannot be cleared. Its variables may hold the
    # error of a check. So the traceback must not lead to it.
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
