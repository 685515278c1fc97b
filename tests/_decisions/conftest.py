"""The cache of a process on an invalidation bus."""

from __future__ import annotations

import pytest

from kit.bus import Process


@pytest.fixture
def here(hub):
    return Process(hub)
