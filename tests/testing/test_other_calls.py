"""Test DecisionTree, Query, Compile and the calls about policies."""

from __future__ import annotations

import time

import grpc
import pytest
from aserto.authorizer.v2 import (
    CompileRequest,
    DecisionTreeRequest,
    GetPolicyRequest,
    InfoRequest,
    ListPoliciesRequest,
    QueryRequest,
)
from aserto.authorizer.v2.api import IdentityContext, PolicyContext
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from kit.embedded import NOBODY, code_of, query, status_of, tree


pytestmark = pytest.mark.real_clock


def test_decision_tree_decides_all_paths_under_the_root(authorizer, stub):
    authorizer.policies = {
        "app.GET.x": {"allowed": True, "visible": False},
        "app.GET.y": lambda check: {"allowed": check.policy_path == "app.GET.y"},
        "app.GET.z": {"other": True},
        "web.GET": True,
    }
    assert tree(stub, "app", "allowed", "visible") == {
        "app.GET.x": {"allowed": True, "visible": False},
        "app.GET.y": {"allowed": True},
    }
    assert tree(stub, "app.GET.x", "allowed", slash=True) == {
        "app/GET/x": {"allowed": True}
    }
    paths = {"app.GET.x", "app.GET.y", "app.GET.z"}
    assert tree(stub, "app", "*") == {path: {} for path in paths}
    assert tree(stub, "web", "*") == {"web.GET": {}}


def test_decision_tree_of_one_function_is_only_the_root(authorizer, stub):
    authorizer.policies = lambda _check: True
    assert tree(stub, "app", "allowed") == {"app": {"allowed": True}}


@pytest.mark.parametrize("root, decisions", [("web", ["allowed"]), ("app", [])])
def test_decision_tree_without_a_decision_is_invalid(authorizer, stub, root, decisions):
    authorizer.policies = {"app.GET.x": True}
    request = DecisionTreeRequest(
        policy_context=PolicyContext(path=root, decisions=decisions),
        identity_context=NOBODY,
    )
    code, details = status_of(stub.DecisionTree, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "no decisions specified" in details


QUERIED = {
    "app.x": {"allowed": True, "visible": False},
    "app.y": True,
    "app.z": lambda check: check.resource.get("id") == 7,
}


def test_query_binds_the_decisions_of_a_path_as_opa_does(authorizer, stub):
    authorizer.policies = QUERIED
    assert query(stub, "x = data.app.x") == [
        {
            "bindings": {"x": {"allowed": True, "visible": False}},
            "expressions": [
                {
                    "text": "x = data.app.x",
                    "value": True,
                    "location": {"row": 1, "col": 1},
                }
            ],
        }
    ]


@pytest.mark.parametrize(
    "text, bindings",
    [
        ("x = data.app.x.visible", {"x": False}),
        ("x := data.app.y", {"x": {"allowed": True}}),
        ("x=data.app.x.allowed\ny=data.app.x.visible", {"x": True, "y": False}),
        ("x = data.app.x.allowed; y = data.app.y.any;", {"x": True, "y": True}),
        ("x = data.app.z.allowed", {"x": False}),
    ],
)
def test_query_takes_several_statements_and_single_decisions(
    authorizer, stub, text, bindings
):
    authorizer.policies = QUERIED
    (result,) = query(stub, text)
    assert result["bindings"] == bindings


def test_query_without_a_name_gives_the_value_of_the_expression(authorizer, stub):
    authorizer.policies = QUERIED
    (result,) = query(stub, "data.app.x.visible")
    assert result["expressions"][0]["value"] is False
    assert "bindings" not in result


def test_query_returns_the_location_of_each_statement(authorizer, stub):
    authorizer.policies = QUERIED
    text = "  a = data.app.x ; data.app.y.any\n\n b = data.app.x"
    (result,) = query(stub, text)
    assert [
        (e["text"], e["location"]["row"], e["location"]["col"])
        for e in result["expressions"]
    ] == [("a = data.app.x", 1, 3), ("data.app.y.any", 1, 20), ("b = data.app.x", 3, 2)]


def test_query_of_a_common_prefix_returns_all_its_policies(authorizer, stub):
    authorizer.policies = {"app.x": True, "app.x.y": {"allowed": False}, "apple": True}
    bindings = {"x": {"x": {"allowed": True, "y": {"allowed": False}}}}
    assert query(stub, "x = data.app")[0]["bindings"] == bindings


def test_query_does_not_change_the_value_returned_by_a_policy(authorizer, stub):
    returned = {"kind": "draft"}
    authorizer.policies = {"app.x": lambda _: {"y": returned}, "app.x.y": True}
    bindings = {"x": {"y": {"kind": "draft", "allowed": True}}}
    assert query(stub, "x = data.app.x")[0]["bindings"] == bindings
    assert returned == {"kind": "draft"}


@pytest.mark.parametrize(
    "text",
    [
        "x = data.nope",
        "data.app.x; data.app.x.nope",
        # If there are several, each must hold.
        "x = data.app.x; data.app.x.visible",
    ],
)
def test_query_of_an_undefined_path_has_no_result(authorizer, stub, text):
    authorizer.policies = QUERIED
    assert query(stub, text) == []


def test_query_reads_the_resource_from_the_context_or_the_input(authorizer, stub):
    authorizer.policies = QUERIED
    statement = "x = data.app.z.allowed"
    seven = '{"resource": {"id": 7}}'
    (result,) = query(stub, statement, input=seven)
    assert result["bindings"] == {"x": True}
    other = Struct()
    other.update({"id": 8})
    (result,) = query(stub, statement, input=seven, resource_context=other)
    assert result["bindings"] == {"x": False}


def test_query_tells_the_time(authorizer, stub):
    before = time.time()
    (result,) = query(stub, "x = time.now_ns()")
    # A number of JSON is right to a microsecond.
    assert before - 1e-5 <= result["bindings"]["x"] / 1e9 <= time.time() + 1e-5


def test_query_evaluates_the_decisions_of_the_policy_context(authorizer, stub):
    authorizer.policies = QUERIED
    context = PolicyContext(path="app", decisions=["visible", "enabled"])
    (result,) = query(stub, "x = data.app.y", policy_context=context)
    assert result["bindings"] == {"x": {"visible": True, "enabled": True}}


@pytest.mark.parametrize("kind", [QueryRequest, CompileRequest])
@pytest.mark.parametrize(
    "fields, text",
    [
        ({"query": ""}, "query not set"),
        ({"query": "data.a", "identity_context": None}, "identity type UNKNOWN"),
        ({"query": "count(data.a) > 1"}, "no Rego engine"),
        ({"query": "x == data.a"}, "no Rego engine"),
        (
            {"query": "data.a", "identity_context": IdentityContext()},
            "identity type UNKNOWN",
        ),
    ],
)
def test_query_and_compile_reject_unsupported_rego(
    authorizer, stub, kind, fields, text
):
    call = stub.Query if kind is QueryRequest else stub.Compile
    code, details = status_of(call, kind(**{"identity_context": NOBODY, **fields}))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text in details


@pytest.mark.parametrize("kind", [QueryRequest, CompileRequest])
@pytest.mark.parametrize(
    "text, problem", [("{", "is not JSON"), ("[]", "must be a JSON object")]
)
def test_an_input_that_is_not_an_object_is_internal_as_in_topaz(
    stub, kind, text, problem
):
    call = stub.Query if kind is QueryRequest else stub.Compile
    code, details = status_of(
        call, kind(query="data.a", input=text, identity_context=NOBODY)
    )
    assert code is grpc.StatusCode.INTERNAL
    assert problem in details


@pytest.mark.parametrize(
    "text, always",
    [
        ("data.app.x.allowed == true", True),
        ("data.app.x.allowed", True),
        ("data.app.x.visible == true", False),
        ("x := data.app.x.visible", True),
        ("data.nope.allowed == true", False),
        ("data.app.x.allowed; data.app.x.visible", False),
    ],
)
def test_compile_returns_an_empty_query_or_no_solution(authorizer, stub, text, always):
    authorizer.policies = QUERIED
    request = CompileRequest(query=text, identity_context=NOBODY)
    response = stub.Compile(request, timeout=10)
    assert MessageToDict(response.result) == ({"queries": [[]]} if always else {})


def test_compile_returns_the_value_of_a_variable(authorizer, stub):
    rules = {"allowed": True, "tags": ["a", 1, None]}
    authorizer.policies = {"app.x": lambda _check: rules}
    request = CompileRequest(
        query="data.app.x.allowed; x = data.app.x", identity_context=NOBODY
    )
    result = MessageToDict(stub.Compile(request, timeout=10).result)
    ((left,),) = result["queries"]
    equal, variable, value = left["terms"]
    assert equal == {"type": "ref", "value": [{"type": "var", "value": "eq"}]}
    assert variable == {"type": "var", "value": "x"}
    string, number = {"type": "string", "value": "a"}, {"type": "number", "value": 1}
    null = {"type": "null", "value": None}
    assert value == {
        "type": "object",
        "value": [
            [
                {"type": "string", "value": "allowed"},
                {"type": "boolean", "value": True},
            ],
            [
                {"type": "string", "value": "tags"},
                {"type": "array", "value": [string, number, null]},
            ],
        ],
    }


def test_list_policies_returns_a_module_for_each_path(authorizer, stub):
    authorizer.policies = {
        "app.y": lambda _check: True,
        "app.x": {"allowed": True, "visible": False},
        "app.a": False,
    }
    modules = stub.ListPolicies(ListPoliciesRequest(), timeout=10).result
    assert [m.id for m in modules] == ["app.a", "app.x", "app.y"]
    assert modules[0].raw == "package app.a\n\ndefault allowed := false\n"
    assert modules[1].raw == "package app.x\n\nallowed := true\n\nvisible := false\n"
    assert modules[2].raw == "package app.y\n\n# decided by a Python function\n"
    assert modules[1].package_path == "data.app.x"


def test_one_function_has_no_modules(authorizer, stub):
    authorizer.policies = lambda _check: True
    assert not stub.ListPolicies(ListPoliciesRequest(), timeout=10).result
    assert code_of(stub.GetPolicy, GetPolicyRequest(id="app")) == "NOT_FOUND"


@pytest.mark.parametrize(
    "paths, fields",
    [
        (["id"], {"id"}),
        (["id", "raw"], {"id", "raw"}),
        (["nope"], {"id", "raw", "package_path"}),
        ([], {"id", "raw", "package_path"}),
    ],
)
def test_a_field_mask_selects_fields_of_a_module(authorizer, stub, paths, fields):
    authorizer.policies = {"app.x": True}
    mask = FieldMask(paths=paths)
    got = stub.GetPolicy(GetPolicyRequest(id="app.x", field_mask=mask), timeout=10)
    assert {field.name for field, _ in got.result.ListFields()} == fields
    listed = stub.ListPolicies(ListPoliciesRequest(field_mask=mask), timeout=10)
    assert list(listed.result) == [got.result]


def test_get_policy_without_a_match_is_not_found(stub):
    code, details = status_of(stub.GetPolicy, GetPolicyRequest(id="nope"))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "[nope]" in details


def test_info_has_a_version_and_unknown_methods_are_unimplemented(authorizer, stub):
    assert stub.Info(InfoRequest(), timeout=10).version == "embedded"
    with grpc.insecure_channel(authorizer.url) as channel:
        unknown = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert code_of(unknown, b"") == "UNIMPLEMENTED"
