"""Test that the authorizer gets only a Rego reference and a name, never other Rego."""

from __future__ import annotations

import contextlib
import datetime as dt
import enum
import json
import math
import re

import anyio
import grpc
import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from fastapi_topaz import (
    AuthorizerOptions,
    Identity,
    IdentityType,
    TopazConfig,
    require_policy_allowed,
)
from fastapi_topaz._authorizer.messages import Subject, is_request
from fastapi_topaz._authorizer.rego import KEYWORDS, check_name, check_reference, join


# If sent unchanged, each text turns a denial into an allow or into another question.
INJECTIONS = [
    "myapp.GET.x.allowed == false #",
    "myapp.GET.x.allowed == false\n#",
    "myapp.GET.x; true; y",
    "myapp.GET.x.allowed = false; x = true #",
    "myapp.GET.x == y",
    "myapp.GET.x with input as {}",
    "myapp.GET.x | true",
    "myapp.GET.x { true }",
    "myapp.GET.x[_]",
    "myapp.GET.x[y]",
    "myapp.GET.x[0]",
    "myapp.GET[input.role].x",
    'myapp.GET["x" == "x"]',
    'myapp.GET["x", "y"]',
    "myapp.GET[`x`]",
    "myapp.GET['x']",
    'myapp.GET["x]',
    'myapp.GET["\n"].x',
    'myapp.GET["\\x41"]',
    "myapp.GET.x()",
    "myapp-admin",
    "myapp.GET-x",
    "myapp/GET/x",
    "myapp..x",
    ".myapp",
    "myapp.",
    "myapp .x",
    " myapp.x",
    "myapp.x ",
    "myapp.x\n",
    "myapp.x\x00",
    "myapp.x\u2028",
    "myapp.\uff58",
    "myapp.é",
    "myapp.1x",
    "myapp.not.x",
    "not.x",
    "true",
    '["myapp"].x',
    'myapp.["x"]',
    "*",
    "{}",
    "[]",
    "#",
    "",
    " ",
]
REFERENCES = [
    "myapp",
    "myapp.GET.documents.__id",
    'myapp.GET["user-profiles"].__id',
    'myapp["in"]["a.b"]["é"]["\\u00e9"]["a\\"b\\\\"][""]',
    "data.input._x9",
]
NAMES = ["allowed", "_", "Visible2"]
ANONYMOUS = Identity(IdentityType.NONE)
UUID = "0f8fad5b-d9cb-469f-a165-70867728950e"


def rego_config(root="myapp", **options):
    return TopazConfig(
        authorizer_options=options.pop("authorizer_options", AuthorizerOptions()),
        policy_path_root=root,
        identity_provider=lambda _request: ANONYMOUS,
        **options,
    )


@pytest.mark.parametrize("path", INJECTIONS)
def test_a_path_that_is_not_a_rego_reference_is_rejected_and_shown(path):
    calls = [
        lambda: is_request(path, ("allowed",), None, None, None, None),
        lambda: Subject(policy_path=path).decision_tree_request(None),
        lambda: rego_config(path),
        lambda: require_policy_allowed(rego_config(), path),
    ]
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        assert re.match(
            "policy_path(_root)? must be a Rego reference", str(caught.value)
        )
        assert repr(path) in str(caught.value)


@pytest.mark.parametrize("path", REFERENCES)
def test_rego_references_are_accepted(path):
    assert check_reference("policy_path", path) == path
    assert rego_config(path).policy_path_root == path
    assert path.encode() in is_request(path, ("allowed",), None, None, None, None)


@pytest.mark.parametrize("name", [*INJECTIONS, "a.b", 'a["b"]', *sorted(KEYWORDS)])
def test_a_decision_that_is_not_a_rego_name_is_rejected_and_shown(name):
    for decisions in ((name,), ("allowed", name), [name]):
        calls = [
            lambda d=decisions: is_request("myapp.x", d, None, None, None, None),
            lambda d=decisions: Subject(
                policy_path="myapp.x", decisions=d
            ).decision_tree_request(None),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="must be a Rego name") as caught:
                call()
            assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_rego_names_are_accepted(name):
    assert check_name("decisions", name) == name


@pytest.mark.parametrize("value", [None, 7, b"myapp.x", ["myapp"], object()])
def test_a_path_and_a_decision_must_be_str(value):
    for check in (check_reference, check_name):
        with pytest.raises(TypeError, match="policy_path must be a str"):
            check("policy_path", value)


def test_a_long_value_is_shown_shortened():
    with pytest.raises(ValueError) as caught:
        check_reference("policy_path", "x " * 100_000)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("wrong", ["query", "compile"])
def test_a_query_may_be_any_rego(wrong):
    subject = Subject(policy_path="my-app", decisions=("a.b",))
    rego = 'data.myapp.GET.x with input as {"a": [1, 2]}; true'
    if wrong == "query":
        assert subject.query_request(rego, "", None).query == rego
    else:
        assert subject.compile_request(rego, "", (), (), None).query == rego


class Liar(str):
    """A str that claims to be equal to another text."""

    __slots__ = ()

    def __eq__(self, other):
        return True

    def __hash__(self):
        return hash("myapp.x")


def test_a_str_subclass_posing_as_a_reference_is_rejected():
    is_request("myapp.x", ("allowed",), None, None, None, None)
    with pytest.raises(ValueError):
        is_request(Liar("x; true"), ("allowed",), None, None, None, None)
    with pytest.raises(ValueError):
        is_request("myapp.x", (Liar("a == b"),), None, None, None, None)


@given(
    st.lists(
        st.text(max_size=8).filter(lambda s: s.encode(errors="ignore").decode() == s)
    )
)
def test_any_segments_make_a_reference_to_exactly_them(segments):
    path = join("myapp", *segments)
    assert check_reference("policy_path", path) == path
    assert [*parts_of(path)] == ["myapp", *segments]


def parts_of(path):
    """
    Yield the parts of a reference, parsed with another grammar than the checked one.
    """
    rest = path
    while rest:
        if rest.startswith("["):
            part, end = json.JSONDecoder().raw_decode(rest[1:])
            assert isinstance(part, str)
            assert rest[1 + end] == "]"
            rest = rest[end + 2 :]
        else:
            part = re.match(r"\w+", rest.removeprefix("."), re.ASCII)[0]
            assert not part[0].isdigit()
            assert part not in KEYWORDS
            assert rest[0] == "." or rest is path
            rest = rest.removeprefix(".")[len(part) :]
        yield part


# -- through the application ----------------------------------------------------------

fragments = st.sampled_from(
    [
        *("myapp", "x", ".", "allowed", "denied", "[", "]", '"', "\\", "==", "false"),
        *(
            "#",
            "\n",
            " ",
            ";",
            "true",
            ":=",
            "not ",
            "{",
            "}",
            "(",
            "é",
            "0",
            "-",
            "with",
        ),
    ]
)
hostile = st.lists(fragments, max_size=7).map("".join) | st.sampled_from(INJECTIONS)
pairs = st.tuples(hostile, st.sampled_from(NAMES) | hostile) | st.tuples(
    st.sampled_from(REFERENCES), hostile | st.sampled_from(NAMES)
)


def request_of():
    return Request({"type": "http", "method": "GET", "path": "/", "path_params": {}})


async def answers_to(config, path, decision):
    """Return the answer of each way to check, without rejected ones."""
    said = []
    with contextlib.suppress(ValueError):
        answer = await config.is_allowed(request_of(), path, decision=decision)
        said.append(answer)
    async with config.connection_pool.acquire() as conn:
        asked = {"policy_path": path, "decisions": [decision]}
        with contextlib.suppress(ValueError, grpc.aio.AioRpcError):
            said.append((await conn.decisions(**asked))[decision])
        with contextlib.suppress(ValueError, grpc.aio.AioRpcError):
            tree = await conn.decision_tree(**asked)
            said += [each[decision] for each in tree.values()]
    return said


@pytest.mark.real_clock
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(pairs=st.lists(pairs, min_size=10, max_size=10))
def test_no_text_leads_to_a_question_about_another_policy(
    backend, pairs, embedded_authorizer
):
    """Check 250 pairs of a path and a decision. Each is denied or not answered."""
    heard = set()

    def policies(check):
        heard.add(check.policy_path)
        return {"allowed": False, "denied": False}

    embedded_authorizer.policies = policies
    config = rego_config(authorizer_options=embedded_authorizer.options)

    async def ask_all():
        async with config.connection_pool:
            for path, decision in pairs:
                answers = []
                with contextlib.suppress(grpc.aio.AioRpcError):
                    answers = await answers_to(config, path, decision)
                assert True not in answers

    anyio.run(ask_all, backend=backend)
    assert heard <= {path for path, _ in pairs}
    for path in heard:
        assert [*parts_of(path)]
    event(f"asked: {len(heard) > 0}")


@pytest.mark.costly
@pytest.mark.real_clock
@pytest.mark.parametrize("path", INJECTIONS)
async def test_an_injection_sends_no_request(path, embedded_authorizer):
    config = rego_config(authorizer_options=embedded_authorizer.options)
    async with config.connection_pool as pool:
        with pytest.raises(ValueError, match="policy_path"):
            await config.is_allowed(request_of(), path)
        with pytest.raises(ValueError, match="decision"):
            await config.is_allowed(request_of(), "myapp.x", decision=path)
        async with pool.acquire() as conn:
            for call in (conn.decisions, conn.decision_tree):
                with pytest.raises(ValueError, match="policy_path"):
                    await call(policy_path=path)
                with pytest.raises(ValueError, match="decisions"):
                    await call(policy_path="myapp.x", decisions=[path])
    assert embedded_authorizer.calls["Is"] == 0
    assert embedded_authorizer.calls["DecisionTree"] == 0


# -- path parameters ------------------------------------------------------------------


@pytest.mark.real_clock
@pytest.mark.parametrize(
    "template, url, typed, text",
    [
        ("/{id:int}", "/007", 7, "7"),
        ("/{id:int}", f"/{2**53}", 2**53, str(2**53)),
        ("/{id:int}", f"/{2**53 + 1}", str(2**53 + 1), str(2**53 + 1)),
        ("/{id:float}", "/1.50", 1.5, "1.5"),
        ("/{id:float}", "/7", 7.0, "7.0"),
        ("/{id:float}", f"/{'9' * 400}", "inf", "inf"),
        ("/{id:uuid}", f"/{UUID}", UUID, UUID),
        ("/{id:path}", "/a/b", "a/b", "a/b"),
        # FastAPI converts this parameter only for the handler, not for the policy.
        ("/{id}", "/07", "07", "07"),
        ("/{id}", "/true", "true", "true"),
    ],
)
@pytest.mark.parametrize("mode", ["typed", "text", None])
def test_the_policy_receives_converted_path_parameters(
    template, url, typed, text, mode, embedded_authorizer
):
    seen = []

    def policies(check):
        seen.append(check.resource["id"])
        return True

    embedded_authorizer.policies = policies
    options = {} if mode is None else {"path_parameters": mode}
    config = rego_config(authorizer_options=embedded_authorizer.options, **options)
    guard = Depends(require_policy_allowed(config, "myapp.x"))
    app = FastAPI(lifespan=config.lifespan)

    @app.get(template, dependencies=[guard])
    async def handler():
        return None

    with TestClient(app) as client:
        assert client.get(url).status_code == 200
    expected = text if mode == "text" else typed
    assert seen == [expected]
    assert isinstance(seen[0], str) == isinstance(expected, str)


@pytest.mark.parametrize("value", ["number", "", None, True, "Typed"])
def test_an_unknown_value_of_path_parameters_is_rejected(value):
    with pytest.raises(ValueError, match="path_parameters must be 'typed' or 'text'"):
        rego_config(path_parameters=value)


async def test_only_integral_and_finite_numbers_are_sent_as_numbers():
    config = rego_config()
    request = request_of()

    class Number(enum.IntEnum):
        ONE = 1

    converted = {
        "yes": True,
        "one": Number.ONE,
        "nan": math.nan,
        "low": -(2**53),
        "lower": -(2**53) - 1,
        "none": None,
        "half": 0.5,
        "day": dt.date(2026, 1, 2),
    }
    request.scope["path_params"] = converted
    assert await config._resource(request) == {
        "yes": "True",
        "one": "1",
        "nan": "nan",
        "low": -(2**53),
        "lower": str(-(2**53) - 1),
        "none": "None",
        "half": 0.5,
        "day": "2026-01-02",
    }
