"""
Policies written in Python: their argument, their answers and how they are evaluated.

Only True itself allows. Any answer that is not a bool is an error or no decision, as in
Topaz.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs


if TYPE_CHECKING:
    import grpc

    from fastapi_topaz._authorizer.options import Identity


__all__ = [
    "Check",
    "Policies",
    "Policy",
    "PolicyError",
    "PolicyFunction",
    "Refusal",
    "evaluate",
]


_LOGGER = logging.getLogger("fastapi_topaz.testing")


@attrs.frozen(kw_only=True)
class Check:
    """
    The question that a policy must decide.

    Args:
        policy_path: The path of the policy, such as `app.GET.documents`.
        decisions: The names of the requested decisions, such as `("allowed",)`.
        identity: The identity that the check is about.
        resource: The resource context, default empty.
        policy_instance_name: Empty, the default, if the caller named no instance.
        policy_instance_label: Empty, the default, if the caller named no instance.
        metadata: The text headers of the call. Binary headers are left out.
    """

    policy_path: str
    decisions: tuple[str, ...]
    # Identity, resource and headers are not in the repr, because reprs end up in logs.
    identity: Identity = attrs.field(repr=False)
    resource: dict[str, Any] = attrs.field(factory=dict, repr=False)
    policy_instance_name: str = ""
    policy_instance_label: str = ""
    metadata: dict[str, str] = attrs.field(factory=dict, repr=False)


Answer: TypeAlias = bool | Mapping[str, bool]
PolicyFunction: TypeAlias = Callable[[Check], Answer | Awaitable[Answer]]
"""A function from a `Check` to one bool for all decisions, or to a bool for each."""
Policy: TypeAlias = Answer | PolicyFunction
"""A fixed answer, or a function that returns an answer."""
Policies: TypeAlias = Mapping[str, Policy] | PolicyFunction
"""Policies by path, or one function that answers for every path."""

# The types of values that a Rego rule can have, besides null.
_VALUES = (bool, int, float, str, list, Mapping)


class Refusal(Exception):  # noqa: N818
    """
    Ends a call with a gRPC status instead of an answer.

    Strictly private.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(code, details)
        self.code = code
        self.details = details


class PolicyError(Exception):
    """
    A policy raised an error, or returned an answer that Rego cannot express.

    Strictly private.
    """


def validated(policies: Policies | None) -> dict[str, Policy] | PolicyFunction:
    """
    Check *policies*, and return them in the form that the service uses.

    Raises:
        TypeError: *policies*, a path or a policy has the wrong type.
        ValueError: A path is empty.
    """
    if policies is None:
        return {}
    if callable(policies):
        return policies
    if not isinstance(policies, Mapping):
        raise TypeError(
            "policies must be a mapping of paths to policies, a callable or None, "
            f"got {type(policies).__name__}"
        )
    for path, policy in policies.items():
        if not isinstance(path, str):
            raise TypeError(f"policies must have paths as keys, got {path!r}")
        if not path:
            raise ValueError("policies must not have an empty path")
        if not callable(policy) and not _is_fixed(policy):
            raise TypeError(
                f"policies[{path!r}] must be a bool, a mapping of decisions to bools "
                f"or a callable, got {policy!r}"
            )
    return dict(policies)


def _is_fixed(policy: object) -> bool:
    if isinstance(policy, Mapping):
        values = policy.values()
        return all(isinstance(name, str) for name in policy) and all(
            isinstance(value, bool) for value in values
        )
    return isinstance(policy, bool)


def _decisions(answer: object, wanted: tuple[str, ...]) -> dict[str, object] | None:
    """Return the value of each decision, or None if *answer* is invalid."""
    # Only a bool, not any truthy value. If a policy returns a mock, or forgets to
    # return, it must not allow anything.
    if isinstance(answer, bool):
        return dict.fromkeys(wanted, answer)
    if isinstance(answer, Mapping) and all(
        isinstance(name, str) and (value is None or isinstance(value, _VALUES))
        for name, value in answer.items()
    ):
        return dict(answer)
    return None


async def evaluate(
    policy: object,
    path: str,
    decisions: tuple[str, ...],
    check: Callable[[str, tuple[str, ...]], Check],
) -> dict[str, object]:
    """
    Evaluate *policy*, and return a value for each decision.

    A value may also be no bool, because a Rego rule can have any value.

    Args:
        policy: A fixed answer or a function.
        path: The path of the policy.
        decisions: The decisions that get the value if the answer is a single bool.
        check: Makes the argument of the function. Not called for a fixed answer.

    Raises:
        PolicyError: The function raised an error, or its answer is invalid.
    """
    answer = policy
    if callable(policy):
        asked = check(path, decisions)
        try:
            answer = policy(asked)
            if inspect.isawaitable(answer):
                answer = await answer
        except Exception as error:
            _LOGGER.warning("policy %r raised", path, exc_info=True)
            raise PolicyError(
                f"policy {path!r} raised {type(error).__name__}: {error}"
            ) from error
    decided = _decisions(answer, decisions)
    if decided is None:
        raise PolicyError(
            f"policy {path!r} must return a bool or a mapping of decisions to bools, "
            f"got {type(answer).__name__}"
        )
    return decided
