"""Test arguments that cannot be sent, and options of another library."""

from __future__ import annotations

import math

import aserto.client
import pytest
from aserto.authorizer.v2 import IsRequest
from aserto.authorizer.v2.api import IdentityType as AsertoIdentityType

from fastapi_topaz import ConnectionPool, Identity, IdentityType
from fastapi_topaz._authorizer import messages as _messages
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.authorizer import FIRST_PROBE, SECRET


pytestmark = pytest.mark.real_clock


# -- unsendable arguments -----------------------------------------------------------


def circular():
    context = {"name": "ring"}
    context["self"] = context
    return context


def nested(depth):
    context = {"leaf": SECRET}
    for _ in range(depth):
        context = {"in": context}
    return context


BAD_SUBJECTS = [
    ({"policy_path": ""}, ValueError, "policy_path"),
    ({"policy_path": "  "}, ValueError, "policy_path"),
    ({"policy_path": None}, TypeError, "policy_path"),
    ({"policy_path": b"app"}, TypeError, "policy_path"),
    ({"policy_path": "app\ud800"}, ValueError, "policy_path"),
    ({"decisions": "allowed"}, TypeError, "decisions"),
    ({"decisions": ()}, ValueError, "decisions"),
    ({"decisions": None}, TypeError, "decisions"),
    ({"decisions": [1]}, TypeError, "decisions"),
    ({"decisions": {"allowed"}}, TypeError, "decisions"),
    ({"identity": SECRET}, TypeError, "identity"),
    ({"identity": 5}, TypeError, "identity"),
    (
        {"identity": Identity(IdentityType.SUB, SECRET + "\ud800")},
        ValueError,
        "identity",
    ),
    (
        {"identity": aserto.client.Identity(SECRET, SECRET)},
        TypeError,
        "type",
    ),
    ({"resource_context": [1]}, TypeError, "resource_context"),
    ({"resource_context": SECRET}, TypeError, "resource_context"),
    ({"resource_context": {1: 2}}, TypeError, "resource_context"),
    ({"resource_context": {"a": {1: 2}}}, TypeError, "resource_context"),
    ({"resource_context": {"a": b"s3cret"}}, TypeError, "resource_context"),
    ({"resource_context": {"a": {SECRET}}}, TypeError, "resource_context"),
    ({"resource_context": {"a": object()}}, TypeError, "resource_context"),
    (
        {"resource_context": {"a": SECRET + "\ud800"}},
        (TypeError, ValueError),
        "resource_context",
    ),
    (
        {"resource_context": {"a": 10**400}},
        (TypeError, ValueError),
        "resource_context",
    ),
    (
        {"resource_context": {"a": math.nan}},
        (TypeError, ValueError),
        "resource_context",
    ),
    (
        {"resource_context": {"a": [math.inf]}},
        (TypeError, ValueError),
        "resource_context",
    ),
    ({"resource_context": circular()}, (TypeError, ValueError), "resource_context"),
    ({"resource_context": nested(60)}, (TypeError, ValueError), "resource_context"),
    ({"resource_context": nested(5000)}, (TypeError, ValueError), "resource_context"),
    ({"policy_instance_name": 5}, TypeError, "policy_instance_name"),
    ({"policy_instance_label": 5}, TypeError, "policy_instance_label"),
]


def labels(value):
    if isinstance(value, dict):
        (name, content), *_ = value.items()
        return f"{name}={type(content).__name__}"
    return None


@pytest.mark.parametrize("arguments, error, name", BAD_SUBJECTS, ids=labels)
async def test_an_unsendable_argument_is_named(
    pool, authorizer, arguments, error, name
):
    arguments = {"policy_path": "app.GET.documents"} | arguments
    async with pool.acquire() as conn:
        with pytest.raises(error, match=name) as caught:
            await conn.decisions(**arguments)
        with pytest.raises(error, match=name):
            await conn.decision_tree(**arguments)
    assert SECRET not in str(caught.value) + repr(caught.value)
    assert authorizer.calls == FIRST_PROBE
    # The pool is unaffected.
    async with pool.acquire() as conn:
        assert await conn.decisions(policy_path="app.GET.documents")
    assert pool.status().busy == 0
    assert pool.status().total == 1
    assert authorizer.connections_accepted == 1


@pytest.mark.parametrize(
    "method, arguments, name",
    [
        (
            "decision_tree",
            {"policy_path": "a", "policy_path_separator": "."},
            "policy_path_separator",
        ),
        (
            "decision_tree",
            {"policy_path": "a", "policy_path_separator": 1},
            "policy_path_separator",
        ),
        (
            "decision_tree",
            {"policy_path": "a", "policy_path_separator": []},
            "policy_path_separator",
        ),
        ("query", {"query": ""}, "query"),
        ("query", {"query": None}, "query"),
        ("query", {"query": "x = data.a", "input": 5}, "input"),
        ("query", {"query": "x = data.a", "input": {}}, "input"),
        ("query", {"query": "x = data.a", "options": "fast"}, "options"),
        ("query", {"query": "x = data.a", "policy_path": 5}, "policy_path"),
        ("query", {"query": "x = data.a", "decisions": "allowed"}, "decisions"),
        ("query", {"query": "x = data.a", "resource_context": 5}, "resource_context"),
        ("compile", {"query": " "}, "query"),
        ("compile", {"query": "data.a", "input": 5}, "input"),
        ("compile", {"query": "data.a", "unknowns": "input"}, "unknowns"),
        ("compile", {"query": "data.a", "unknowns": [1]}, "unknowns"),
        ("compile", {"query": "data.a", "disable_inlining": "x"}, "disable_inlining"),
        ("compile", {"query": "data.a", "options": 5}, "options"),
        ("get_policy", {"id": ""}, "id"),
        ("get_policy", {"id": None}, "id"),
        ("get_policy", {"id": "x", "policy_instance_name": 5}, "policy_instance_name"),
        ("list_policies", {"policy_instance_name": 5}, "policy_instance_name"),
        ("list_policies", {"policy_instance_label": 5}, "policy_instance_label"),
    ],
    ids=lambda value: value if isinstance(value, str) else labels(value),
)
async def test_the_other_calls_name_unsendable_arguments_too(
    conn, authorizer, method, arguments, name
):
    with pytest.raises((TypeError, ValueError), match=name):
        await getattr(conn, method)(**arguments)
    assert authorizer.calls == FIRST_PROBE
    assert (await conn.info()).version == "embedded"


@pytest.mark.parametrize("leaf", ["text", 1, None, ["text"]], ids=repr)
async def test_a_resource_context_at_the_depth_limit_is_sent_and_beyond_rejected(
    asked, leaf
):
    deepest = 29 if isinstance(leaf, list) else 30
    for depth in (deepest, deepest + 1):
        context = {"leaf": leaf}
        for _ in range(depth - 1):
            context = {"in": context}
        if depth == deepest:
            await asked(resource_context=context)
        else:
            with pytest.raises(ValueError, match="30 levels"):
                await asked(resource_context=context)


def test_a_str_equal_to_another_policy_is_not_confused_with_it():
    class Careless(str):
        __slots__ = ()

        def __eq__(self, other):
            return self.lower() == other.lower()

        def __hash__(self):
            return hash(self.lower())

    def sent(path, decision):
        data = _messages.is_request(path, (decision,), None, None, None, None)
        context = IsRequest.FromString(data).policy_context
        return context.path, list(context.decisions)

    assert sent("pol.x", "seen") == ("pol.x", ["seen"])
    assert sent(Careless("POL.X"), "seen") == ("POL.X", ["seen"])
    assert sent("pol.x", Careless("SEEN")) == ("pol.x", ["SEEN"])


async def test_an_integer_beyond_json_precision_is_rejected_and_not_rounded(asked):
    # Sending the id of another document would be worse than an error.
    with pytest.raises((TypeError, ValueError), match="resource_context"):
        await asked(resource_context={"id": 2**53 + 1})
    assert (await asked(resource_context={"id": 2**53 - 1})).resource["id"] == 2**53 - 1


# -- options of aserto --------------------------------------------------------------


async def test_aserto_options_are_accepted(authorizer, seen):
    with EmbeddedAuthorizer(
        authorizer.policies, tls=True, api_key=SECRET, tenant_id="tenant-1"
    ) as guarded:
        pool = ConnectionPool(min_connections=0)
        pool.configure(
            aserto.client.AuthorizerOptions(
                url=guarded.url,
                api_key=SECRET,
                tenant_id="tenant-1",
                cert_file_path=guarded.ca_cert_path,
            )
        )
        async with pool, pool.acquire() as conn:
            identity = aserto.client.Identity(
                AsertoIdentityType.IDENTITY_TYPE_JWT, "ey.J0"
            )
            assert await conn.decisions(
                policy_path="app.GET.documents", identity=identity
            ) == {"allowed": True}
    assert seen[-1].identity == Identity(IdentityType.JWT, "ey.J0")


@pytest.mark.parametrize("options", ["localhost:8282", None, 5, {}], ids=repr)
def test_other_options_are_rejected(options):
    with pytest.raises(TypeError, match="authorizer_options"):
        ConnectionPool().configure(options)
