"""Fixtures: an embedded authorizer and a client."""

from __future__ import annotations

import pytest

from kit.embedded import connect


@pytest.fixture
def authorizer(request):
    return request.getfixturevalue("embedded_authorizer")


@pytest.fixture
def stub(authorizer):
    with connect(authorizer) as connected:
        yield connected
