"""Test support: an embedded authorizer, and fakes without a network."""

from __future__ import annotations

from ._embedded import EmbeddedAuthorizer
from ._fake import FakeConnection, FakeConnector, Step, fail, hang, ok, slow
from ._policies import Check, Policies, Policy, PolicyFunction


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
]
