"""
Policies in Python: what they are asked, and what they may answer.

Nothing but a plain True allows: what is neither yes nor no is an error, or no decision
at all, as in Topaz.
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
    What a policy is asked to decide.

    Args:
        policy_path: The path of the policy, such as `app.GET.documents`.
        decisions: The names of the decisions wanted, such as `("allowed",)`.
        identity: On whose behalf.
        resource: The resource context.
        policy_instance_name: Empty if the caller named no policy instance.
        policy_instance_label: Empty if the caller named no policy instance.
        metadata: The headers of the call, without binary ones.
    """

    policy_path: str
    decisions: tuple[str, ...]
    # Whom and what it is about stays out of the repr: reprs end up in logs.
    identity: Identity = attrs.field(repr=False)
    resource: dict[str, Any] = attrs.field(factory=dict, repr=False)
    policy_instance_name: str = ""
    policy_instance_label: str = ""
    metadata: dict[str, str] = attrs.field(factory=dict, repr=False)


Answer: TypeAlias = bool | Mapping[str, bool]
PolicyFunction: TypeAlias = Callable[[Check], Answer | Awaitable[Answer]]
"""Answers a `Check` with one bool for all decisions, or with one bool for each."""
Policy: TypeAlias = Answer | PolicyFunction
"""A fixed answer, or a function that finds it."""
Policies: TypeAlias = Mapping[str, Policy] | PolicyFunction
"""Policies by path, or one function that answers for every path."""

# What a rule in Rego may have as its value, besides null.
_VALUES = (bool, int, float, str, list, Mapping)


class Refusal(Exception):  # noqa: N818
    """
    A call ends with this status instead of an answer.

    Strictly private.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(code, details)
        self.code = code
        self.details = details


class PolicyError(Exception):
    """
    A policy fails, or answers with what no policy in Rego could answer.

    Strictly private.
    """


def validated(policies: Policies | None) -> dict[str, Policy] | PolicyFunction:
    """Return *policies* as the service keeps them, or say what is wrong."""
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
    """Return *answer* by decision, or None if it is no answer at all."""
    # bool itself, not what is truthy: a policy that forgets to return, or
    # returns a mock, must not allow anything.
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
    Return what *policy* says, by decision; a rule in Rego may have any value, too.

    Args:
        policy: A fixed answer or a function.
        path: The path of the policy.
        decisions: The decisions that a single bool answers.
        check: Makes the argument of a function; not called otherwise.

    Raises:
        PolicyError: The function raised, or the answer is no answer.
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
