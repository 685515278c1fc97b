"""FastAPI dependencies: a request goes on if its policy allows it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import grpc
from fastapi import HTTPException, Request

from fastapi_topaz._config import TopazConfig
from fastapi_topaz._options import shown
from fastapi_topaz._rego import check_reference
from fastapi_topaz._routes import route_policy_path
from fastapi_topaz.exceptions import TopazError


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


__all__ = ["require_policy_allowed", "require_policy_auto"]


logger = logging.getLogger("fastapi_topaz.fastapi")

RETRY_AFTER = "1"
"""Seconds. A pool recovers within a moment of its authorizer."""

HINTS = {
    grpc.StatusCode.INVALID_ARGUMENT: (
        "there is no such policy, it fails, or it has no default for the decision"
    ),
    grpc.StatusCode.NOT_FOUND: "it does not know the identity, or cannot look it up",
    grpc.StatusCode.UNAUTHENTICATED: "the api_key is missing or wrong",
}
"""What these statuses of Topaz mean for a check."""


def require_policy_allowed(
    config: TopazConfig, policy_path: str
) -> Callable[[Request], Awaitable[None]]:
    """
    Return a dependency that lets a request pass if *policy_path* allows it.

    Use it as `Depends(require_policy_allowed(config, "myapp.GET.documents"))`.
    A denied request ends with 403, and so does one of an identity that the authorizer
    does not know, or could not look up. If the authorizer cannot be asked, or the
    policy fails or is undefined, it ends with 503 and `Retry-After`. For HTTP routes,
    not for WebSockets.

    Args:
        config: How to ask.
        policy_path: The whole path of the policy.

    Raises:
        TypeError: *config* or *policy_path* has the wrong type.
        ValueError: *policy_path* is not a Rego reference.
    """
    _check_config(config)
    check_reference("policy_path", policy_path)

    async def dependency(request: Request) -> None:
        await _check(config, request, policy_path)

    return dependency


def require_policy_auto(config: TopazConfig) -> Callable[[Request], Awaitable[None]]:
    """
    Return a dependency that takes the policy path from the route.

    `GET /documents/{id}` of the root `myapp` asks `myapp.GET.documents.__id`.
    Otherwise as `require_policy_allowed`.

    The path is built from the templates of the route and of everything above it:
    prefixes of `APIRouter` and `include_router`, and mounts. A mount with a parameter,
    such as `app.mount("/{tenant}", ...)`, asks `myapp.GET.__tenant...`. No text of a
    request becomes part of the path. A dot separates as a slash does: `/users.export`
    and `/users/export` have one policy. A segment that is not a Rego name is quoted:
    `/user-profiles` asks `myapp.GET["user-profiles"]`. Declare the package under
    exactly that name.

    HEAD asks the policy of GET if the route answers both. The dependency raises
    RuntimeError, and asks nothing, for a route below a `Host` route, for the files of
    `app.frontend`, and if no template of the route matches the path of the request.

    Args:
        config: How to ask.

    Raises:
        TypeError: *config* is not a TopazConfig.
    """
    _check_config(config)

    async def dependency(request: Request) -> None:
        path = route_policy_path(config.policy_path_root, request.scope)
        await _check(config, request, path)

    return dependency


async def _check(config: TopazConfig, request: Request, policy_path: str) -> None:
    # Outside the try: what a provider raises is the application's own.
    question = await config._question(request, policy_path)  # noqa: SLF001
    try:
        allowed = await config._ask(question)  # noqa: SLF001
    except (TopazError, grpc.RpcError) as error:
        logger.warning("no decision on %s: %s", policy_path, _reason(error))
        if _code(error) is grpc.StatusCode.NOT_FOUND:
            # Of the policy, or of anything else, Topaz says that in other words.
            raise HTTPException(403, detail="Not allowed.") from error
        raise HTTPException(
            503,
            detail="The authorizer is not available.",
            headers={"Retry-After": RETRY_AFTER},
        ) from error
    if not allowed:
        raise HTTPException(403, detail="Not allowed.")


def _code(error: Exception) -> Any:
    return error.code() if isinstance(error, grpc.aio.AioRpcError) else None


def _reason(error: Exception) -> str:
    if (code := _code(error)) is None:
        return str(error)
    # Not the details: an authorizer may name the identity there.
    hint = HINTS.get(code)
    return f"the authorizer answered {code.name}" + (f" ({hint})" if hint else "")


def _check_config(config: object) -> None:
    if not isinstance(config, TopazConfig):
        raise TypeError(f"config must be a TopazConfig, got {shown(config)}")
