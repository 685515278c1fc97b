"""
An application on trio, served by hypercorn.

Only the server differs, because the pool detects the event loop. A route may use trio
directly. The route `/documents` does so, to check many documents at once.

    hypercorn --worker-class trio --graceful-timeout 10 trio_app:app
"""

from __future__ import annotations

import os

import grpc
import trio
from fastapi import Depends, FastAPI, HTTPException, Request

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
    TopazError,
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
    # Two connections can carry a hundred checks at once.
    connection_pool=ConnectionPool(
        min_connections=1, max_connections=2, streams_per_connection=50
    ),
)
app = FastAPI(lifespan=config.lifespan)
guarded = [Depends(require_policy_auto(config))]

DOCUMENTS = ("1", "2")


@app.get("/documents", dependencies=guarded)
async def documents(request: Request) -> list[str]:
    """Return the documents that the caller may read."""
    readable: list[str] = []
    failures: list[Exception] = []

    async def ask(document: str) -> None:
        try:
            if await config.is_allowed(
                request, "myapp.GET.documents.__id", resource_context={"id": document}
            ):
                readable.append(document)
        # Stored, because a nursery would raise it inside an ExceptionGroup.
        except (TopazError, grpc.RpcError) as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        for document in DOCUMENTS:
            nursery.start_soon(ask, document)
    if failures:
        raise HTTPException(503, headers={"Retry-After": "1"}) from failures[0]
    return sorted(readable)


@app.get("/documents/{id}", dependencies=guarded)
async def document(id: str) -> dict[str, str]:
    return {"id": id}
