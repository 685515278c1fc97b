"""
Code common to all requests, and the simple queries that need no Rego engine.

A query is a list of statements, separated by line breaks or semicolons. A statement is
`data.<path>`, `x = data.<path>` or `x := data.<path>`. The path leads to several
policies, to one policy or to one decision of a policy. A query also accepts
`time.now_ns()` instead of `data.<path>`.

Compile also accepts `== true` after a statement. All values are known here. So the
result is an empty condition, no solution, or the values of variables.
"""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import grpc
import grpc.aio
from aserto.authorizer.v2 import (
    CompileRequest,
    DecisionTreeRequest,
    IsRequest,
    QueryRequest,
)
from google.protobuf.json_format import MessageToDict

from fastapi_topaz._authorizer.options import Identity, IdentityType

from ._policies import (
    Check,
    Policy,
    PolicyError,
    PolicyFunction,
    Refusal,
    evaluate,
)


if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from aserto.authorizer.v2.api import IdentityContext

    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


__all__ = ["Question", "compiled", "queried"]


_Request: TypeAlias = IsRequest | DecisionTreeRequest | QueryRequest | CompileRequest
_Policies: TypeAlias = dict[str, Policy] | PolicyFunction

_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_INTERNAL = grpc.StatusCode.INTERNAL
_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_RULE = re.compile(rf'{_NAME}(?:\.{_NAME}|\["(?:[^"\\\n]|\\.)*"\])*')
_BINDING = rf"(?:(?P<name>{_NAME})\s*(?P<sign>:?=)(?!=)\s*)?"
_DATA = r"data\.(?P<path>\w+(?:\.\w+)*)"
_STATEMENT = re.compile(rf"{_BINDING}(?:{_DATA}|time\.now_ns\(\))")
_CONDITION = re.compile(rf"{_BINDING}{_DATA}(?:\s*==?\s*true)?")


@attrs.frozen
class _Statement:
    text: str
    name: str | None
    sign: str | None
    path: str | None  # None: the time
    row: int
    col: int


class Question:
    """One request: its checks, and the evaluation of policies for it."""

    def __init__(
        self,
        request: _Request,
        context: Context,
        identities: Collection[str] | None = None,
    ) -> None:
        self._request = request
        self._context = context
        self._identities = identities
        self._input: dict[str, Any] = {}

    def need_policy(self) -> None:
        """Refuse a request without a policy path."""
        if not self._request.HasField("policy_context"):
            raise Refusal(_INVALID, "invalid argument: policy context not set")
        if not self._request.policy_context.path:
            raise Refusal(_INVALID, "invalid argument: policy context path not set")

    def need_rules(self) -> None:
        """
        Refuse a path and decision that are not a Rego reference.

        Topaz builds a query from them. In that query, `my-docs` is the difference of
        two undefined variables.
        """
        context = self._request.policy_context
        for decision in context.decisions:
            if not _RULE.fullmatch(rule := f"{context.path}.{decision}"):
                raise Refusal(
                    _INVALID,
                    f"invalid query: data.{rule} is not a reference to a rule: write "
                    'a part that is not an identifier as ["my-docs"]',
                )

    def need_identity(self) -> None:
        """Refuse a request without an identity."""
        request = self._request
        if isinstance(request, IsRequest) and not request.HasField("identity_context"):
            raise Refusal(_INVALID, "invalid argument: identity context not set")
        if not request.identity_context.type:
            raise Refusal(_INVALID, "invalid argument: identity type UNKNOWN")

    def find_identity(self) -> None:
        """Refuse a request with an unknown or invalid identity."""
        try:
            identity = _identity(self._request.identity_context)
        except ValueError:
            identity = None
        if identity is None or (
            self._identities is not None
            and identity.type in (IdentityType.SUB, IdentityType.JWT)
            and identity.value not in self._identities
        ):
            # Topaz sends this status for every reason, even if its directory is down.
            raise Refusal(
                grpc.StatusCode.NOT_FOUND,
                "authentication failed: failed to resolve identity context",
            )

    def statements(self, pattern: re.Pattern[str]) -> list[_Statement]:
        """Check the request as Topaz does, then return the statements of its query."""
        request = self._request
        assert isinstance(request, QueryRequest | CompileRequest)  # noqa: S101
        if not request.query.strip():
            raise Refusal(_INVALID, "invalid argument: query not set")
        self.need_identity()
        try:
            self._input = json.loads(request.input or "{}")
        except ValueError as error:
            raise Refusal(_INTERNAL, f"input is not JSON: {error}") from None
        if not isinstance(self._input, dict):
            raise Refusal(_INTERNAL, "input must be a JSON object")
        self.find_identity()
        return list(_parsed(request.query, pattern))

    async def ask(
        self, policies: _Policies, path: str, decisions: tuple[str, ...]
    ) -> dict[str, object] | None:
        """Return the decisions of the policy at *path*, or None if there is none."""
        if callable(policies):
            policy: Policy = policies
        elif path in policies:
            policy = policies[path]
        else:
            return None
        try:
            return await evaluate(policy, path, decisions, self._check)
        except PolicyError as error:
            if isinstance(self._request, IsRequest | DecisionTreeRequest):
                details = f"invalid query: query evaluation failed: {error}"
                raise Refusal(_INVALID, details) from error
            details = f"an unknown error has occurred: {error}"
            raise Refusal(_INTERNAL, details) from error

    async def value(self, policies: _Policies, path: str | None) -> object:
        """
        Return the value of `data.<path>`, or None if it is undefined.

        If *path* is None, return the time in nanoseconds since 1970.
        """
        if path is None:
            return time.time_ns()
        wanted = tuple(self._request.policy_context.decisions) or ("allowed",)
        document = await self.ask(policies, path, wanted)
        for below in [] if callable(policies) else sorted(policies):
            if below.startswith(f"{path}."):
                node = document = {} if document is None else document
                for segment in below.removeprefix(f"{path}.").split("."):
                    # Rego forbids a package and a rule with the same name. Here the
                    # package replaces the rule.
                    inner = node.get(segment)
                    node[segment] = node = {**inner} if isinstance(inner, dict) else {}
                node.update(await self.ask(policies, below, wanted) or {})
        if document is not None:
            return document
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


def _parsed(query: str, pattern: re.Pattern[str]) -> Iterator[_Statement]:
    for part in re.finditer(r"[^;\n]*[^;\s][^;\n]*", query):
        text = part[0].strip()
        if (match := pattern.fullmatch(text)) is None:
            raise Refusal(
                _INVALID,
                f"invalid query: {text!r}: the embedded authorizer has no Rego engine "
                "and understands `x = data.<path>` only",
            )
        start = query.index(text, part.start())
        row = query.count("\n", 0, start) + 1
        col = start - query.rfind("\n", 0, start)
        yield _Statement(text, match["name"], match["sign"], match["path"], row, col)


async def queried(question: Question, policies: _Policies) -> list[dict[str, Any]]:
    """Return the result set of a query. It is empty if a statement is not true."""
    bindings: dict[str, Any] = {}
    expressions: list[dict[str, Any]] = []
    statements = question.statements(_STATEMENT)
    for statement in statements:
        value = await question.value(policies, statement.path)
        # If a false expression is the only statement, its result shows the False.
        if value is None or (
            value is False and not statement.name and len(statements) > 1
        ):
            return []
        if statement.name:
            bindings[statement.name] = value
            value = True
        location = {"row": statement.row, "col": statement.col}
        expressions.append(
            {"text": statement.text, "value": value, "location": location}
        )
    result: dict[str, Any] = {"expressions": expressions}
    if bindings:
        result["bindings"] = bindings
    return [result]


async def compiled(question: Question, policies: _Policies) -> dict[str, Any]:
    """
    Compile a query.

    Returns:
        `{}` if the query can never be true. Otherwise the remaining conditions: the
        values of variables.
    """
    left: list[dict[str, Any]] = []
    for statement in question.statements(_CONDITION):
        value = await question.value(policies, statement.path)
        # `x = data.p.d` is true for any defined value. `data.p.d` is not true if the
        # value is False.
        if value is None or (value is False and not statement.name):
            return {}
        if statement.sign == "=":
            variable = {"type": "var", "value": statement.name}
            equal = {"type": "ref", "value": [{"type": "var", "value": "eq"}]}
            terms = [equal, variable, _term(value)]
            left.append({"index": len(left), "terms": terms})
    return {"queries": [left]}


def _term(value: object) -> dict[str, Any]:
    """Return *value* as a term of Rego's syntax tree."""
    if isinstance(value, dict):
        pairs = [[_term(key), _term(inner)] for key, inner in sorted(value.items())]
        return {"type": "object", "value": pairs}
    if isinstance(value, list):
        return {"type": "array", "value": [_term(inner) for inner in value]}
    kinds = {bool: "boolean", str: "string", type(None): "null"}
    kind = kinds.get(type(value), "number")
    return {"type": kind, "value": value}
