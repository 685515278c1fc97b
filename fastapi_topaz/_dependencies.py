"""FastAPI dependencies: a request goes on if its policy allows it."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

import grpc
from fastapi import HTTPException, Request

from fastapi_topaz._options import text
from fastapi_topaz.exceptions import TopazError


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastapi_topaz._config import TopazConfig


__all__ = ["require_policy_allowed", "require_policy_auto"]


logger = logging.getLogger("fastapi_topaz.fastapi")

RETRY_AFTER = "1"
"""Seconds. A pool recovers within a moment of its authorizer."""


def require_policy_allowed(
    config: TopazConfig, policy_path: str
) -> Callable[[Request], Awaitable[None]]:
    """
    Return a dependency that lets a request pass if *policy_path* allows it.

    Use it as `Depends(require_policy_allowed(config, "myapp.GET.documents"))`.
    A denied request ends with 403. If the authorizer cannot be asked, or does not
    answer, it ends with 503 and `Retry-After`.

    Args:
        config: How to ask.
        policy_path: The whole path of the policy.

    Raises:
        TypeError, ValueError: *policy_path* is no str, or empty.
    """
    text("policy_path", policy_path, optional=False)

    async def dependency(request: Request) -> None:
        await _check(config, request, policy_path)

    return dependency


def require_policy_auto(config: TopazConfig) -> Callable[[Request], Awaitable[None]]:
    """
    Return a dependency that takes the policy path from the route.

    `GET /documents/{id}` of the root `myapp` asks `myapp.GET.documents.__id`.
    Otherwise as `require_policy_allowed`.
    """

    async def dependency(request: Request) -> None:
        template = request.scope["route"].path_format
        path = policy_path_of(config.policy_path_root, request.method, template)
        await _check(config, request, path)

    return dependency


def policy_path_of(root: str, method: str, template: str) -> str:
    """Return the policy path of a route: dots for slashes, `__id` for `{id}`."""
    # A parameter may be a part of a segment only, as in /files/{name}.json.
    named = re.sub(r"\{(\w+)\}", r"__\1", template)
    return ".".join((root, method, *filter(None, named.split("/"))))


async def _check(config: TopazConfig, request: Request, policy_path: str) -> None:
    try:
        allowed = await config.is_allowed(request, policy_path)
    except (TopazError, grpc.RpcError) as error:
        logger.warning("no decision on %s: %s", policy_path, _reason(error))
        raise HTTPException(
            503,
            detail="The authorizer is not available.",
            headers={"Retry-After": RETRY_AFTER},
        ) from error
    if not allowed:
        raise HTTPException(403, detail="Not allowed.")


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
