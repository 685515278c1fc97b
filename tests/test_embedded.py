from __future__ import annotations

import asyncio
import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

import attrs
import grpc
import psutil
import pytest
from aserto.authorizer.v2 import (
    AuthorizerStub,
    CompileRequest,
    DecisionTreeOptions,
    DecisionTreeRequest,
    GetPolicyRequest,
    InfoRequest,
    IsRequest,
    ListPoliciesRequest,
    PathSeparator,
    QueryRequest,
)
from aserto.authorizer.v2.api import IdentityContext, PolicyContext, PolicyInstance
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from fastapi_topaz._authorizer.options import Identity, IdentityType
from fastapi_topaz.testing import Check, EmbeddedAuthorizer
from fastapi_topaz.testing.fixtures import (
    embedded_authorizer,
    embedded_authorizer_tls,
)


pytestmark = pytest.mark.real_clock

NOBODY = IdentityContext(type=IdentityType.NONE)
OWN_SOCKET = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.002)


@contextmanager
def connect(authorizer, *, url=None, ca=None):
    options = authorizer.options
    target = url or options.url
    if options.insecure:
        channel = grpc.insecure_channel(target, options=OWN_SOCKET)
    else:
        root = pathlib.Path(ca or options.cert_file_path).read_bytes()
        credentials = grpc.ssl_channel_credentials(root)
        channel = grpc.secure_channel(target, credentials, options=OWN_SOCKET)
    with channel:
        yield AuthorizerStub(channel)


# A fixture is requested by its name in the module of the test.
__all__ = ["embedded_authorizer", "embedded_authorizer_tls"]


@pytest.fixture
def authorizer(request):
    return request.getfixturevalue("embedded_authorizer")


@pytest.fixture
def stub(authorizer):
    with connect(authorizer) as connected:
        yield connected


def is_request(path="app.GET.x", *decisions, identity=NOBODY, **fields):
    return IsRequest(
        policy_context=PolicyContext(path=path, decisions=decisions or ("allowed",)),
        identity_context=identity,
        **fields,
    )


def decided(response):
    return {d.decision: getattr(d, "is") for d in response.decisions}


def ask(stub, *args, metadata=None, **kwargs):
    request = is_request(*args, **kwargs)
    return decided(stub.Is(request, timeout=10, metadata=metadata))


def status_of(call, *args, **kwargs):
    with pytest.raises(grpc.RpcError) as caught:
        call(*args, timeout=10, **kwargs)
    return caught.value.code(), caught.value.details()


def code_of(call, *args, **kwargs):
    return status_of(call, *args, **kwargs)[0].name


def is_listening(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


# -- policies


@pytest.mark.parametrize("value", [True, False])
def test_a_bool_answers_every_decision(authorizer, stub, value):
    authorizer.policies = {"app.GET.x": value}
    assert ask(stub, "app.GET.x", "allowed", "visible") == {
        "allowed": value,
        "visible": value,
    }


def test_a_mapping_answers_by_decision_in_the_order_asked(authorizer, stub):
    authorizer.policies = {"app.GET.x": {"allowed": True, "visible": False}}
    answer = ask(stub, "app.GET.x", "visible", "allowed")
    assert list(answer.items()) == [("visible", False), ("allowed", True)]


def test_a_function_sees_the_whole_request(authorizer, stub):
    seen = []

    def policy(check):
        seen.append(check)
        return True

    authorizer.policies = {"app.GET.x": policy}
    resource = Struct()
    resource.update({"id": 7, "tags": ["a"]})
    request = is_request(
        identity=IdentityContext(type=IdentityType.SUB, identity="rick"),
        resource_context=resource,
        policy_instance=PolicyInstance(name="todo", instance_label="blue"),
    )
    metadata = [("x-request-id", "r1"), ("trace-bin", b"\x00\x01")]
    assert decided(stub.Is(request, timeout=10, metadata=metadata)) == {"allowed": True}
    (check,) = seen
    assert check.metadata.pop("user-agent").startswith("grpc-python")
    assert check == Check(
        policy_path="app.GET.x",
        decisions=("allowed",),
        identity=Identity(IdentityType.SUB, "rick"),
        resource={"id": 7, "tags": ["a"]},
        policy_instance_name="todo",
        policy_instance_label="blue",
        metadata={"x-request-id": "r1"},
    )


def test_a_check_is_frozen_and_its_repr_names_nobody():
    check = Check(
        policy_path="app.x",
        decisions=("allowed",),
        identity=Identity(IdentityType.SUB, "rick@example.com"),
        resource={"owner": "morty"},
        metadata={"authorization": "basic secret"},
    )
    assert repr(check) == (
        "Check(policy_path='app.x', decisions=('allowed',), "
        "policy_instance_name='', policy_instance_label='')"
    )
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        check.policy_path = "other"


def test_an_async_function_may_wait_and_answer_by_decision(authorizer, stub):
    async def policy(check):
        await asyncio.sleep(0)
        return dict.fromkeys(check.decisions, False)

    authorizer.policies = {"app.GET.x": policy}
    assert ask(stub) == {"allowed": False}


def test_one_function_answers_for_every_path(authorizer, stub):
    authorizer.policies = lambda check: check.policy_path.endswith("GET")
    assert ask(stub, "any.GET") == {"allowed": True}
    assert ask(stub, "any.POST") == {"allowed": False}


def test_policies_may_be_changed_in_place_and_are_a_copy(authorizer, stub):
    mine = {"app.GET.x": False}
    authorizer.policies = mine
    mine["app.GET.x"] = True
    assert ask(stub) == {"allowed": False}
    authorizer.policies["app.GET.x"] = True
    assert ask(stub) == {"allowed": True}


@pytest.mark.parametrize(
    "answer", [None, 1, "yes", {"allowed": object()}, {1: True}, ["allowed"]]
)
def test_an_answer_that_is_no_answer_is_an_error(authorizer, stub, answer):
    authorizer.policies = {"app.GET.x": lambda _check: answer}
    code, details = status_of(stub.Is, is_request())
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "'app.GET.x' must return a bool" in details
    assert details.endswith(f"got {type(answer).__name__}")


@pytest.mark.parametrize("value", [None, 1, "yes", ["yes"], {"yes": True}])
def test_without_a_boolean_there_is_no_decision_at_all(authorizer, stub, caplog, value):
    odd = {"allowed": value, "visible": True}
    authorizer.policies = {"app.GET.x": lambda _check: odd}
    assert ask(stub, "app.GET.x", "visible", "allowed") == {}
    (record,) = caplog.records
    assert "decides 'allowed' with a " + type(value).__name__ in record.getMessage()
    assert ask(stub, "app.GET.x", "visible") == {"visible": True}
    assert tree(stub, "app", "allowed") == {"app.GET.x": {}}
    assert query(stub, "x = data.app.GET.x")[0]["bindings"] == {"x": odd}


def test_a_policy_that_raises_is_an_error_and_logged(authorizer, stub, caplog):
    def policy(_check):
        raise LookupError("no such door")

    authorizer.policies = {"app.GET.x": policy}
    code, details = status_of(stub.Is, is_request())
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("invalid query: query evaluation failed: ")
    assert details.endswith("policy 'app.GET.x' raised LookupError: no such door")
    assert [r.exc_info[0] for r in caplog.records] == [LookupError]
    request = QueryRequest(query="data.app.GET.x", identity_context=NOBODY)
    assert code_of(stub.Query, request) == "INTERNAL"


@pytest.mark.parametrize(
    "policies, error",
    [
        (3, TypeError),
        ({"a": 1}, TypeError),
        ({"a": None}, TypeError),
        ({"a": {"allowed": "yes"}}, TypeError),
        ({1: True}, TypeError),
        ({"": True}, ValueError),
    ],
)
def test_what_is_no_policy_is_refused_when_assigned(policies, error):
    with pytest.raises(error, match="policies"):
        EmbeddedAuthorizer(policies)


def test_no_policies_is_an_empty_dict():
    assert EmbeddedAuthorizer().policies == {}


# -- Is, and what every call needs


def without(request, field):
    request.ClearField(field)
    return request


@pytest.mark.parametrize(
    "request_, code, text",
    [
        (
            without(is_request(), "policy_context"),
            "INVALID_ARGUMENT",
            "policy context not set",
        ),
        (is_request(""), "INVALID_ARGUMENT", "policy context path not set"),
        (
            IsRequest(policy_context=PolicyContext(path="a"), identity_context=NOBODY),
            "INVALID_ARGUMENT",
            "decisions not set",
        ),
        (
            without(is_request(), "identity_context"),
            "INVALID_ARGUMENT",
            "identity context not set",
        ),
        (
            is_request(identity=IdentityContext()),
            "INVALID_ARGUMENT",
            "identity type UNKNOWN",
        ),
        (
            is_request(identity=IdentityContext(type=IdentityType.SUB)),
            "NOT_FOUND",
            "failed to resolve identity",
        ),
        (
            is_request(identity=IdentityContext(type=99, identity="x")),  # type: ignore[arg-type]
            "NOT_FOUND",
            "failed to resolve identity",
        ),
        (
            is_request("nope"),
            "INVALID_ARGUMENT",
            "undefined results: data.nope.allowed",
        ),
        (
            is_request("app.GET.x", "allowed", "nope"),
            "INVALID_ARGUMENT",
            "undefined results: data.app.GET.x.allowed data.app.GET.x.nope",
        ),
        (is_request("my-docs"), "INVALID_ARGUMENT", "data.my-docs.allowed is no "),
        (is_request("app.GET.x", "*"), "INVALID_ARGUMENT", "data.app.GET.x.* is no "),
    ],
)
def test_is_refuses_as_topaz_does(authorizer, stub, request_, code, text):
    authorizer.policies = {"app.GET.x": {"allowed": True}, "my-docs": True}
    got, details = status_of(stub.Is, request_)
    assert got.name == code
    assert text in details


def test_a_segment_that_is_no_identifier_is_quoted(authorizer, stub):
    for path in ('app.GET["my-docs"].__id', r'app.GET["a\"b\\c"]'):
        authorizer.policies = {path: True}
        assert ask(stub, path) == {"allowed": True}


def test_those_who_are_not_in_the_directory_are_not_found():
    with (
        EmbeddedAuthorizer({"app.GET.x": True}, identities=["rick"]) as authorizer,
        connect(authorizer) as stub,
    ):

        def known(kind, name):
            who = IdentityContext(type=kind, identity=name)
            status = "OK"
            for call, request in (
                (stub.Is, is_request(identity=who)),
                (stub.Query, QueryRequest(query="data.app", identity_context=who)),
            ):
                try:
                    call(request, timeout=10)
                except grpc.RpcError as error:
                    status = error.code().name
            return status

        assert known(IdentityType.SUB, "rick") == "OK"
        assert known(IdentityType.JWT, "rick") == "OK"
        assert known(IdentityType.SUB, "morty") == "NOT_FOUND"
        assert known(IdentityType.JWT, "morty") == "NOT_FOUND"
        # Nobody is looked up for these.
        assert known(IdentityType.MANUAL, "morty") == "OK"
        assert known(IdentityType.NONE, "") == "OK"


# -- the other calls


def tree(stub, root, *decisions, slash=False):
    options = DecisionTreeOptions(
        path_separator=PathSeparator.PATH_SEPARATOR_SLASH
        if slash
        else PathSeparator.PATH_SEPARATOR_DOT
    )
    response = stub.DecisionTree(
        DecisionTreeRequest(
            policy_context=PolicyContext(path=root, decisions=decisions),
            identity_context=NOBODY,
            options=options,
        ),
        timeout=10,
    )
    assert response.path_root == root
    return MessageToDict(response.path)


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


def test_decision_tree_of_one_function_is_the_root_alone(authorizer, stub):
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


def query(stub, text, **fields):
    request = QueryRequest(query=text, identity_context=NOBODY, **fields)
    return MessageToDict(stub.Query(request, timeout=10).response)["result"]


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


def test_query_tells_where_each_statement_stands(authorizer, stub):
    authorizer.policies = QUERIED
    text = "  a = data.app.x ; data.app.y.any\n\n b = data.app.x"
    (result,) = query(stub, text)
    assert [
        (e["text"], e["location"]["row"], e["location"]["col"])
        for e in result["expressions"]
    ] == [("a = data.app.x", 1, 3), ("data.app.y.any", 1, 20), ("b = data.app.x", 3, 2)]


def test_query_of_what_policies_have_in_common_gives_them_all(authorizer, stub):
    authorizer.policies = {"app.x": True, "app.x.y": {"allowed": False}, "apple": True}
    bindings = {"x": {"x": {"allowed": True, "y": {"allowed": False}}}}
    assert query(stub, "x = data.app")[0]["bindings"] == bindings


def test_query_adds_nothing_to_what_a_policy_has_returned(authorizer, stub):
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
        # Of several, each must hold.
        "x = data.app.x; data.app.x.visible",
    ],
)
def test_query_of_something_undefined_has_no_result(authorizer, stub, text):
    authorizer.policies = QUERIED
    assert query(stub, text) == []


def test_query_takes_the_resource_from_the_context_or_else_the_input(authorizer, stub):
    authorizer.policies = QUERIED
    statement = "x = data.app.z.allowed"
    seven = '{"resource": {"id": 7}}'
    (result,) = query(stub, statement, input=seven)
    assert result["bindings"] == {"x": True}
    other = Struct()
    other.update({"id": 8})
    (result,) = query(stub, statement, input=seven, resource_context=other)
    assert result["bindings"] == {"x": False}


def test_query_asks_for_the_decisions_of_the_policy_context(authorizer, stub):
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
def test_query_and_compile_refuse_the_rest(authorizer, stub, kind, fields, text):
    call = stub.Query if kind is QueryRequest else stub.Compile
    code, details = status_of(call, kind(**{"identity_context": NOBODY, **fields}))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text in details


@pytest.mark.parametrize("kind", [QueryRequest, CompileRequest])
@pytest.mark.parametrize(
    "text, problem", [("{", "is no JSON"), ("[]", "must be a JSON object")]
)
def test_an_input_that_is_no_object_is_internal_as_in_topaz(stub, kind, text, problem):
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
def test_compile_leaves_nothing_or_no_solution(authorizer, stub, text, always):
    authorizer.policies = QUERIED
    request = CompileRequest(query=text, identity_context=NOBODY)
    response = stub.Compile(request, timeout=10)
    assert MessageToDict(response.result) == ({"queries": [[]]} if always else {})


def test_compile_leaves_what_a_variable_is(authorizer, stub):
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


def test_list_policies_makes_a_module_of_each_path(authorizer, stub):
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


def test_info_tells_a_version_and_unknown_methods_are_unimplemented(authorizer, stub):
    assert stub.Info(InfoRequest(), timeout=10).version == "embedded"
    with grpc.insecure_channel(authorizer.url) as channel:
        unknown = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert code_of(unknown, b"") == "UNIMPLEMENTED"


# -- who is let in


def test_the_api_key_and_the_tenant_are_needed_except_for_info():
    guarded = EmbeddedAuthorizer({"app.GET.x": True}, api_key="k1", tenant_id="t1")
    with guarded, connect(guarded) as stub:
        options = guarded.options
        assert (options.api_key, options.tenant_id) == ("k1", "t1")
        assert ask(stub, metadata=options.metadata) == {"allowed": True}
        for headers, code in (
            ((), "UNAUTHENTICATED"),
            ((("authorization", "basic k2"),), "UNAUTHENTICATED"),
            ((("authorization", "bearer k1"),), "UNAUTHENTICATED"),
            ((("authorization", "Basic k1"),), "PERMISSION_DENIED"),
            (
                (("authorization", "basic k1"), ("aserto-tenant-id", "t2")),
                "PERMISSION_DENIED",
            ),
        ):
            assert code_of(stub.Is, is_request(), metadata=headers) == code
        listed = stub.ListPolicies
        assert code_of(listed, ListPoliciesRequest()) == "UNAUTHENTICATED"
        assert stub.Info(InfoRequest(), timeout=10).version


# -- TLS


@pytest.fixture
def tls(request):
    running = request.getfixturevalue("embedded_authorizer_tls")
    running.policies = {"app.GET.x": True}
    return running


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_tls_with_the_right_ca(tls, host):
    assert tls.options.insecure is False
    assert tls.options.cert_file_path == tls.ca_cert_path
    with connect(tls, url=f"{host}:{tls.port}") as stub:
        assert ask(stub) == {"allowed": True}


def test_tls_with_the_ca_of_somebody_else(tls):
    with EmbeddedAuthorizer(tls=True) as other:
        assert other.ca_cert_path != tls.ca_cert_path
        with connect(tls, ca=other.ca_cert_path) as stub:
            code, details = status_of(stub.Is, is_request())
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "CERTIFICATE_VERIFY_FAILED" in details


def test_tls_keeps_its_ca_over_a_restart_and_removes_it_in_the_end():
    authorizer = EmbeddedAuthorizer({"app.GET.x": True}, tls=True)
    assert authorizer.ca_cert_path is None
    with authorizer:
        path = authorizer.ca_cert_path
    with authorizer, connect(authorizer) as stub:
        assert authorizer.ca_cert_path == path
        assert ask(stub) == {"allowed": True}
    assert pathlib.Path(path).exists()
    del authorizer
    until(lambda: not pathlib.Path(path).parent.exists())


def test_tls_without_trustme_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "trustme", None)
    authorizer = EmbeddedAuthorizer(tls=True)
    with pytest.raises(ImportError, match=r"fastapi-topaz-pool\[testing\]"):
        authorizer.start()


# -- lifecycle


def test_constructing_starts_nothing():
    before = set(threading.enumerate()), psutil.Process().num_fds()
    authorizer = EmbeddedAuthorizer(tls=True)
    threads, fds = before
    # Of those before, gRPC's own may have ended meanwhile.
    assert set(threading.enumerate()) <= threads
    assert psutil.Process().num_fds() <= fds
    for name in ("port", "url", "options"):
        with pytest.raises(RuntimeError, match="start"):
            getattr(authorizer, name)
    assert repr(authorizer) == "<EmbeddedAuthorizer port=0 stopped>"
    authorizer.stop()


@pytest.mark.parametrize(
    "arguments",
    [
        {"port": -1},
        {"port": 65536},
        {"max_concurrent_streams": 0},
        {"api_key": ""},
        {"tenant_id": "\n"},
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        EmbeddedAuthorizer(**arguments)


def test_one_name_is_no_collection_of_identities():
    with pytest.raises(TypeError, match="identities must be"):
        EmbeddedAuthorizer(identities="rick")


def test_start_and_stop_are_idempotent_and_keep_the_port():
    authorizer = EmbeddedAuthorizer()
    assert authorizer.start() is authorizer.start()
    port = authorizer.port
    assert repr(authorizer) == f"<EmbeddedAuthorizer port={port} running>"
    with connect(authorizer) as stub:
        stub.Info(InfoRequest(), timeout=10)
    authorizer.stop()
    authorizer.stop()
    assert not is_listening(port)
    authorizer.start()
    assert authorizer.port == port
    with connect(authorizer) as stub:
        stub.Info(InfoRequest(), timeout=10)
    assert authorizer.connections_accepted == 2
    authorizer.stop()


def test_stop_closes_the_sockets_of_clients(authorizer):
    with socket.create_connection(("127.0.0.1", authorizer.port), timeout=5) as client:
        until(lambda: authorizer.connections_open == 1)
        authorizer.stop()
        assert authorizer.connections_open == 0
        try:
            while client.recv(4096):
                pass
        except ConnectionResetError:
            pass


def test_a_port_of_ones_own_and_one_that_is_taken(authorizer):
    threads = threading.active_count()
    second = EmbeddedAuthorizer(port=authorizer.port)
    with pytest.raises(OSError, match="in use"):
        second.start()
    until(lambda: threading.active_count() <= threads)
    authorizer.stop()
    with second:
        assert second.url == authorizer.url
        assert is_listening(second.port)


def test_a_client_of_the_old_server_finds_the_new_one(authorizer):
    authorizer.policies = {"app.GET.x": True}
    with connect(authorizer) as stub:
        assert ask(stub) == {"allowed": True}
        authorizer.stop()
        authorizer.start()
        response = stub.Is(is_request(), timeout=20, wait_for_ready=True)
        assert decided(response) == {"allowed": True}


async def test_it_is_an_async_context_manager_on_both_backends():
    async with EmbeddedAuthorizer({"app.GET.x": True}) as authorizer:
        with connect(authorizer) as stub:
            assert ask(stub) == {"allowed": True}
        port = authorizer.port
    assert not is_listening(port)


def test_two_in_one_process_and_an_aio_client_at_the_same_time():
    async def client(url):
        async with grpc.aio.insecure_channel(url, options=OWN_SOCKET) as channel:
            stub = AuthorizerStub(channel)
            answers = await asyncio.gather(*[stub.Is(is_request()) for _ in range(20)])
            return {decided(answer)["allowed"] for answer in answers}

    async def both():
        return await asyncio.gather(client(yes.url), client(no.url))

    with (
        EmbeddedAuthorizer({"app.GET.x": True}) as yes,
        EmbeddedAuthorizer({"app.GET.x": False}) as no,
    ):
        assert asyncio.run(both()) == [{True}, {False}]
        assert yes.calls == no.calls == {"Is": 20}


# -- counting


def test_each_channel_with_a_pool_of_its_own_is_a_socket(authorizer):
    channels = [grpc.insecure_channel(authorizer.url, OWN_SOCKET) for _ in range(10)]
    for channel in channels:
        AuthorizerStub(channel).Info(InfoRequest(), timeout=10)
        AuthorizerStub(channel).Info(InfoRequest(), timeout=10)
    assert authorizer.connections_accepted == authorizer.connections_open == 10
    for channel in channels[:4]:
        channel.close()
    until(lambda: authorizer.connections_open == 6)
    for channel in channels[4:]:
        channel.close()
    until(lambda: authorizer.connections_open == 0)
    assert authorizer.connections_accepted == 10


def test_channels_that_share_a_pool_are_one_socket(authorizer):
    channels = [grpc.insecure_channel(authorizer.url) for _ in range(10)]
    for channel in channels:
        AuthorizerStub(channel).Info(InfoRequest(), timeout=10)
    assert authorizer.connections_accepted == 1
    for channel in channels:
        channel.close()


def test_calls_are_counted_by_method_and_reset(authorizer, stub):
    authorizer.policies = {"app.GET.x": True}
    ask(stub)
    ask(stub)
    code_of(stub.Is, is_request("nope"))
    stub.Info(InfoRequest(), timeout=10)
    assert authorizer.calls == {"Is": 3, "Info": 1}
    authorizer.calls["Is"] = 99
    assert authorizer.calls["Is"] == 3
    assert authorizer.calls["Query"] == 0
    authorizer.reset_counters()
    assert authorizer.calls == {}
    assert authorizer.connections_accepted == 0
    assert authorizer.connections_open == 1


# -- nothing is left


@pytest.mark.parametrize("grace", [0.0, 1.0])
def test_fifty_starts_leave_no_descriptor_thread_or_port(grace):
    process = psutil.Process()
    authorizer = EmbeddedAuthorizer({"app.GET.x": True})

    def cycle():
        with connect(authorizer.start()) as stub:
            ask(stub)
            authorizer.stop(grace)

    for _ in range(3):
        cycle()
    fds, threads = process.num_fds(), threading.active_count()
    native = process.num_threads()
    for _ in range(50):
        cycle()
    until(lambda: process.num_fds() <= fds)
    until(lambda: threading.active_count() <= threads)
    # gRPC has a pool of threads without Python, which grows by a few under load.
    assert process.num_threads() <= native + 8
    assert authorizer.connections_accepted == 53
    assert not is_listening(authorizer.port)


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        **options,
    )


def test_a_server_that_nobody_stopped_does_not_disturb_the_exit():
    done = python(
        "-c",
        textwrap.dedent("""
            import grpc
            from aserto.authorizer.v2 import AuthorizerStub, InfoRequest
            from fastapi_topaz.testing import EmbeddedAuthorizer

            authorizer = EmbeddedAuthorizer().start()
            channel = grpc.insecure_channel(authorizer.url)
            print(AuthorizerStub(channel).Info(InfoRequest(), timeout=10).version)
        """),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "embedded\n", "")


def test_the_package_needs_neither_pytest_nor_trustme():
    done = python(
        "-c",
        "import sys; sys.modules['pytest'] = sys.modules['trustme'] = None\n"
        "from fastapi_topaz.testing import EmbeddedAuthorizer\n"
        "with EmbeddedAuthorizer(): print('works')",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "works\n", "")


def test_the_fixtures_work_as_a_plugin(tmp_path):
    conftest = 'pytest_plugins = ["fastapi_topaz.testing.fixtures"]\n'
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
            def test_plain(embedded_authorizer):
                assert embedded_authorizer.options.insecure
                assert embedded_authorizer.policies == {}

            def test_tls(embedded_authorizer_tls):
                assert embedded_authorizer_tls.options.cert_file_path
        """)
    )
    done = python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider"),
        cwd=tmp_path,
        # Without the plugins that happen to be installed here.
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr
