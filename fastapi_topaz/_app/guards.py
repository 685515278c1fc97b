"""FastAPI dependencies that let a request pass only if its policy allows it."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import attrs
import grpc
import starlette
from fastapi import HTTPException, WebSocketException
from starlette.requests import HTTPConnection  # noqa: TC002  (FastAPI reads it)

from fastapi_topaz._app.config import TopazConfig
from fastapi_topaz._app.routes import route_policy_path
from fastapi_topaz._authorizer.rego import check_name, check_reference
from fastapi_topaz._checks import check_seconds, safe_repr
from fastapi_topaz._redaction import boundary
from fastapi_topaz.exceptions import PoolMisuse, TopazError


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastapi_topaz._decisions.fallback import Custom, Strategy
    from fastapi_topaz._decisions.question import Ask

    Dependency = Callable[[HTTPConnection], Awaitable[None]]


__all__ = ["Guard", "guard_of", "require_policy_allowed", "require_policy_auto"]


RETRY_AFTER = 1.0
"""Seconds. When the authorizer is back, the pool works again within a second."""

POLICY_VIOLATION = 1008
"""The close code of a WebSocket that is refused: RFC 6455, section 7.4.1."""

_ANSWERS_WEBSOCKETS = tuple(map(int, starlette.__version__.split(".")[:2])) >= (0, 41)
"""Whether Starlette sends what its handler of HTTPException makes for a WebSocket."""

# The HTTP status and the detail for a request that does not pass. No text of the
# authorizer is in them.
DENIED: tuple[int, str] = (403, "Not allowed.")
UNAVAILABLE: tuple[int, str] = (503, "The authorizer is not available.")
MISUSE: tuple[int, str] = (500, "Internal Server Error")
WRONG_POLICY: tuple[int, str] = (
    500,
    (
        "The authorizer cannot evaluate the policy: there is no such policy or rule, "
        "the rule has no value for this request, or it fails."
    ),
)

ENDS: dict[Any, tuple[int, str]] = {
    # Topaz sends it only if it does not know the identity.
    grpc.StatusCode.NOT_FOUND: DENIED,
    # A mistake in the policy or in its path. A retry does not help.
    grpc.StatusCode.INVALID_ARGUMENT: WRONG_POLICY,
}
"""The HTTP response for the gRPC status of a check. Other statuses: UNAVAILABLE."""


def require_policy_allowed(
    config: TopazConfig,
    policy_path: str,
    *,
    decision: str = "allowed",
    fallback: Strategy | Custom | None = None,
    max_age: float | None = None,
) -> Dependency:
    """
    Return a dependency that lets a request pass if *policy_path* allows it.

    Use it as `Depends(require_policy_allowed(config, "myapp.GET.documents"))`.
    A request ends with

    - 403 if the policy denies it, or if the authorizer does not know the identity or
      could not look it up;
    - 503 and `Retry-After` if the authorizer cannot be asked, or the pool is
      overloaded;
    - 500 if the authorizer cannot evaluate the policy: the policy or the rule does not
      exist, or the rule has no value or fails. Trying again does not help;
    - 500 if the application misuses the pool: see `PoolMisuse`.

    The exception has no cause, because the text of the authorizer may name the
    identity. The log has the reason.

    The dependency also guards WebSocket routes. It asks before the WebSocket is
    accepted. A server with the ASGI extension `websocket.http.response` sends the same
    answers. With other servers, and with Starlette before 0.41, the WebSocket is closed
    with code 1008, and the client gets 403.

    Two calls with equal arguments return the same dependency. So FastAPI runs it once
    for a request, and a test can replace it through `dependency_overrides`.

    Args:
        config: The configuration whose authorizer is asked.
        policy_path: The whole path of the policy.
        decision: The name of the decision that must be true. Default `allowed`.
        fallback: What decides on this route if there is no decision, as *fallback* of
            `TopazConfig`. None, the default: that of *config*. One that may allow
            without an answer needs `allow_unsafe_fallback` of *config*, too.
        max_age: The oldest answer to use, in seconds; 0 always asks the authorizer.
            Default None: see `TopazConfig.is_allowed`.

    Raises:
        TypeError: *config*, *policy_path* or another argument has the wrong type.
        ValueError: *policy_path* is not a Rego reference, or another argument is wrong.
    """
    _check_config(config)
    check_reference("policy_path", policy_path)
    check_name("decision", decision)
    rules = _Rules(config, decision, fallback, max_age)

    @boundary
    async def dependency(request: HTTPConnection) -> None:
        await _check(rules, request, policy_path)

    return _once(rules, policy_path, dependency)


def require_policy_auto(
    config: TopazConfig,
    *,
    fallback: Strategy | Custom | None = None,
    max_age: float | None = None,
) -> Dependency:
    """
    Return a dependency that takes the policy path from the route.

    `GET /documents/{id}` of the root `myapp` asks `myapp.GET.documents.__id`.
    For the answers to the client see `require_policy_allowed`.

    The path is built from the templates of the route and of everything above it:
    prefixes of `APIRouter` and `include_router`, and mounts. A mount with a parameter,
    such as `app.mount("/{tenant}", ...)`, asks `myapp.GET.__tenant...`. No text of a
    request becomes part of the path. A dot separates as a slash does: `/users.export`
    and `/users/export` have one policy. A segment that is not a Rego name is quoted:
    `/user-profiles` asks `myapp.GET["user-profiles"]`. Declare the package under
    exactly that name.

    HEAD asks the policy of GET if the route answers both. A WebSocket route also asks
    the policy of GET, because a WebSocket begins as a GET request. The dependency
    raises RuntimeError and asks nothing in three cases: the route is below a `Host`
    route, it serves the files of `app.frontend`, or no template of the route matches
    the path of the request.

    Args:
        config: The configuration whose authorizer is asked.
        fallback: What decides on this route if there is no decision: see
            `require_policy_allowed`.
        max_age: The oldest answer to use, in seconds: see `require_policy_allowed`.

    Raises:
        TypeError: *config* is not a TopazConfig, or another argument has the wrong
            type.
        ValueError: Another argument is wrong.
    """
    _check_config(config)
    rules = _Rules(config, "allowed", fallback, max_age)

    @boundary
    async def dependency(request: HTTPConnection) -> None:
        path = route_policy_path(config.policy_path_root, request.scope)
        await _check(rules, request, path)

    return _once(rules, None, dependency)


@attrs.frozen(eq=False)
class Guard:
    """
    The policy and the decision that a dependency of this module asks for.

    Strictly private.

    Attributes:
        config: The configuration by which it asks.
        policy_path: The policy. None: that of the route.
        decision: The decision that must be true.
    """

    config: TopazConfig
    policy_path: str | None
    decision: str


_GUARD = "_fastapi_topaz_guard"
"""The attribute of a dependency with its `Guard`."""


def guard_of(call: object) -> Guard | None:
    """Return the `Guard` of the dependency *call*, or None if it is not a guard."""
    guard = getattr(call, _GUARD, None)
    if not isinstance(guard, Guard):
        return None
    # Not the attribute alone: functools.wraps copies it to a function that may never
    # call the guard.
    known = guard.config._dependencies.values()  # noqa: SLF001
    return guard if any(call is each for each in known) else None


class _Rules:
    """How a guard asks, beside the policy."""

    def __init__(
        self,
        config: TopazConfig,
        decision: str,
        fallback: Strategy | Custom | None,
        max_age: float | None,
    ) -> None:
        if max_age is not None:
            max_age = check_seconds("max_age", max_age)
        self.config = config
        self.decision = decision
        self.max_age = max_age
        # By its identity: a callable may not be hashable.
        name: object = id(fallback) if callable(fallback) else fallback
        self.key = decision, name, max_age
        self.ask: Ask = (
            config._ask  # noqa: SLF001
            if fallback is None
            else config._asking(fallback)  # noqa: SLF001
        )


def _once(rules: _Rules, policy_path: str | None, dependency: Dependency) -> Dependency:
    """Return the dependency of *policy_path*, which lives as long as the config."""
    setattr(dependency, _GUARD, Guard(rules.config, policy_path, rules.decision))
    known: dict[Any, Dependency] = rules.config._dependencies  # noqa: SLF001
    return known.setdefault((policy_path, *rules.key), dependency)


async def _check(rules: _Rules, request: HTTPConnection, policy_path: str) -> None:
    config = rules.config
    # Outside the try: an error of a provider is the application's own.
    question = await config._question(  # noqa: SLF001
        *(request, policy_path, rules.decision),
        max_age=rules.max_age,
        source="dependency",
    )
    try:
        decision = await rules.ask(question)
    except (TopazError, grpc.RpcError) as error:
        is_misuse = isinstance(error, PoolMisuse)
        end = MISUSE if is_misuse else ENDS.get(_code(error), UNAVAILABLE)
        wait = getattr(error, "retry_after", None)
    else:
        if decision.allowed:
            return
        end, wait = DENIED, None
    # Raised outside the except block. Inside it, the error of the authorizer would be
    # the context. Error trackers and logs show that, and it may name the identity.
    raise _refusal(request, *end, wait)


def _refusal(
    request: HTTPConnection, status: int, detail: str, wait: float | None
) -> Exception:
    """
    Return the exception that ends *request* with *status*.

    *wait* is the estimate of the pool for `Retry-After`, in seconds.
    """
    if request.scope["type"] == "websocket":
        extensions = request.scope.get("extensions") or {}
        if "websocket.http.response" not in extensions or not _ANSWERS_WEBSOCKETS:
            return WebSocketException(POLICY_VIOLATION, detail)
    headers = None
    if status == 503:
        headers = {"Retry-After": _retry_after(wait)}
    return HTTPException(status, detail, headers)


def _retry_after(wait: float | None) -> str:
    """Return the value of the header `Retry-After`: whole seconds, at least 1."""
    if wait is None:
        return f"{RETRY_AFTER:.0f}"
    least = math.ceil(max(wait, RETRY_AFTER))
    # With jitter. Otherwise all refused clients come back at the same moment.
    return str(least + random.randint(0, least))  # noqa: S311  (no secret)


def _code(error: Exception) -> Any:
    return error.code() if isinstance(error, grpc.aio.AioRpcError) else None


def _check_config(config: object) -> None:
    if not isinstance(config, TopazConfig):
        raise TypeError(f"config must be a TopazConfig, got {safe_repr(config)}")
