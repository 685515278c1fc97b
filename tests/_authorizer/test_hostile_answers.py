"""
Test that a decision is true only if every part of the answer says so.

The answers are built here byte by byte, as protobuf messages with yes, no or unclear
decisions. `test_hostile_wire` does the same with HTTP/2 frames.
"""

from __future__ import annotations

import gzip
from collections import Counter

import grpc
import pytest
from aserto.authorizer.v2 import DecisionTreeResponse, IsResponse
from hypothesis import given
from hypothesis import strategies as st

from fastapi_topaz import (
    AuthorizerOptions,
    ConnectionPool,
    Identity,
    IdentityType,
    TopazConfig,
)
from fastapi_topaz._authorizer.messages import decision_tree_of, decisions_of
from fastapi_topaz.testing import FakeConnector
from kit.backends import backends
from kit.configs import POLICY, REQUEST
from kit.fuzzing import examples, run


pytestmark = pytest.mark.real_clock


# -- protobuf encoded by hand ------------------------------------------------------

VARINT, FIXED64, LENGTH, GROUP, END_GROUP, FIXED32 = range(6)


def varint(value, *, extra=0):
    """Encode *value* with *extra* redundant bytes."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    for _ in range(extra):
        out[-1] |= 128
        out.append(0)
    return bytes(out)


def field(number, kind, data):
    if kind == LENGTH:
        data = varint(len(data)) + data
    elif kind == GROUP:
        data += varint(number << 3 | END_GROUP)
    return varint(number << 3 | kind) + data


def name_of(text):
    return field(1, LENGTH, text if isinstance(text, bytes) else text.encode())


def says(value, *, extra=0):
    return field(2, VARINT, varint(value, extra=extra))


def entry(*fields):
    return field(1, LENGTH, b"".join(fields))


def decision(name, *values):
    return entry(name_of(name), *map(says, values))


YES, NO = decision("allowed", 1), decision("allowed", 0)
OTHER = decision("visible", 1)
NOTES = field(1000, LENGTH, b"of a newer authorizer") + field(1001, VARINT, b"\x05")


def test_the_hand_written_encoding_matches_protobuf():
    answer = IsResponse.FromString(YES + NO + OTHER + NOTES)
    said = [(one.decision, getattr(one, "is")) for one in answer.decisions]
    assert said == [("allowed", True), ("allowed", False), ("visible", True)]


# -- answers to Is -----------------------------------------------------------------

ALLOWED = {
    "yes": YES,
    "yes twice": YES + YES,
    "yes, said twice in one entry": decision("allowed", 1, 1),
    "yes beside others": OTHER + YES + decision("allowe", 0),
    "yes beside another that is both": OTHER + decision("visible", 0) + YES,
    "yes beside another that is not clear": entry(name_of("x"), says(2)) + YES,
    "yes beside another of another type": (
        entry(name_of("x"), field(2, LENGTH, b"\1")) + YES
    ),
    "yes beside unknown fields": NOTES + YES + NOTES,
    "yes with unknown fields": entry(name_of("allowed"), says(1), NOTES),
    "yes before its name": entry(says(1), name_of("allowed")),
    "yes in more bytes than needed": entry(name_of("allowed"), says(1, extra=8)),
    "yes among thousands": YES + OTHER * 5000,
}
DENIED = {
    "no": NO,
    "no that is not written": decision("allowed"),
    "yes and no": YES + NO,
    "no and yes": NO + YES,
    "yes, no and yes": YES + NO + YES,
    "no among many": YES * 40 + NO + YES * 40,
    "no among thousands": YES * 3000 + NO + YES * 3000,
    "no far from yes": YES + OTHER * 2000 + NO,
    "no before yes in one entry": decision("allowed", 0, 1),
    "yes before no in one entry": decision("allowed", 1, 0),
    "no and yes in two answers joined": NO + NOTES + YES + NOTES,
    "no that is not written, and yes": decision("allowed") + YES,
    "no in more bytes than needed": entry(name_of("allowed"), says(0, extra=3)) + YES,
    "no and what is not clear": entry(name_of("allowed"), says(2)) + NO + YES,
    "no of a name after another": entry(name_of("x"), name_of("allowed")) + YES,
}
UNCLEAR = {
    "nothing": b"",
    "only others": OTHER,
    "only unknown fields": NOTES,
    "another case": decision("Allowed", 1) + decision("ALLOWED", 1),
    "blanks around": decision(" allowed", 1) + decision("allowed ", 1),
    "a line end": decision("allowed\n", 1),
    "a NUL": decision("allowed\0", 1),
    "a letter of another alphabet": decision("аllowed", 1),  # noqa: RUF001
    "wide letters": decision("ａｌｌｏｗｅｄ", 1),  # noqa: RUF001
    "a soft hyphen": decision("al\xadlowed", 1),
    "a byte order mark": decision("\ufeffallowed", 1),
    "an empty name": decision("", 1),
    "no name": entry(says(1)),
    "an empty entry": entry(),
    "a part of the name": decision("allow", 1) + decision("allowed.x", 1),
    "two": entry(name_of("allowed"), says(2)),
    "the largest number": entry(name_of("allowed"), says(2**64 - 1)),
    "yes as text": entry(name_of("allowed"), field(2, LENGTH, b"\1")),
    "yes as 32 bits": entry(name_of("allowed"), field(2, FIXED32, b"\1\0\0\0")),
    "yes as 64 bits": entry(name_of("allowed"), field(2, FIXED64, b"\1" + bytes(7))),
    "yes as a group": entry(name_of("allowed"), field(2, GROUP, says(1))),
    "yes, and yes as text": entry(name_of("allowed"), says(1), field(2, LENGTH, b"")),
    "yes, and two": YES + entry(name_of("allowed"), says(2)),
    "yes of two names": entry(name_of("x"), name_of("allowed"), says(1)),
    "yes of two names, the other last": (
        entry(name_of("allowed"), name_of("x"), says(1)) + YES
    ),
    "a name as a number": entry(field(1, VARINT, b"\1"), says(1)) + YES,
    "an entry as a group": field(1, GROUP, name_of("allowed") + says(1)),
    "yes, and an entry as a group": YES + field(1, GROUP, name_of("allowed")),
    "yes, and an entry as a number": YES + field(1, VARINT, b"\1"),
    "a name that is not UTF-8": YES + entry(name_of(b"\xffallowed"), says(1)),
    "a name that is not UTF-8, before another": (
        entry(name_of(b"\xff"), name_of("allowed"), says(1))
    ),
    "an answer within an answer": field(1, LENGTH, YES),
    "a group that does not end": YES + varint(5 << 3 | GROUP),
    "a group that did not begin": YES + varint(5 << 3 | END_GROUP),
    "a field number 0": YES + b"\0",
    "a wire type that does not exist": YES + b"\x0f",
    "a number without an end": YES + b"\x10" + b"\xff" * 11,
    "an entry that is cut": YES + YES[:-1],
    "a tag at the end": YES + b"\x0a",
    "text": b"<html>allowed: true</html>",
    "JSON": b'{"decisions":[{"decision":"allowed","is":true}]}',
    "a gzip file": gzip.compress(YES),
    "NUL bytes": bytes(64),
    "too many": YES * 20_000,
}


@pytest.mark.parametrize("answer", ALLOWED.values(), ids=ALLOWED)
def test_a_clear_yes_allows(answer):
    assert decisions_of(answer, ("allowed",)) == {"allowed": True}


@pytest.mark.parametrize("answer", DENIED.values(), ids=DENIED)
def test_a_single_no_denies(answer):
    assert decisions_of(answer, ("allowed",)) == {"allowed": False}


@pytest.mark.parametrize("answer", UNCLEAR.values(), ids=UNCLEAR)
def test_an_answer_without_a_clear_decision_is_an_error(answer):
    with pytest.raises(grpc.aio.AioRpcError, match="the answer ") as caught:
        decisions_of(answer, ("allowed",))
    assert caught.value.code() is grpc.StatusCode.INTERNAL


def test_exactly_the_requested_decisions_are_returned():
    answer = YES + OTHER + decision("admin", 1)
    assert decisions_of(answer, ("visible",)) == {"visible": True}
    assert decisions_of(answer, ["visible", "allowed", "visible"]) == {
        "visible": True,
        "allowed": True,
    }
    assert decisions_of(answer, ()) == {}
    with pytest.raises(grpc.aio.AioRpcError, match="requested decision 'denied'"):
        decisions_of(answer, ("allowed", "denied"))


def test_a_cached_answer_is_decoded_again_for_another_question():
    answer = YES + decision("visible", 0)
    for _ in range(2):
        assert decisions_of(answer, ("allowed",)) == {"allowed": True}
        assert decisions_of(answer, ("visible",)) == {"visible": False}
        with pytest.raises(grpc.aio.AioRpcError):
            decisions_of(answer, ("admin",))
        with pytest.raises(grpc.aio.AioRpcError):
            decisions_of(YES + b"\0", ("allowed",))


def all_cut(answer):
    return [answer[:size] for size in range(len(answer))]


@pytest.mark.parametrize("answer", [NO + YES, decision("allowed", 0, 1)])
def test_a_truncated_answer_allows_nothing(answer):
    for part in all_cut(answer):
        try:
            assert decisions_of(part, ("allowed",)) == {"allowed": False}
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.INTERNAL  # noqa: PT017


names = st.sampled_from(["allowed", "Allowed", "allowed ", "visible", "", b"\xff"])
flags = st.sampled_from([0, 1, 1, 1, 2, 2**63])
odd = st.sampled_from(
    [
        NOTES,
        field(2, LENGTH, b"\1"),
        field(2, FIXED32, b"\1\0\0\0"),
        field(1, VARINT, b"\1"),
        field(3, GROUP, b""),
        b"\0",
        b"\x0a\x05x",
    ]
)
one_entry = st.tuples(
    st.lists(names, max_size=2), st.lists(flags, max_size=3), st.lists(odd, max_size=1)
)


def is_clear_yes(entries, rest):
    """Decode an answer in the simplest way, as an independent oracle."""
    about = [one for one in entries if "allowed" in one[0]]
    return (
        bool(about)
        and not rest
        and all(
            named == ["allowed"] and bits and set(bits) == {1} and set(more) <= {NOTES}
            for named, bits, more in about
        )
    )


@examples(400)
@given(
    entries=st.lists(one_entry, max_size=5),
    rest=st.sampled_from([b"", b"", b"", b"\0", b"\x0f", YES[:-1], b"\x08\x01"]),
    data=st.data(),
)
def test_any_answer_allows_only_if_all_its_decisions_are_yes(entries, rest, data):
    written = []
    for named, bits, more in entries:
        parts = [*map(name_of, named), *map(says, bits), *more]
        written.append(entry(*data.draw(st.permutations(parts))))
    answer = b"".join(written) + rest
    try:
        allowed = decisions_of(answer, ("allowed",))["allowed"]
    except grpc.aio.AioRpcError:
        allowed = None
    if allowed:
        assert is_clear_yes(entries, rest)
    elif is_clear_yes(entries, rest) and len(entries) == 1:
        assert allowed is True


@examples(300)
@given(st.binary(max_size=60), st.integers(0, 2))
def test_random_bytes_allow_nothing(answer, place):
    answer = [answer, NO + answer, answer + NO][place]
    try:
        assert decisions_of(answer, ("allowed",)) == {"allowed": False}
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.INTERNAL  # noqa: PT017


# -- answers to DecisionTree -------------------------------------------------------


def key(text):
    return field(1, LENGTH, text.encode())


def value(*fields):
    return field(2, LENGTH, b"".join(fields))


def struct(*entries):
    return b"".join(field(1, LENGTH, one) for one in entries)


def boolean(bit):
    return field(4, VARINT, varint(bit))


def policy(path, *entries):
    return key(path) + value(field(5, LENGTH, struct(*entries)))


def tree(*policies):
    return field(1, LENGTH, b"app") + field(3, LENGTH, struct(*policies))


T = key("allowed") + value(boolean(1))
F = key("allowed") + value(boolean(0))
V = key("visible") + value(boolean(1))

TREES = {
    "yes": (tree(policy("a", T)), {"a": {"allowed": True}}),
    "no": (tree(policy("a", F)), {"a": {"allowed": False}}),
    "others": (tree(policy("a", V, T)), {"a": {"allowed": True}}),
    "none": (tree(policy("a", V), policy("b", T)), {"a": {}, "b": {"allowed": True}}),
    "unknown fields": (
        tree(policy("a", T) + NOTES) + NOTES,
        {"a": {"allowed": True}},
    ),
    "no, then yes": (tree(policy("a", F, T)), {"a": {"allowed": False}}),
    "yes, then no": (tree(policy("a", T, F)), {"a": {"allowed": False}}),
    "no, then yes, in two parts": (
        tree(policy("a", F), policy("a", T)),
        {"a": {"allowed": False}},
    ),
    "no, then yes, in two trees": (
        tree(policy("a", F)) + tree(policy("a", T)),
        {"a": {"allowed": False}},
    ),
    "no, then yes, in one value": (
        tree(policy("a", key("allowed") + value(boolean(0), boolean(1)))),
        {"a": {"allowed": False}},
    ),
    "no, then yes, in two values": (
        tree(policy("a", key("allowed") + value(boolean(0)) + value(boolean(1)))),
        {"a": {"allowed": False}},
    ),
    "no, then yes, in two sets": (
        tree(
            key("a") + value(field(5, LENGTH, struct(F)), field(5, LENGTH, struct(T)))
        ),
        {"a": {"allowed": False}},
    ),
    "what is hidden by an entry without a name": (
        # The first field is as much shorter than in protobuf as the second one is
        # longer.
        tree(
            policy(
                "a", value(boolean(1)), key("allowed") + value(boolean(0), boolean(1))
            )
        ),
        {"a": {"allowed": False}},
    ),
    "what is hidden by a policy without a path": (
        tree(
            value(field(5, LENGTH, struct(V))),
            policy("a", key("allowed") + value(boolean(0), boolean(1))),
        ),
        {"": {}, "a": {"allowed": False}},
    ),
    "nothing": (b"", {}),
    "only unknown": (NOTES, {}),
}
BAD_TREES = {
    "a number": tree(policy("a", key("allowed") + value(field(2, FIXED64, bytes(8))))),
    "a text": tree(policy("a", key("allowed") + value(field(3, LENGTH, b"true")))),
    "null": tree(policy("a", key("allowed") + value(field(1, VARINT, b"\0")))),
    "a number and yes": tree(
        policy("a", key("allowed") + value(field(2, FIXED64, bytes(8)), boolean(1)))
    ),
    "yes as text": tree(policy("a", key("allowed") + value(field(4, LENGTH, b"\1")))),
    "two": tree(policy("a", key("allowed") + value(boolean(2)), F)),
    "no value": tree(policy("a", key("allowed"))),
    "two names": tree(policy("a", key("x") + key("allowed") + value(boolean(1)))),
    "a policy that is a boolean": tree(key("a") + value(boolean(1))),
    "a policy that is a text": tree(key("a") + value(field(3, LENGTH, b"allowed"))),
    "a tree of another type": field(3, VARINT, b"\1") + tree(policy("a", T)),
}


@pytest.mark.parametrize("answer, expected", TREES.values(), ids=TREES)
def test_a_tree_allows_only_clear_decisions(answer, expected):
    assert decision_tree_of(answer, ("allowed",)) == expected


@pytest.mark.parametrize("answer", BAD_TREES.values(), ids=BAD_TREES)
def test_a_tree_with_other_content_is_an_error(answer):
    with pytest.raises(TypeError, match=r"the answer|is not a boolean"):
        decision_tree_of(answer, ("allowed",))


@pytest.mark.parametrize("garbage", [b"\0", b"\x1a\x05x", b"\x0f", b"<html>"])
def test_an_undecodable_tree_is_an_error(garbage):
    with pytest.raises(grpc.aio.AioRpcError, match="cannot be read as DecisionTree"):
        decision_tree_of(tree(policy("a", T)) + garbage, ("allowed",))


@examples(200, by_default=0.5)
@given(st.dictionaries(st.text(min_size=1), st.dictionaries(st.text(), st.booleans())))
def test_both_tree_decoders_agree(decisions):
    answer = DecisionTreeResponse()
    answer.path.update(decisions)
    if not decisions:
        answer.path.SetInParent()
    wanted = sorted({name for one in decisions.values() for name in one})
    plain = answer.SerializeToString()
    assert decision_tree_of(plain, wanted) == decisions
    assert decision_tree_of(plain + NOTES, wanted) == decisions


# -- through a pool ----------------------------------------------------------------


@backends
def test_a_check_is_allowed_only_by_a_clear_yes(backend):
    ends = Counter()

    async def use():
        connector = FakeConnector()
        pool = ConnectionPool(connector=connector, min_connections=0)
        config = TopazConfig(
            authorizer_options=AuthorizerOptions(url="localhost:1", insecure=True),
            policy_path_root="app",
            identity_provider=lambda _request: Identity(IdentityType.NONE),
            connection_pool=pool,
        )
        async with pool:
            for expected, answers in ((True, ALLOWED), (False, DENIED)):
                for answer in answers.values():
                    connector.answer = lambda *_, a=answer: a
                    assert await config.is_allowed(REQUEST, POLICY) is expected
                    ends[expected] += 1
            for answer in UNCLEAR.values():
                connector.answer = lambda *_, a=answer: a
                with pytest.raises(grpc.aio.AioRpcError, match="the answer "):
                    await config.is_allowed(REQUEST, POLICY)
                ends["error"] += 1
            # The answer is bad, but the connection is not.
            assert len(connector.connections) == 1

    run(backend, use)
    assert ends[False] + ends["error"] >= 50
