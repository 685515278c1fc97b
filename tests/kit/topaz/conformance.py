"""
The answers that an authorizer must give, both Topaz and the embedded one.

Requests are sent unchanged, so requests that the pool refuses to build can be sent too.
Every expectation was read from Topaz's source. OPA computed the values of policies from
the bundle beside this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
from aserto.authorizer.v2 import (
    CompileRequest,
    DecisionTreeRequest,
    GetPolicyRequest,
    IsRequest,
    ListPoliciesRequest,
    QueryRequest,
)
from aserto.authorizer.v2.api import (
    IdentityContext,
    IdentityType,
    PolicyContext,
    PolicyInstance,
)
from google.protobuf.struct_pb2 import Struct


if TYPE_CHECKING:
    from collections.abc import Mapping


NOBODY = IdentityContext(type=IdentityType.IDENTITY_TYPE_NONE)
MANUAL = IdentityContext(type=IdentityType.IDENTITY_TYPE_MANUAL, identity="alice")
ALICES = {"owner": "alice"}

INVALID = "INVALID_ARGUMENT"
NOT_FOUND = "NOT_FOUND"
INTERNAL = "INTERNAL"


def struct(values: Mapping[str, Any]) -> Struct:
    made = Struct()
    made.update(values)
    return made


def policy(path: str, *decisions: str) -> PolicyContext:
    return PolicyContext(path=f"conformance.{path}", decisions=decisions or ["allowed"])


def is_(path: str, *decisions: str, **fields: Any) -> IsRequest:
    """Ask for decisions of a policy of the bundle; *fields* replace the defaults."""
    asked = {"policy_context": policy(path, *decisions), "identity_context": NOBODY}
    return IsRequest(**asked | fields)


def tree(path: str, *decisions: str, **fields: Any) -> DecisionTreeRequest:
    asked = {"policy_context": policy(path, *decisions), "identity_context": NOBODY}
    return DecisionTreeRequest(**asked | fields)


def query(text: str, **fields: Any) -> QueryRequest:
    return QueryRequest(query=text, **{"identity_context": NOBODY} | fields)


def compile_(text: str, **fields: Any) -> CompileRequest:
    return CompileRequest(query=text, **{"identity_context": NOBODY} | fields)


@attrs.frozen
class Refused:
    """A request that ends with a status; *text* is a part of its message."""

    name: str
    request: Any
    code: str
    text: str = ""


@attrs.frozen
class Decided:
    """A request for decisions, and the decisions in the order of the answer."""

    name: str
    request: IsRequest
    decisions: list[tuple[str, bool]]


ALLOWED = [("allowed", True)]
DENIED = [("allowed", False)]

DECIDED = [
    Decided("allow", is_("allow"), ALLOWED),
    Decided("deny", is_("deny"), DENIED),
    Decided(
        "several, in the order asked for",
        is_("allow", "visible", "allowed"),
        [("visible", False), ("allowed", True)],
    ),
    Decided("one twice", is_("allow", "allowed", "allowed"), ALLOWED * 2),
    Decided(
        "resource that fits", is_("resource", resource_context=struct(ALICES)), ALLOWED
    ),
    Decided(
        "resource that does not",
        is_("resource", resource_context=struct({"owner": "bob"})),
        DENIED,
    ),
    Decided("no resource", is_("resource"), DENIED),
    Decided("identity that fits", is_("identity", identity_context=MANUAL), ALLOWED),
    Decided("nobody", is_("identity"), DENIED),
    Decided(
        "nobody of some name",
        is_(
            "identity",
            identity_context=IdentityContext(
                type=IdentityType.IDENTITY_TYPE_NONE, identity="alice"
            ),
        ),
        DENIED,
    ),
    Decided(
        "defined for this resource",
        is_("undefined", resource_context=struct(ALICES)),
        ALLOWED,
    ),
    Decided(
        "not failing for this resource",
        is_("fails", resource_context=struct({"owner": "carol"})),
        DENIED,
    ),
    Decided(
        "any instance of a policy",
        is_("allow", policy_instance=PolicyInstance(name="any", instance_label="any")),
        ALLOWED,
    ),
    # Neither an error nor a denial: this decision and all other decisions are missing.
    Decided("no boolean", is_("odd"), []),
    Decided("a boolean beside one that is none", is_("odd", "visible", "allowed"), []),
    Decided(
        "a boolean of a policy with others", is_("odd", "visible"), [("visible", True)]
    ),
]

SUB = IdentityContext(type=IdentityType.IDENTITY_TYPE_SUB, identity="mallory")
JWT = IdentityContext(type=IdentityType.IDENTITY_TYPE_JWT, identity="no.real.token")

REFUSED = [
    Refused("unknown policy", is_("nowhere"), INVALID, "undefined results"),
    Refused("unknown rule", is_("allow", "nothing"), INVALID, "undefined results"),
    Refused("one unknown rule of two", is_("allow", "allowed", "nothing"), INVALID),
    Refused("undefined", is_("undefined"), INVALID, "undefined results"),
    Refused(
        "fails",
        is_("fails", resource_context=struct(ALICES)),
        INVALID,
        "query evaluation failed",
    ),
    Refused("hyphen in the path", is_("my-docs"), INVALID, "invalid query"),
    Refused("slash in the path", is_("allow/allow"), INVALID, "invalid query"),
    Refused("number in the path", is_("allow.2"), INVALID, "invalid query"),
    Refused("empty segment", is_("allow."), INVALID, "invalid query"),
    Refused("any decision", is_("allow", "*"), INVALID, "invalid query"),
    Refused("empty decision", is_("allow", ""), INVALID, "invalid query"),
    Refused(
        "no policy",
        is_("allow", policy_context=None),
        INVALID,
        "policy context not set",
    ),
    Refused(
        "no path",
        is_("allow", policy_context=PolicyContext(decisions=["allowed"])),
        INVALID,
        "policy context path not set",
    ),
    Refused(
        "no decisions",
        is_("allow", policy_context=PolicyContext(path="conformance.allow")),
        INVALID,
        "policy context decisions not set",
    ),
    Refused(
        "no identity",
        is_("allow", identity_context=None),
        INVALID,
        "identity context not set",
    ),
    Refused(
        "identity of no type",
        is_("allow", identity_context=IdentityContext(identity="alice")),
        INVALID,
        "identity type UNKNOWN",
    ),
    Refused("unknown subject", is_("allow", identity_context=SUB), NOT_FOUND),
    Refused("no token", is_("allow", identity_context=JWT), NOT_FOUND),
    Refused(
        "subject without a name",
        is_(
            "allow",
            identity_context=IdentityContext(type=IdentityType.IDENTITY_TYPE_SUB),
        ),
        NOT_FOUND,
    ),
    Refused(
        "unknown subject before an unknown policy",
        is_("nowhere", identity_context=SUB),
        NOT_FOUND,
    ),
    # Whatever the policy decides for it.
    Refused(
        "too large",
        is_("allow", resource_context=struct({"text": "x" * 2**22})),
        "RESOURCE_EXHAUSTED",
    ),
    Refused("tree of nothing", tree("nowhere"), INVALID, "no decisions specified"),
    Refused(
        "tree of a decision that no policy has",
        tree("tree", "nothing"),
        INVALID,
        "no decisions specified",
    ),
    Refused(
        "tree of no decision",
        tree("tree", policy_context=PolicyContext(path="conformance.tree")),
        INVALID,
        "no decisions specified",
    ),
    Refused(
        "tree with a policy that fails",
        tree("fails", resource_context=struct(ALICES)),
        INVALID,
        "query evaluation failed",
    ),
    Refused("tree without a policy", tree("tree", policy_context=None), INVALID),
    Refused(
        "tree without an identity",
        tree("tree", identity_context=None),
        INVALID,
        "identity type UNKNOWN",
    ),
    Refused("tree of a stranger", tree("tree", identity_context=SUB), NOT_FOUND),
    Refused("unknown id", GetPolicyRequest(id="conformance/nowhere.rego"), NOT_FOUND),
    Refused("no id", GetPolicyRequest(), NOT_FOUND),
    *(
        refused
        for ask, name in ((query, "query"), (compile_, "compile"))
        for refused in (
            Refused(f"empty {name}", ask(""), INVALID, "query not set"),
            Refused(f"{name} with a typo", ask("x = data."), INVALID, "invalid query"),
            Refused(
                f"{name} without an identity",
                ask("data.conformance.allow", identity_context=None),
                INVALID,
                "identity type UNKNOWN",
            ),
            Refused(
                f"{name} of a stranger",
                ask("data.conformance.allow", identity_context=SUB),
                NOT_FOUND,
            ),
            Refused(f"{name} with half an input", ask("data.x", input="{"), INTERNAL),
            Refused(
                f"{name} with an input that is no object",
                ask("data.x", input="[]"),
                INTERNAL,
            ),
        )
    ),
    Refused(
        "query of a policy that fails",
        query("x = data.conformance.fails", resource_context=struct(ALICES)),
        INTERNAL,
    ),
]


@attrs.frozen
class Tree:
    """A request for a tree, and the decisions by path."""

    name: str
    request: DecisionTreeRequest
    path: dict[str, dict[str, bool]]


ROOT = "conformance.tree"
TREES = [
    Tree(
        "one decision",
        tree("tree"),
        {
            f"{ROOT}.GET.documents": {"allowed": True},
            f"{ROOT}.GET.documents.__id": {"allowed": False},
            f"{ROOT}.POST.documents": {"allowed": False},
        },
    ),
    Tree(
        "two decisions, of which a policy may have one",
        tree("tree", "allowed", "visible", resource_context=struct({"id": "42"})),
        {
            f"{ROOT}.GET.documents": {"allowed": True, "visible": True},
            f"{ROOT}.GET.documents.__id": {"allowed": True},
            f"{ROOT}.POST.documents": {"allowed": False},
        },
    ),
    Tree(
        "all paths, and no decisions",
        tree("tree", "*"),
        {
            f"{ROOT}.GET.documents": {},
            f"{ROOT}.GET.documents.__id": {},
            f"{ROOT}.POST.documents": {},
        },
    ),
    Tree(
        "a path that only begins so",
        tree("tree.GET.doc"),
        {
            f"{ROOT}.GET.documents": {"allowed": True},
            f"{ROOT}.GET.documents.__id": {"allowed": False},
        },
    ),
    Tree("no boolean", tree("odd"), {"conformance.odd": {}}),
]


@attrs.frozen
class Queried:
    """A query, and its result."""

    name: str
    request: QueryRequest
    result: list[dict[str, Any]]


def expression(
    text: str, *, value: object = True, row: int = 1, col: int = 1
) -> dict[str, Any]:
    return {"text": text, "value": value, "location": {"row": row, "col": col}}


_X = "x = data.conformance.allow.allowed"
_Y = "y = data.conformance.deny.allowed"
_DENIED = "data.conformance.deny.allowed"
_RESOURCE = "x = data.conformance.resource.allowed"
_TREE = "x = data.conformance.tree"

QUERIES = [
    Queried(
        "a rule",
        query(_X),
        [{"expressions": [expression(_X)], "bindings": {"x": True}}],
    ),
    Queried(
        "a package",
        query("x = data.conformance.allow"),
        [
            {
                "expressions": [expression("x = data.conformance.allow")],
                "bindings": {"x": {"allowed": True, "visible": False}},
            }
        ],
    ),
    Queried(
        "packages",
        query(_TREE),
        [
            {
                "expressions": [expression(_TREE)],
                "bindings": {
                    "x": {
                        "GET": {
                            "documents": {
                                "__id": {"allowed": False},
                                "allowed": True,
                                "visible": True,
                            }
                        },
                        "POST": {"documents": {"allowed": False}},
                    }
                },
            }
        ],
    ),
    Queried(
        "two statements in a line",
        query(f"{_X}; {_Y}"),
        [
            {
                "expressions": [expression(_X), expression(_Y, col=37)],
                "bindings": {"x": True, "y": False},
            }
        ],
    ),
    Queried(
        "two lines",
        query(f"{_X}\n{_Y}"),
        [
            {
                "expressions": [expression(_X), expression(_Y, row=2)],
                "bindings": {"x": True, "y": False},
            }
        ],
    ),
    Queried(
        "nothing but a value",
        query(_DENIED),
        [{"expressions": [expression(_DENIED, value=False)]}],
    ),
    Queried("a value that does not hold, beside others", query(f"{_X}; {_DENIED}"), []),
    Queried("undefined", query("x = data.conformance.nowhere"), []),
    Queried("an undefined rule", query("x = data.conformance.undefined.allowed"), []),
    Queried(
        "with a resource",
        query(_RESOURCE, resource_context=struct(ALICES)),
        [{"expressions": [expression(_RESOURCE)], "bindings": {"x": True}}],
    ),
    Queried(
        "with an input",
        query(_RESOURCE, input='{"resource": {"owner": "alice"}}'),
        [{"expressions": [expression(_RESOURCE)], "bindings": {"x": True}}],
    ),
    Queried(
        "a resource before an input",
        query(
            _RESOURCE,
            input='{"resource": {"owner": "alice"}}',
            resource_context=struct({"owner": "bob"}),
        ),
        [{"expressions": [expression(_RESOURCE)], "bindings": {"x": False}}],
    ),
]


@attrs.frozen
class Compiled:
    """A partial evaluation of expressions without input, and the remaining query."""

    name: str
    request: CompileRequest
    result: dict[str, Any]


ALWAYS: dict[str, Any] = {"queries": [[]]}
NEVER: dict[str, Any] = {}
_EQUAL = {"type": "ref", "value": [{"type": "var", "value": "eq"}]}

COMPILED = [
    Compiled("always", compile_("data.conformance.allow.allowed == true"), ALWAYS),
    Compiled("never", compile_("data.conformance.deny.allowed == true"), NEVER),
    Compiled("false", compile_(_DENIED), NEVER),
    Compiled("undefined", compile_("data.conformance.nowhere.allowed == true"), NEVER),
    Compiled(
        "a variable",
        compile_(_Y),
        {
            "queries": [
                [
                    {
                        "index": 0,
                        "terms": [
                            _EQUAL,
                            {"type": "var", "value": "y"},
                            {"type": "boolean", "value": False},
                        ],
                    }
                ]
            ]
        },
    ),
]

LISTED = ListPoliciesRequest()
PACKAGES = {
    "allow",
    "deny",
    "fails",
    "identity",
    "odd",
    "resource",
    "undefined",
    "tree.GET.documents",
    "tree.GET.documents.__id",
    "tree.POST.documents",
}
