"""
A lease of one's own: `async with pool.acquire()`, or acquire and release.

For questions that the dependencies do not ask. What they do then is the application's
part: a timeout for each call, 403 for a no, and 503 where there is no answer.

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
    """Ask on *conn*; only a clear yes is True."""
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
    # The pool's errors, and those that the authorizer answers with.
    except (TopazError, grpc.RpcError) as error:
        raise unavailable() from error
    if not may:
        raise HTTPException(403)
    return ["1", "2"]


@app.get("/documents/{id}/rights")
async def rights(id: str, request: Request) -> dict[str, bool]:
    """Say what the caller may do with a document: two questions, one lease."""
    try:
        conn = await pool.acquire(timeout=1.0)
        try:
            read = await allowed(conn, request, "myapp.GET.documents.__id", id=id)
            delete = await allowed(conn, request, "myapp.DELETE.documents.__id", id=id)
        finally:
            # Also when the request is cancelled: a lease that is not released is
            # missing until Python destroys it.
            await pool.release(conn)
    except (TopazError, grpc.RpcError) as error:
        raise unavailable() from error
    if not read:
        raise HTTPException(403)
    return {"read": read, "delete": delete}
