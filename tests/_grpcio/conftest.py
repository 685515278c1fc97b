"""Fixtures: an authorizer and a connection to it."""

from __future__ import annotations

import functools

import pytest

from fastapi_topaz.connector import GrpcConnector
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.channels import ask


@pytest.fixture
def authorizer(embedded_authorizer):
    return embedded_authorizer


@pytest.fixture
async def connection(authorizer):
    connection = await GrpcConnector(authorizer.options.target).connect(10)
    yield connection
    # Close the connection unless the test has closed it.
    if "closed" not in repr(connection):
        await connection.close(0)


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
