"""
The gRPC service of the embedded authorizer: credentials, faults and the seven calls.

Statuses are the same as those of the Topaz server:

- INVALID_ARGUMENT: a field is missing, a decision is undefined, or a policy fails.
- NOT_FOUND: the identity is unknown.
- INTERNAL: all other errors.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import platform
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import attrs
import grpc
import grpc.aio
from aserto.authorizer.v2 import (
    AuthorizerServicer,
    CompileRequest,
    CompileResponse,
    Decision,
    DecisionTreeRequest,
    DecisionTreeResponse,
    GetPolicyRequest,
    GetPolicyResponse,
    InfoRequest,
    InfoResponse,
    IsRequest,
    IsResponse,
    ListPoliciesRequest,
    ListPoliciesResponse,
    PathSeparator,
    QueryRequest,
    QueryResponse,
)

from ._modules import masked, module
from ._policies import Policy, PolicyFunction, Refusal
from ._questions import Question, compiled, queried


if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


__all__ = ["METHODS", "AuthorizerService", "Failure"]


METHODS: Final = frozenset(
    {"Is", "DecisionTree", "Query", "Compile", "ListPolicies", "GetPolicy", "Info"}
)
_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_LOGGER = logging.getLogger("fastapi_topaz.testing")
# Go's names of processors that Python names differently.
_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}

_Response = TypeVar("_Response")


@attrs.define(eq=False)
class Failure:
    """
    An error status that calls get instead of an answer.

    Strictly private.
    """

    code: grpc.StatusCode
    details: str
    times: int | None
    methods: frozenset[str]

    def hits(self, method: str) -> bool:
        """Return whether the next call of *method* fails. If so, count it."""
        if method not in self.methods or self.times == 0:
            return False
        if self.times is not None:
            self.times -= 1
        return True


class AuthorizerService(AuthorizerServicer):
    """
    Answers calls from policies written in Python.

    Strictly private. It runs in one event loop. Other threads may read the numbers,
    and may assign `policies`, `delay` and `failure`.
    """

    def __init__(
        self,
        *,
        api_key: str | None,
        tenant_id: str | None,
        identities: Collection[str] | None = None,
    ) -> None:
        self.policies: dict[str, Policy] | PolicyFunction = {}
        self._identities = identities
        self.delay = 0.0
        self.failure: Failure | None = None
        self.calls: dict[str, int] = {}
        self.streams = 0
        self.cancelled = 0
        # True while the server stops. Calls that end then were not cancelled by a
        # client, so they are not counted.
        self.stopping = False
        self._api_key = api_key
        self._tenant_id = tenant_id

    async def _answer(
        self,
        method: str,
        context: Context,
        work: Callable[[], Awaitable[_Response]],
    ) -> _Response:
        self.calls[method] = self.calls.get(method, 0) + 1
        self.streams += 1
        try:
            if self.delay:
                await asyncio.sleep(self.delay)
            self._admit(method, context)
            return await work()
        except Refusal as refusal:
            await context.abort(refusal.code, refusal.details)
            raise  # pragma: no cover  # abort() always raises
        except asyncio.CancelledError:
            self.cancelled += not self.stopping
            raise
        finally:
            self.streams -= 1

    def _admit(self, method: str, context: Context) -> None:
        if self.failure is not None and self.failure.hits(method):
            raise Refusal(self.failure.code, self.failure.details)
        # Topaz's default configuration allows Info without credentials.
        if method == "Info":
            return
        headers = dict(context.invocation_metadata() or ())
        if self._api_key is not None:
            scheme, _, key = str(headers.get("authorization", "")).partition(" ")
            if scheme.lower() != "basic" or key != self._api_key:
                raise Refusal(
                    grpc.StatusCode.UNAUTHENTICATED, "authentication failed: api key"
                )
        if self._tenant_id not in (None, headers.get("aserto-tenant-id")):
            raise Refusal(
                grpc.StatusCode.PERMISSION_DENIED, "authorization failed: tenant id"
            )

    async def Is(self, request: IsRequest, context: Context) -> IsResponse:  # noqa: N802
        """Return the requested decisions of one policy."""
        work = functools.partial(self._is, request, context)
        return await self._answer("Is", context, work)

    async def DecisionTree(  # noqa: N802
        self, request: DecisionTreeRequest, context: Context
    ) -> DecisionTreeResponse:
        """Return the decisions of all policies whose path has the given prefix."""
        work = functools.partial(self._tree, request, context)
        return await self._answer("DecisionTree", context, work)

    async def Query(self, request: QueryRequest, context: Context) -> QueryResponse:  # noqa: N802
        """Evaluate `x = data.<path>`, with a result in OPA's format."""
        work = functools.partial(self._query, request, context)
        return await self._answer("Query", context, work)

    async def Compile(  # noqa: N802
        self, request: CompileRequest, context: Context
    ) -> CompileResponse:
        """Partially evaluate `data.<path>.<decision> == true`."""
        work = functools.partial(self._compile, request, context)
        return await self._answer("Compile", context, work)

    async def ListPolicies(  # noqa: N802
        self, request: ListPoliciesRequest, context: Context
    ) -> ListPoliciesResponse:
        """Return a module for each policy path."""
        work = functools.partial(self._list, request)
        return await self._answer("ListPolicies", context, work)

    async def GetPolicy(  # noqa: N802
        self, request: GetPolicyRequest, context: Context
    ) -> GetPolicyResponse:
        """Return the module whose id is the policy path."""
        work = functools.partial(self._get, request)
        return await self._answer("GetPolicy", context, work)

    async def Info(self, request: InfoRequest, context: Context) -> InfoResponse:  # noqa: N802
        """Return version information, without a check of credentials."""
        work = functools.partial(self._info, request)
        return await self._answer("Info", context, work)

    async def _is(self, request: IsRequest, context: Context) -> IsResponse:
        question = Question(request, context, self._identities)
        question.need_policy()
        path = request.policy_context.path
        wanted = tuple(request.policy_context.decisions)
        if not wanted:
            raise Refusal(
                _INVALID, "invalid argument: policy context decisions not set"
            )
        question.need_identity()
        question.find_identity()
        question.need_rules()
        decided = await question.ask(self.policies, path, wanted)
        if decided is None or not decided.keys() >= set(wanted):
            # In Rego, an unknown package and an unset rule are both undefined.
            undefined = " ".join(f"data.{path}.{name}" for name in wanted)
            raise Refusal(_INVALID, f"invalid query: undefined results: {undefined}")
        response = IsResponse()
        for name in wanted:
            if not isinstance(decided[name], bool):
                _LOGGER.warning(
                    "policy %r decides %r with a %s, which Topaz answers with no "
                    "decision at all",
                    *(path, name, type(decided[name]).__name__),
                )
                return IsResponse()
            # `is` is a Python keyword, so it cannot be a keyword argument.
            fields: dict[str, Any] = {"decision": name, "is": decided[name]}
            response.decisions.append(Decision(**fields))
        return response

    async def _tree(
        self, request: DecisionTreeRequest, context: Context
    ) -> DecisionTreeResponse:
        question = Question(request, context, self._identities)
        question.need_policy()
        question.need_identity()
        question.find_identity()
        root = request.policy_context.path
        wanted = tuple(request.policy_context.decisions)
        slash = request.options.path_separator == PathSeparator.PATH_SEPARATOR_SLASH
        response = DecisionTreeResponse(path_root=root)
        found = False
        for path in self._paths(root):
            decided = await question.ask(self.policies, path, wanted)
            if decided and (wanted == ("*",) or not decided.keys().isdisjoint(wanted)):
                found = True
                key = path.replace(".", "/") if slash else path
                # As in Topaz, "*" selects every path but no decision. Values that are
                # not booleans are left out.
                booleans = {n: v for n, v in decided.items() if isinstance(v, bool)}
                selected = booleans.keys() & set(wanted) - {"*"}
                response.path.get_or_create_struct(key).update(
                    {name: booleans[name] for name in selected}
                )
        if not found:
            raise Refusal(_INVALID, "invalid argument: no decisions specified")
        return response

    def _paths(self, root: str) -> list[str]:
        if callable(self.policies):
            return [root]
        return [path for path in sorted(self.policies) if path.startswith(root)]

    async def _query(self, request: QueryRequest, context: Context) -> QueryResponse:
        question = Question(request, context, self._identities)
        result = await queried(question, self.policies)
        response = QueryResponse()
        response.response.update({"result": result})
        response.metrics.SetInParent()
        return response

    async def _compile(
        self, request: CompileRequest, context: Context
    ) -> CompileResponse:
        response = CompileResponse()
        question = Question(request, context, self._identities)
        response.result.update(await compiled(question, self.policies))
        response.result.SetInParent()
        response.metrics.SetInParent()
        return response

    async def _list(self, request: ListPoliciesRequest) -> ListPoliciesResponse:
        policies = {} if callable(self.policies) else self.policies
        return ListPoliciesResponse(
            result=[
                masked(module(path, policies[path]), request)
                for path in sorted(policies)
            ]
        )

    async def _get(self, request: GetPolicyRequest) -> GetPolicyResponse:
        policies = {} if callable(self.policies) else self.policies
        if request.id not in policies:
            raise Refusal(
                grpc.StatusCode.NOT_FOUND, f"policy not found: with ID [{request.id}]"
            )
        found = module(request.id, policies[request.id])
        return GetPolicyResponse(result=masked(found, request))

    async def _info(self, _request: InfoRequest) -> InfoResponse:
        machine = platform.machine().lower()
        return InfoResponse(
            version="embedded",
            commit="undefined",
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            os=platform.system().lower(),
            arch=_ARCH.get(machine, machine),
        )
