"""
The application, built when it is imported, like users' applications.

A check asks for the process that sends it, and each answer names the process.
"""

from __future__ import annotations

import json
import os

from fastapi import Depends, FastAPI

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
    require_policy_auto,
)


cert = os.environ.get("TOPAZ_CERT")
config = TopazConfig(
    authorizer_options=AuthorizerOptions(
        url=os.environ["TOPAZ_URL"], cert_file_path=cert, insecure=cert is None
    ),
    policy_path_root="workers",
    identity_provider=lambda _: Identity(IdentityType.NONE),
    resource_context_provider=lambda _: {"pid": str(os.getpid())},
    connection_pool=ConnectionPool(**json.loads(os.environ["POOL"])),
    check_timeout=float(os.environ["CHECK_TIMEOUT"]),
)
app = FastAPI(lifespan=config.lifespan)


BUILT_IN = os.getpid()


def who() -> dict[str, int]:
    return {"pid": os.getpid(), "built_in": BUILT_IN}


@app.get("/health")
async def health() -> dict[str, int]:
    return who()


@app.get("/quick", dependencies=[Depends(require_policy_auto(config))])
async def quick() -> dict[str, int]:
    return who()


@app.get("/held", dependencies=[Depends(require_policy_auto(config))])
async def held() -> dict[str, int]:
    return who()
