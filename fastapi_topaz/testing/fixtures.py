"""
Fixtures for pytest.

To use them, put `pytest_plugins = ["fastapi_topaz.testing.fixtures"]` into the
`conftest.py` at the root of your tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ._embedded import EmbeddedAuthorizer


if TYPE_CHECKING:
    from collections.abc import Iterator


__all__ = ["embedded_authorizer", "embedded_authorizer_tls"]


@pytest.fixture
def embedded_authorizer() -> Iterator[EmbeddedAuthorizer]:
    """
    A running authorizer without TLS and without policies.

    Assign `embedded_authorizer.policies` in the test.
    """
    with EmbeddedAuthorizer() as authorizer:
        yield authorizer


@pytest.fixture
def embedded_authorizer_tls() -> Iterator[EmbeddedAuthorizer]:
    """
    A running authorizer with TLS and without policies.

    Its `options` contain the path of the CA certificate.
    """
    with EmbeddedAuthorizer(tls=True) as authorizer:
        yield authorizer
