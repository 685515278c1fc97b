"""
What requests have in common, and the few queries that need no Rego engine.

A query is a list of statements, one a line or separated by semicolons, each
`data.<path>`, `x = data.<path>` or `x := data.<path>`, where the path is that of a
policy or of one decision of a policy. Compiling takes the same, and `== true`
after it; all is known here, so what remains is nothing or no solution.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import grpc.aio
from aserto.authorizer.v2 import (
    CompileRequest,
    DecisionTreeRequest,
    IsRequest,
    QueryRequest,
)
from google.protobuf.json_format import MessageToDict

from fastapi_topaz._options import Identity, IdentityType

from ._policies import Check, Policy, PolicyFunction, Refusal, evaluate


if TYPE_CHECKING:
    from aserto.authorizer.v2.api import IdentityContext

    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


__all__ = ["Question", "compiled", "queried"]


_Request: TypeAlias = IsRequest | DecisionTreeRequest | QueryRequest | CompileRequest
_Policies: TypeAlias = dict[str, Policy] | PolicyFunction

_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_STATEMENT = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)\s*:?=(?!=)\s*)?data\.(?P<path>\w+(?:\.\w+)*)"
)
_CONDITION = re.compile(_STATEMENT.pattern + r"(?:\s*==?\s*true)?")


class Question:
    """One request, as policies see it."""

    def __init__(self, request: _Request, context: Context) -> None:
        self._request = request
        self._context = context
        self._input: dict[str, Any] = {}

    def need_policy(self) -> None:
        """Refuse a request without a policy path."""
        if not self._request.HasField("policy_context"):
            raise Refusal(_INVALID, "invalid argument: policy context not set")
        if not self._request.policy_context.path:
            raise Refusal(_INVALID, "invalid argument: policy context path not set")

    def need_identity(self) -> None:
        """Refuse a request that does not say on whose behalf it is."""
        if not self._request.HasField("identity_context"):
            raise Refusal(_INVALID, "invalid argument: identity context not set")
        identity = self._request.identity_context
        if not identity.type:
            raise Refusal(_INVALID, "invalid argument: identity type UNKNOWN")
        try:
            _identity(identity)
        except ValueError:
            raise Refusal(
                grpc.StatusCode.NOT_FOUND, "failed to resolve identity context"
            ) from None

    def statements(self, pattern: re.Pattern[str]) -> list[re.Match[str]]:
        """Return the statements of the query, checking its input as well."""
        request = self._request
        assert isinstance(request, QueryRequest | CompileRequest)  # noqa: S101
        if not request.query.strip():
            raise Refusal(_INVALID, "invalid argument: query not set")
        self.need_identity()
        try:
            self._input = json.loads(request.input or "{}")
        except ValueError as error:
            raise Refusal(_INVALID, f"input is no JSON: {error}") from None
        if not isinstance(self._input, dict):
            raise Refusal(_INVALID, "input must be a JSON object")
        found = []
        for text in re.split(r"[;\n]", request.query):
            if not text.strip():
                continue
            if (match := pattern.fullmatch(text.strip())) is None:
                raise Refusal(
                    _INVALID,
                    f"invalid query: {text.strip()!r}: the embedded authorizer has "
                    "no Rego engine and understands `x = data.<path>` only",
                )
            found.append(match)
        return found

    async def ask(
        self, policies: _Policies, path: str, decisions: tuple[str, ...]
    ) -> dict[str, bool] | None:
        """Return what the policy at *path* says; None if there is none."""
        if callable(policies):
            policy: Policy = policies
        elif path in policies:
            policy = policies[path]
        else:
            return None
        return await evaluate(policy, path, decisions, self._check)

    async def value(
        self, policies: _Policies, path: str
    ) -> dict[str, bool] | bool | None:
        """Return what `data.<path>` is: a policy's decisions, one of them, or None."""
        wanted = tuple(self._request.policy_context.decisions) or ("allowed",)
        decided = await self.ask(policies, path, wanted)
        if decided is not None:
            return decided
        parent, _, decision = path.rpartition(".")
        return (await self.ask(policies, parent, (decision,)) or {}).get(decision)

    def _check(self, path: str, decisions: tuple[str, ...]) -> Check:
        request = self._request
        metadata = self._context.invocation_metadata() or ()
        if request.HasField("resource_context"):
            resource = MessageToDict(request.resource_context)
        else:
            resource = self._input.get("resource", {})
        return Check(
            policy_path=path,
            decisions=decisions,
            identity=_identity(request.identity_context),
            resource=resource,
            policy_instance_name=request.policy_instance.name,
            policy_instance_label=request.policy_instance.instance_label,
            metadata={k: v for k, v in metadata if isinstance(v, str)},
        )


def _identity(identity: IdentityContext) -> Identity:
    return Identity(IdentityType(identity.type), identity.identity or None)


async def queried(question: Question, policies: _Policies) -> list[dict[str, Any]]:
    """Return the result set of a query, empty if anything in it is undefined."""
    bindings: dict[str, Any] = {}
    expressions: list[dict[str, Any]] = []
    for row, statement in enumerate(question.statements(_STATEMENT), start=1):
        value = await question.value(policies, statement["path"])
        if value is None:
            return []
        if statement["name"]:
            bindings[statement["name"]] = value
            value = True
        location = {"row": row, "col": 1}
        expressions.append({"text": statement[0], "value": value, "location": location})
    result: dict[str, Any] = {"expressions": expressions}
    if bindings:
        result["bindings"] = bindings
    return [result]


async def compiled(question: Question, policies: _Policies) -> dict[str, Any]:
    """Return `{"queries": [[]]}` for always, and `{}` for never."""
    for statement in question.statements(_CONDITION):
        value = await question.value(policies, statement["path"])
        # `x = data.p.d` holds with any value, `data.p.d` needs one that is not false.
        if value is None or (value is False and not statement["name"]):
            return {}
    return {"queries": [[]]}
