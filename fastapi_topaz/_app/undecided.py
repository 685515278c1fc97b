"""The log line for a check without a decision, by a guard or by the application."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import grpc

from fastapi_topaz._error_text import error_kind, log_text
from fastapi_topaz.exceptions import PoolMisuse, TopazError


if TYPE_CHECKING:
    from fastapi_topaz._decisions.question import Question
    from fastapi_topaz._log_limit import LogLimit


__all__ = ["HINTS", "log_undecided"]


HINTS = {
    grpc.StatusCode.INVALID_ARGUMENT: (
        "there is no such policy or rule, the rule has no value, or its evaluation "
        "fails"
    ),
    grpc.StatusCode.INTERNAL: (
        "it failed, its answer is wrong, or the answer lacks the decision (Topaz "
        "leaves out a decision that is not a boolean)"
    ),
    grpc.StatusCode.NOT_FOUND: "it does not know the identity, or cannot look it up",
    grpc.StatusCode.UNAUTHENTICATED: "the api_key or credentials are missing or wrong",
    grpc.StatusCode.UNIMPLEMENTED: "it serves no Authorizer: is url the right port?",
}
"""What these statuses of Topaz mean for a check, for the log and for `load`."""


def log_undecided(limit: LogLimit, question: Question, error: BaseException) -> None:
    """
    Log that *error* ended a check, once for each check.

    A cancellation is not logged, and neither is an error without a status that is not a
    TopazError: it comes from a fault in the code. Both go to the caller.
    """
    if not isinstance(error, TopazError | grpc.RpcError):
        return
    limit.report(
        logging.ERROR if isinstance(error, PoolMisuse) else logging.WARNING,
        f"no decision: {error_kind(error)}",
        "no decision on %s: %s",
        *(question.policy_path, _reason(error, question.budget.seconds)),
    )


def _reason(error: Exception, timeout: float) -> str:
    code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
    if code is None:
        return log_text(error)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer within {timeout:g} s (check_timeout)"
    # Without the details: an authorizer may name the identity there.
    hint = HINTS.get(code)
    return f"the authorizer answered {code.name}" + (f" ({hint})" if hint else "")
