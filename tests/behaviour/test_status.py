"""A status is plain data: routes can return it, and it is encoded as JSON anywhere."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pydantic
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from fastapi_topaz import ConnectionPool, ConnectionStatus, PoolStatus
from fastapi_topaz.testing import FakeConnector


pytestmark = pytest.mark.real_clock

COUNTS = {
    "total": 3,
    "idle": 2,
    "busy": 1,
    "healthy_connections": 3,
    "max_connections": 10,
    "min_connections": 2,
    "waiting": 0,
    "connecting": 0,
    "streams_in_use": 1,
    "streams_max": 10,
    "suspect": 0,
    "leaving": 0,
    "failing": False,
    "ready": True,
    "limit": 10,
    "limit_reason": "capacity",
    "estimated_wait": 0.25,
}
CONNECTION = {
    "peer": "ipv4:127.0.0.1:8282",
    "condition": "busy",
    "streams": 1,
    "age": 2.5,
    "idle_for": 0.0,
    "last_error": None,
}


def pool_status():
    return PoolStatus(**COUNTS)


def connection_status():
    return ConnectionStatus(**CONNECTION)


class Report(pydantic.BaseModel):
    pool: PoolStatus
    connections: list[ConnectionStatus]


def test_a_status_is_a_dict_of_its_attributes():
    assert pool_status().as_dict() == {**COUNTS, "healthy": True}
    assert connection_status().as_dict() == CONNECTION
    for status in (pool_status(), connection_status()):
        assert json.loads(json.dumps(status.as_dict())) == status.as_dict()


async def test_the_status_of_a_pool_is_a_dict():
    pool = ConnectionPool(connector=FakeConnector(), min_connections=0)
    async with pool, pool.acquire():
        told = pool.status().as_dict()
        assert (told["total"], told["busy"], told["healthy"]) == (1, 1, True)
        (connection,) = pool.connections()
        assert connection.as_dict()["condition"] == "busy"
        assert json.dumps(connection.as_dict())


def test_a_status_with_only_the_fields_of_the_guide_is_not_ready():
    names = ["total", "idle", "busy", "healthy_connections", "max_connections"]
    assert PoolStatus(**{name: COUNTS[name] for name in names}).ready is False


def test_healthy_is_computed_and_cannot_be_passed_or_changed():
    with pytest.raises(TypeError, match="healthy"):
        PoolStatus(**COUNTS, healthy=True)
    for name in ("healthy", "ready"):
        with pytest.raises(AttributeError):
            setattr(pool_status(), name, False)
    sick = PoolStatus(**{**COUNTS, "healthy_connections": 0, "failing": True})
    assert not sick.healthy
    assert sick.as_dict()["healthy"] is False
    assert not dataclasses.replace(sick, waiting=5).healthy


app = FastAPI()


@app.get("/bare")
async def bare():
    return pool_status()


@app.get("/annotated")
async def annotated() -> PoolStatus:
    return pool_status()


@app.get("/model", response_model=PoolStatus)
def model():
    return pool_status()


@app.get("/connections")
async def connections() -> tuple[ConnectionStatus, ...]:
    return (connection_status(),)


@app.get("/nested")
async def nested():
    return {"pool": pool_status(), "connections": [connection_status()]}


@app.get("/any")
async def anything() -> dict[str, Any]:
    return {"pool": pool_status(), "connections": [connection_status()]}


@app.get("/report")
async def report() -> Report:
    return Report(pool=pool_status(), connections=[connection_status()])


ALONE = {**COUNTS, "healthy": True}
TOGETHER = {"pool": ALONE, "connections": [CONNECTION]}


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize(
    "path, expected",
    [
        ("/bare", ALONE),
        ("/annotated", ALONE),
        ("/model", ALONE),
        ("/connections", [CONNECTION]),
        ("/nested", TOGETHER),
        ("/any", TOGETHER),
        ("/report", TOGETHER),
    ],
)
def test_a_route_can_return_a_status(backend, path, expected):
    with TestClient(app, backend=backend) as client:
        response = client.get(path)
    assert response.status_code == 200
    assert response.json() == expected


def test_the_openapi_schema_describes_a_status():
    with TestClient(app) as client:
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["PoolStatus"]["properties"].keys() == ALONE.keys()
    assert schemas["ConnectionStatus"]["properties"].keys() == CONNECTION.keys()
