"""
Between Python values and the protobuf messages of `aserto.authorizer.v2`.

The only module that builds or reads messages on the client's side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
from aserto.authorizer.v2 import (
    CompileRequest,
    CompileResponse,
    DecisionTreeOptions,
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
    QueryOptions,
    QueryRequest,
    QueryResponse,
)
from aserto.authorizer.v2.api import IdentityContext, PolicyContext, PolicyInstance
from google.protobuf.struct_pb2 import Struct

from fastapi_topaz._options import Identity, IdentityLike


__all__ = [
    "COMPILE",
    "DECISION_TREE",
    "GET_POLICY",
    "INFO",
    "IS",
    "LIST_POLICIES",
    "QUERY",
    "Method",
    "Subject",
    "decision_tree_of",
    "decisions_of",
    "policy_instance",
]


ResourceContext = Mapping[str, Any]


@attrs.frozen
class Method:
    """One RPC of the authorizer: its path and how to (de)serialize it."""

    path: str
    request: Any
    response: Any


def _method(name: str, request: Any, response: Any) -> Method:
    return Method(
        f"/aserto.authorizer.v2.Authorizer/{name}",
        request.SerializeToString,
        response.FromString,
    )


IS = _method("Is", IsRequest, IsResponse)
DECISION_TREE = _method("DecisionTree", DecisionTreeRequest, DecisionTreeResponse)
QUERY = _method("Query", QueryRequest, QueryResponse)
COMPILE = _method("Compile", CompileRequest, CompileResponse)
LIST_POLICIES = _method("ListPolicies", ListPoliciesRequest, ListPoliciesResponse)
GET_POLICY = _method("GetPolicy", GetPolicyRequest, GetPolicyResponse)
INFO = _method("Info", InfoRequest, InfoResponse)


def _text(name: str, value: object, *, shown: bool = True) -> str:
    """Return *value* if protobuf can carry it."""
    if not isinstance(value, str):
        given = repr(value) if shown else type(value).__name__
        raise TypeError(f"{name} must be a str, got {given}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be text that UTF-8 knows, but has a lone surrogate at "
            f"position {error.start}"
        ) from None
    return value


def _non_empty(name: str, value: object) -> str:
    if not _text(name, value).strip():
        raise ValueError(f"{name} must not be empty, got {value!r}")
    return str(value)


def _names(name: str, values: object) -> list[str]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of str, got {values!r}")
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{name} must hold only str, got {values!r}")
    return [_text(name, value) for value in values]


def _options(options: QueryOptions | None) -> QueryOptions | None:
    if options is not None and not isinstance(options, QueryOptions):
        raise TypeError(f"options must be QueryOptions or None, got {options!r}")
    return options


def policy_instance(name: str | None, label: str | None) -> PolicyInstance | None:
    """Return which instance of a policy is meant, if that is said."""
    if name is None and label is None:
        return None
    if name is not None:
        _text("policy_instance_name", name)
    if label is not None:
        _text("policy_instance_label", label)
    # What Topaz's own clients send: the label is the name unless it is given.
    return PolicyInstance(name=name or "", instance_label=label or name or "")


@attrs.frozen(kw_only=True)
class Subject:
    """What most requests have in common: which policy, for whom, about what."""

    policy_path: str
    decisions: Sequence[str] = ("allowed",)
    identity: IdentityLike | None = None
    resource_context: ResourceContext | None = None
    policy_instance_name: str | None = None
    policy_instance_label: str | None = None

    def fields(self, *, optional_path: bool = False) -> dict[str, Any]:
        """
        Return the fields of the request that say so.

        Raises:
            TypeError, ValueError: An argument cannot be sent; names it.
        """
        decisions = _names("decisions", self.decisions)
        if not optional_path or self.policy_path:
            _non_empty("policy_path", self.policy_path)
            if not decisions:
                raise ValueError("decisions must not be empty, got ()")
        identity = Identity.coerce(self.identity)
        return {
            "policy_context": PolicyContext(path=self.policy_path, decisions=decisions),
            "identity_context": IdentityContext(
                type=identity.type,  # type: ignore[arg-type]
                identity=_text("identity", identity.value or "", shown=False),
            ),
            "resource_context": _struct(self.resource_context),
            "policy_instance": policy_instance(
                self.policy_instance_name, self.policy_instance_label
            ),
        }

    def is_request(self) -> IsRequest:
        """Return the request of `decisions`."""
        return IsRequest(**self.fields())

    def decision_tree_request(
        self, separator: Literal["DOT", "SLASH"] | None
    ) -> DecisionTreeRequest:
        """Return the request of `decision_tree`."""
        separators = {
            "DOT": PathSeparator.PATH_SEPARATOR_DOT,
            "SLASH": PathSeparator.PATH_SEPARATOR_SLASH,
        }
        if separator is not None and separator not in tuple(separators):
            raise ValueError(
                f"policy_path_separator must be 'DOT' or 'SLASH', got {separator!r}"
            )
        return DecisionTreeRequest(
            **self.fields(),
            options=DecisionTreeOptions(
                path_separator=separators[separator] if separator else None  # type: ignore[arg-type]
            ),
        )

    def query_request(
        self, query: str, input_: str, options: QueryOptions | None
    ) -> QueryRequest:
        """Return the request of `query`."""
        return QueryRequest(
            **self.fields(optional_path=True),
            query=_non_empty("query", query),
            input=_text("input", input_),
            options=_options(options),
        )

    def compile_request(
        self,
        query: str,
        input_: str,
        unknowns: Sequence[str],
        disable_inlining: Sequence[str],
        options: QueryOptions | None,
    ) -> CompileRequest:
        """Return the request of `compile`."""
        return CompileRequest(
            **self.fields(optional_path=True),
            query=_non_empty("query", query),
            input=_text("input", input_),
            unknowns=_names("unknowns", unknowns),
            disable_inlining=_names("disable_inlining", disable_inlining),
            options=_options(options),
        )


def list_policies_request(instance: PolicyInstance | None) -> ListPoliciesRequest:
    """Return the request of `list_policies`."""
    return ListPoliciesRequest(policy_instance=instance)


def get_policy_request(id_: str, instance: PolicyInstance | None) -> GetPolicyRequest:
    """Return the request of `get_policy`."""
    return GetPolicyRequest(id=_non_empty("id", id_), policy_instance=instance)


def info_request() -> InfoRequest:
    """Return the request of `info`."""
    return InfoRequest()


def _struct(context: ResourceContext | None) -> Struct | None:
    if context is None:
        return None
    if not isinstance(context, Mapping):
        raise TypeError(
            f"resource_context must be a mapping, got {type(context).__name__}"
        )
    struct = Struct()
    struct.update(_plain("resource_context", context))
    return struct


# A protobuf parser gives up at 100 nested messages, and a level of a Struct is three.
_DEPTH = 30
# Numbers of a Struct are floats; a larger whole number would become another one.
_EXACT = 2**53


def _plain(name: str, value: Any, depth: int = 0) -> Any:
    """Return *value*, made of what `Struct.update` takes: list, dict and scalars."""
    # Errors name the place and the type: the values may be personal.
    if depth > _DEPTH:
        raise ValueError(f"resource_context must not nest deeper than {_DEPTH} levels")
    if isinstance(value, Mapping):
        plain = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{name} must have str keys, got {key!r}")
            place = f"{name}[{_text(name, key)!r}]"
            plain[key] = _plain(place, item, depth + 1)
        return plain
    if isinstance(value, str):
        return _text(name, value, shown=False)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [
            _plain(f"{name}[{index}]", item, depth + 1)
            for index, item in enumerate(value)
        ]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT:
        raise ValueError(
            f"{name} must not be a whole number beyond 2**53, which would be rounded; "
            "send it as a str"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if value is None or isinstance(value, bool | int | float):
        return value
    raise TypeError(
        f"{name} must be made of what JSON knows, got {type(value).__name__}"
    )


def decisions_of(response: IsResponse) -> dict[str, bool]:
    """Return the decisions by name; a decision not in it was not made."""
    # The field is called `is`, which Python keeps for itself.
    return {item.decision: bool(getattr(item, "is")) for item in response.decisions}


def decision_tree_of(response: DecisionTreeResponse) -> dict[str, dict[str, bool]]:
    """
    Return the decisions by policy path.

    Raises:
        TypeError: The answer holds something else than decisions.
    """
    tree: dict[str, dict[str, bool]] = {}
    for path, decisions in response.path.fields.items():
        tree[path] = {}
        for name, decision in decisions.struct_value.fields.items():
            if decision.WhichOneof("kind") != "bool_value":
                raise TypeError(f"the decision {name!r} of {path!r} is no boolean")
            tree[path][name] = decision.bool_value
    return tree
