"""
Any argument of a call gives an answer or a clear error, and the next call is answered.

The arguments are sent to a connector in memory, in virtual time, and with fewer
examples to a real authorizer. `--hypothesis-profile=deep` runs forty times as many.
"""

# ruff: noqa: PT017  (an answer and an error are both valid)

from __future__ import annotations

import re

import anyio
import grpc
import pytest
from aserto.authorizer.v2 import InfoResponse, QueryOptions
from fastapi import APIRouter
from hypothesis import given
from hypothesis import strategies as st

from fastapi_topaz import (
    ConnectionPool,
    Identity,
    IdentityType,
    PoolError,
)
from fastapi_topaz._app.routes import policy_path_of
from fastapi_topaz.testing import EmbeddedAuthorizer, FakeConnector
from kit.backends import backends
from kit.channels import INFO
from kit.fuzzing import (
    CLEAR,
    OwnError,
    assert_usable,
    examples,
    or_odd,
    run,
    scalars,
    texts,
)


pytestmark = pytest.mark.real_clock  # each example has its own loop

RESERVED = [
    "te",
    "host",
    "path",
    "grpc-timeout",
    "content-type",
    "grpc-encoding",
    "-bin",
]

paths = st.sampled_from(["a.b", "a"]) | texts
names = st.lists(st.sampled_from(["allowed", "b"]) | texts, max_size=3)
json = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
    ),
    max_leaves=8,
)
INSTANCE = {
    "policy_instance_name": st.none() | texts,
    "policy_instance_label": st.none() | texts,
    "timeout": st.none() | st.floats(0.001, 10),
}
SUBJECT = {
    **INSTANCE,
    "policy_path": paths,
    "decisions": names | names.map(tuple),
    "identity": st.none()
    | st.builds(Identity, st.just(IdentityType.SUB), st.just("x")),
    "resource_context": st.none() | st.dictionaries(texts, json, max_size=4),
}
QUERY = {
    **SUBJECT,
    "query": st.sampled_from(["x = data.a", "data.a"]) | texts,
    "input": st.sampled_from(["{}", "[" * 5000]) | texts,
    "options": st.none() | st.just(QueryOptions(metrics=True)),
}
pairs = st.tuples(
    st.sampled_from(["x", *RESERVED]) | texts, texts | st.binary(max_size=9)
)
ARGUMENTS = {
    "decisions": (["policy_path"], SUBJECT),
    "decision_tree": (
        ["policy_path"],
        {**SUBJECT, "policy_path_separator": st.sampled_from([None, "DOT", "SLASH"])},
    ),
    "query": (["query"], QUERY),
    "compile": (["query"], {**QUERY, "unknowns": names, "disable_inlining": names}),
    "list_policies": ([], INSTANCE),
    "get_policy": (["id"], {**INSTANCE, "id": texts}),
    "info": ([], {"timeout": INSTANCE["timeout"]}),
    "call": (
        ["method", "request"],
        {
            "method": st.sampled_from([INFO, "", "/", "/a/b\n", "/" + "a" * 20_000])
            | texts,
            "request": st.binary(max_size=20),
            "timeout": INSTANCE["timeout"],
            "metadata": st.lists(pairs, max_size=3) | st.just(()),
            "request_serializer": st.none() | st.just(bytes),
            "response_deserializer": st.none() | st.just(InfoResponse.FromString),
        },
    ),
}


def one_call(name):
    needed, known = ARGUMENTS[name]
    given = {key: or_odd(usual) for key, usual in known.items()}
    return st.tuples(
        st.just(name),
        st.fixed_dictionaries({key: given.pop(key) for key in needed}, optional=given),
    )


any_call = st.sampled_from(sorted(ARGUMENTS)).flatmap(one_call)


async def asked(conn, name, arguments):
    """Make the call; it must end in one of the documented ways."""
    try:
        with anyio.fail_after(30):
            await getattr(conn, name)(**arguments)
    except TimeoutError:
        # From a connector in memory: a real server does not answer this way.
        assert isinstance(arguments.get("timeout"), int | float)
    except (*CLEAR, PoolError, grpc.aio.AioRpcError, OwnError) as error:
        assert str(error) or isinstance(error, OwnError)


async def answers(conn):
    reply = await conn.info(timeout=20)
    assert isinstance(reply, InfoResponse)


@backends
@examples(100)
@given(call=any_call)
def test_any_argument_of_a_call_leaves_the_lease_usable(backend, call):
    connector = FakeConnector(answer=lambda _method, _request: b"")

    async def use():
        async with ConnectionPool(connector=connector, min_connections=0) as pool:
            async with pool.acquire() as conn:
                await asked(conn, *call)
                await answers(conn)
            await assert_usable(pool)
            assert all(not conn.closed for conn in connector.connections)

    run(backend, use)


@pytest.fixture(scope="module")
def authorizer():
    with EmbeddedAuthorizer(lambda _check: True) as running:
        yield running


@backends
@examples(25)
@given(calls=st.lists(any_call, min_size=1, max_size=8))
def test_any_argument_of_a_call_to_a_server_leaves_the_connection_usable(
    backend, authorizer, calls
):
    async def use():
        pool = ConnectionPool(min_connections=0, max_connections=1)
        pool.configure(authorizer.options)
        async with pool:
            async with pool.acquire() as conn:
                for call in calls:
                    await asked(conn, *call)
                    await answers(conn)
            await assert_usable(pool)
            # None of the calls has broken the connection.
            assert pool._counters.connects == 1

    anyio.run(use, backend=backend)
    assert authorizer.streams == 0


@pytest.mark.parametrize("metadata", [None, 0])
async def test_empty_metadata_is_accepted_with_and_without_a_span(metadata):
    from opentelemetry.sdk.trace import TracerProvider

    connector = FakeConnector(answer=lambda _method, _request: b"")
    tracer = TracerProvider().get_tracer("test")
    async with ConnectionPool(connector=connector) as pool, pool.acquire() as conn:
        assert await conn.call(INFO, b"", metadata=metadata) == b""
        with tracer.start_as_current_span("span"):
            assert await conn.call(INFO, b"", metadata=metadata) == b""


@pytest.mark.parametrize("name", ["decisions", "query", "info"])
async def test_a_garbage_answer_raises_a_documented_error(name):
    connector = FakeConnector(answer=lambda _method, _request: b"\xff\xff")
    async with ConnectionPool(connector=connector) as pool, pool.acquire() as conn:
        arguments = {"decisions": {"policy_path": "a"}, "query": {"query": "data.a"}}
        with pytest.raises((*CLEAR, PoolError, grpc.RpcError)):
            await getattr(conn, name)(**arguments.get(name, {}))


# -- routes ---------------------------------------------------------------------------

segments = st.one_of(
    st.sampled_from(
        ["a", "a.b", ".", "..", "", "{id}", "{id:int}", "x{id}y", "{p:path}"]
    ),
    st.sampled_from(["__id", "{é}", "%2F", "a b", "\0", "-"]),
    st.text(max_size=4).filter(lambda text: not {"/", "{", "}"} & set(text)),
)


@examples(300)
@given(parts=st.lists(segments, max_size=5), method=st.sampled_from(["GET", "POST"]))
def test_the_policy_path_of_any_route_has_its_own_root_and_method(parts, method):
    router = APIRouter()
    try:
        router.add_api_route("/" + "/".join(parts), dict, methods=[method])
    except Exception:  # noqa: BLE001  (a route that FastAPI refuses is not a route)
        return
    template = router.routes[0].path_format
    path = policy_path_of("my.app", method, template)
    assert path.startswith(f"my.app.{method}")
    assert not re.search(r"[/{}]", path)
    # Paths that differ only by a slash are the same resource; other paths differ.
    assert policy_path_of("my.app", method, template.rstrip("/") + "/") == path
    assert policy_path_of("my.app", method, template + "/x") == path + ".x"
