"""The policies of the bundle in Python, for the embedded authorizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi_topaz import Identity, IdentityType


if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi_topaz.testing import Check, Policies


def _is_alices(check: Check) -> bool:
    return check.resource.get("owner") == "alice"


def _fails(check: Check) -> Mapping[str, bool]:
    owner = check.resource.get("owner")
    if owner == "alice":
        raise ValueError("two answers at once")
    return {"allowed": False} if owner not in (None, "bob") else {}


def _odd(_check: Check) -> Mapping[str, bool]:
    return {"allowed": "yes", "visible": True}  # type: ignore[dict-item]


def _documents_post(check: Check) -> Mapping[str, bool]:
    return {"allowed": False} | ({"visible": True} if _is_alices(check) else {})


TWINS: Policies = {
    "conformance.allow": {"allowed": True, "visible": False},
    "conformance.deny": {"allowed": False},
    "conformance.resource": lambda check: {"allowed": _is_alices(check)},
    "conformance.identity": lambda check: {
        "allowed": check.identity == Identity(IdentityType.MANUAL, "alice")
    },
    "conformance.fails": _fails,
    "conformance.undefined": lambda check: (
        {"allowed": True} if _is_alices(check) else {}
    ),
    "conformance.odd": _odd,
    "conformance.tree.GET.documents": {"allowed": True, "visible": True},
    "conformance.tree.GET.documents.__id": lambda check: {
        "allowed": check.resource.get("id") == "42"
    },
    "conformance.tree.POST.documents": _documents_post,
}

ROUTE_TWINS: Policies = {
    "routes.GET.documents.__id": True,
    "routes.GET.public.documents.__id": True,
    "routes.GET.public.__group.documents.__id": True,
    'routes.GET["user-files"]': True,
    "routes.GET.admin.documents.__id": False,
    "routes.GET.admin.__group.documents.__id": False,
    'routes.GET.admin["user-files"]': False,
    "routes.GET.__tenant.documents.__id": False,
    "routes.GET.__tenant.admin.documents.__id": False,
    'routes.GET.v1["0"].admin.documents.__id': False,
}
