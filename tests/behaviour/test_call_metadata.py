"""Test the metadata of calls: `extra_metadata` of the options, `metadata` of a call."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest
from aserto.authorizer.v2 import Decision, IsResponse

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
)
from kit.configs import Requests
from kit.h2peer import SocketServer
from kit.secrets import KEY, assert_clean


pytestmark = [pytest.mark.real_clock, pytest.mark.uvloop]

SERVICE = "/aserto.authorizer.v2.Authorizer"
REQUEST = Requests({"type": "http", "headers": []})
ALLOWED = IsResponse(decisions=[Decision(decision="allowed", **{"is": True})])

CALLS = {
    "Is": ("decisions", {"policy_path": "app"}),
    "DecisionTree": ("decision_tree", {"policy_path": "app"}),
    "Query": ("query", {"query": "x = 1"}),
    "Compile": ("compile", {"query": "x = 1"}),
    "ListPolicies": ("list_policies", {}),
    "GetPolicy": ("get_policy", {"id": "x"}),
    "Info": ("info", {}),
}


def named(value):
    # The repr() of an iterator has its address, which differs between processes.
    return "an iterator" if hasattr(value, "__next__") else repr(value)


each_call = pytest.mark.parametrize("method", CALLS)

FORMS = {
    "list": list,
    "tuple": tuple,
    "grpc.aio": lambda pairs: grpc.aio.Metadata(*pairs),
}
PAIRS = [("x-user", "ann"), ("x-user", "bob"), ("x-raw-bin", b"\0\xff")]

# The metadata that cannot be sent, with the error.
BAD = [
    (KEY, TypeError),
    (3, TypeError),
    ({"authorization": KEY}, TypeError),
    (iter([("authorization", KEY)]), TypeError),
    ([("authorization", KEY, KEY)], TypeError),
    ([KEY], TypeError),
    ([(KEY.upper(), "x")], ValueError),
    ([("grpc-timeout", "1S")], ValueError),
    ([("te", KEY)], ValueError),
    ([("content-type", KEY)], ValueError),
    ([(":path", KEY)], ValueError),
    ([("", KEY)], ValueError),
    ([(3, KEY)], ValueError),
    ([("authorization", KEY + "\r\nx: y")], ValueError),
    ([("authorization", KEY + "\xe9")], ValueError),
    ([("authorization", KEY.encode())], TypeError),
    ([(KEY, 3)], TypeError),
    ([("x-key-bin", KEY)], TypeError),
]


def answer(server, number, _data):
    path = dict(server.headers[number])[":path"]
    server.answer(number, ALLOWED.SerializeToString() if path.endswith("/Is") else b"")


@pytest.fixture
def server():
    with SocketServer(answer) as running:
        yield running


def headers_of(server, method):
    path = (":path", f"{SERVICE}/{method}")
    each = [headers for peer in server.servers for headers in peer.headers.values()]
    return [headers for headers in each if path in headers]


def pool_of(transport):
    return ConnectionPool(transport=transport, min_connections=0, max_connections=1)


def pool_to(server, transport, **options):
    pool = pool_of(transport)
    pool.configure(AuthorizerOptions(url=server.url, insecure=True, **options))
    return pool


def config_to(server, transport, **options):
    return TopazConfig(
        authorizer_options=AuthorizerOptions(url=server.url, insecure=True, **options),
        policy_path_root="app",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
        connection_pool=pool_of(transport),
    )


# -- metadata of a call -------------------------------------------------------------


@pytest.mark.costly
@each_call
@pytest.mark.parametrize("form", FORMS)
async def test_each_call_takes_metadata_of_its_own(server, transport, method, form):
    name, arguments = CALLS[method]
    async with pool_to(server, transport, api_key="k") as pool, pool.acquire() as conn:
        ask = getattr(conn, name)
        await ask(**arguments, metadata=FORMS[form](PAIRS), timeout=20)
        await ask(**arguments, metadata=None, timeout=20)
        await ask(**arguments, timeout=20)
    sent, *others = headers_of(server, method)[-3:]
    assert [v for k, v in sent if k == "x-user"] == ["ann", "bob"]
    assert dict(sent)["x-raw-bin"].rstrip("=") == "AP8"
    assert dict(sent)["authorization"] == "basic k"
    assert len(others) == 2
    assert all(not {"x-user", "x-raw-bin"} & dict(each).keys() for each in others)


@pytest.mark.parametrize("name", ["is_allowed", "decide"])
@pytest.mark.parametrize("form", FORMS)
async def test_a_check_takes_metadata_of_its_own(server, transport, name, form):
    config = config_to(server, transport)
    async with config.connection_pool:
        ask = getattr(config, name)
        await ask(REQUEST, "app", metadata=FORMS[form](PAIRS))
        await ask(REQUEST, "app", metadata=None)
        await ask(REQUEST, "app")
    sent, *others = headers_of(server, "Is")
    assert [v for k, v in sent if k == "x-user"] == ["ann", "bob"]
    assert all("x-user" not in dict(each) for each in others)


async def test_a_repeated_check_sends_its_metadata_again(transport):
    def refuse_once(server, number, data):
        if headers_of(running, "Is") == [server.headers[number]]:
            server.h2.reset_stream(number, 7)  # REFUSED_STREAM
        else:
            answer(server, number, data)

    with SocketServer(refuse_once) as running:
        config = config_to(running, transport)
        async with config.connection_pool:
            assert await config.is_allowed(REQUEST, "app", metadata=PAIRS)
        first, second = headers_of(running, "Is")
        assert dict(first)["x-raw-bin"] == dict(second)["x-raw-bin"]


@pytest.mark.costly
@each_call
@pytest.mark.parametrize("wrong, kind", BAD, ids=named)
async def test_metadata_that_cannot_be_sent_is_named_and_not_shown(
    server, method, wrong, kind
):
    name, arguments = CALLS[method]
    async with pool_to(server, "native") as pool, pool.acquire() as conn:
        before = len(headers_of(server, method))
        with pytest.raises(kind, match=r"^metadata ") as caught:
            await getattr(conn, name)(**arguments, metadata=wrong)
        assert len(headers_of(server, method)) == before
    assert_clean(caught.value)


@pytest.mark.parametrize("name", ["is_allowed", "decide"])
@pytest.mark.parametrize("wrong, kind", BAD, ids=named)
async def test_metadata_of_a_check_that_cannot_be_sent_are_refused_before_it_waits(
    name, wrong, kind
):
    options = AuthorizerOptions(url="127.0.0.1:1", insecure=True)
    config = TopazConfig(
        authorizer_options=options,
        policy_path_root="app",
        identity_provider=lambda _request: Identity(IdentityType.NONE),
    )
    with pytest.raises(kind, match=r"^metadata ") as caught:
        await getattr(config, name)(REQUEST, "app", metadata=wrong)
    assert_clean(caught.value)


# -- extra_metadata -----------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
async def test_extra_metadata_are_sent_with_calls_and_probes(server, transport, form):
    extra = FORMS[form](PAIRS)
    options = {"extra_metadata": extra, "api_key": "k", "tenant_id": "t"}
    async with pool_to(server, transport, **options) as pool, pool.acquire() as conn:
        await conn.decisions(policy_path="app", metadata=[("x-user", "eve")])
    (call,) = headers_of(server, "Is")
    assert [v for k, v in call if k == "x-user"] == ["ann", "bob", "eve"]
    probe = headers_of(server, "Info")[0]
    assert [v for k, v in probe if k == "x-user"] == ["ann", "bob"]
    for headers in (call, probe):
        assert dict(headers)["authorization"] == "basic k"
        assert dict(headers)["aserto-tenant-id"] == "t"


@pytest.mark.parametrize("wrong, kind", BAD, ids=named)
def test_extra_metadata_that_cannot_be_sent_are_named_and_not_shown(wrong, kind):
    with pytest.raises(kind, match=r"^extra_metadata ") as caught:
        AuthorizerOptions(extra_metadata=wrong)
    assert_clean(caught.value)


@pytest.mark.parametrize(
    "option, key", [("api_key", "authorization"), ("tenant_id", "aserto-tenant-id")]
)
def test_extra_metadata_must_not_repeat_a_key_of_another_option(option, key):
    extra = [("x-other", "x"), (key, KEY)]
    with pytest.raises(ValueError, match=f"must not have the key '{key}'") as caught:
        AuthorizerOptions(extra_metadata=extra, **{option: KEY})
    assert_clean(caught.value)
    assert AuthorizerOptions(extra_metadata=extra).metadata == tuple(extra)


def test_options_keep_a_copy_of_extra_metadata_and_hide_it():
    extra = [["x-key", KEY]]
    options = AuthorizerOptions(extra_metadata=extra)
    extra[0][1] = extra.append(("x-other", "x"))
    assert options.extra_metadata == (("x-key", KEY),)
    assert options == AuthorizerOptions(extra_metadata=[("x-key", KEY)])
    assert hash(options) == hash(AuthorizerOptions(extra_metadata=[("x-key", KEY)]))
    assert options != AuthorizerOptions()
    assert KEY not in repr(options)
    assert AuthorizerOptions(extra_metadata=None).extra_metadata == ()
