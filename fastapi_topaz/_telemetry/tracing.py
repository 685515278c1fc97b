"""
A span for each check, and the trace context in the metadata of the call.

The attributes `rpc.*` and `error.type` have the names and values of OpenTelemetry's
semantic conventions for gRPC clients.

A span contains no identity, no resource context and no text of the authorizer, because
these may name people. If the tracing library raises an error, the check must not fail.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, Self

from opentelemetry import context, propagate, trace
from opentelemetry.trace import INVALID_SPAN, SpanKind, StatusCode, get_current_span

from fastapi_topaz._error_text import error_kind, without_context
from fastapi_topaz._rpc.credentials import Computed
from fastapi_topaz._rpc.metadata import is_metadata
from fastapi_topaz._rpc.statuses import status_number
from fastapi_topaz._version import VERSION


if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from opentelemetry.trace import Span, TracerProvider

    from fastapi_topaz._rpc.metadata import Metadata


__all__ = ["NO_SPAN", "CheckSpan", "Tracing", "current_check", "propagated"]


logger = logging.getLogger("fastapi_topaz.tracing")

SCOPE = "fastapi_topaz"

_CHECK = context.create_key("fastapi_topaz check")

_broken: set[str] = set()


def _failed(what: str, error: Exception) -> None:
    # Logged once for each *what*, not once for each check.
    if what not in _broken:
        _broken.add(what)
        logger.warning(
            "%s failed; checks continue without it",
            what,
            exc_info=without_context(error),
        )


def propagated(metadata: Metadata) -> Metadata:
    """Return *metadata* plus the trace context of the current span, if there is one."""
    # The fast path: without tracing, a call runs only this test.
    if get_current_span() is INVALID_SPAN:
        return metadata
    carrier: dict[str, str] = {}
    try:
        propagate.inject(carrier)
    except Exception as error:  # noqa: BLE001  (code of the tracing library)
        _failed("propagating a trace", error)
        return metadata
    given = {key for key, _ in metadata or ()}
    pairs = [
        *(metadata or ()),
        *(
            (key.lower(), value)
            for key, value in carrier.items()
            # Propagators are made for HTTP, which accepts more than gRPC.
            if key.lower() not in given and is_metadata(key.lower(), value)
        ),
    ]
    return Computed(pairs) if isinstance(metadata, Computed) else pairs


class Tracing:
    """
    Starts the spans of checks.

    Strictly private.

    Args:
        provider: The provider of the tracer. None means the global one.
        method: The full name of the RPC that each check makes, as
            `/package.Service/Method`.
    """

    def __init__(self, provider: TracerProvider | None, method: str) -> None:
        # None means the global provider. `trace` finds it even if it is set later.
        source: Any = trace if provider is None else provider
        self._tracer = source.get_tracer(SCOPE, VERSION)
        _, self._service, self._method = method.split("/")

    def check(self, policy_path: str, decision: str, pool: str | None) -> CheckSpan:
        """
        Start the span of one check and return it. The caller must enter it.

        If tracing is off, this returns `NO_SPAN`, which needs not be entered.
        """
        attributes = {
            # Set from the start, so that a sampler sees them.
            "rpc.system": "grpc",
            "rpc.service": self._service,
            "rpc.method": self._method,
            "topaz.policy_path": policy_path,
            "topaz.decision": decision,
        }
        if pool is not None:
            attributes["topaz.pool"] = pool
        try:
            span = self._tracer.start_span(
                "topaz.check", kind=SpanKind.CLIENT, attributes=attributes
            )
            # Not is_recording(): the authorizer must also learn that a trace is not
            # sampled, so its context is propagated.
            if span.get_span_context().is_valid:
                return CheckSpan(span)
        except Exception as error:  # noqa: BLE001  (code of the tracing library)
            _failed("beginning a span", error)
        return NO_SPAN


class CheckSpan:
    """
    The span of one check. It is the current span while it is entered.

    Strictly private.
    """

    def __init__(self, span: Span) -> None:
        self._span = span
        self._token: Any = None
        self._outcome = "error"
        self._origin: str | None = None
        self._status: int | None = None

    def __enter__(self) -> Self:
        within = trace.set_span_in_context(self._span)
        self._token = context.attach(context.set_value(_CHECK, self, within))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # If the garbage collector ends a check, this runs in another context. Nothing
        # was attached there, so there is nothing to detach.
        if get_current_span() is self._span:
            context.detach(self._token)
        try:
            if isinstance(exc, Exception):
                self._status = status_number(exc)
                self._span.set_attribute("error.type", error_kind(exc))
                self._span.set_status(StatusCode.ERROR, error_kind(exc))
            elif exc is not None:
                self._outcome = "cancelled"
            if self._status is not None:
                self._span.set_attribute("rpc.grpc.status_code", self._status)
            if self._origin is not None:
                self._span.set_attribute("topaz.origin", self._origin)
            self._span.set_attribute("topaz.outcome", self._outcome)
            self._span.end()
        except Exception as error:  # noqa: BLE001  (code of the tracing library)
            _failed("ending a span", error)

    def decided(self, allowed: bool, origin: str) -> None:
        """Record the decision; one of the authorizer is an answer with status OK."""
        self._outcome = "allowed" if allowed else "denied"
        if origin == "authorizer":
            self._status = 0
        else:
            self._origin = origin
            self._status = None

    def fell_back(self, strategy: str, error: Exception) -> None:
        """Record that the fallback *strategy* decided, because of *error*."""
        self._event(
            "topaz.fallback",
            {"topaz.strategy": strategy, "error.type": error_kind(error)},
        )

    def waited(self, seconds: float) -> None:
        """Record that the check waited *seconds* for its lease."""
        self._event("topaz.waited", {"topaz.wait": seconds})

    def lost(self, error: Exception) -> None:
        """Record that the call failed with *error*, and that the check is repeated."""
        self._event("topaz.retry", {"error.type": error_kind(error)})

    def _event(self, name: str, attributes: Mapping[str, float | str]) -> None:
        try:
            self._span.add_event(name, attributes)
        except Exception as error:  # noqa: BLE001  (code of the tracing library)
            _failed("recording an event", error)


class _NoSpan(CheckSpan):
    """Replaces the span if tracing is off."""

    def __init__(self) -> None:
        super().__init__(INVALID_SPAN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        pass

    def decided(self, allowed: bool, origin: str) -> None:
        pass

    def _event(self, name: str, attributes: Mapping[str, float | str]) -> None:
        pass


NO_SPAN: Final = _NoSpan()


def current_check() -> CheckSpan:
    """Return the span of the check that this code is part of."""
    check = context.get_value(_CHECK)
    return check if isinstance(check, CheckSpan) else NO_SPAN
