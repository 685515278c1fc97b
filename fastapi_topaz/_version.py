"""Which version of the package this is."""

from __future__ import annotations

import functools
import importlib.metadata


__all__ = ["version"]


@functools.cache
def version() -> str:
    """Return the version that is installed."""
    try:
        return importlib.metadata.version("fastapi-topaz")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "unknown"
