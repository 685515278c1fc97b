"""Lists the routes of an application that no guard protects."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.routing import Router

from fastapi_topaz._app.config import TopazConfig
from fastapi_topaz._app.listing import listed_routes
from fastapi_topaz._checks import safe_repr


__all__ = ["unguarded_routes"]


def unguarded_routes(
    app: Starlette | Router, config: TopazConfig | None = None
) -> list[str]:
    """
    Return the routes of *app* that no guard protects, such as `["GET /health"]`.

    A route is guarded if `require_policy_auto` or `require_policy_allowed`, with any
    arguments, is one of its dependencies. The guard may be a dependency of the route,
    of a router above it or of the application, or a dependency of a dependency.

    The function lists everything that it cannot judge. In detail:

    - `"POST /documents"`: a route, for each of its methods. HEAD is not listed beside
      GET. The pages of FastAPI, such as `GET /docs`, have no guard, so they are listed.
    - `"GET /raw"`: a route of Starlette, as `app.add_route` makes it. A router with a
      guard does not guard it. `"ANY /raw"`: it answers all methods.
    - `"WEBSOCKET /news"`: a WebSocket route.
    - `"MOUNT /static"`, `"HOST files.example.org"`: another ASGI application, or one in
      a middleware. The routes of a mounted FastAPI, Starlette or router are judged one
      by one, also below such a middleware.
    - `"GET /app"`: files of `app.frontend`.
    - `"DEFAULT /"`: a router whose argument `default` answers unknown paths.
    - A route whose guard is replaced in `dependency_overrides`, unless another guard
      replaces it. The function does not look at the dependencies of replacements.
    - A route whose own code asks, through `is_allowed` or by calling a guard.

    Middlewares, and custom classes of applications, routers and routes, can answer a
    request before a guard runs. The function does not judge them.

    Args:
        app: A FastAPI or Starlette application, or a router.
        config: Only guards of this configuration count. None, the default: guards of
            any configuration.

    Returns:
        A method and a path for each route, in the order of the routers.

    Raises:
        TypeError: *app* is not an application with routes, such as one in a middleware,
            or *config* is not a TopazConfig.
    """
    if not isinstance(app, Starlette | Router):
        raise TypeError(
            "app must be a FastAPI or Starlette application or a router, got "
            f"{safe_repr(app)}; pass the application inside a middleware itself"
        )
    if config is not None and not isinstance(config, TopazConfig):
        raise TypeError(f"config must be a TopazConfig, got {safe_repr(config)}")
    found = [
        f"{route.method} {route.path}"
        for route in listed_routes(app)
        if not any((config or guard.config) is guard.config for guard in route.guards)
    ]
    return list(dict.fromkeys(found))
