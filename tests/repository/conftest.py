"""Fixtures for the tests of the examples."""

from __future__ import annotations

import pytest

from kit.examples import DECISIONS


@pytest.fixture
def authorizer(embedded_authorizer):
    embedded_authorizer.policies = DECISIONS
    return embedded_authorizer


@pytest.fixture
def warnings_are(request):
    """The warning filters of this test run, as options for another Python."""
    chosen = request.config.getoption("pythonwarnings") or ["error"]
    return [f"-W{each}" for each in chosen]
