"""
The application of the guide: a pool, guarded routes, and a health route.

The lifespan of the application opens and closes the pool.

    uvicorn lifespan_app:app

Then: curl -i -H 'x-user: alice' http://127.0.0.1:8000/documents
"""

from __future__ import annotations

import os

from fastapi import Depends, FastAPI, Request

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
    require_policy_allowed,
    require_policy_auto,
)


def get_identity(request: Request) -> Identity:
    """Return the identity in a header. A real application passes a token as JWT."""
    # MANUAL reaches the policy unchanged. Topaz looks up SUB in its directory.
    user = request.headers.get("x-user")
    return Identity(IdentityType.MANUAL, user) if user else Identity(IdentityType.NONE)


config = TopazConfig(
    authorizer_options=AuthorizerOptions(
        url=os.environ.get("TOPAZ_URL", "127.0.0.1:8282"),
        # Plaintext, for a Topaz on this machine. Otherwise leave it out to use TLS. If
        # the CA is not a public one, pass its certificate as cert_file_path.
        insecure=True,
    ),
    policy_path_root="myapp",
    identity_provider=get_identity,
    policy_instance_name="myapp",
    connection_pool=ConnectionPool(
        min_connections=2,
        max_connections=10,
        acquire_timeout=5.0,
        connection_timeout=10.0,
        max_idle_time=300,
        idle_check_interval=60,
        health_check_interval=30,
        health_check_timeout=5.0,
        eager_init=False,
    ),
)
app = FastAPI(lifespan=config.lifespan)


# This route names its policy.
@app.get(
    "/documents",
    dependencies=[Depends(require_policy_allowed(config, "myapp.GET.documents"))],
)
async def documents() -> list[str]:
    return ["1", "2"]


# Here the route gives the policy myapp.GET.documents.__id. It sees the id.
@app.get("/documents/{id}", dependencies=[Depends(require_policy_auto(config))])
async def document(id: str) -> dict[str, str]:
    return {"id": id}


@app.get("/health")
async def health() -> dict[str, object]:
    pool_status = config.connection_pool.status()
    return {
        "status": "ok" if pool_status.healthy else "degraded",
        "connection_pool": {
            "total": pool_status.total,
            "idle": pool_status.idle,
            "busy": pool_status.busy,
            "healthy": pool_status.healthy_connections,
            "max": pool_status.max_connections,
        },
    }
