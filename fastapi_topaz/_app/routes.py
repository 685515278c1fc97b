"""
The policy path of the route that runs.

FastAPI does not give a dependency the complete template of its route. Since FastAPI
0.137 an included route does not have the prefixes of `include_router`. A mounted
application sees its prefix as plain text. If the prefix has a parameter, that text
comes from the client. So this module walks the routers, from the application's router
down to the route, and joins their templates. Text of a request never becomes part of a
policy path.

If a router is included or mounted twice, one route has several templates. Then the path
of the request selects one of them. If none matches, there is no policy path: a later
change in FastAPI must not change which policy is asked.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import attrs
from starlette.routing import Host, Mount

from fastapi_topaz._authorizer.rego import join


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from starlette.types import Scope


__all__ = ["policy_path_of", "route_policy_path", "router_of", "routes_of"]


# A parameter in a template, as starlette.routing writes it, perhaps with a converter.
_PARAMETER = re.compile(r"\{([a-zA-Z_][a-zA-Z0-9_]*)(?::[a-zA-Z_][a-zA-Z0-9_]*)?\}")
_WRAPPERS = 50
"""How many middlewares around a mounted application are unwrapped at most."""
_REMEDY = "name its policy with require_policy_allowed"


@attrs.frozen(eq=False)
class _Chain:
    """
    One path through the routers, from the application to a route.

    Attributes:
        mounts: The mounts on the path, the outermost first.
        route: The object with the template, the methods and the pattern of the route.
        host: Whether a `Host` route is on the path.
        template: The complete template, such as `/{tenant}/documents/{id}`.
    """

    mounts: tuple[Mount, ...]
    route: Any
    host: bool
    template: str

    def matches(self, path: str) -> bool:
        """Return whether the router sends a request for *path* along this chain."""
        for mount in self.mounts:
            found = mount.path_regex.match(path)
            if found is None:
                return False
            path = "/" + found["path"]
        return self.route.path_regex.match(path) is not None


def _template(mounts: Sequence[Mount], route: Any) -> str:
    prefixes = (mount.path_format.removesuffix("/{path}") for mount in mounts)
    return "".join(prefixes) + str(route.path_format)


class _Map:
    """
    Every chain below one router, by the `id()` of its route.

    Strictly private. An application may add routes while it runs. So the map remembers
    the routes of each router, and is rebuilt if they change.
    """

    def __init__(self, router: Any) -> None:
        self._chains: dict[int, list[_Chain]] = {}
        self._seen: list[tuple[Any, list[Any]]] = []
        self._walk(router, (), (), host=False)

    def is_current(self) -> bool:
        """Return whether all routers still have the same routes."""
        return all(router.routes == routes for router, routes in self._seen)

    def chains(self, route: object) -> Sequence[_Chain]:
        """Return the chains that end with *route*, in the order of the routers."""
        return self._chains.get(id(route), ())

    def _walk(
        self,
        router: Any,
        above: tuple[Any, ...],
        mounts: tuple[Mount, ...],
        *,
        host: bool,
    ) -> None:
        if any(router is each for each in above):
            return  # The application is mounted in itself.
        above = (*above, router)
        self._watch(router)
        for route in routes_of(router):
            if isinstance(route, Mount | Host):
                inner = router_of(route.app)
                if inner is not None:
                    below = (*mounts, route) if isinstance(route, Mount) else mounts
                    through = host or isinstance(route, Host)
                    self._walk(inner, above, below, host=through)
            elif hasattr(route, "path_regex") and hasattr(route, "path_format"):
                chain = _Chain(mounts, route, host, _template(mounts, route))
                self._chains.setdefault(id(route), []).append(chain)

    def _watch(self, router: Any) -> None:
        self._seen.append((router, list(router.routes)))
        for route in router.routes:
            included = getattr(route, "original_router", None)
            if included is not None:
                self._watch(included)


def routes_of(router: Any) -> Iterator[Any]:
    """
    Yield an object with the complete template for each route of *router*.

    The scope of a request leads to the same object. Since 0.137 FastAPI keeps an
    included router, with a context for each of its routes that has the template. For a
    mount or a WebSocket route it makes a new route instead.
    """
    for route in router.routes:
        contexts = getattr(route, "effective_route_contexts", None)
        if contexts is None:
            yield route
            continue
        for context in contexts():
            if context.starlette_route is not None:
                yield context.starlette_route
            else:
                yield context


def router_of(app: Any) -> Any:
    """Return the object with the routes of *app*, without middlewares around it."""
    for _ in range(_WRAPPERS):
        if isinstance(getattr(app, "routes", None), list):
            return app
        app = getattr(app, "app", None)
    return None


_ATTRIBUTE = "_fastapi_topaz_map"
"""The attribute for the map of a router. A router cannot be a key: it has no hash."""


def _chains(router: Any, route: object) -> Sequence[_Chain]:
    known = getattr(router, _ATTRIBUTE, None)
    if known is None or not known.is_current() or not known.chains(route):
        known = _Map(router)
        setattr(router, _ATTRIBUTE, known)
    return known.chains(route)


def route_policy_path(root: str, scope: Scope) -> str:
    """
    Return the policy path of the route that runs for the request of *scope*.

    Args:
        root: The package of all policies.
        scope: The ASGI scope of the request, after routing.

    Raises:
        RuntimeError: The route has no template, or its template does not match the
            path of the request. The message names the route.
    """
    route, router = scope.get("route"), scope.get("router")
    fastapi = scope.get("fastapi") or {}
    if "frontend_path" in fastapi:
        raise RuntimeError(
            "require_policy_auto cannot guard files of app.frontend, because they "
            f"have no route each: {_REMEDY}"
        )
    context = fastapi.get("effective_route_context")
    if context is not None and getattr(context, "original_route", None) is route:
        route = context
    path = _path_of(scope)
    chains = [] if router is None else _chains(router, route)
    matching = [chain for chain in chains if chain.matches(path)]
    if any(chain.host for chain in matching):
        raise RuntimeError(
            f"require_policy_auto cannot name the policy of {_named(route)} below a "
            f"Host route, because the host is not part of a policy path: {_REMEDY}"
        )
    if not matching:
        templates = ", ".join(repr(chain.template) for chain in chains) or "none"
        raise RuntimeError(
            f"require_policy_auto cannot name the policy of {_named(route)}: none of "
            "its templates, found from the router of the application, matches the "
            f"path of this request (templates: {templates}); {_REMEDY}"
        )
    # As routers do, take the first one that matches.
    chain = matching[0]
    return policy_path_of(root, _method_of(chain.route, scope), chain.template)


# The cache cannot grow with requests, because templates contain no text of a request.
@functools.lru_cache(maxsize=4096)
def policy_path_of(root: str, method: str, template: str) -> str:
    """Return the policy path of a route: dots for slashes, `__id` for `{id}`."""
    # A parameter may be only a part of a segment, as in /files/{name}.json.
    named = _PARAMETER.sub(r"__\1", template)
    return join(root, method, *filter(None, re.split(r"[/.]", named)))


def _path_of(scope: Scope) -> str:
    """Return the path of the request below the application, without its prefix."""
    # A mount appends its prefix to root_path, and keeps the old value in
    # `app_root_path`.
    root = scope.get("app_root_path", scope.get("root_path", ""))
    path: str = scope["path"]
    rest = path.removeprefix(root)
    return rest if rest != path and rest[:1] in {"", "/"} else path


def _method_of(route: Any, scope: Scope) -> str:
    """Return the method of *route* that answers the request of *scope*."""
    methods = getattr(route, "methods", None)
    if methods is None:
        return "GET"  # A WebSocket begins as a GET request: RFC 6455, section 4.1.
    asked = scope.get("method")
    if asked == "HEAD" and "GET" in methods:
        return "GET"  # HEAD is GET without the body: RFC 9110, section 9.3.2.
    for method in methods:
        if method == asked:
            return str(method)
    raise RuntimeError(
        f"require_policy_auto cannot name the policy of {_named(route)}: the route "
        f"does not answer this method; {_REMEDY}"
    )


def _named(route: Any) -> str:
    template = getattr(route, "path_format", None)
    if template is None:
        return f"a {type(route).__name__}" if route is not None else "no route"
    methods = ", ".join(sorted(getattr(route, "methods", None) or ()))
    return f"the route {f'{methods} {template}'.strip()!r}"
