"""An invalidation finds answers whatever the types of its values and of theirs are."""

from __future__ import annotations

import datetime as dt
import enum
import ipaddress
import math
import uuid
from collections import namedtuple
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePosixPath

import anyio
import attrs
import pytest
from pydantic import BaseModel, TypeAdapter

from fastapi_topaz import DecisionCache
from fastapi_topaz._decisions.cache import Cached
from fastapi_topaz._decisions.memo import Memo
from fastapi_topaz._decisions.values import MOST_SPELLINGS
from kit.bus import Answering, Process, running
from kit.decisions import OpenHere, Subject, http_request


UUID = uuid.UUID("550e8400-e29b-41d4-a716-446655440000")
DIGITS = uuid.UUID("12345678-1234-5678-1234-567812345678")
NOON = dt.datetime(2024, 5, 1, 12, tzinfo=dt.UTC)


class Text(str):
    __slots__ = ()


class Shown(str):
    __slots__ = ()

    def __str__(self):
        return f"order {str.__str__(self)}"


class Number(int):
    def __str__(self):
        return f"order-{int(self)}"


class Plain(enum.Enum):
    PAID = "paid"
    OPEN = "open"
    SEVEN = 7


class Mixed(str, enum.Enum):  # noqa: UP042  (its str() is another one)
    PAID = "paid"
    OPEN = "open"


class Strung(enum.StrEnum):
    PAID = "paid"


class Counted(enum.IntEnum):
    SEVEN = 7


class Odd(enum.Enum):
    A = frozenset("a")
    B = frozenset("b")


class Flags(enum.IntFlag):
    ONE = 1
    TWO = 2


@attrs.frozen
class Key:
    number: int

    def __str__(self):
        return f"key_{self.number}"


# What the resource context of the answer has, what is invalidated, and a value that
# must not concern that answer.
PAIRS = {
    "int": ("7", 7, 8),
    "int of a number": (7, "7", "8"),
    "int with zeros": ("007", 7, 70),
    "int with a sign": ("+7", 7, -7),
    "negative int": ("-7", -7, 7),
    "zero": ("-0", 0, 1),
    "int with spaces": (" 7 ", 7, 8),
    "int with underscores": ("1_000", 1000, 1001),
    "large int": (str(2**53 + 1), 2**53 + 1, 2**55),
    "int of 400 digits": ("9" * 400, int("9" * 400), 9),
    "int subclass": ("7", Number(7), Number(8)),
    "int subclass by its text": ("order-7", Number(7), Number(8)),
    "float": ("7.50", 7.5, 7.25),
    "whole float": ("7", 7.0, 8.0),
    "float of a number": (7.5, "7.5", "7.25"),
    "large float": ("1e22", 10**22, 10**21),
    "infinity": ("inf", math.inf, -math.inf),
    "nan": ("nan", math.nan, 0),
    "Decimal": ("7.5", Decimal("7.5000"), Decimal("7.51")),
    "Decimal of a number": (0.1, Decimal("0.1"), Decimal("0.2")),
    "Decimal NaN": ("NaN", Decimal("nan"), Decimal(1)),
    "Fraction": ("7.5", Fraction(15, 2), Fraction(1, 3)),
    "True": ("true", True, False),
    "True by its repr": ("True", True, False),
    "True by another word": ("yes", True, False),
    "True as a number": (1, True, False),
    "False": ("0", False, True),
    "bool of a bool": (True, "true", "false"),
    "bool of a bool as a number": (False, 0, 1),
    "None": (None, "None", "x"),
    "None of a null": ("null", None, "x"),
    "None of a null in capitals": ("NULL", None, "x"),
    "UUID": (str(UUID), UUID, DIGITS),
    "UUID in capitals": (str(UUID).upper(), UUID, DIGITS),
    "UUID without dashes": (UUID.hex, UUID, DIGITS),
    "UUID as a URN": (UUID.urn, UUID, DIGITS),
    "UUID in braces": (f"{{{UUID}}}", UUID, DIGITS),
    "UUID of digits": (DIGITS.hex, DIGITS, UUID),
    "UUID of text": (UUID.hex, str(UUID), str(DIGITS)),
    "str subclass": ("7", Text("7"), Text("8")),
    "str subclass with another text": ("7", Shown("7"), Shown("8")),
    "str subclass by its text": ("order 7", Shown("7"), Shown("8")),
    "Enum": ("paid", Plain.PAID, Plain.OPEN),
    "Enum by its name": ("PAID", Plain.PAID, Plain.OPEN),
    "Enum by its text": ("Plain.PAID", Plain.PAID, Plain.OPEN),
    "Enum of an int": ("7", Plain.SEVEN, Plain.OPEN),
    "Enum of an object": ("Odd.A", Odd.A, Odd.B),
    "str Enum": ("paid", Mixed.PAID, Mixed.OPEN),
    "str Enum by its text": ("Mixed.PAID", Mixed.PAID, Mixed.OPEN),
    "StrEnum": ("paid", Strung.PAID, "open"),
    "IntEnum": (7, Counted.SEVEN, 8),
    "IntEnum of text": ("7", Counted.SEVEN, "8"),
    "IntFlag": ("3", Flags.ONE | Flags.TWO, Flags.TWO),
    "date": ("2024-05-01", NOON.date(), dt.date(2024, 5, 2)),
    "datetime": ("2024-05-01T12:00:00Z", NOON, NOON.replace(hour=13)),
    "datetime by its text": (str(NOON), NOON, NOON.replace(hour=13)),
    "datetime of JavaScript": (
        "2024-05-01T12:00:00.000Z",
        NOON,
        NOON.replace(microsecond=1000),
    ),
    "datetime of another zone": ("2024-05-01T14:00+02:00", NOON, NOON.replace(hour=14)),
    "datetime without a zone": (
        "2024-05-01T12:00:00Z",
        NOON.replace(tzinfo=None),
        NOON.replace(tzinfo=None, hour=13),
    ),
    "datetime before the calendar": (
        "0001-01-01T00:00+02:00",
        "0001-01-01T00:00+02:00",
        1,
    ),
    "time": ("12:00:00", dt.time(12), dt.time(13)),
    "IP address": ("10.0.0.1", ipaddress.ip_address("10.0.0.1"), "10.0.0.2"),
    "path": ("a/b", PurePosixPath("a/b"), PurePosixPath("a/c")),
    "class of the application": ("key_7", Key(7), Key(8)),
    "text": ("Ä b", "Ä b", "ä b"),
    "list": (["1", 2, None], (1, "2", "null"), (1, "2")),
    "list in another order": (["1", "2"], [1, 2], [2, 1]),
    "mapping": ({"kind": "paid", "n": "7"}, {"n": 7, "kind": Plain.PAID}, {"n": 7}),
    "deep": ({"a": [{"b": str(UUID)}]}, {"a": [{"b": UUID}]}, {"a": [{"b": 7}]}),
    "empty list": ([], (), {}),
}
pairs = pytest.mark.parametrize("name", PAIRS)


def memo_of_a_request():
    """Return what one request remembers, what asks in it, and what invalidates."""
    cached = Cached(Answering(), DecisionCache(jitter=0), OpenHere())
    cached.freshness.clock = anyio.current_time
    layer, request = Memo(Answering(), cached.freshness, OpenHere()), http_request()

    async def origin(resource):
        return (await layer(Subject(resource=resource).question(http=request))).origin

    return origin, cached.freshness


def process_alone():
    cache = DecisionCache(jitter=0)
    layer = Cached(Answering(), cache, OpenHere())
    layer.freshness.clock = anyio.current_time

    async def origin(resource):
        return (await layer(Subject(resource=resource).question())).origin

    return origin, cache


@pairs
async def test_a_value_of_another_type_drops_the_answers(name):
    kept, invalidated, _ = PAIRS[name]
    origin, cache = process_alone()
    resource = {"id": kept, "owner": "x"}
    assert [await origin(resource) for _ in "12"] == ["authorizer", "cache"]
    cache.invalidate(resource={"id": invalidated})
    assert [await origin(resource) for _ in "12"] == ["authorizer", "cache"]


@pairs
async def test_another_value_keeps_the_answers(name):
    kept, _, other = PAIRS[name]
    origin, cache = process_alone()
    await origin({"id": kept})
    cache.invalidate(resource={"id": other})
    assert await origin({"id": kept}) == "cache"


@pairs
async def test_a_value_of_another_type_drops_the_answers_of_a_request(name):
    kept, invalidated, other = PAIRS[name]
    origin, freshness = memo_of_a_request()
    assert [await origin({"id": kept}) for _ in "12"] == ["authorizer", "cache"]
    freshness.invalidate(None, None, {"id": other})
    assert await origin({"id": kept}) == "cache"
    freshness.invalidate(None, None, {"id": invalidated})
    assert await origin({"id": kept}) == "authorizer"


@pairs
async def test_a_value_of_another_type_drops_the_answers_of_another_process(
    name, hub, here
):
    kept, invalidated, other = PAIRS[name]
    there, subject = Process(hub), Subject(resource={"id": kept})
    async with running(here.cache, there.cache):
        await there.origins(subject)
        here.cache.invalidate(resource={"id": other})
        await anyio.sleep(0.01)
        assert await there.origins(subject) == ["cache"]
        here.cache.invalidate(resource={"id": invalidated})
        await anyio.sleep(0.01)
        assert await there.origins(subject) == ["authorizer"]
        assert there.bus.rejected == there.bus.gaps == 0


@pairs
async def test_two_fields_must_both_match(name):
    kept, invalidated, other = PAIRS[name]
    origin, cache = process_alone()
    resource = {"id": kept, "owner": "7", "more": "x"}
    await origin(resource)
    cache.invalidate(resource={"id": invalidated, "owner": 8})
    cache.invalidate(resource={"id": other, "owner": 7})
    cache.invalidate(resource={"id": invalidated, "missing": 7})
    assert await origin(resource) == "cache"
    cache.invalidate(resource={"id": invalidated, "owner": 7})
    assert await origin(resource) == "authorizer"


TEXTS = [
    *("7", "007", "+7", "-7", "7.0", "7.", " 7 ", "1_000", "1e3", ".5", "0.50", "-0"),
    *(
        "inf",
        "-Infinity",
        "NaN",
        "9007199254740993",
        "1e400",
        "\N{ARABIC-INDIC DIGIT TWO}",
    ),
    *("true", "TRUE", "1", "0", "yes", "Y", "on", "off", "t", "F", "No"),
    *(f"{UUID}", f"{UUID}".upper(), UUID.hex, UUID.urn, f"{{{UUID}}}", DIGITS.hex),
    *(
        "2024-05-01",
        "2024-05-01T00:00Z",
        "2024-05-01 12:00",
        "2024-05-01T12:00:00Z",
        "2024-05-01_12:00:00",
    ),
    *(
        "2024-05-01t12:00:00.123z",
        "2024-05-01T12:00:00.1+02:00",
        "2024-05-01T12:00-0030",
    ),
]


@pytest.mark.parametrize(
    "kind", [str, int, float, Decimal, bool, uuid.UUID, dt.date, dt.datetime]
)
async def test_each_text_that_fastapi_accepts_is_found_by_the_value_it_makes(kind):
    read, accepted = TypeAdapter(kind), 0
    for text in TEXTS:
        try:
            value = read.validate_python(text)
        except ValueError:
            continue
        if isinstance(value, dt.date) and text[4:5] != "-":
            continue  # The number of a timestamp: see the page.
        origin, cache = process_alone()
        assert [await origin({"id": text}) for _ in "12"] == ["authorizer", "cache"]
        cache.invalidate(resource={"id": value})
        assert await origin({"id": text}) == "authorizer", (text, value)
        accepted += 1
    assert accepted > 1


async def test_a_field_that_no_answer_has_concerns_none():
    origin, cache = process_alone()
    await origin({"id": "7"})
    for resource in ({"document_id": 7}, {"document_id": None}, {"ID": 7}):
        cache.invalidate(resource=resource)
        assert await origin({"id": "7"}) == "cache"


@pytest.mark.parametrize(
    "wide",
    [
        {f"f{n}": Plain.PAID for n in range(40)},
        {"many": [Plain.PAID] * 40},
        {"many": {f"f{n}": Plain.PAID for n in range(40)}, "other": 7},
    ],
    ids=["fields", "list", "mapping"],
)
async def test_too_many_combinations_of_spellings_drop_more(wide, hub, here):
    there = Process(hub)

    def spelled(value, text):
        if isinstance(value, dict):
            return {name: spelled(each, text) for name, each in value.items()}
        if isinstance(value, list):
            return [spelled(each, text) for each in value]
        return text if value is Plain.PAID else value

    subjects = [
        Subject(resource=spelled(wide, text)) for text in ("PAID", "paid", "Plain.PAID")
    ]
    async with running(here.cache, there.cache):
        for process in (here, there):
            await process.origins(*subjects)
        here.cache.invalidate(resource=wide)
        await anyio.sleep(0.01)
        for process in (here, there):
            assert await process.origins(*subjects) == ["authorizer"] * 3
        marks = here.layer.freshness.invalidations.marks
        assert marks.count <= MOST_SPELLINGS


async def test_a_context_of_the_greatest_depth_can_be_asked_about():
    origin, cache = process_alone()
    deepest = {}
    for _ in range(29):
        deepest = {"a": deepest}
    assert await origin({"a": deepest}) == "authorizer"
    cache.invalidate(resource={"a": deepest})
    assert await origin({"a": deepest}) == "authorizer"
    cache.invalidate(resource={"b": 1})
    assert await origin({"a": deepest}) == "cache"


class Silent:
    """Has no text of its own."""


class Failing:
    def __str__(self):
        raise RuntimeError("hunter2")


class Wrong:
    def __str__(self):
        return 7  # noqa: PLE0307


class Model(BaseModel):
    id: str = "hunter2"


LOOP = {}
LOOP["a"] = LOOP
REFUSED = {
    "object": (object(), TypeError),
    "class": (int, TypeError),
    "no text": (Silent(), TypeError),
    "a text that fails": (Failing(), TypeError),
    "a text that is none": (Wrong(), TypeError),
    "a model": (Model(), TypeError),
    "bytes": (b"hunter2", TypeError),
    "bytearray": (bytearray(b"hunter2"), TypeError),
    "set": ({"hunter2"}, TypeError),
    "generator": (iter("hunter2"), TypeError),
    "a digit too many": (10**5000, TypeError),
    "inside a list": (["x", object()], TypeError),
    "inside a mapping": ({"a": {"b": b"hunter2"}}, TypeError),
    "a key": ({7: "x"}, TypeError),
    "no UTF-8": ("hunter2\ud800", ValueError),
    "no UTF-8 inside": (["hunter2\ud800"], ValueError),
    "too deep": (LOOP, ValueError),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_value_without_a_text_is_an_error_that_names_its_place(name):
    value, error = REFUSED[name]
    origin, cache = process_alone()
    await origin({"id": "hunter2"})
    with pytest.raises(error, match="resource") as caught:
        cache.invalidate(resource={"id": value})
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    if error is TypeError:
        assert caught.value.__context__ is None
    # Nothing is invalidated, and nothing is half done.
    assert await origin({"id": "hunter2"}) == "cache"


async def test_a_field_must_have_a_text_as_its_name():
    with pytest.raises(TypeError, match="str keys, got a int"):
        DecisionCache().invalidate(resource={7: "7"})


async def test_a_named_tuple_is_a_list():
    origin, cache = process_alone()
    await origin({"id": ["7", "x"]})
    cache.invalidate(resource={"id": namedtuple("Id", "n kind")(7, "x")})  # noqa: PYI024
    assert await origin({"id": ["7", "x"]}) == "authorizer"
