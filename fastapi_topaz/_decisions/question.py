"""What a check asks and gets: `Question`, `Decision`, and the protocol `Ask`."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

import attrs


if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import HTTPConnection

    from fastapi_topaz._pool.budget import Budget
    from fastapi_topaz._rpc.metadata import Metadata
    from fastapi_topaz._telemetry.decisions import CheckSource


__all__ = ["Ask", "Decision", "Origin", "Question"]


Origin = Literal["authorizer", "cache", "shared", "stale", "fallback"]
"""Where a decision comes from."""


@attrs.frozen
class Question:
    """
    One check, encoded once, before it waits for a connection.

    So a wrong argument gets its own error, and not a timeout of the pool. Questions are
    equal if the authorizer is asked the same: the budget does not count.
    """

    policy_path: str
    decision: str
    # Holds the identity and the resource context: see `Identity`.
    request: bytes = attrs.field(repr=False)
    budget: Budget = attrs.field(eq=False, repr=False)
    # Of this check alone, and perhaps secret. The answer may depend on it.
    metadata: Metadata = attrs.field(default=(), repr=False)
    # The rest is not sent. The JSON Web Token in the request, if there is one:
    token: str | None = attrs.field(default=None, eq=False, repr=False)
    http: HTTPConnection | None = attrs.field(default=None, eq=False, repr=False)
    resource: Mapping[str, Any] = attrs.field(factory=dict, eq=False, repr=False)
    # The oldest answer that the caller accepts, in seconds since it was asked for.
    max_age: float | None = attrs.field(default=None, eq=False, repr=False)
    # What asks, for the metrics.
    source: CheckSource = attrs.field(default="manual", eq=False, repr=False)


# A dataclass of the standard library, as the status objects: a route may return it.
@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """
    The answer to one check, as `TopazConfig.decide()` returns it.

    It has no truth value: `if decision` would be true for a denial, so it raises
    TypeError. Write `if decision.allowed`.

    Attributes:
        allowed: True only if the authorizer decided so, or the `fallback` of the
            configuration did.
        origin: Where the decision comes from. `authorizer`: it was asked for this
            check. `cache`: the `DecisionCache`, or an earlier equal check of the same
            request. `shared`: the call of an equal check at the same time. `stale`: an
            older answer in the cache, and `fallback`: the fallback itself, both because
            the authorizer could not be asked.
        age: Seconds since the authorizer was asked; 0 if it was asked for this check,
            and if the fallback decided.
        id: Identifies the answer of the authorizer in logs: 32 hexadecimal digits,
            chosen here. Decisions that reuse one answer have the same id.
    """

    allowed: bool
    origin: Origin = "authorizer"
    age: float = 0.0
    id: str = dataclasses.field(default_factory=lambda: os.urandom(16).hex())

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "a Decision cannot be used as a condition: a denial would count as true; "
            "write `if decision.allowed`"
        )


class Ask(Protocol):
    """
    Gets the decision on a question: from the authorizer, or by another `Ask`.

    Each layer of a check is an `Ask`. It calls the next layer, or answers itself.
    """

    async def __call__(self, question: Question, /) -> Decision:
        """
        Return the decision. An error is never a decision.

        Raises:
            TopazError, grpc.aio.AioRpcError: There is no decision.
        """
        ...
