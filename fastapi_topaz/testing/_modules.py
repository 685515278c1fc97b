"""Makes Rego modules from Python policies, for ListPolicies and GetPolicy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from aserto.authorizer.v2.api import Module


if TYPE_CHECKING:
    from aserto.authorizer.v2 import GetPolicyRequest, ListPoliciesRequest

    from ._policies import Policy


__all__ = ["masked", "module"]


def module(path: str, policy: Policy) -> Module:
    """Return the module of *policy*. Its id is *path*."""
    if isinstance(policy, bool):
        rules = [f"default allowed := {str(policy).lower()}"]
    elif isinstance(policy, Mapping):
        rules = [f"{name} := {str(value).lower()}" for name, value in policy.items()]
    else:
        rules = ["# decided by a Python function"]
    return Module(
        id=path,
        raw="\n\n".join([f"package {path}", *rules]) + "\n",
        package_path=f"data.{path}",
    )


def masked(full: Module, request: ListPoliciesRequest | GetPolicyRequest) -> Module:
    """Return the fields of *full* that *request* selects, as Topaz selects them."""
    mask = request.field_mask
    # Topaz ignores an empty mask, and a mask with a path that does not exist.
    if not any(mask.paths) or not mask.IsValidForDescriptor(Module.DESCRIPTOR):
        return full
    part = Module()
    mask.MergeMessage(full, part)
    return part
