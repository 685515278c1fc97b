"""The command `routes`: it prints the policy paths that the guards of routes ask."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from fastapi_topaz._cli.output import new_console, say


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fastapi_topaz._app.listing import Listed


__all__ = ["policies_of", "show_routes"]


_NO_PATH = "none: require_policy_auto cannot name it"


def show_routes(routes: Sequence[Listed], *, as_json: bool) -> int:
    """Print the routes, and return the exit code."""
    if as_json:
        said = [
            {
                "method": route.method,
                "path": route.path,
                "guarded": bool(route.guards),
                "policies": policies_of(route),
            }
            for route in routes
        ]
        sys.stdout.write(f"{json.dumps({'routes': said}, indent=2)}\n")
        return 0
    console = new_console()
    table = Table()
    for name in ("method", "path", "policy path"):
        table.add_column(name, overflow="fold")
    for route in routes:
        asked = "\n".join(policies_of(route)) or "not guarded"
        # As Text, because the quoted part of a policy path looks like markup.
        table.add_row(*map(Text, (route.method, route.path, asked)))
    console.print(table)
    guarded = sum(bool(route.guards) for route in routes)
    say(console, f"{guarded} of {len(routes)} routes are guarded.", *_shared(routes))
    return 0


def policies_of(route: Listed) -> list[str]:
    """
    Return what the guards of *route* ask, such as `myapp.GET.documents`.

    A decision that is not `allowed` stands behind the policy path.
    """
    asked = []
    for guard in route.guards:
        decision = "" if guard.decision == "allowed" else f" ({guard.decision})"
        asked.append(f"{route.policy_path(guard) or _NO_PATH}{decision}")
    return list(dict.fromkeys(asked))


def _shared(routes: Sequence[Listed]) -> Iterator[str]:
    """Yield a line for each policy that several routes get from their paths."""
    paths: dict[str | None, list[str]] = {}
    for route in routes:
        for guard in route.guards:
            if guard.policy_path is None and route.is_named:
                paths.setdefault(route.policy_path(guard), []).append(route.path)
    for policy, asking in paths.items():
        # A path may be there twice, with several guards.
        different = list(dict.fromkeys(asking))
        if len(different) > 1:
            yield f"{policy} is the policy of several routes: {', '.join(different)}"
