from __future__ import annotations

import math

import anyio
import aserto.client
import attrs
import grpc
import grpc.aio
import pytest
from aserto.authorizer.v2 import IsResponse, QueryOptions
from aserto.authorizer.v2.api import IdentityType as AsertoIdentityType
from google.protobuf.json_format import MessageToDict

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    PoolError,
)
from kit.authorizer import ALICE, FIRST_PROBE, SECRET, status_raised
from kit.channels import INFO
from kit.waiting import eventually


pytestmark = pytest.mark.real_clock

PATIENCE = 5.0


# -- decisions


async def test_decisions_are_returned_by_name(conn):
    assert await conn.decisions(policy_path="app.GET.documents") == {"allowed": True}
    both = ["allowed", "visible"]
    assert await conn.decisions(policy_path="app.DELETE.documents", decisions=both) == {
        "allowed": False,
        "visible": True,
    }


async def test_an_undefined_decision_is_an_error_and_not_a_denial(conn):
    for arguments in (
        {"policy_path": "app.GET.nothing"},
        {"policy_path": "app.GET.documents", "decisions": ("unknown",)},
    ):
        code = await status_raised(conn.decisions(**arguments))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_decisions_send_every_argument(asked):
    check = await asked(
        decisions=("allowed",),
        identity=ALICE,
        resource_context={"id": "42"},
        policy_instance_name="app",
        policy_instance_label="stable",
        timeout=10,
    )
    assert check.policy_path == "app.GET.documents"
    assert check.decisions == ("allowed",)
    assert check.identity == ALICE
    assert check.resource == {"id": "42"}
    assert check.policy_instance_name == "app"
    assert check.policy_instance_label == "stable"


@pytest.mark.parametrize(
    "identity",
    [
        Identity(IdentityType.NONE),
        ALICE,
        Identity(IdentityType.JWT, "ey.J0.eXAi"),
        Identity(IdentityType.MANUAL, "key: value, ünïcödé"),
    ],
    ids=lambda identity: identity.type.name,
)
async def test_every_kind_of_identity_arrives(asked, identity):
    check = await asked(identity=identity)
    assert check.identity == identity
    assert check.identity.value == identity.value


async def test_without_an_identity_the_caller_is_anonymous(asked):
    assert (await asked()).identity == Identity(IdentityType.NONE)


async def test_an_identity_does_not_carry_over_to_the_next_call(asked):
    await asked(identity=ALICE, resource_context={"id": "42"})
    check = await asked()
    assert check.identity.type is IdentityType.NONE
    assert check.resource == {}


async def test_aserto_identities_are_accepted(asked):
    given = aserto.client.Identity(AsertoIdentityType.IDENTITY_TYPE_SUB, "alice")
    assert (await asked(identity=given)).identity == Identity(IdentityType.SUB, "alice")


async def test_a_resource_context_arrives_as_its_json(asked):
    check = await asked(
        resource_context={
            "text": "ünïcödé",
            "yes": True,
            "no": False,
            "nothing": None,
            "int": 3,
            "float": 2.5,
            "list": [1, "two", None, [True]],
            "tuple": ("a", ("b",), {"c": ("d",)}),
            "mapping": {"owner": {"groups": ("x", "y")}, "empty": {}},
            "empty": [],
        }
    )
    assert check.resource == {
        "text": "ünïcödé",
        "yes": True,
        "no": False,
        "nothing": None,
        "int": 3,
        "float": 2.5,
        "list": [1, "two", None, [True]],
        "tuple": ["a", ["b"], {"c": ["d"]}],
        "mapping": {"owner": {"groups": ["x", "y"]}, "empty": {}},
        "empty": [],
    }
    # In Python True == 1, in Rego they differ.
    assert check.resource["yes"] is True
    assert check.resource["list"][3][0] is True


async def test_sending_a_resource_context_does_not_change_it(asked):
    context = {"a": {"b": (1, [2])}}
    await asked(resource_context=context)
    assert context == {"a": {"b": (1, [2])}}


async def test_the_label_of_a_policy_instance_is_its_name_unless_given(asked):
    check = await asked(policy_instance_name="app")
    assert (check.policy_instance_name, check.policy_instance_label) == ("app", "app")
    check = await asked(policy_instance_label="stable")
    assert (check.policy_instance_name, check.policy_instance_label) == ("", "stable")
    check = await asked()
    assert (check.policy_instance_name, check.policy_instance_label) == ("", "")


# -- the other six calls


@pytest.mark.parametrize(
    "separator, paths",
    [
        (None, ("app.DELETE.documents", "app.GET.documents")),
        ("DOT", ("app.DELETE.documents", "app.GET.documents")),
        ("SLASH", ("app/DELETE/documents", "app/GET/documents")),
    ],
)
async def test_decision_tree_returns_all_policies_below_a_path(
    conn, seen, separator, paths
):
    tree = await conn.decision_tree(
        policy_path="app",
        decisions=["allowed", "visible"],
        identity=ALICE,
        resource_context={"id": "42"},
        policy_instance_name="app",
        policy_instance_label="stable",
        policy_path_separator=separator,
        timeout=10,
    )
    assert tree == {
        paths[0]: {"allowed": False, "visible": True},
        paths[1]: {"allowed": True, "visible": False},
    }
    assert seen[-1].identity == ALICE
    assert seen[-1].resource == {"id": "42"}
    assert seen[-1].policy_instance_name == "app"
    assert seen[-1].policy_instance_label == "stable"


async def test_query_evaluates_with_its_input(conn, seen):
    response = await conn.query(
        query="x = data.app.GET.documents",
        input='{"resource": {"id": "7"}}',
        policy_path="app.GET.documents",
        decisions=("allowed",),
        identity=ALICE,
        policy_instance_name="app",
        policy_instance_label="stable",
        options=QueryOptions(metrics=True),
        timeout=10,
    )
    result = MessageToDict(response.response)["result"]
    assert result[0]["bindings"] == {"x": {"allowed": True, "visible": False}}
    assert seen[-1].identity == ALICE
    assert seen[-1].resource == {"id": "7"}
    assert seen[-1].policy_instance_name == "app"
    assert seen[-1].policy_instance_label == "stable"


async def test_a_query_needs_only_the_query(conn, seen):
    response = await conn.query(
        query="x = data.app.GET.documents", resource_context={"id": "42"}
    )
    assert MessageToDict(response.response)["result"][0]["bindings"]["x"]["allowed"]
    assert seen[-1].resource == {"id": "42"}
    assert seen[-1].identity.type is IdentityType.NONE


async def test_compile_evaluates_the_known_part(conn, seen):
    response = await conn.compile(
        query="data.app.GET.documents.allowed == true",
        input="{}",
        unknowns=["input.resource"],
        disable_inlining=["data.x"],
        policy_path="app.GET.documents",
        decisions=("allowed",),
        identity=ALICE,
        resource_context={"id": "42"},
        policy_instance_name="app",
        policy_instance_label="stable",
        options=QueryOptions(metrics=True),
        timeout=10,
    )
    assert MessageToDict(response.result) == {"queries": [[]]}
    assert seen[-1].identity == ALICE
    assert seen[-1].resource == {"id": "42"}
    never = await conn.compile(query="data.app.DELETE.documents.allowed == true")
    assert MessageToDict(never.result) == {}


async def test_policies_are_listed_and_fetched_by_id(conn):
    listed = await conn.list_policies(
        policy_instance_name="app", policy_instance_label="stable", timeout=10
    )
    ids = {module.id for module in listed.result}
    assert ids == {"app.GET.documents", "app.DELETE.documents"}
    got = await conn.get_policy(
        id="app.GET.documents",
        policy_instance_name="app",
        policy_instance_label="stable",
        timeout=10,
    )
    assert got.result.id == "app.GET.documents"
    code = await status_raised(conn.get_policy(id="app.GET.nothing"))
    assert code is grpc.StatusCode.NOT_FOUND


async def test_info_returns_the_version(conn, authorizer):
    assert (await conn.info(timeout=10)).version == "embedded"
    # The first call was the probe of the new connection.
    assert authorizer.calls == {"Info": 2}


# -- timeout


async def test_a_timeout_is_deadline_exceeded(conn, authorizer):
    authorizer.delay = 30
    path = {"policy_path": "app.GET.documents"}
    with anyio.fail_after(PATIENCE):
        for call in (
            conn.decisions(**path, timeout=0.05),
            conn.decision_tree(**path, timeout=0.05),
            conn.query(query="x = data.app", timeout=0.05),
            conn.compile(query="data.app", timeout=0.05),
            conn.list_policies(timeout=0.05),
            conn.get_policy(id="app", timeout=0.05),
            conn.info(timeout=0.05),
            conn.call(INFO, b"", timeout=0.05),
            conn.info(timeout=0),
        ):
            assert await status_raised(call) is grpc.StatusCode.DEADLINE_EXCEEDED
    # This excludes the pool's own probe after several unanswered calls.
    await eventually(lambda: authorizer.streams <= 1)


@pytest.mark.parametrize("timeout", [1e9, 1e12, 1e300], ids=str)
async def test_a_huge_timeout_does_not_overflow_to_a_short_one(conn, timeout):
    assert (await conn.info(timeout=timeout)).version == "embedded"


@pytest.mark.parametrize(
    "timeout, error",
    [
        (-1, ValueError),
        (-0.001, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (True, TypeError),
        ("1", TypeError),
        (10**400, ValueError),
    ],
    ids=lambda value: str(value)[:8],
)
async def test_a_timeout_must_be_a_valid_duration(conn, authorizer, timeout, error):
    with pytest.raises(error, match="timeout"):
        await conn.info(timeout=timeout)
    with pytest.raises(error, match="timeout"):
        await conn.decisions(policy_path="app.GET.documents", timeout=timeout)
    assert authorizer.calls == FIRST_PROBE
    assert (await conn.info()).version == "embedded"


# -- credentials


async def test_the_api_key_and_the_tenant_are_sent_with_every_call(guarded, seen):
    pool = ConnectionPool(min_connections=0)
    pool.configure(guarded.options)
    async with pool, pool.acquire() as conn:
        for _ in range(2):
            assert await conn.decisions(policy_path="app.GET.documents")
        assert await conn.list_policies()
    for check in seen:
        assert check.metadata["authorization"] == f"basic {SECRET}"
        assert check.metadata["aserto-tenant-id"] == "tenant-1"
        assert check.metadata["user-agent"].startswith("fastapi-topaz/")


@pytest.mark.parametrize(
    "changes, code",
    [
        ({"api_key": "another"}, "UNAUTHENTICATED"),
        ({"api_key": None}, "UNAUTHENTICATED"),
        ({"tenant_id": "another"}, "PERMISSION_DENIED"),
        ({"tenant_id": None}, "PERMISSION_DENIED"),
    ],
    ids=str,
)
async def test_wrong_credentials_raise_the_error_of_the_server(guarded, changes, code):
    pool = ConnectionPool(min_connections=0)
    pool.configure(attrs.evolve(guarded.options, **changes))
    async with pool, pool.acquire() as conn:
        refused = await status_raised(conn.decisions(policy_path="app.GET.documents"))
        assert refused.name == code
        # A rejected caller has a healthy connection.
        assert (await conn.info()).version == "embedded"
    assert guarded.connections_accepted == 1


async def test_a_server_without_credentials_ignores_them(authorizer):
    pool = ConnectionPool(min_connections=0)
    pool.configure(attrs.evolve(authorizer.options, api_key=SECRET, tenant_id="t"))
    async with pool, pool.acquire() as conn:
        assert await conn.decisions(policy_path="app.GET.documents")


async def test_metadata_of_a_call_is_sent_beside_the_credentials(guarded, seen):
    pool = ConnectionPool(min_connections=0)
    pool.configure(guarded.options)
    async with pool, pool.acquire() as conn:
        await conn.call(INFO, b"", metadata=[("x-request-id", "abc")])
        await conn.decisions(policy_path="app.GET.documents")
    # The metadata of one call does not carry over to the next.
    assert "x-request-id" not in seen[-1].metadata


# -- call()


async def test_call_carries_bytes_without_a_serializer(conn):
    answer = await conn.call(INFO, b"", timeout=10, metadata=[("x-a", "b")])
    assert isinstance(answer, bytes)
    assert b"embedded" in answer


async def test_call_reaches_any_other_service(conn):
    code = await status_raised(conn.call("/grpc.health.v1.Health/Check", b""))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert (await conn.info()).version == "embedded"


async def test_call_uses_the_serializers_it_is_given(conn):
    for suffix in ("one", "two"):
        answer = await conn.call(
            INFO,
            "",
            request_serializer=str.encode,
            response_deserializer=lambda data, suffix=suffix: (len(data), suffix),
        )
        assert answer[0] > 0
        assert answer[1] == suffix


async def test_a_serializer_error_is_not_sent_as_an_empty_request(conn, authorizer):
    def broken(request):
        raise KeyError("cannot serialize")

    with pytest.raises(KeyError, match="cannot serialize"):
        await conn.call(INFO, "x", request_serializer=broken)
    assert authorizer.calls == FIRST_PROBE
    assert (await conn.info()).version == "embedded"


async def test_a_deserializer_error_reaches_the_caller(conn):
    def broken(data):
        raise KeyError("cannot read")

    with pytest.raises(KeyError, match="cannot read"):
        await conn.call(INFO, b"", response_deserializer=broken)
    assert (await conn.info()).version == "embedded"


async def test_an_undecodable_answer_is_an_error(conn):
    from google.protobuf.message import DecodeError

    with pytest.raises(DecodeError):
        await conn.call(
            INFO,
            b"",
            response_deserializer=lambda data: IsResponse.FromString(b"\xff" + data),
        )


@pytest.mark.parametrize("request_", ["text", None, 5], ids=repr)
async def test_a_request_without_a_serializer_must_be_bytes(conn, authorizer, request_):
    with pytest.raises(TypeError, match="request"):
        await conn.call(INFO, request_)
    assert authorizer.calls == FIRST_PROBE
    assert (await conn.info()).version == "embedded"


@pytest.mark.parametrize("method", [None, 5, b"/a.B/C"], ids=repr)
async def test_a_method_must_be_a_full_method_name(conn, method):
    with pytest.raises(TypeError, match="method"):
        await conn.call(method, b"")
    assert (await conn.info()).version == "embedded"


@pytest.mark.parametrize(
    "metadata",
    [
        [("Upper-Case", "x")],
        [("x-line", "a\nb")],
        [("x-number", 5)],
        [("with space", "x")],
        "text",
        5,
    ],
    ids=repr,
)
async def test_unsendable_metadata_is_named(conn, authorizer, metadata):
    with pytest.raises((TypeError, ValueError), match="metadata"):
        await conn.call(INFO, b"", metadata=metadata)
    assert (await conn.info()).version == "embedded"


# -- after release


async def test_every_use_after_release_is_rejected(pool, authorizer):
    async with pool.acquire() as conn:
        await conn.info()
    before = authorizer.calls
    for use in (
        lambda: conn.decisions(policy_path="app.GET.documents"),
        lambda: conn.decision_tree(policy_path="app"),
        lambda: conn.query(query="x = data.app"),
        lambda: conn.compile(query="data.app"),
        conn.list_policies,
        lambda: conn.get_policy(id="app"),
        conn.info,
        lambda: conn.call(INFO, b""),
    ):
        with pytest.raises(PoolError, match="released"):
            await use()
    with pytest.raises(PoolError, match="released"):
        _ = conn.connection
    assert authorizer.calls == before
    # The next lease of the same connection is unaffected.
    async with pool.acquire() as other:
        assert await other.info()
        with pytest.raises(PoolError, match="released"):
            await conn.info()
    assert authorizer.connections_accepted == 1


# -- secrets


async def test_no_error_and_no_repr_holds_the_api_key_or_the_identity(guarded):
    identity = Identity(IdentityType.JWT, f"token-{SECRET}")
    pool = ConnectionPool(min_connections=0, max_retries=0)
    pool.configure(guarded.options)
    texts = [repr(identity), repr(guarded.options), repr(pool)]
    path = {"policy_path": "app.GET.documents", "identity": identity}

    async def collect(call):
        with pytest.raises(Exception) as caught:
            await call
        texts.extend([str(caught.value), repr(caught.value)])

    async with pool:
        async with pool.acquire() as conn:
            texts.append(repr(conn))
            texts.append(repr(conn.connection))
            await collect(conn.decisions(**path | {"policy_path": "unknown"}))
            await collect(conn.decisions(**path, resource_context={"a": {1}}))
            await collect(conn.decisions(**path | {"decisions": "x"}))
            await collect(conn.decisions(**path, timeout=-1))
            guarded.fail("UNAVAILABLE", "gone")
            await collect(conn.decisions(**path))
            guarded.heal()
            guarded.delay = 30
            await collect(conn.decisions(**path, timeout=0.05))
            guarded.heal()
        await collect(conn.decisions(**path))
        guarded.stop()
        pool.drain()

        async def acquire():
            async with pool.acquire(timeout=0.2) as conn:
                await conn.decisions(**path, timeout=0.2)

        await collect(acquire())
    assert len(texts) == 5 + 2 * 8
    for text in texts:
        assert SECRET not in text


async def test_infinite_timeouts_are_valid(authorizer):
    pool = ConnectionPool(
        min_connections=1,
        acquire_timeout=math.inf,
        max_idle_time=math.inf,
        idle_check_interval=math.inf,
        health_check_interval=math.inf,
        max_lifetime=math.inf,
        leak_threshold=math.inf,
        eager_init=True,
    )
    pool.configure(AuthorizerOptions(url=authorizer.url, insecure=True))
    with anyio.fail_after(PATIENCE):
        async with pool, pool.acquire() as conn:
            assert (await conn.info()).version == "embedded"
