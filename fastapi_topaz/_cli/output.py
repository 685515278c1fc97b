"""What the commands have in common in their output."""

from __future__ import annotations

import io
import logging
import math
import re
import sys
from collections import Counter
from typing import TYPE_CHECKING, Final, Self

from rich.console import Console


if TYPE_CHECKING:
    from collections.abc import Iterator


__all__ = ["Causes", "Messages", "ms", "new_console", "say"]


WIDTH: Final = 100
"""Columns of output without a terminal, such as a pipe or a log file."""


def new_console() -> Console:
    """Return a console for the standard output, which prints any text."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The name in a certificate may have signs that the terminal cannot show.
        sys.stdout.reconfigure(errors="replace")
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def say(console: Console, *lines: str) -> None:
    """
    Print *lines* as they are.

    Without markup and wrapping: a cause may be long, and may contain brackets that Rich
    would interpret.
    """
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def ms(seconds: float) -> str:
    """Return a time in milliseconds, or `n/a`."""
    return "n/a" if math.isnan(seconds) else f"{seconds * 1000:.1f} ms"


class Messages:
    """Counts messages. Messages that differ only in numbers count as the same."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._times: Counter[str] = Counter()

    def add(self, message: str) -> None:
        """Count *message*."""
        kind = re.sub(r"\d+(\.\d+)?", "0", message)
        self._first.setdefault(kind, message)
        self._times[kind] += 1

    def most_frequent(self) -> tuple[str, int] | None:
        """Return the most frequent message and how often it came, if there is one."""
        for kind, times in self._times.most_common(1):
            return self._first[kind], times
        return None


class Causes(logging.Handler):
    """A log handler that collects warnings, so that they do not disturb the output."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._messages = Messages()

    def emit(self, record: logging.LogRecord) -> None:
        """Count the message, together with its error."""
        message = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if error is not None:
            message = f"{message.strip()}: {error}"
        # If the start fails, servers put a traceback into the text. Keep its last line.
        self._messages.add(message.rstrip("\n'").rpartition("\n")[2])

    def lines(self) -> Iterator[str]:
        """Yield a line with the most frequent message, if there is one."""
        if (found := self._messages.most_frequent()) is not None:
            yield f"Cause: {found[0]}"

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)
