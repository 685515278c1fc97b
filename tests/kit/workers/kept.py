"""Like `warmed`, but a closed connection is still referenced."""

from __future__ import annotations

import asyncio

from kit.workers.warmed import app, ask


kept = asyncio.run(ask())

__all__ = ["app"]
