"""Test support: an embedded authorizer, fakes, and a list of unguarded routes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._embedded import EmbeddedAuthorizer
from ._fake import FakeConnection, FakeConnector, Step, fail, hang, ok, slow
from ._policies import Check, Policies, Policy, PolicyFunction


if TYPE_CHECKING:
    from ._unguarded import unguarded_routes


__all__ = [
    "Check",
    "EmbeddedAuthorizer",
    "FakeConnection",
    "FakeConnector",
    "Policies",
    "Policy",
    "PolicyFunction",
    "Step",
    "fail",
    "hang",
    "ok",
    "slow",
    "unguarded_routes",
]


def __getattr__(name: str) -> Any:
    # Imported on first use, because it imports FastAPI.
    if name == "unguarded_routes":
        from ._unguarded import unguarded_routes  # noqa: PLC0415

        return unguarded_routes
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
