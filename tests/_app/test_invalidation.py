"""A handler invalidates by its own id, whose type is not that of the route."""

from __future__ import annotations

import enum
from datetime import date
from decimal import Decimal
from uuid import UUID

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from fastapi_topaz import ConnectionPool, DecisionCache, require_policy_allowed
from kit.backends import backends
from kit.configs import POLICY, config_of


pytestmark = pytest.mark.real_clock


class Kind(enum.Enum):
    PAID = "paid"


IDS = {
    # The path, the type in the handler, and the converters that take the path.
    "int": ("/orders/7", int, ("", ":int", ":float", ":path")),
    "int with zeros": ("/orders/007", int, ("", ":int", ":float", ":path")),
    "Decimal": ("/orders/7.50", Decimal, ("", ":float", ":path")),
    "UUID": (f"/orders/{UUID(int=2**100)}", UUID, ("", ":uuid", ":path")),
    "UUID in capitals": (
        f"/orders/{str(UUID(int=2**128 - 1)).upper()}",
        UUID,
        # The converter of the oldest Starlette knows no capitals.
        ("", ":path"),
    ),
    "bool": ("/orders/yes", bool, ("", ":path")),
    "date": ("/orders/2024-05-01", date, ("", ":path")),
    "float": ("/orders/1e3", float, ("", ":path")),
    "Enum": ("/orders/paid", Kind, ("", ":path")),
    "str": ("/orders/x", str, ("", ":path")),
}


@pytest.mark.costly
@pytest.mark.parametrize("path_parameters", ["typed", "text"])
@pytest.mark.parametrize(
    "name, converter", [(name, each) for name in IDS for each in IDS[name][2]]
)
@backends
def test_a_revoked_right_ends_if_the_handler_passes_its_own_id(
    embedded_authorizer, name, converter, path_parameters, backend
):
    path, kind, _ = IDS[name]
    config = config_of(
        ConnectionPool(min_connections=0),
        embedded_authorizer.options,
        decision_cache=DecisionCache(),
        path_parameters=path_parameters,
    )
    app = FastAPI(lifespan=config.lifespan)
    route = f"/orders/{{id{converter}}}"

    async def revoke(id):  # noqa: A002
        embedded_authorizer.policies = lambda _check: False
        config.invalidate(resource={"id": id})

    revoke.__annotations__["id"] = kind
    guard = Depends(require_policy_allowed(config, POLICY))
    app.get(route, dependencies=[guard])(lambda: None)
    app.delete(route)(revoke)
    embedded_authorizer.policies = lambda _check: True
    with TestClient(app, backend=backend) as client:
        assert client.get(path).status_code == 200
        assert client.get(path).status_code == 200
        assert embedded_authorizer.calls["Is"] == 1
        assert client.delete(path).status_code == 200
        assert client.get(path).status_code == 403
