"""FastAPI dependencies: a request goes on if its policy allows it."""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING, Any

import grpc
from fastapi import HTTPException, Request

from fastapi_topaz._config import TopazConfig
from fastapi_topaz._options import shown, text
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

KEYWORDS = {
    *("as", "contains", "default", "else", "every", "false", "if", "import", "in"),
    *("not", "null", "package", "some", "true", "with"),
}
"""Words of Rego, which are no names."""


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
        TypeError, ValueError: *policy_path* is no str, or empty.
    """
    text("policy_path", policy_path, optional=False)
    _check_config(config)

    async def dependency(request: Request) -> None:
        await _check(config, request, policy_path)

    return dependency


def require_policy_auto(config: TopazConfig) -> Callable[[Request], Awaitable[None]]:
    """
    Return a dependency that takes the policy path from the route.

    `GET /documents/{id}` of the root `myapp` asks `myapp.GET.documents.__id`.
    Otherwise as `require_policy_allowed`. What an application is mounted under is part
    of the path, and a dot in a path separates as a slash does: `/users.export` and
    `/users/export` have one policy. What is no name in Rego is quoted as Rego wants it:
    `/user-profiles` asks `myapp.GET["user-profiles"]`, as its package is called, too.
    Below a mount with parameters, such as `app.mount("/{tenant}", ...)`, it raises
    RuntimeError: clients would choose what is asked.
    """
    _check_config(config)

    async def dependency(request: Request) -> None:
        scope = request.scope
        # Starlette appends the prefix of each mount to the root path of the server.
        prefix = scope.get("root_path", "").removeprefix(
            scope.get("app_root_path", scope.get("root_path", ""))
        )
        route = scope["route"]
        mounted = set(request.path_params) - set(route.param_convertors)
        if any(f"/{request.path_params[name]}/" in f"{prefix}/" for name in mounted):
            # As it stands in the prefix, the client would choose which policy is asked.
            raise RuntimeError(
                "require_policy_auto cannot name the policy of a route below a mount "
                f"with parameters ({', '.join(sorted(mounted))}): name it with "
                "require_policy_allowed"
            )
        template = prefix + route.path_format
        path = policy_path_of(config.policy_path_root, request.method, template)
        await _check(config, request, path)

    return dependency


def policy_path_of(root: str, method: str, template: str) -> str:
    """Return the policy path of a route: dots for slashes, `__id` for `{id}`."""
    # A parameter may be a part of a segment only, as in /files/{name}.json.
    named = re.sub(r"\{(\w+)\}", r"__\1", template)
    segments = filter(None, re.split(r"[/.]", named))
    return root + "".join(map(_reference, (method, *segments)))


def _reference(segment: str) -> str:
    # Topaz makes a query in Rego of the path: there `my-docs` is a difference.
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", segment) and segment not in KEYWORDS:
        return f".{segment}"
    return f"[{json.dumps(segment, ensure_ascii=False)}]"


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
