"""Lists the routes of an application that no guard protects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, APIWebSocketRoute
from starlette.applications import Starlette
from starlette.routing import Host, Mount, Router, WebSocketRoute

from fastapi_topaz._app.config import TopazConfig
from fastapi_topaz._app.guards import guard_of
from fastapi_topaz._app.routes import router_of, routes_of
from fastapi_topaz._checks import safe_repr


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


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
    - A route whose guard is replaced in `dependency_overrides`. The function does not
      look for guards in replacements.
    - A route whose own code asks, through `is_allowed` or by calling a guard.

    It does not judge middlewares of *app* and custom classes of routes: either can
    answer a request before a guard runs.

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
    return list(dict.fromkeys(_Search(config).below(app, "", ())))


@attrs.frozen
class _Search:
    """
    Walks the routers of an application.

    Args:
        config: Only its guards count, if given.
    """

    config: TopazConfig | None

    def below(
        self, app: Starlette | Router, prefix: str, above: tuple[object, ...]
    ) -> Iterator[str]:
        """Yield the routes of *app* without a guard. *prefix* is its path."""
        if any(app is each for each in above):
            return  # The application is mounted in itself.
        above = (*above, app)
        overrides = getattr(app, "dependency_overrides", {})
        router = app.router if isinstance(app, Starlette) else app
        for route in (*routes_of(router), *_low_priority(router)):
            if isinstance(route, Mount | Host):
                yield from self._inner(route, prefix, above)
            elif not self._is_guarded(route, overrides):
                yield from _names(route, prefix)
        if getattr(router.default, "__func__", None) is not Router.not_found:
            yield f"DEFAULT {prefix or '/'}"

    def _inner(
        self, route: Mount | Host, prefix: str, above: tuple[object, ...]
    ) -> Iterator[str]:
        """Yield the routes without a guard of a mounted application."""
        if isinstance(route, Mount):
            kind, path = "MOUNT", prefix + route.path
            # Without the middlewares that are arguments of the mount.
            app = getattr(route, "_base_app", route.app)
        else:
            kind, path, app = "HOST", route.host + prefix, route.app
        if not isinstance(app, Starlette | Router):
            # A middleware, or another application. It may answer by itself.
            yield f"{kind} {path or '/'}"
            app = router_of(app)
        if isinstance(app, Starlette | Router):
            yield from self.below(app, path, above)

    def _is_guarded(self, route: Any, overrides: Mapping[Any, Any]) -> bool:
        original = getattr(route, "original_route", route)
        # The files of `app.frontend` have no class that is public.
        known = isinstance(original, APIRoute | APIWebSocketRoute) or hasattr(
            original, "add_frontend_route"
        )
        dependant = getattr(route, "dependant", None)
        if not known or not isinstance(dependant, Dependant):
            return False
        return self._has_guard(dependant, overrides)

    def _has_guard(self, dependant: Dependant, overrides: Mapping[Any, Any]) -> bool:
        for each in dependant.dependencies:
            call = overrides.get(each.call, each.call) if overrides else each.call
            if guard_of(call, self.config) is not None:
                return True
            if call is each.call and self._has_guard(each, overrides):
                return True
        return False


def _low_priority(router: Any) -> Iterator[Any]:
    """Yield the groups of files of `app.frontend`, which FastAPI 0.138 added."""
    yield from getattr(router, "_low_priority_routes", ())
    for route in router.routes:
        included = getattr(route, "effective_low_priority_routes", None)
        if included is not None:
            yield from included()


def _names(route: Any, prefix: str) -> Iterator[str]:
    """Yield a text for each method of *route*, such as `GET /documents`."""
    original = getattr(route, "original_route", route)
    if hasattr(original, "add_frontend_route"):
        prefix += getattr(route, "frontend_prefix", "")
        for each in original.routes:
            yield f"GET {prefix.rstrip('/')}{each.path}"
        return
    path = prefix + getattr(route, "path", f" {type(route).__name__}")
    if isinstance(route, WebSocketRoute):
        yield f"WEBSOCKET {path}"
        return
    methods = set(getattr(route, "methods", None) or {"ANY"})
    for method in sorted(methods - ({"HEAD"} if "GET" in methods else set())):
        yield f"{method} {path}"
