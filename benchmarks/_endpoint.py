"""
The application that `endpoint.py` measures: one route with a check, one without.

It is a file of its own, because it also runs with older releases of the package.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import time

import uvicorn
from fastapi import Depends, FastAPI

import fastapi_topaz as topaz


def application(url, root):
    pool = topaz.ConnectionPool()
    config = topaz.TopazConfig(
        authorizer_options=topaz.AuthorizerOptions(url=url, insecure=True),
        policy_path_root=root,
        identity_provider=lambda _: topaz.Identity(topaz.IdentityType.MANUAL, "alice"),
        connection_pool=pool,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_app):
        async with pool:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/plain")
    async def plain():
        return {"ok": True}

    @app.get("/documents", dependencies=[Depends(topaz.require_policy_auto(config))])
    async def documents():
        return {"ok": True}

    @app.get("/cpu")
    async def cpu():
        return time.process_time()

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--root", required=True)
    parser.add_argument("--loop", required=True)
    parser.add_argument("--socket", type=int, required=True)
    given = parser.parse_args()
    settings = uvicorn.Config(
        application(given.url, given.root),
        loop=given.loop,
        log_level="error",
        access_log=False,
    )
    uvicorn.Server(settings).run(sockets=[socket.socket(fileno=given.socket)])
