"""Test the decisions of the embedded authorizer."""

from __future__ import annotations

import asyncio

import attrs
import grpc
import pytest
from aserto.authorizer.v2 import (
    IsRequest,
    QueryRequest,
)
from aserto.authorizer.v2.api import IdentityContext, PolicyContext, PolicyInstance
from google.protobuf.struct_pb2 import Struct

from fastapi_topaz._authorizer.options import Identity, IdentityType
from fastapi_topaz.testing import Check, EmbeddedAuthorizer
from kit.embedded import (
    NOBODY,
    ask,
    code_of,
    connect,
    decided,
    is_request,
    query,
    status_of,
    tree,
)


pytestmark = pytest.mark.real_clock


# -- policies -----------------------------------------------------------------------


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


def test_a_check_is_frozen_and_its_repr_has_no_identity():
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


def test_an_async_function_may_wait_and_return_a_mapping(authorizer, stub):
    async def policy(check):
        await asyncio.sleep(0)
        return dict.fromkeys(check.decisions, False)

    authorizer.policies = {"app.GET.x": policy}
    assert ask(stub) == {"allowed": False}


def test_one_function_answers_for_every_path(authorizer, stub):
    authorizer.policies = lambda check: check.policy_path.endswith("GET")
    assert ask(stub, "any.GET") == {"allowed": True}
    assert ask(stub, "any.POST") == {"allowed": False}


def test_policies_are_copied_and_may_be_changed_in_place(authorizer, stub):
    mine = {"app.GET.x": False}
    authorizer.policies = mine
    mine["app.GET.x"] = True
    assert ask(stub) == {"allowed": False}
    authorizer.policies["app.GET.x"] = True
    assert ask(stub) == {"allowed": True}


@pytest.mark.parametrize(
    "answer", [None, 1, "yes", {"allowed": object()}, {1: True}, ["allowed"]]
)
def test_an_invalid_policy_answer_is_an_error(authorizer, stub, answer):
    authorizer.policies = {"app.GET.x": lambda _check: answer}
    code, details = status_of(stub.Is, is_request())
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "'app.GET.x' must return a bool" in details
    assert details.endswith(f"got {type(answer).__name__}")


@pytest.mark.parametrize("value", [None, 1, "yes", ["yes"], {"yes": True}])
def test_a_decision_that_is_not_a_boolean_leaves_no_decisions(
    authorizer, stub, caplog, value
):
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
def test_an_invalid_policy_is_rejected_when_assigned(policies, error):
    with pytest.raises(error, match="policies"):
        EmbeddedAuthorizer(policies)


def test_no_policies_are_an_empty_dict():
    assert EmbeddedAuthorizer().policies == {}


# -- Is, and the checks of every call -----------------------------------------------


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
        (is_request("my-docs"), "INVALID_ARGUMENT", "data.my-docs.allowed is not "),
        (is_request("app.GET.x", "*"), "INVALID_ARGUMENT", "data.app.GET.x.* is not "),
    ],
)
def test_is_rejects_the_same_requests_as_topaz(authorizer, stub, request_, code, text):
    authorizer.policies = {"app.GET.x": {"allowed": True}, "my-docs": True}
    got, details = status_of(stub.Is, request_)
    assert got.name == code
    assert text in details


def test_a_segment_that_is_not_an_identifier_is_quoted(authorizer, stub):
    for path in ('app.GET["my-docs"].__id', r'app.GET["a\"b\\c"]'):
        authorizer.policies = {path: True}
        assert ask(stub, path) == {"allowed": True}


def test_unknown_identities_are_not_found():
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
        # These identities are not looked up.
        assert known(IdentityType.MANUAL, "morty") == "OK"
        assert known(IdentityType.NONE, "") == "OK"
