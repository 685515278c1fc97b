"""
The application that `zipf.py` measures: a route whose check is about one document.

It is a file of its own, because it also runs with fastapi-topaz 2.0.0.
"""

from __future__ import annotations

import argparse
import socket

import aserto.client
import uvicorn
from fastapi import Depends, FastAPI

import fastapi_topaz as topaz


POLICY = "myapp.GET.documents"


def configuration(url, cache):
    """Return the configuration, and what else FastAPI needs to open it."""
    common = {"policy_path_root": "myapp", "decision_cache": cache}
    if not hasattr(topaz, "ConnectionPool"):
        alice = aserto.client.Identity(
            aserto.client.IdentityType.IDENTITY_TYPE_MANUAL, "alice"
        )
        # This package has no such argument.
        plaintext = {"insecure": True}
        config = topaz.TopazConfig(
            authorizer_options=aserto.client.AuthorizerOptions(url=url),
            identity_provider=lambda _request: alice,
            policy_instance_name="myapp",
            **plaintext,
            **common,
        )
        return config, {}
    config = topaz.TopazConfig(
        authorizer_options=topaz.AuthorizerOptions(url=url, insecure=True),
        identity_provider=lambda _: topaz.Identity(topaz.IdentityType.MANUAL, "alice"),
        **common,
    )
    return config, {"lifespan": config.lifespan}


def application(url, *, caches):
    cache = topaz.DecisionCache() if caches else None
    config, settings = configuration(url, cache)
    app = FastAPI(**settings)
    guard = topaz.require_policy_allowed(config, POLICY)

    @app.get("/documents/{number}", dependencies=[Depends(guard)])
    async def documents(number: int):
        return {"number": number}

    @app.get("/clear")
    async def clear():
        if cache is not None:
            await cache.clear()

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--cache", action="store_true")
    parser.add_argument("--loop", required=True)
    parser.add_argument("--socket", type=int, required=True)
    given = parser.parse_args()
    settings = uvicorn.Config(
        application(given.url, caches=given.cache),
        loop=given.loop,
        log_level="error",
        access_log=False,
    )
    uvicorn.Server(settings).run(sockets=[socket.socket(fileno=given.socket)])
