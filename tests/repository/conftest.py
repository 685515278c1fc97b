"""What tests of the examples request."""

from __future__ import annotations

import pytest

from kit.examples import DECISIONS


@pytest.fixture
def authorizer(embedded_authorizer):
    embedded_authorizer.policies = DECISIONS
    return embedded_authorizer


@pytest.fixture
def warnings_are(request):
    """What this run of the tests makes of warnings, as options for another Python."""
    chosen = request.config.getoption("pythonwarnings") or ["error"]
    return [f"-W{each}" for each in chosen]
