"""What a check asks and gets: `Question`, `Decision`, and the protocol `Ask`."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Literal, NoReturn, Protocol

import attrs


if TYPE_CHECKING:
    from fastapi_topaz._pool.budget import Budget
    from fastapi_topaz._rpc.metadata import Metadata


__all__ = ["Ask", "Decision", "Origin", "Question"]


Origin = Literal["authorizer"]
"""Who gave a decision."""


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


# A dataclass of the standard library, as the status objects: a route may return it.
@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """
    The answer to one check, as `TopazConfig.decide()` returns it.

    It has no truth value: `if decision` would be true for a denial, so it raises
    TypeError. Write `if decision.allowed`.

    Attributes:
        allowed: True only if the authorizer decided so.
        origin: Who decided: `authorizer`.
        age: Seconds since the authorizer was asked; 0 if it was asked for this check.
        id: Identifies this decision in logs: 32 hexadecimal digits, chosen here.
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
