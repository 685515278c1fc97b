"""The embedded authorizer and Topaz give the same answers to the same requests."""

from __future__ import annotations

import re

import grpc
import pytest
from aserto.authorizer.v2 import (
    AuthorizerStub,
    DecisionTreeOptions,
    DecisionTreeRequest,
    GetPolicyRequest,
    InfoRequest,
    PathSeparator,
)
from google.protobuf.json_format import MessageToDict

from fastapi_topaz import ConnectionPool, Identity, IdentityType
from fastapi_topaz.testing import EmbeddedAuthorizer
from kit.topaz import conformance
from kit.topaz.config import POLICIES
from kit.topaz.conformance import ALICES, LISTED, PACKAGES
from kit.topaz.server import MISSING, REAL, Topazd
from kit.topaz.twins import TWINS


pytestmark = pytest.mark.real_clock

REQUESTS = {
    "IsRequest": "Is",
    "DecisionTreeRequest": "DecisionTree",
    "QueryRequest": "Query",
    "CompileRequest": "Compile",
    "GetPolicyRequest": "GetPolicy",
}


@pytest.fixture(scope="module", params=["embedded", *(["topaz"] if REAL else [])])
def options(request, tmp_path_factory):
    """Where the authorizer that answers is."""
    if request.param == "embedded":
        with EmbeddedAuthorizer(TWINS, identities=()) as authorizer:
            yield authorizer.options
        return
    with Topazd([REAL], tmp_path_factory.mktemp("topaz")) as server:
        yield server.start().options
        print(server.log)  # noqa: T201  (shown with a failure)


@pytest.fixture
def stub(options):
    own = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(options.url, options=own) as channel:
        yield AuthorizerStub(channel)


def send(stub, request):
    return getattr(stub, REQUESTS[type(request).__name__])(request, timeout=10)


def cases(expected):
    return pytest.mark.parametrize("case", expected, ids=lambda case: case.name)


def decided(response):
    return [(item.decision, getattr(item, "is")) for item in response.decisions]


def test_the_conformance_suite_runs_against_topaz(tmp_path):
    if not REAL:
        pytest.skip(MISSING)
    with Topazd([REAL], tmp_path) as server:
        assert server.version()


# -- request by request ---------------------------------------------------------------


@cases(conformance.DECIDED)
def test_decisions(stub, case):
    assert decided(send(stub, case.request)) == case.decisions


@cases(conformance.REFUSED)
def test_invalid_requests_are_refused(stub, case):
    with pytest.raises(grpc.RpcError) as caught:
        send(stub, case.request)
    assert caught.value.code().name == case.code
    assert case.text in caught.value.details()


@cases(conformance.TREES)
def test_decision_trees(stub, case):
    response = send(stub, case.request)
    assert response.path_root == case.request.policy_context.path
    assert MessageToDict(response.path) == case.path


def test_a_decision_tree_with_slashes_as_separators(stub):
    request = DecisionTreeRequest()
    request.CopyFrom(conformance.tree("tree.POST"))
    slash = PathSeparator.PATH_SEPARATOR_SLASH
    request.options.CopyFrom(DecisionTreeOptions(path_separator=slash))
    response = send(stub, request)
    assert response.path_root == "conformance.tree.POST"
    assert list(response.path) == ["conformance/tree/POST/documents"]


@cases(conformance.QUERIES)
def test_queries(stub, case):
    response = send(stub, case.request)
    assert MessageToDict(response.response) == {"result": case.result}
    assert response.HasField("metrics")
    assert not response.trace
    assert not response.trace_summary


@cases(conformance.COMPILED)
def test_partial_evaluations(stub, case):
    response = send(stub, case.request)
    assert response.HasField("result")
    assert MessageToDict(response.result) == case.result


def test_policies(stub):
    listed = stub.ListPolicies(LISTED, timeout=10).result
    modules = {module.package_path: module for module in listed}
    assert modules.keys() == {f"data.conformance.{name}" for name in PACKAGES}
    assert len({module.id for module in listed}) == len(listed)
    for path, module in modules.items():
        assert f"package {path.removeprefix('data.')}\n" in module.raw
        assert not module.HasField("package_root")
        got = stub.GetPolicy(GetPolicyRequest(id=module.id), timeout=10)
        assert got.result == module


def test_info(stub):
    info = stub.Info(InfoRequest(), timeout=10)
    assert info.version
    assert info.commit
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", info.date)
    assert info.os in {"linux", "darwin"}
    assert info.arch in {"amd64", "arm64"}


def test_the_health_service_is_not_on_the_authorizer_port(options):
    with grpc.insecure_channel(options.url) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        with pytest.raises(grpc.RpcError) as caught:
            check(b"", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# -- through the pool -----------------------------------------------------------------


@pytest.fixture
async def conn(options, anyio_backend):
    pool = ConnectionPool(min_connections=0)
    pool.configure(options)
    async with pool, pool.acquire() as lease:
        yield lease


async def test_all_calls_work_through_the_pool(conn):
    alice = Identity(IdentityType.MANUAL, "alice")
    assert await conn.decisions(policy_path="conformance.identity", identity=alice) == {
        "allowed": True
    }
    assert await conn.decisions(
        policy_path="conformance.resource", resource_context=ALICES
    ) == {"allowed": True}
    assert await conn.decision_tree(
        policy_path="conformance.tree.POST", policy_path_separator="SLASH"
    ) == {"conformance/tree/POST/documents": {"allowed": False}}
    answer = await conn.query(query="x = data.conformance.allow.allowed")
    assert MessageToDict(answer.response)["result"][0]["bindings"] == {"x": True}
    answer = await conn.compile(query="data.conformance.allow.allowed == true")
    assert MessageToDict(answer.result) == {"queries": [[]]}
    modules = (await conn.list_policies()).result
    assert len(modules) == len(PACKAGES)
    assert (await conn.get_policy(id=modules[0].id)).result == modules[0]
    assert (await conn.info()).version


async def test_an_answer_without_the_decision_is_an_error_in_the_pool(conn):
    # Topaz returns this if a decision is not a boolean.
    for names in (("allowed",), ("visible", "allowed")):
        with pytest.raises(grpc.aio.AioRpcError, match="requested decision") as caught:
            await conn.decisions(policy_path="conformance.odd", decisions=names)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
    visible = await conn.decisions(policy_path="conformance.odd", decisions=["visible"])
    assert visible == {"visible": True}


@pytest.mark.parametrize(
    "question, code",
    [
        ({"policy_path": "conformance.nowhere"}, "INVALID_ARGUMENT"),
        (
            {"policy_path": "conformance.fails", "resource_context": ALICES},
            "INVALID_ARGUMENT",
        ),
        (
            {
                "policy_path": "conformance.allow",
                "identity": Identity(IdentityType.SUB, "mallory"),
            },
            "NOT_FOUND",
        ),
    ],
)
async def test_error_statuses_are_raised_through_the_pool(conn, question, code):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await conn.decisions(**question)
    assert caught.value.code().name == code
    # Error statuses are answers: the connection stays usable.
    assert (await conn.decisions(policy_path="conformance.allow"))["allowed"] is True


# -- the bundle and its Python counterpart --------------------------------------------


def test_each_package_of_the_bundle_has_a_python_counterpart():
    texts = [path.read_text() for path in POLICIES.rglob("*.rego")]
    packages = {re.search(r"^package (\S+)$", text, re.MULTILINE)[1] for text in texts}
    assert packages == TWINS.keys() == {f"conformance.{name}" for name in PACKAGES}
    # OPA before and after 1.0 accepts this, whichever version a release of Topaz
    # contains.
    assert all("\nimport rego.v1\n" in text for text in texts)
