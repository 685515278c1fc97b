"""Keys are equal if and only if the questions mean the same to the authorizer."""

from __future__ import annotations

import copy
import random
import struct
import unicodedata

import pytest
from aserto.authorizer.v2 import IsRequest

from fastapi_topaz import Identity, IdentityType
from fastapi_topaz._authorizer.messages import is_request
from fastapi_topaz._decisions.keys import Keys
from fastapi_topaz._decisions.question import Question
from fastapi_topaz._pool.budget import Budget
from kit.decisions import Subject


KEYS = Keys()

DISTINCT = [
    *(1, True, 0, False, "1", "0", None, "null", "", [], {}, [1], [[1]], ["1"]),
    *(0.5, -0.0, "True", [None], [[]], [{}], {"": None}, {"a": {}}, {"a": []}),
    *("a:b", ["a", "b"], "a\0b", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"),
    unicodedata.normalize("NFD", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"),
    *("Alice", "alice", "alice ", "\N{KELVIN SIGN}", "K"),
]


def key_of(subject, **options):
    return KEYS.key_of(subject.question(**options))


async def test_values_that_the_authorizer_can_tell_apart_have_different_keys():
    keys = {key_of(Subject(resource={"v": value})) for value in DISTINCT}
    assert len(keys) == len(DISTINCT)
    names = ["", "v", "V", "v.w", "w"]
    assert len({key_of(Subject(resource={name: 1})) for name in names}) == len(names)


async def test_each_part_of_a_question_is_in_its_key():
    subjects = [
        Subject(),
        Subject(path="app.GET"),
        Subject(path="app.GET.documents.x"),
        Subject(user="bob"),
        Subject(token="alice"),
        Subject(decision="visible"),
        Subject(resource={"a": "1"}),
        Subject(resource={"a": {"b": "1"}}),
        Subject(metadata=(("a", "1"),)),
        Subject(metadata=(("a", "2"),)),
        Subject(metadata=(("a", "1"), ("a", "2"))),
        Subject(metadata=(("a", "2"), ("a", "1"))),
        Subject(metadata=(("a", "1a2"),)),
        Subject(metadata=(("a-bin", b"1"),)),
        Subject(metadata=(("aa", "1"),)),
    ]
    assert len({key_of(subject) for subject in subjects}) == len(subjects)


async def test_instance_name_and_label_are_in_the_key():
    parts = [(None, None), ("a", None), ("a", "b"), ("b", "a"), ("ab", None)]
    keys = {
        KEYS.key_of(
            Question("p", "d", is_request("p", ("d",), None, {}, *each), Budget(1))
        )
        for each in parts
    }
    assert len(keys) == len(parts)


async def test_what_is_not_asked_is_not_in_the_key():
    subject = Subject(resource={"a": 1, "b": [1, 2.5]})
    same = Subject(resource={"b": (1.0, 2.5), "a": 1.0})
    assert key_of(subject, seconds=1, max_age=3) == key_of(same, seconds=2)
    one = Subject(metadata=(("a", "1"), ("b", "2")))
    assert key_of(one) == key_of(Subject(metadata=(("b", "2"), ("a", "1"))))


async def test_the_keys_of_two_openings_are_never_equal():
    assert Keys().key_of(Subject().question()) != key_of(Subject())


# -- fuzzing --------------------------------------------------------------------------


TEXTS = ["", "a", "b", "a:b", "\0", "null", "1", "é", "e\u0301", "true", '"', "a" * 90]


def value(source, depth=0):
    kinds = ["text", "number", "bool", "none"] + ["list", "map"] * (depth < 3)
    match source.choice(kinds):
        case "text":
            return source.choice(TEXTS)
        case "number":
            return source.choice([0, 1, -1, 2, 0.5, -0.0, 1e300, 2**53])
        case "bool":
            return source.choice([True, False])
        case "none":
            return None
        case "list":
            return [value(source, depth + 1) for _ in range(source.randrange(4))]
    return mapping(source, depth + 1)


def mapping(source, depth=0):
    return {
        source.choice(TEXTS): value(source, depth) for _ in range(source.randrange(4))
    }


def subject(source):
    identity = source.choice(["alice", "bob", "a:b", "é", "e\u0301"])
    return {
        "path": source.choice(["app.a", "app.b", 'app["a.b"]', "app.a.b"]),
        "decision": source.choice(["allowed", "visible"]),
        "identity": (source.choice([2, 3, 4]), identity),
        "resource": mapping(source),
        "metadata": [
            (source.choice(["a", "b", "ab"]), source.choice(["1", "2", "12", ""]))
            for _ in range(source.randrange(3))
        ],
    }


def shuffled(source, given):
    """Return an equal value with its mappings in another order."""
    if isinstance(given, dict):
        items = list(given.items())
        source.shuffle(items)
        return {key: shuffled(source, each) for key, each in items}
    if isinstance(given, list):
        return [shuffled(source, each) for each in given]
    same_number = type(given) is int and source.random() < 0.5
    return float(given) if same_number else given


def changed(source, given):
    """Return a copy of *given* with one small difference somewhere, or none."""
    result = copy.deepcopy(given)
    part = source.choice(list(result))
    result[part] = subject(source)[part]
    return result


def question_of(given):
    kind, name = given["identity"]
    request = is_request(
        *(given["path"], (given["decision"],)),
        *(Identity(IdentityType(kind), name), given["resource"], None, None),
    )
    return Question(
        given["path"], given["decision"], request, Budget(1), tuple(given["metadata"])
    )


def meaning(given):
    """Return what the authorizer is told, independently of the encoding of the key."""

    def of_value(each):
        match each:
            case None | str():
                return each
            case bool():
                return ("bool", each)
            case int() | float():
                return struct.pack(">d", each)
            case list():
                return ("list", *map(of_value, each))
        return ("map", frozenset((key, of_value(each[key])) for key in each))

    metadata = {}
    for name, text in given["metadata"]:
        metadata.setdefault(name, []).append(text)
    return (
        *(given["path"], given["decision"], given["identity"]),
        of_value(given["resource"]),
        tuple(sorted((name, tuple(texts)) for name, texts in metadata.items())),
    )


def fuzz(pairs, seed=0):
    source, equal = random.Random(seed), 0
    for _ in range(pairs):
        first = subject(source)
        second = shuffled(source, first)
        second["identity"] = first["identity"]
        if source.random() < 0.6:
            second = changed(source, second)
        same = meaning(first) == meaning(second)
        one, other = question_of(first), question_of(second)
        assert (KEYS.key_of(one) == KEYS.key_of(other)) is same, (first, second)
        if same:
            equal += 1
            assert IsRequest.FromString(one.request) == IsRequest.FromString(
                other.request
            )
    return equal


async def test_a_fuzz_of_pairs_finds_no_wrong_key():
    assert 500 < fuzz(2000) < 1500


@pytest.mark.nightly
@pytest.mark.timeout(600)
async def test_a_long_fuzz_of_pairs_finds_no_wrong_key():
    assert fuzz(100_000, random.randrange(2**32)) > 10_000
