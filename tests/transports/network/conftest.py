"""Fixtures: servers, and proxies in front of them that break connections."""

from __future__ import annotations

import pytest

from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.faultkit.proxy import Proxy
from kit.faultkit.replicas import Replicas
from kit.network import PATH, Gate


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def authorizer():
    with EmbeddedAuthorizer({PATH: True}) as running:
        yield running


@pytest.fixture
def proxy(authorizer):
    with Proxy([authorizer.port]) as running:
        yield running


@pytest.fixture
def replicas():
    with Replicas(3, policies={PATH: True}) as running:
        yield running


@pytest.fixture
def tls():
    with EmbeddedAuthorizer({PATH: True}, tls=True) as authorizer:
        yield authorizer


@pytest.fixture
def tls_proxy(tls):
    with Proxy([tls.port]) as running:
        yield running
