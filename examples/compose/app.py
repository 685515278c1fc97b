"""
The application of docker-compose.yaml: guarded routes, health, and metrics.

    uvicorn app:app

Run one process per container. Each process has its own metrics, and Prometheus must
scrape each of them.
"""

from __future__ import annotations

import os

from fastapi import Depends, FastAPI, Request
from opentelemetry import metrics
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import make_asgi_app

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
    require_policy_auto,
)


metrics.set_meter_provider(MeterProvider([PrometheusMetricReader()]))


def get_identity(request: Request) -> Identity:
    user = request.headers.get("x-user")
    return Identity(IdentityType.MANUAL, user) if user else Identity(IdentityType.NONE)


config = TopazConfig(
    authorizer_options=AuthorizerOptions(
        # Plaintext, because it stays within the network of the containers.
        url=os.environ.get("TOPAZ_URL", "127.0.0.1:8282"),
        insecure=True,
    ),
    policy_path_root="myapp",
    identity_provider=get_identity,
    connection_pool=ConnectionPool(
        name="main",  # the label `pool` of the metrics
        streams_per_connection=50,
        max_waiting=500,  # above this 503 at once, instead of a wait that is too long
        leak_threshold=60.0,
    ),
)
app = FastAPI(lifespan=config.lifespan)
app.mount("/metrics", make_asgi_app())
guarded = [Depends(require_policy_auto(config))]


@app.get("/documents", dependencies=guarded)
async def documents() -> list[str]:
    return ["1", "2"]


@app.get("/documents/{id}", dependencies=guarded)
async def document(id: str) -> dict[str, str]:
    return {"id": id}


@app.delete("/documents/{id}", dependencies=guarded)
async def delete(id: str) -> dict[str, str]:
    return {"deleted": id}


@app.get("/health")
async def health() -> dict[str, object]:
    # Always 200: if Topaz is down, checks are answered 503, and a restart cannot help.
    pool_status = config.connection_pool.status()
    return {
        "status": "ok" if pool_status.healthy else "degraded",
        "connections": pool_status.total,
    }
