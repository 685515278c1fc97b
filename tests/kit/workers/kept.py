"""As `warmed`, but for a closed connection that somebody keeps."""

from __future__ import annotations

import asyncio

from kit.workers.warmed import app, ask


kept = asyncio.run(ask())

__all__ = ["app"]
