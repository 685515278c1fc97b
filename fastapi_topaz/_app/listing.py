"""
All routes of an application, with the guards that protect them.

`unguarded_routes` and the command `routes` use this list. Except for middlewares, it
has everything that may answer a request. An entry that cannot be judged has no guard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, APIWebSocketRoute
from starlette.applications import Starlette
from starlette.routing import Host, Mount, Router, WebSocketRoute

from fastapi_topaz._app.guards import guard_of
from fastapi_topaz._app.routes import policy_path_of, router_of, routes_of


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fastapi_topaz._app.guards import Guard


__all__ = ["Listed", "listed_routes"]


@attrs.frozen
class Listed:
    """
    One method of one route, or something else that may answer requests.

    Attributes:
        method: The HTTP method; `ANY`, which is all methods; `WEBSOCKET`; `MOUNT` or
            `HOST`, which is another application; or `DEFAULT`, which is the argument
            of a router that answers unknown paths.
        path: The whole template, such as `/documents/{id}`. A host stands before it.
        guards: Its guards. Empty: it has none, or cannot be judged.
        is_named: Whether `require_policy_auto` can name its policy.
    """

    method: str
    path: str
    guards: tuple[Guard, ...] = ()
    is_named: bool = True

    def policy_path(self, guard: Guard) -> str | None:
        """Return the policy that *guard* asks for. None: *guard* raises an error."""
        if guard.policy_path is not None or not self.is_named:
            return guard.policy_path
        method = "GET" if self.method == "WEBSOCKET" else self.method
        return policy_path_of(guard.config.policy_path_root, method, self.path)


def listed_routes(
    app: Starlette | Router,
    prefix: str = "",
    above: tuple[object, ...] = (),
    *,
    is_named: bool = True,
) -> Iterator[Listed]:
    """
    Yield everything in *app* that may answer requests, in the order of the routers.

    Args:
        app: A FastAPI or Starlette application, or a router.
        prefix: The path of *app*.
        above: The applications in which *app* is mounted.
        is_named: As in `Listed`.
    """
    if any(app is each for each in above):
        return  # The application is mounted in itself.
    above = (*above, app)
    router = app.router if isinstance(app, Starlette) else app
    for route in routes_of(router):
        if isinstance(route, Mount | Host):
            yield from _inner(route, prefix, above, is_named=is_named)
            continue
        guards = tuple(_guards(route, router))
        path = prefix + getattr(route, "path", f" {type(route).__name__}")
        for method in _methods(route):
            yield Listed(method, path, guards, is_named)
    for group in _frontends(router):
        guards = tuple(_guards(group, router))
        start = prefix + getattr(group, "frontend_prefix", "").rstrip("/")
        for each in getattr(group, "original_route", group).routes:
            yield Listed("GET", start + each.path, guards, is_named=False)
    if getattr(router.default, "__func__", None) is not Router.not_found:
        yield Listed("DEFAULT", prefix or "/")


def _inner(
    route: Mount | Host, prefix: str, above: tuple[object, ...], *, is_named: bool
) -> Iterator[Listed]:
    """Yield the routes of a mounted application."""
    if isinstance(route, Mount):
        kind, path = "MOUNT", prefix + route.path
        # Without the middlewares that are arguments of the mount.
        app = getattr(route, "_base_app", route.app)
    else:
        kind, path, app = "HOST", route.host + prefix, route.app
        is_named = False  # The host is not part of a policy path.
    if not isinstance(app, Starlette | Router):
        # A middleware, or another application. It may answer by itself.
        yield Listed(kind, path or "/")
        app = router_of(app)
    if isinstance(app, Starlette | Router):
        yield from listed_routes(app, path, above, is_named=is_named)


def _frontends(router: Any) -> Iterator[Any]:
    """Yield the groups of files of `app.frontend`, which FastAPI 0.138 added."""
    yield from getattr(router, "_low_priority_routes", ())
    for route in router.routes:
        included = getattr(route, "effective_low_priority_routes", None)
        if included is not None:
            yield from included()


def _methods(route: Any) -> list[str]:
    if isinstance(route, WebSocketRoute):
        return ["WEBSOCKET"]
    # An endpoint that is a class of Starlette has no methods.
    methods = set(getattr(route, "methods", None) or {"ANY"})
    # HEAD asks the policy of GET.
    return sorted(methods - ({"HEAD"} if "GET" in methods else set()))


def _guards(route: Any, router: Any) -> Iterator[Guard]:
    """Yield the guards of *route*, which is in *router*."""
    original = getattr(route, "original_route", route)
    # Another class may have dependencies and never run them. The files of
    # `app.frontend` have no class that is public.
    known = isinstance(original, APIRoute | APIWebSocketRoute) or hasattr(
        original, "add_frontend_route"
    )
    dependant = getattr(route, "dependant", None)
    if known and isinstance(dependant, Dependant):
        # The application where the route was made. A WebSocket route does not keep it.
        name = "dependency_overrides_provider"
        provider = getattr(route, name, None) or getattr(router, name, None)
        yield from _inside(dependant, getattr(provider, "dependency_overrides", {}))


def _inside(dependant: Dependant, overrides: Mapping[Any, Any]) -> Iterator[Guard]:
    for each in dependant.dependencies:
        # As in FastAPI: without overrides, a call needs no hash.
        call = overrides.get(each.call, each.call) if overrides else each.call
        if (guard := guard_of(call)) is not None:
            yield guard
        if call is each.call:
            yield from _inside(each, overrides)
