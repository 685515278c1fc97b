"""Fixtures: an authorizer and a connection to it."""

from __future__ import annotations

import functools

import pytest

from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.channels import ask, connected


@pytest.fixture
def authorizer(embedded_authorizer):
    return embedded_authorizer


@pytest.fixture
async def connection(authorizer):
    async with connected(authorizer.options) as connection:
        yield connection


@pytest.fixture
def call(connection):
    return functools.partial(ask, connection)


@pytest.fixture
def plaintext(embedded_authorizer):
    return embedded_authorizer


@pytest.fixture
def tls(embedded_authorizer_tls):
    return embedded_authorizer_tls


@pytest.fixture(params=["plaintext", "tls"])
def either_authorizer(request):
    with EmbeddedAuthorizer(tls=request.param == "tls") as running:
        yield running
