"""Which version of the package is installed."""

from __future__ import annotations

import importlib.metadata


__all__ = ["VERSION"]


def _installed() -> str:
    try:
        return importlib.metadata.version("fastapi-topaz")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "unknown"


# Read when the package is imported: building a pool opens no file.
VERSION = _installed()
