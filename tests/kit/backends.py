"""Backends for tests that start the event loop themselves."""

from __future__ import annotations

import pytest


backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])
asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
