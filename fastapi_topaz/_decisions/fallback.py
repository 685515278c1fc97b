"""What decides if the authorizer cannot be asked: the `fallback` of a configuration."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from fastapi_topaz._checks import safe_repr
from fastapi_topaz._decisions.question import Decision
from fastapi_topaz._error_text import error_kind, without_context
from fastapi_topaz._log_limit import LogLimit
from fastapi_topaz._rpc.statuses import lacks_decision
from fastapi_topaz._telemetry.decisions import DecisionCounts
from fastapi_topaz._telemetry.tracing import current_check


if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Awaitable, Callable, Mapping

    from fastapi_topaz._decisions.question import Ask, Question

    Custom = Callable[
        [Any, str, Mapping[str, Any], bool | None, Exception], bool | Awaitable[bool]
    ]
    OnFallback = Callable[[Any, str, bool | None, bool], object]


__all__ = ["Fallback", "Fallbacks", "Strategy", "check_fallback"]


Strategy: TypeAlias = Literal[
    "error", "deny", "cache_then_error", "cache_then_deny", "cache_then_allow", "allow"
]

UNSAFE: Final = ("cache_then_allow", "allow")
"""They allow without an answer of the authorizer."""

logger = logging.getLogger("fastapi_topaz.decisions")


def check_fallback(
    value: Any, *, allow_unsafe: bool, has_cache: bool
) -> Strategy | Custom:
    """
    Return *value* if it is a fallback that the configuration permits.

    Raises:
        TypeError, ValueError: It is none. The message says what is missing.
    """
    if callable(value):
        return value  # type: ignore[no-any-return]
    if not isinstance(value, str) or value not in get_args(Strategy):
        raise ValueError(
            f"fallback must be one of {', '.join(map(repr, get_args(Strategy)))}, or a "
            f"callable, got {safe_repr(value)}"
        )
    if value in UNSAFE and not allow_unsafe:
        raise ValueError(
            f"fallback={value!r} allows requests that the authorizer did not decide; "
            "pass allow_unsafe_fallback=True to TopazConfig as well, or use 'deny' or "
            "'error'"
        )
    if value.startswith("cache_then") and not has_cache:
        raise ValueError(
            f"fallback={value!r} needs a cache with older answers: pass "
            "decision_cache=DecisionCache(stale_ttl_seconds=...) to TopazConfig"
        )
    return value  # type: ignore[return-value]


class Fallbacks:
    """
    What the fallbacks of one configuration share.

    Args:
        stale: Returns an older answer to a question, or None.
        allow_unsafe: Whether a fallback may allow without an answer.
        on_fallback: Called for each decision of a fallback.
        counts: Counts each decision of a fallback. Default: numbers of its own.
    """

    def __init__(
        self,
        stale: Callable[[Question], Decision | None],
        *,
        allow_unsafe: bool,
        on_fallback: OnFallback | None,
        counts: DecisionCounts | None = None,
    ) -> None:
        self.stale = stale
        self.allow_unsafe = allow_unsafe
        self._counts = DecisionCounts() if counts is None else counts
        self._on_fallback = on_fallback
        self._limit = LogLimit(logger, "fallbacks")

    @property
    def uses(self) -> Counter[tuple[str, bool, str]]:
        """
        How often which fallback decided.

        The keys are (strategy, whether an older answer was there, decision).
        """
        return self._counts.fallbacks

    def used(
        self,
        question: Question,
        strategy: str,
        stale: Decision | None,
        decision: Decision,
        error: Exception,
    ) -> None:
        """Count, log and report one decision of a fallback."""
        path, word = question.policy_path, "allowed" if decision.allowed else "denied"
        self._counts.fell_back(strategy, stale is not None, word, error)
        current_check().fell_back(strategy, error)
        self._limit.report(
            # Also for a denial: it may be the only sign of an outage.
            logging.WARNING,
            f"fallback {strategy} {word} {path}",
            "the fallback %r %s a check of %s, because there is no decision: %s (%s)",
            *(strategy, word, path, error_kind(error)),
            f"an answer {decision.age:.3g} s old"
            if decision.origin == "stale"
            else "the authorizer did not decide this",
        )
        if self._on_fallback is not None:
            cached = None if stale is None else stale.allowed
            try:
                self._on_fallback(question.http, path, cached, decision.allowed)
            except Exception as broken:  # noqa: BLE001  (code of the application)
                self.broken("on_fallback", broken)

    def broken(self, what: str, error: Exception) -> None:
        """Log that a callable of the application failed."""
        self._limit.report(
            logging.ERROR,
            f"{what}: {type(error).__name__}",
            "%s failed",
            what,
            exc_info=without_context(error),
        )

    def refused(self, path: str) -> None:
        """Log that a callable allowed what it may not allow."""
        self._limit.report(
            logging.ERROR,
            f"fallback refused {path}",
            "the fallback allowed a check of %s that the authorizer did not decide. "
            "It counts as an error, because allow_unsafe_fallback is not True",
            path,
        )

    def flush(self) -> None:
        """Report what was counted and not yet logged."""
        self._limit.flush(everything=True)


class Fallback:
    """
    Decides by a strategy if the next layer has no decision.

    Args:
        ask: The next layer.
        strategy: One of `Strategy` except "error", or a callable.
        shared: What all fallbacks of the configuration share.
    """

    def __init__(
        self, ask: Ask, strategy: Strategy | Custom, shared: Fallbacks
    ) -> None:
        self._ask = ask
        self._strategy = strategy
        self._shared = shared

    async def __call__(self, question: Question, /) -> Decision:
        try:
            return await self._ask(question)
        except Exception as error:
            if not lacks_decision(error):
                raise
            failure = error
        # Outside the handler: an error in there would have *failure* as its context.
        try:
            decision = await self._decide(question, failure)
            if decision is None:
                raise failure
            return decision
        finally:
            # Its traceback leads to this frame.
            del failure

    async def _decide(self, question: Question, error: Exception) -> Decision | None:
        """Return the decision, or None if the error stands."""
        shared, strategy = self._shared, self._strategy
        name = strategy if isinstance(strategy, str) else "custom"
        stale = None
        if name not in {"allow", "deny"}:
            stale = shared.stale(question)
        decision: Decision | None
        if callable(strategy):
            decision = await self._custom(strategy, question, stale, error)
        elif stale is not None:
            decision = stale
        elif name == "cache_then_error":
            decision = None
        else:
            # Checked here once more, because this line allows without an answer.
            allowed = name in UNSAFE and shared.allow_unsafe is True
            decision = Decision(allowed, "fallback")
        if decision is not None:
            shared.used(question, name, stale, decision, error)
        return decision

    async def _custom(
        self,
        decide: Custom,
        question: Question,
        stale: Decision | None,
        error: Exception,
    ) -> Decision | None:
        cached = None if stale is None else stale.allowed
        try:
            result: Any = decide(
                *(question.http, question.policy_path, question.resource),
                *(cached, error),
            )
            if inspect.isawaitable(result):
                result = await result
        except Exception as broken:  # noqa: BLE001  (code of the application)
            self._shared.broken("the fallback", broken)
            return None
        if result is not True:
            return Decision(allowed=False, origin="fallback")
        if stale is not None and stale.allowed is True:
            return stale
        if self._shared.allow_unsafe is True:
            return Decision(allowed=True, origin="fallback")
        self._shared.refused(question.policy_path)
        return None
