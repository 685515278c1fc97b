"""The application of the README: one route, guarded by one policy."""

from __future__ import annotations

from fastapi import Depends, FastAPI, Request

from fastapi_topaz import (
    AuthorizerOptions,
    Identity,
    IdentityType,
    TopazConfig,
    require_policy_auto,
)


def get_identity(request: Request) -> Identity:
    """Return the identity in a header. A real application checks a token."""
    return Identity(IdentityType.MANUAL, request.headers.get("x-user", "nobody"))


config = TopazConfig(
    authorizer_options=AuthorizerOptions(url="127.0.0.1:8282", insecure=True),
    policy_path_root="myapp",
    identity_provider=get_identity,
)
app = FastAPI(lifespan=config.lifespan)


# The guard checks the decision `allowed` of the policy myapp.GET.documents.__id
@app.get("/documents/{id}", dependencies=[Depends(require_policy_auto(config))])
async def document(id: str) -> dict[str, str]:
    return {"id": id}
