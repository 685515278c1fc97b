"""
The spellings of a value, by which an invalidation finds the answers that it concerns.

A route passes the text of an id to the policy, and the application has an int or a UUID
for it. So values are compared by their text, whatever their type is. Numbers, UUIDs,
dates and truth values have many texts, so each of these gets one spelling. If different
values have one spelling, an invalidation drops more answers than it must: that is safe.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fastapi_topaz._authorizer.resource import DEPTH, text_of


if TYPE_CHECKING:
    from google.protobuf.struct_pb2 import Struct, Value


__all__ = ["MOST_SPELLINGS", "fields_of", "spellings"]


MOST_SPELLINGS = 16
"""Spellings of one value. A value with more of them concerns every value."""

# The texts that FastAPI reads as a bool. True is 1, as in Python and in databases.
_WORDS = {
    **dict.fromkeys(("true", "t", "yes", "y", "on"), "1.0"),
    **dict.fromkeys(("false", "f", "no", "n", "off"), "0.0"),
    **dict.fromkeys(("null", "none"), "null"),
}


def spellings(place: str, value: object, depth: int = 1) -> frozenset[bytes] | None:
    """
    Return the spellings that *value* may have in a resource context.

    Args:
        place: The name of the value, for errors.
        value: A mapping, a sequence, or anything that has a text of its own.
        depth: The number of levels above it, and its own.

    Returns:
        None if it has more than `MOST_SPELLINGS`.

    Raises:
        TypeError: No text can be made of *value*. The message does not show it.
        ValueError: It nests too deep, or its text cannot be encoded.
    """
    if depth > DEPTH:
        raise ValueError(f"resource must not nest deeper than {DEPTH} levels")
    # The common cases first: this runs for each value of a question.
    if type(value) is str:
        text_of(place, value, show=False)
        return frozenset({_normal(value).encode()})
    if type(value) is float:
        return frozenset({_normal(repr(value)).encode()})
    parts: list[frozenset[bytes] | None]
    if isinstance(value, Mapping):
        named = {
            _name(place, name): spellings(f"{place}[{name!r}]", each, depth + 1)
            for name, each in value.items()
        }
        parts = []
        for data in sorted(named):
            parts += frozenset({data}), named[data]
        return _joined(b"{", parts)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        parts = [spellings(f"{place}[...]", each, depth + 1) for each in value]
        return _joined(b"[", parts)
    return frozenset(
        _normal(text_of(place, text, show=False)).encode()
        for text in _texts(place, value)
    )


def fields_of(struct: Struct) -> dict[str, Any]:
    """Return the fields of a message as plain values."""
    return {name: _plain(value) for name, value in struct.fields.items()}


def _plain(value: Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return fields_of(value.struct_value)
    if kind == "list_value":
        return [_plain(each) for each in value.list_value.values]
    return None if kind in {None, "null_value"} else getattr(value, str(kind))


def _name(place: str, name: object) -> bytes:
    if not isinstance(name, str):
        raise TypeError(f"{place} must have str keys, got a {type(name).__name__}")
    return text_of(place, name).encode()


def _joined(
    kind: bytes, parts: list[frozenset[bytes] | None]
) -> frozenset[bytes] | None:
    """Return the spellings of a value that consists of *parts*."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or math.prod(map(len, known)) > MOST_SPELLINGS:
        return None
    return frozenset(
        kind + b"".join([b"%d:%b" % (len(each), each) for each in chosen])
        for chosen in itertools.product(*known)
    )


def _texts(place: str, value: object) -> set[str]:
    """Return the texts of a value that is neither a mapping nor a sequence."""
    if value is None:
        return {"null"}
    own = type(value)
    # The text of an object without a __str__ of its own is in no answer. The classes of
    # numbers have only a __repr__. An iterable has no single text: a set, bytes, or a
    # model of Pydantic.
    is_number = hasattr(own, "__float__")
    if (own.__str__ is object.__str__ and not is_number) or (
        isinstance(value, Iterable) and not isinstance(value, str | enum.Enum)
    ):
        raise TypeError(
            f"{place} must be a JSON value, or have a text as a UUID has, got "
            f"{own.__name__}; pass the value that the resource context has"
        )
    failure, texts = "", set[str]()
    try:
        texts.add(str(value))
    except Exception as error:  # noqa: BLE001  (a foreign class, whose methods may raise)
        failure = type(error).__name__
    if failure:
        # Raised here, so that an error with a foreign text is not its context.
        raise TypeError(
            f"{place} must have a text, but str() of this {own.__name__} fails with "
            f"{failure}"
        )
    if isinstance(value, str):
        # The text that is sent, whatever __str__ returns.
        texts.add(str.__str__(value))
    if isinstance(value, enum.Enum):
        # JSON shows the value, str() often the name, and databases keep either.
        texts.add(value.name or "")
        with contextlib.suppress(TypeError):
            texts |= _texts(place, value.value)
    if is_number:
        with contextlib.suppress(ArithmeticError, TypeError, ValueError):
            texts.add(repr(float(value)))  # type: ignore[arg-type]
    return texts


def _normal(text: str) -> str:
    """Return the one spelling of the texts that mean the same value."""
    if len(text) >= 32:
        with contextlib.suppress(ValueError):
            # Then it may be a number, too: a UUID can have only digits.
            text = uuid.UUID(text).hex
    try:
        # Whole numbers beyond 2**53 may get the spelling of a neighbour. The sum makes
        # -0.0 the same as 0.0.
        return repr(float(text) + 0.0)
    except ValueError:
        pass
    if text[4:5] == "-":  # as in 2024-05-01
        with contextlib.suppress(ValueError, OverflowError):
            moment = datetime.fromisoformat(text.upper())
            # Databases often leave out the zone, so a time without one counts as UTC.
            if moment.tzinfo is not None:
                moment = moment.astimezone(UTC)
            return moment.replace(tzinfo=None).isoformat()
    return _WORDS.get(text.casefold(), text)
