"""The findings about the policies that Topaz lists. Nothing here makes a call."""

from __future__ import annotations

import difflib
import json
import re
from typing import TYPE_CHECKING, Final

from fastapi_topaz._cli.doctor.findings import found


if TYPE_CHECKING:
    from collections.abc import Collection

    from fastapi_topaz._cli.doctor.findings import Finding


__all__ = ["missing_policy", "root_finding"]


_MOST_ROOTS: Final = 8
_MOST_PACKAGES: Final = 10
_LONGEST: Final = 100
"""The most characters of a package that are shown."""

_DECISION: Final = "allowed"
"""The decision that guards ask for."""

_PART = re.compile(r'[A-Za-z_][A-Za-z0-9_]*|"(?:[^"\\]|\\.)*"')


def root_finding(packages: Collection[str], root: str | None, where: str) -> Finding:
    """Return whether there are packages, and whether one is at or below *root*."""
    if not packages:
        return found("policies-missing", "Topaz has loaded no policy", where)
    roots = sorted({re.split(r"[.\[]", path)[0] for path in packages})
    listed = ", ".join(roots[:_MOST_ROOTS])
    if root is None:
        said = f"packages of policies: {len(packages)}, below {listed}"
        return found("policies", said, where)
    wanted = _parts(root)
    below = [path for path in packages if _parts(path)[: len(wanted)] == wanted]
    if below:
        said = f"packages of policies at or below {root}: {len(below)}"
        return found("policies", said, where)
    said = f"no package is at or below {root}; the packages are below {listed}"
    return found("policy-root-missing", said, where)


def missing_policy(packages: Collection[str], path: str, where: str) -> Finding:
    """Return the finding for a *path* without a decision; *packages* may be unknown."""
    said = f"Topaz has no decision `{_DECISION}` for {path}"
    return found("policy-missing", said, where, facts=_facts(packages, path))


def _facts(packages: Collection[str], path: str) -> str:
    by_parts = {_parts(each): each for each in packages}
    parts = _parts(path)
    if parts in by_parts:
        return (
            f"Topaz has the package {path}, but its rule `{_DECISION}` is missing, "
            "fails, or has no value for an anonymous caller without a resource. "
            f"`default {_DECISION} := false` gives it a value."
        )
    facts = []
    if parts[0] == "data":
        facts.append("A policy path begins without `data`.")
    if parts[-1] == _DECISION and len(parts) > 1:
        head = by_parts.get(parts[:-1])
        exists = ", which is a package of Topaz" if head is not None else ""
        shorter = head or re.sub(rf'(?:\.{_DECISION}|\["{_DECISION}"\])$', "", path)
        facts.append(
            f"`{_DECISION}` is the name of the decision, and not a part of the path: "
            f"pass --policy-path '{shorter}'{exists}."
        )
    if packages:
        near = difflib.get_close_matches(path, packages, _MOST_PACKAGES, cutoff=0)
        listed = ", ".join(map(_clipped, near))
        facts.append(f"The closest of the {len(packages)} packages: {listed}.")
    return " ".join(facts)


def _parts(path: str) -> tuple[str, ...]:
    """Return the parts of a reference, the same for `a.b` and `a["b"]`."""
    return tuple(map(_unquoted, _PART.findall(path)))


def _unquoted(part: str) -> str:
    if not part.startswith('"'):
        return part
    try:
        return str(json.loads(part))
    except ValueError:  # a string of Rego that is not one of JSON
        return part


def _clipped(package: str) -> str:
    return package if len(package) <= _LONGEST else f"{package[:_LONGEST]}..."
