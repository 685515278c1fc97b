"""
Leases without the FastAPI dependencies: `async with pool.acquire()`, or acquire and
release.

Use this for checks that the dependencies do not make. Then the application must do what
they do: set a timeout for each call, answer 403 if the policy denies, and answer 503 if
there is no decision.

    uvicorn explicit_acquire:app
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
from fastapi import FastAPI, HTTPException, Request

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    PooledConnection,
    TopazError,
)


if TYPE_CHECKING:
    from collections.abc import AsyncIterator


pool = ConnectionPool()
pool.configure(
    AuthorizerOptions(url=os.environ.get("TOPAZ_URL", "127.0.0.1:8282"), insecure=True)
)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with pool:
        yield


app = FastAPI(lifespan=lifespan)


async def allowed(
    conn: PooledConnection, request: Request, policy_path: str, **resource: str
) -> bool:
    """Make a check on *conn*. Return True only if the policy allows."""
    user = request.headers.get("x-user")
    decisions = await conn.decisions(
        policy_path=policy_path,
        identity=Identity(IdentityType.MANUAL, user or "nobody"),
        resource_context=resource,
        timeout=2.0,
    )
    return decisions.get("allowed") is True


def unavailable() -> HTTPException:
    return HTTPException(503, "Cannot tell.", headers={"Retry-After": "1"})


@app.get("/documents")
async def documents(request: Request) -> list[str]:
    try:
        async with pool.acquire(timeout=1.0) as conn:
            may = await allowed(conn, request, "myapp.GET.documents")
    # The errors of the pool, and the error statuses of the authorizer.
    except (TopazError, grpc.RpcError) as error:
        raise unavailable() from error
    if not may:
        raise HTTPException(403)
    return ["1", "2"]


@app.get("/documents/{id}/rights")
async def rights(id: str, request: Request) -> dict[str, bool]:
    """Return the rights of the caller on a document, with two checks on one lease."""
    try:
        conn = await pool.acquire(timeout=1.0)
        try:
            read = await allowed(conn, request, "myapp.GET.documents.__id", id=id)
            delete = await allowed(conn, request, "myapp.DELETE.documents.__id", id=id)
        finally:
            # Also if the request is cancelled. A lease that is not released stays in
            # use until Python destroys it.
            await pool.release(conn)
    except (TopazError, grpc.RpcError) as error:
        raise unavailable() from error
    if not read:
        raise HTTPException(403)
    return {"read": read, "delete": delete}
