"""Log lines of a test."""

from __future__ import annotations

import logging


def lines(caplog, level=logging.WARNING, *, logger="", part=""):
    """Return the messages of *level* or above that contain *part*."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= level
        and record.name.startswith(logger)
        and part in record.getMessage()
    ]


def lines_of(caplog, level):
    """Return the messages of exactly this level."""
    return [r.getMessage() for r in caplog.records if r.levelno == level]
