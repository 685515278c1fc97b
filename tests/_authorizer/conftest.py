"""Fixtures: an authorizer whose policies record their checks, and a lease."""

from __future__ import annotations

import pytest

from fastapi_topaz import ConnectionPool
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.authorizer import SECRET


@pytest.fixture
def seen():
    """The checks that the policies received."""
    return []


@pytest.fixture
def authorizer(seen):
    def reader(check):
        seen.append(check)
        return {"allowed": True, "visible": False}

    policies = {
        "app.GET.documents": reader,
        "app.DELETE.documents": {"allowed": False, "visible": True},
    }
    with EmbeddedAuthorizer(policies) as running:
        yield running


@pytest.fixture
async def pool(authorizer):
    pool = ConnectionPool(min_connections=0)
    pool.configure(authorizer.options)
    async with pool:
        yield pool


@pytest.fixture
async def conn(pool):
    async with pool.acquire() as conn:
        yield conn


@pytest.fixture
def asked(conn, seen):
    """Ask for a decision, and return the check that the policy received."""

    async def ask(**arguments):
        arguments = {"policy_path": "app.GET.documents"} | arguments
        assert await conn.decisions(**arguments) == {"allowed": True}
        return seen[-1]

    return ask


@pytest.fixture
def guarded(authorizer):
    with EmbeddedAuthorizer(
        authorizer.policies, api_key=SECRET, tenant_id="tenant-1"
    ) as running:
        yield running
