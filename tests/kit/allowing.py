"""Pools in memory that allow every check."""

from __future__ import annotations

from aserto.authorizer.v2 import Decision, IsResponse

from fastapi_topaz import ConnectionPool
from fastapi_topaz.testing import FakeConnector


def allowing(**options):
    """A connector of connections that allow every check."""
    allowed = IsResponse(decisions=[Decision(decision="allowed", **{"is": True})])
    answer = allowed.SerializeToString()
    return FakeConnector(answer=lambda _method, _request: answer, **options)


def virtual(connector=None, **parameters):
    return ConnectionPool(
        connector=connector or allowing(),
        **{"min_connections": 0, "max_connections": 3, **parameters},
    )
