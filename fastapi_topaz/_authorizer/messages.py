"""
Converts Python values to and from protobuf messages of `aserto.authorizer.v2`.

On the client side, only this module builds messages.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import attrs
import grpc.aio
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
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct

from fastapi_topaz._authorizer.answers import decided, decided_by_path
from fastapi_topaz._authorizer.options import Identity, IdentityLike
from fastapi_topaz._authorizer.rego import check_name, check_reference
from fastapi_topaz._authorizer.resource import ResourceContext, fill, text_of
from fastapi_topaz._checks import safe_repr


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
    "identity_context",
    "is_request",
    "names_of",
    "policy_instance",
]


@attrs.frozen
class Method:
    """One RPC of the authorizer: its path, serializer and deserializer."""

    path: str
    request: Any
    response: Any


def _method(name: str, request: Any, response: Any) -> Method:
    return Method(
        f"/aserto.authorizer.v2.Authorizer/{name}",
        request.SerializeToString,
        functools.partial(_read, response),
    )


def _read(message: Any, data: bytes) -> Any:
    """
    Parse *data* as a *message*.

    Raises:
        grpc.aio.AioRpcError: It cannot be parsed. The status is INTERNAL, as with stubs
            that gRPC generates.
    """
    try:
        return message.FromString(data)
    except DecodeError as error:
        raise _unreadable(message) from error


def _unreadable(message: Any) -> grpc.aio.AioRpcError:
    return _broken(f"the answer cannot be read as {message.__name__}")


def _broken(details: str) -> grpc.aio.AioRpcError:
    """Return an INTERNAL error for an answer that cannot be used."""
    return grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), details
    )


IS = "/aserto.authorizer.v2.Authorizer/Is"
DECISION_TREE = "/aserto.authorizer.v2.Authorizer/DecisionTree"
QUERY = _method("Query", QueryRequest, QueryResponse)
COMPILE = _method("Compile", CompileRequest, CompileResponse)
LIST_POLICIES = _method("ListPolicies", ListPoliciesRequest, ListPoliciesResponse)
GET_POLICY = _method("GetPolicy", GetPolicyRequest, GetPolicyResponse)
INFO = _method("Info", InfoRequest, InfoResponse)


def _non_empty(name: str, value: object) -> str:
    if not text_of(name, value).strip():
        raise ValueError(f"{name} must not be empty, got {value!r}")
    return str(value)


def _names(values: object, name: str = "decisions") -> list[str]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        # Show only the type. If the caller swapped arguments, this may be a resource
        # context.
        given = safe_repr(values) if isinstance(values, str) else type(values).__name__
        raise TypeError(f"{name} must be a sequence of str, got {given}")
    for value in values:
        if not isinstance(value, str):
            given = type(value).__name__
            raise TypeError(f"{name} must hold only str, got a {given}")
    return [text_of(name, value) for value in values]


def _some(name: str, values: Sequence[str]) -> None:
    if not values:
        raise ValueError(f"{name} must not be empty, got ()")


def check_decisions(decisions: Sequence[str]) -> None:
    """
    Check that *decisions* is not empty and holds only Rego names.

    Raises:
        TypeError: A decision is not a str.
        ValueError: *decisions* is empty, or a decision is not a Rego name.
    """
    _some("decisions", decisions)
    for decision in decisions:
        check_name("decisions", decision)


def names_of(decisions: Sequence[str]) -> tuple[str, ...]:
    """Return *decisions* as a tuple. If it is one, `is_request` checks its names."""
    return decisions if type(decisions) is tuple else tuple(_names(decisions))


def _options(options: QueryOptions | None) -> QueryOptions | None:
    if options is not None and not isinstance(options, QueryOptions):
        raise TypeError(f"options must be QueryOptions or None, got {options!r}")
    return options


def policy_instance(name: str | None, label: str | None) -> PolicyInstance | None:
    """Return the policy instance, or None if *name* and *label* are None."""
    if name is None and label is None:
        return None
    if name is not None:
        text_of("policy_instance_name", name)
    if label is not None:
        text_of("policy_instance_label", label)
    # As Topaz's own clients do: without a label, the name is the label.
    return PolicyInstance(name=name or "", instance_label=label or name or "")


def identity_context(identity: Identity) -> IdentityContext:
    """Return the message of *identity*."""
    return IdentityContext(
        type=identity.type,  # type: ignore[arg-type]
        identity=text_of("identity", identity.value or "", show=False),
    )


# Every request of an application waits for `decisions`. So the parts of its message are
# encoded once and kept as bytes. Protobuf reads joined messages as one message with all
# their fields: see "Last One Wins" in its encoding guide.


def is_request(
    policy_path: str,
    decisions: Sequence[str],
    identity: IdentityLike | None,
    resource_context: ResourceContext | None,
    instance_name: str | None,
    instance_label: str | None,
) -> bytes:
    """
    Return the encoded request of `decisions`.

    Raises:
        TypeError, ValueError: An argument cannot be sent. The message names it.
    """
    names = names_of(decisions)
    parts = policy_path, instance_name, instance_label
    # Only plain values may be keys of the cache. Other classes can define an equality
    # that makes different values equal.
    sound = _PLAIN.issuperset(map(type, (*parts, *names)))
    ask = _question if sound else _question.__wrapped__
    question = ask(policy_path, names, instance_name, instance_label)
    known = identity if type(identity) is Identity else Identity.coerce(identity)
    asker = known.encoded or _encode(known)
    if resource_context is None:
        return question + asker
    rest = IsRequest()
    fill(rest.resource_context, resource_context)
    # Deterministic, so that equal questions have equal bytes.
    return question + asker + rest.SerializeToString(deterministic=True)


_PLAIN = frozenset({str, type(None)})


# Enough for all policies of an application. If paths contain ids, old entries drop out.
@functools.lru_cache(maxsize=1024)
def _question(
    policy_path: str,
    decisions: tuple[str, ...],
    instance_name: str | None,
    instance_label: str | None,
) -> bytes:
    check_reference("policy_path", policy_path)
    check_decisions(decisions)
    return IsRequest(
        policy_context=PolicyContext(path=policy_path, decisions=decisions),
        policy_instance=policy_instance(instance_name, instance_label),
    ).SerializeToString()


def _encode(identity: Identity) -> bytes:
    request = IsRequest(identity_context=identity_context(identity))
    encoded = request.SerializeToString()
    if type(identity) is Identity:  # a subclass may be mutable
        # Stored on the identity, so it lives no longer. It may contain a token.
        object.__setattr__(identity, "encoded", encoded)
    return encoded


@attrs.frozen(kw_only=True)
class Subject:
    """The fields common to most requests: policy, identity and resource context."""

    policy_path: str
    decisions: Sequence[str] = ("allowed",)
    identity: IdentityLike | None = None
    resource_context: ResourceContext | None = None
    policy_instance_name: str | None = None
    policy_instance_label: str | None = None

    def fields(self, *, optional_path: bool = False) -> dict[str, Any]:
        """
        Return these fields as keyword arguments for the request message.

        Args:
            optional_path: Whether the policy path may be empty. If it is not empty,
                it need not be a Rego reference.

        Raises:
            TypeError, ValueError: An argument cannot be sent. The message names it.
        """
        decisions = _names(self.decisions)
        if not optional_path:
            check_reference("policy_path", self.policy_path)
            check_decisions(decisions)
        elif self.policy_path:
            _non_empty("policy_path", self.policy_path)
            _some("decisions", decisions)
        resource = None
        if self.resource_context is not None:
            resource = Struct()
            fill(resource, self.resource_context)
        return {
            "policy_context": PolicyContext(path=self.policy_path, decisions=decisions),
            "identity_context": identity_context(Identity.coerce(self.identity)),
            "resource_context": resource,
            "policy_instance": policy_instance(
                self.policy_instance_name, self.policy_instance_label
            ),
        }

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
            input=text_of("input", input_, show=False),
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
            input=text_of("input", input_, show=False),
            unknowns=_names(unknowns, "unknowns"),
            disable_inlining=_names(disable_inlining, "disable_inlining"),
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


def decisions_of(response: bytes, wanted: Sequence[str]) -> dict[str, bool]:
    """
    Return the *wanted* decisions by name. Other decisions in the answer are ignored.

    Raises:
        grpc.aio.AioRpcError: INTERNAL. The answer cannot be read, or a decision is
            missing or ambiguous.
    """
    read = _decisions_of if len(response) < _LARGE else _decisions_of.__wrapped__
    found = read(bytes(response))
    decisions: dict[str, bool] = {}
    for name in wanted:
        decision = found.get(name)
        if decision is None:
            raise _broken(
                f"the answer lacks the requested decision {name!r}, or it is not "
                "clear; Topaz leaves out a decision that is not a boolean"
            )
        decisions[name] = decision
    return decisions


_LARGE = 1024
"""Answers of at least this many bytes are not cached."""

_MANY = 10_000
"""Maximum number of decisions in one answer. To read so many takes about 50 ms."""


# An application gets only a few different answers, again and again.
@functools.lru_cache(maxsize=256)
def _decisions_of(response: bytes) -> dict[str, bool | None]:
    if len(_read(IsResponse, response).decisions) > _MANY:
        raise _broken(f"the answer has more than {_MANY} decisions")
    try:
        return decided(response)
    except TypeError as error:
        raise _broken(str(error)) from None


def decision_tree_of(
    response: bytes, wanted: Sequence[str]
) -> dict[str, dict[str, bool]]:
    """
    Return the *wanted* decisions by policy path.

    Raises:
        TypeError: The answer contains a value that is not a decision.
        grpc.aio.AioRpcError: INTERNAL. The answer cannot be read.
    """
    try:
        tree = decided_by_path(response)
    except DecodeError as error:
        raise _unreadable(DecisionTreeResponse) from error
    return {
        path: {name: found[name] for name in wanted if name in found}
        for path, found in tree.items()
    }
