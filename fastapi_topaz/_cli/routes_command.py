"""The command `routes`: it prints the policy paths that the guards of routes ask."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import attrs
from rich.table import Table
from rich.text import Text

from fastapi_topaz._app.guards import guard_of
from fastapi_topaz._cli.output import new_console, say


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from fastapi_topaz._app.guards import Guard
    from fastapi_topaz._app.routes import Listed


__all__ = ["Row", "rows_of", "show_routes"]


_NO_PATH = "none: below a Host route"


@attrs.frozen
class Row:
    """
    One method of one route.

    Attributes:
        method: The method, as in `Listed`.
        path: The template of the route.
        policies: What the guards ask, such as `myapp.GET.documents`. A decision that is
            not `allowed` stands behind it. Empty: the route has no guard.
        automatic: Those of *policies* that come from the route.
    """

    method: str
    path: str
    policies: tuple[str, ...]
    automatic: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the row, ready for JSON."""
        return {
            "method": self.method,
            "path": self.path,
            "guarded": bool(self.policies),
            "policies": list(self.policies),
        }


def show_routes(routes: Iterable[Listed], *, as_json: bool) -> int:
    """Print the routes, and return the exit code."""
    rows = rows_of(routes)
    if as_json:
        said = {"routes": [row.as_dict() for row in rows]}
        sys.stdout.write(f"{json.dumps(said, indent=2)}\n")
        return 0
    console = new_console()
    table = Table()
    for name in ("method", "path", "policy path"):
        table.add_column(name, overflow="fold")
    for row in rows:
        asked = "\n".join(row.policies) or "not guarded"
        # As Text, because the quoted part of a policy path looks like markup.
        table.add_row(*map(Text, (row.method, row.path, asked)))
    console.print(table)
    guarded = sum(bool(row.policies) for row in rows)
    say(console, f"{guarded} of {len(rows)} routes are guarded.", *_shared(rows))
    return 0


def rows_of(routes: Iterable[Listed]) -> list[Row]:
    """Return a row for each method of each route."""
    return [_row(route) for route in routes]


def _row(route: Listed) -> Row:
    asked: dict[str, bool] = {}
    for guard in _guards(getattr(route.route, "dependant", None)):
        path = guard.policy_path
        if path is None:
            path = (
                _NO_PATH
                if route.host
                else route.policy_path(guard.config.policy_path_root)
            )
        decision = "" if guard.decision == "allowed" else f" ({guard.decision})"
        asked[path + decision] = guard.policy_path is None and not route.host
    automatic = tuple(path for path, is_automatic in asked.items() if is_automatic)
    return Row(route.method, route.template, tuple(asked), automatic)


def _guards(dependant: Any) -> Iterator[Guard]:
    """Yield the guards among all dependencies below *dependant*."""
    for each in getattr(dependant, "dependencies", ()):
        if (guard := guard_of(each.call)) is not None:
            yield guard
        yield from _guards(each)


def _shared(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each policy that routes with different paths ask."""
    paths: dict[str, list[str]] = {}
    for row in rows:
        for policy in row.automatic:
            paths.setdefault(policy, []).append(row.path)
    for policy, asking in paths.items():
        if len(set(asking)) > 1:
            yield f"{policy} is the policy of several routes: {', '.join(asking)}"
