"""`TopazConfig`: how an application asks its authorizer, and about which policies."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

from fastapi_topaz._app.asking import Layers
from fastapi_topaz._authorizer.messages import IS, is_request
from fastapi_topaz._authorizer.options import (
    AuthorizerOptions,
    AuthorizerOptionsLike,
    Identity,
    IdentityLike,
    IdentityType,
)
from fastapi_topaz._authorizer.pool import ConnectionPool
from fastapi_topaz._authorizer.rego import check_name, check_reference
from fastapi_topaz._authorizer.resource import EXACT
from fastapi_topaz._checks import (
    check_flag,
    check_provider,
    check_seconds,
    check_text,
    safe_repr,
)
from fastapi_topaz._decisions.breaker import CircuitBreaker
from fastapi_topaz._decisions.cache import DecisionCache
from fastapi_topaz._decisions.fallback import Fallbacks, check_fallback
from fastapi_topaz._decisions.question import Ask, Decision, Question
from fastapi_topaz._error_text import error_kind, log_text
from fastapi_topaz._log_limit import LogLimit
from fastapi_topaz._pool.budget import Budget
from fastapi_topaz._pool.readiness import is_ready
from fastapi_topaz._redaction import boundary
from fastapi_topaz._rpc.metadata import frozen_metadata
from fastapi_topaz._slips import NotCopied
from fastapi_topaz._telemetry.decisions import DecisionMetrics
from fastapi_topaz._telemetry.tracing import Tracing
from fastapi_topaz.exceptions import PoolMisuse, TopazError


if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider
    from starlette.requests import HTTPConnection

    from fastapi_topaz._decisions.fallback import Custom, OnFallback, Strategy
    from fastapi_topaz._rpc.metadata import Metadata
    from fastapi_topaz._telemetry.decisions import CheckSource

    # Called with a Request, or with a WebSocket where a WebSocket route is guarded.
    IdentityProvider = Callable[[Any], IdentityLike | Awaitable[IdentityLike]]
    ResourceContextProvider = Callable[
        [Any], Mapping[str, Any] | Awaitable[Mapping[str, Any]]
    ]


__all__ = ["TopazConfig"]


logger = logging.getLogger("fastapi_topaz.fastapi")


class TopazConfig(NotCopied):
    """
    How a FastAPI application asks its authorizer.

    Build one at import time, share it between routes, and let
    `FastAPI(lifespan=config.lifespan)` open and close its pool.

    Args:
        authorizer_options: Where the authorizer is; objects of
            `aserto.client.AuthorizerOptions` work, too.
        policy_path_root: The package that all policies are below, such as `myapp`.
        identity_provider: Called with the Request, or with the WebSocket of a guarded
            WebSocket route. Returns the `Identity` of the caller; sync or async. An
            error that it raises is the application's own and is not changed.
        policy_instance_name: The policy instance to ask. None, the default: the server
            chooses.
        policy_instance_label: The label of that instance. Default: its name.
        resource_context_provider: Called with the request; sync or async. Returns a
            mapping that the policy sees as `input.resource`, together with the path
            parameters. It cannot replace a path parameter.
        connection_pool: The pool. None, the default: one with the default parameters.
        check_timeout: Seconds for one check: the wait for a connection and all
            attempts share them. Default 5.
        path_parameters: How the policy sees path parameters in `input.resource`.
            "typed", the default: as a number if the route converts it to one, as
            `{id:int}` and `{x:float}` do, and as text otherwise. "text": always as
            text. A whole number beyond 2**53 is text, because JSON would round it.
        tracer_provider: Records the spans of checks. None, the default: the global
            provider of OpenTelemetry.
        decision_cache: Keeps answers for a short time. None, the default: only equal
            checks of one HTTP request share an answer, for at most 5 seconds.
        circuit_breaker: Refuses checks while most of them fail. Default None.
        fallback: What decides if there is no decision now, because the authorizer or
            the pool fails. "error", the default: the error is raised, which guards
            answer with 503. "deny": it is a denial. "cache_then_error" and
            "cache_then_deny": an older answer of *decision_cache* decides, if there is
            one. "cache_then_allow" and "allow" allow without an answer. Or a callable,
            sync or async, with the arguments request, policy path, resource context,
            cached decision (a bool or None) and error. It allows only by returning
            True. If it raises an error, the error of the check is raised.
        allow_unsafe_fallback: True permits a fallback to allow without an answer of the
            authorizer. Default False.
        on_fallback: Called for each decision of a fallback with request, policy path,
            cached decision and the decision. Default None.
        meter_provider: Records the metrics of checks. None, the default: the global
            provider of OpenTelemetry. That of *connection_pool* is an argument of its
            own.

    Raises:
        TypeError, ValueError: An argument is wrong. The message names it.
        PoolMisuse: *connection_pool* is open and connected to another authorizer.
    """

    _copy_form = "its pool belongs to one process; share it, or build another one"

    @boundary
    def __init__(
        self,
        *,
        authorizer_options: AuthorizerOptionsLike,
        policy_path_root: str,
        identity_provider: IdentityProvider,
        policy_instance_name: str | None = None,
        policy_instance_label: str | None = None,
        resource_context_provider: ResourceContextProvider | None = None,
        connection_pool: ConnectionPool | None = None,
        check_timeout: float = 5.0,
        path_parameters: Literal["typed", "text"] = "typed",
        tracer_provider: TracerProvider | None = None,
        decision_cache: DecisionCache | None = None,
        circuit_breaker: CircuitBreaker | None = None,
        fallback: Strategy | Custom = "error",
        allow_unsafe_fallback: bool = False,
        on_fallback: OnFallback | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        check_reference("policy_path_root", policy_path_root)
        check_text("policy_instance_name", policy_instance_name)
        check_text("policy_instance_label", policy_instance_label)
        check_flag("allow_unsafe_fallback", allow_unsafe_fallback)
        _callable("identity_provider", identity_provider)
        for name, given in (
            ("resource_context_provider", resource_context_provider),
            ("on_fallback", on_fallback),
        ):
            if given is not None:
                _callable(name, given)
        if path_parameters not in ("typed", "text"):
            raise ValueError(
                "path_parameters must be 'typed' or 'text', got "
                f"{safe_repr(path_parameters)}"
            )
        if connection_pool is None:
            connection_pool = ConnectionPool()
        elif not isinstance(connection_pool, ConnectionPool):
            raise TypeError(
                "connection_pool must be a ConnectionPool, got "
                f"{safe_repr(connection_pool)}"
            )
        self.authorizer_options: AuthorizerOptions = AuthorizerOptions.coerce(
            authorizer_options
        )
        self.policy_path_root = policy_path_root
        self.identity_provider = identity_provider
        self.policy_instance_name = policy_instance_name
        self.policy_instance_label = policy_instance_label
        self.resource_context_provider = resource_context_provider
        self.connection_pool = connection_pool
        self.check_timeout: float = check_seconds(
            "check_timeout", check_timeout, zero=False, infinite=False
        )
        self.path_parameters = path_parameters
        self._log_limit = LogLimit(logger, "checks")
        self._set_layers(
            *(tracer_provider, meter_provider, decision_cache, circuit_breaker)
        )
        self._fallbacks = Fallbacks(
            self._stale,
            allow_unsafe=allow_unsafe_fallback,
            on_fallback=on_fallback,
            counts=self._metrics.counts,
        )
        self._ask: Ask = self._asking(fallback)
        # The dependencies by their arguments.
        self._dependencies: dict[Any, Any] = {}
        self._configure(connection_pool)
        if allow_unsafe_fallback:
            logger.warning(
                "%r: allow_unsafe_fallback=True: with fallback=%s, requests may pass "
                "that the authorizer did not allow",
                *(self, repr(fallback) if isinstance(fallback, str) else "a callable"),
            )

    def _configure(self, pool: ConnectionPool) -> None:
        already = pool.authorizer_options
        if already not in (None, self.authorizer_options):
            raise ValueError(
                "connection_pool must not be shared by configurations of different "
                f"authorizers: it is configured for {already}, and this one is for "
                f"{self.authorizer_options}"
            )
        pool.configure(self.authorizer_options)
        cache = self._decision_cache
        if cache is not None and cache._companion is not None:  # noqa: SLF001
            # Also without a check: a process may only invalidate.
            pool._accompany(cache._companion)  # noqa: SLF001

    def _set_layers(
        self,
        tracer_provider: TracerProvider | None,
        meter_provider: MeterProvider | None,
        cache: object,
        breaker: object,
    ) -> None:
        for name, provider, method, kind in (
            ("tracer_provider", tracer_provider, "get_tracer", "TracerProvider"),
            ("meter_provider", meter_provider, "get_meter", "MeterProvider"),
        ):
            check_provider(name, provider, method, kind)
        if cache is not None and not isinstance(cache, DecisionCache):
            raise TypeError(
                f"decision_cache must be a DecisionCache, got {safe_repr(cache)}"
            )
        if breaker is not None and not isinstance(breaker, CircuitBreaker):
            raise TypeError(
                f"circuit_breaker must be a CircuitBreaker, got {safe_repr(breaker)}"
            )
        self._decision_cache, self._circuit_breaker = cache, breaker
        self._metrics = DecisionMetrics(
            meter_provider, lambda: self.connection_pool.options.name, cache, breaker
        )
        self._layers = Layers(
            lambda: self.connection_pool,
            Tracing(tracer_provider, IS),
            self._metrics,
            self._log_limit,
            cache,
            breaker,
            self.authorizer_options.credentials is not None,
        )
        self._below, self._freshness, self._stale = self._layers.chain()

    def _asking(self, fallback: Strategy | Custom) -> Ask:
        """Return the layers of a check with *fallback*, if that is permitted."""
        shared = self._fallbacks
        checked = check_fallback(
            fallback,
            allow_unsafe=shared.allow_unsafe,
            has_cache=self._decision_cache is not None,
        )
        return self._layers.observed(self._below, checked, shared)

    @property
    def decision_cache(self) -> DecisionCache | None:
        """The cache of this configuration, or None."""
        return self._decision_cache

    @property
    def circuit_breaker(self) -> CircuitBreaker | None:
        """The circuit breaker of this configuration, or None."""
        return self._circuit_breaker

    def __repr__(self) -> str:
        return (
            f"<TopazConfig {self.policy_path_root!r} to {self.authorizer_options.url}>"
        )

    @asynccontextmanager
    async def lifespan(self, _app: object) -> AsyncIterator[None]:
        """Open the pool when the application starts, close it when it stops."""
        self._metrics.begin(self.connection_pool.options.name)
        try:
            async with self.connection_pool:
                yield
        finally:
            self._log_limit.flush(everything=True)
            self._fallbacks.flush()

    @boundary
    async def is_ready(self, timeout: float = 1.0) -> bool:
        """
        Ask whether the authorizer answers, for a readiness probe.

        Opens the pool if it was not used yet. If the authorizer answered within the
        last second, and nothing failed since, this returns True at once. Otherwise the
        pool sends the RPC `Info` on one connection. If none is open, it opens one
        first. Many callers at the same time share that call. It needs no free lease.
        It asks no policy, so a wrong `api_key` or policy path does not show.

        If that ends with an error, the error is logged, and the result is False. It is
        also False if the application closed the pool: this does not open it again.

        Args:
            timeout: Seconds it may take, more than 0. Default 1.

        Returns:
            True only if the authorizer answered, with OK or an error status of its
            own. UNAVAILABLE is no answer, and neither is a page of a proxy.

        Raises:
            TypeError, ValueError: *timeout* is not a number of seconds above 0.
        """
        timeout = check_seconds("timeout", timeout, zero=False, infinite=False)
        try:
            return await is_ready(self.connection_pool, timeout)
        except Exception as error:  # noqa: BLE001  (a connector may raise anything)
            # The pool itself logs an outage. Any other error is a mistake in the code.
            outage = isinstance(error, TopazError) and not isinstance(error, PoolMisuse)
            self._log_limit.report(
                logging.DEBUG if outage else logging.ERROR,
                f"not ready: {error_kind(error)}",
                "not ready: %s",
                log_text(error),
            )
            return False

    @boundary
    async def is_allowed(
        self,
        request: HTTPConnection,
        policy_path: str,
        *,
        decision: str = "allowed",
        resource_context: Mapping[str, Any] | None = None,
        metadata: Metadata | None = None,
        max_age: float | None = None,
    ) -> bool:
        """
        Return whether the policy *policy_path* allows the caller of *request*.

        If the answer is lost with its connection, or the call ends with UNAVAILABLE or
        CANCELLED, this asks once more within `check_timeout`. If many calls end like
        this while their connections work, it does not ask again, because that would
        double the load (gRFC A6, retry throttling). If the server certainly
        did not process the call, this sends it again as often as that time allows. The
        first two repetitions follow at once, the third one after 0.01 s. Later pauses
        double, up to 0.5 s.

        Args:
            request: The Request or WebSocket that has the identity and the path
                parameters.
            policy_path: The whole path, such as `myapp.GET.documents`.
            decision: The name of the decision that must be true. Default `allowed`.
            resource_context: Added to the path parameters and to the mapping of
                `resource_context_provider`. It wins over both, because only the
                application can pass it.
            metadata: Pairs of key and value, or a `grpc.aio.Metadata`. They are sent
                with each attempt of this check, in addition to those of
                `authorizer_options`. They may be secret, so no error shows them. None,
                the default, means none.
            max_age: The oldest answer to use, in seconds since the authorizer was
                asked. 0 always asks it, as after a change of rights. None, the default:
                the limits of `decision_cache`, or 5 seconds within one HTTP request.

        Returns:
            True only if the authorizer decided so, or a *fallback* of the configuration
            that is permitted to. If there is no decision, this raises an error, and a
            WARNING is logged as for a guard, at most one line in 10 seconds for each
            kind of error.

        Raises:
            PoolSaturated: The pool is overloaded: the answer would come after
                `check_timeout`, or `max_waiting` callers wait already.
            PoolError: No connection was available within `check_timeout`, two
                connections were lost, or the circuit breaker is open. See
                `ConnectionPool.acquire`.
            grpc.aio.AioRpcError: The authorizer answered with an error status, too
                late, or without a clear decision.
            TypeError: A provider returned a value of a wrong type, or an argument
                cannot be sent.
            ValueError: *policy_path* is not a Rego reference, *decision* is not a Rego
                name, or an argument cannot be sent.
        """
        decided = await self._ask(
            await self._question(
                request, policy_path, decision, resource_context, metadata, max_age
            )
        )
        return decided.allowed

    @boundary
    async def decide(
        self,
        request: HTTPConnection,
        policy_path: str,
        *,
        decision: str = "allowed",
        resource_context: Mapping[str, Any] | None = None,
        metadata: Metadata | None = None,
        max_age: float | None = None,
    ) -> Decision:
        """
        Ask as `is_allowed` does, and return the whole decision.

        Args:
            request: See `is_allowed`, also for the other arguments and the errors.
            policy_path: The whole path, such as `myapp.GET.documents`.
            decision: The decision that must be true, default `allowed`.
            resource_context: What the application adds to the resource context.
            metadata: Pairs that are sent with this check. Default none.
            max_age: The oldest answer to use, in seconds. Default None.

        Returns:
            The decision. It has no truth value: write `if decision.allowed`.
        """
        return await self._ask(
            await self._question(
                request, policy_path, decision, resource_context, metadata, max_age
            )
        )

    async def _question(
        self,
        request: HTTPConnection,
        policy_path: str,
        decision: str = "allowed",
        resource_context: Mapping[str, Any] | None = None,
        metadata: Metadata | None = None,
        max_age: float | None = None,
        source: CheckSource = "manual",
    ) -> Question:
        """
        Return the question about *request*, encoded.

        Raises:
            TypeError, ValueError: An argument cannot be sent. The message names it.
            Exception: An error of the application's providers, unchanged.
        """
        check_reference("policy_path", policy_path)
        check_name("decision", decision)
        if resource_context is not None and not isinstance(resource_context, Mapping):
            raise TypeError(
                f"resource_context must be a mapping, got "
                f"{type(resource_context).__name__}"
            )
        if max_age is not None:
            max_age = check_seconds("max_age", max_age)
        pairs = frozen_metadata(metadata)
        identity = await self._identity(request)
        resource = {**await self._resource(request), **(resource_context or {})}
        return Question(
            policy_path,
            decision,
            is_request(
                policy_path,
                (decision,),
                identity,
                resource,
                self.policy_instance_name,
                self.policy_instance_label,
            ),
            Budget(self.check_timeout),
            pairs,
            token=identity.value if identity.type is IdentityType.JWT else None,
            http=request,
            resource=resource,
            max_age=max_age,
            source=source,
        )

    @boundary
    def invalidate(
        self,
        *,
        identity: IdentityLike | None = None,
        policy_path: str | None = None,
        resource: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Use no answer again that was asked for before this call. Thread-safe.

        This concerns the cache of this configuration and what requests under way have
        asked. For the arguments see `DecisionCache.invalidate`.
        """
        self._freshness.invalidate(identity, policy_path, resource)

    async def _identity(self, request: HTTPConnection) -> Identity:
        identity = await _result(self.identity_provider(request))
        if identity is None:
            raise TypeError(
                "identity_provider must return an Identity, got None; for an anonymous "
                "caller return Identity(IdentityType.NONE)"
            )
        try:
            return Identity.coerce(identity)
        except TypeError:
            # Names the type and not the value, which may be a token.
            raise TypeError(
                "identity_provider must return an Identity, got "
                f"{type(identity).__name__}"
            ) from None

    async def _resource(self, request: HTTPConnection) -> dict[str, Any]:
        resource: dict[str, Any] = {}
        if self.resource_context_provider is not None:
            extra = await _result(self.resource_context_provider(request))
            if not isinstance(extra, Mapping):
                raise TypeError(
                    "resource_context_provider must return a mapping, got "
                    f"{type(extra).__name__}"
                )
            resource.update(extra)
        # Path parameters come last and win. A provider may copy input of the client,
        # such as the query. That must not change which document the check is about.
        typed = self.path_parameters == "typed"
        for name, value in request.path_params.items():
            resource[name] = value if typed and _is_exact_number(value) else str(value)
        return resource


def _is_exact_number(value: object) -> bool:
    """Return whether *value* is a number that JSON and protobuf keep exactly."""
    # Not isinstance(): a converter may return a bool or an enum member.
    if type(value) is int:
        return abs(value) <= EXACT
    return type(value) is float and math.isfinite(value)


def _callable(name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {safe_repr(value)}")


async def _result(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
