"""
Startup and shutdown hooks, for an application without a lifespan.

They do the same as `@app.on_event`, without its deprecation warning. An application
with a lifespan runs no hooks. Then open the pool in the lifespan, as lifespan_app.py
does.

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
    # With eager_init, the pool connects before the first request. If Topaz is not
    # running yet, this logs a warning, and the application starts anyway.
    await config.connection_pool.initialize()


async def shutdown() -> None:
    await config.connection_pool.close()


# Registered on the router, because the alternatives warn. `@app.on_event` always warns.
# `FastAPI(on_startup=...)` warns in versions of FastAPI that pass it to Starlette.
app.router.add_event_handler("startup", startup)
app.router.add_event_handler("shutdown", shutdown)


@app.get("/documents", dependencies=[Depends(require_policy_auto(config))])
async def documents() -> list[str]:
    return ["1", "2"]
