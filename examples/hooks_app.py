"""
Startup and shutdown hooks, for an application that has no lifespan.

What the guide's `@app.on_event` does, without its warning. An application that is
given a lifespan runs no hooks: open the pool there, as lifespan_app.py does.

    uvicorn hooks_app:app
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
    require_policy_auto,
)


def get_identity(request: Request) -> Identity:
    user = request.headers.get("x-user")
    return Identity(IdentityType.MANUAL, user) if user else Identity(IdentityType.NONE)


config = TopazConfig(
    authorizer_options=AuthorizerOptions(
        url=os.environ.get("TOPAZ_URL", "127.0.0.1:8282"), insecure=True
    ),
    policy_path_root="myapp",
    identity_provider=get_identity,
    connection_pool=ConnectionPool(min_connections=1, eager_init=True),
)
app = FastAPI()


async def startup() -> None:
    # With eager_init the first connections are there before the first request. If
    # Topaz is not there yet, this logs a warning, and the application starts anyway.
    await config.connection_pool.initialize()


async def shutdown() -> None:
    await config.connection_pool.close()


# By the router, since `@app.on_event` and `FastAPI(on_startup=...)` warn: the one now,
# the other in the versions of FastAPI that leave it to Starlette.
app.router.add_event_handler("startup", startup)
app.router.add_event_handler("shutdown", shutdown)


@app.get("/documents", dependencies=[Depends(require_policy_auto(config))])
async def documents() -> list[str]:
    return ["1", "2"]
