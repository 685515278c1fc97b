"""
Reads decisions from answers, and counts each value that an answer has for them.

Protobuf keeps only the last of several values of a field, and skips a value of another
type than the field's. So it can read an answer that says both no and yes as a yes.
Here a decision is true only if all values for it are true.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aserto.authorizer.v2 import DecisionTreeResponse
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import (  # type: ignore[import-not-found]
    UnknownFieldSet,
)


if TYPE_CHECKING:
    from collections.abc import Iterator


__all__ = ["decided", "decided_by_path"]


# Types of fields on the wire: see "Message Structure" in protobuf's guide to the
# encoding.
_VARINT, _LENGTH = 0, 2


def decided(response: bytes) -> dict[str, bool | None]:
    """
    Return the decisions of an `IsResponse`, which protobuf can parse.

    Returns:
        Each decision by its name: False if one entry says so, None if an entry for it
        is not clear, else True.

    Raises:
        TypeError: The answer is not an `IsResponse`.
    """
    found: dict[str, bool | None] = {}
    for entry in _values(response, 1, _LENGTH):
        # Protobuf checks the encoding of the last one only.
        names = [n.decode(errors="replace") for n in _values(entry, 1, _LENGTH)]
        verdict: bool | None
        try:
            verdict = _all_true(_values(entry, 2, _VARINT))
            if verdict and len(names) > 1:
                verdict = None
        except TypeError:
            verdict = None
        for name in names:
            both = found.get(name, True), verdict
            found[name] = next(each for each in (False, None, True) if each in both)
    return found


def decided_by_path(response: bytes) -> dict[str, dict[str, bool]]:
    """
    Return the decisions of a `DecisionTreeResponse`, which protobuf can parse.

    If values for one decision differ, it is False.

    Raises:
        TypeError: It has something that is not a decision, or not clear.
    """
    message: Any = DecisionTreeResponse.FromString(response)
    message.DiscardUnknownFields()
    # A value that protobuf dropped or skipped makes the answer longer than what is
    # left. Most have none, and to read each field takes five times as long.
    whole = message.ByteSize() == len(response)
    plain = _plain_tree(message) if whole else None
    return _tree(response) if plain is None else plain


def _plain_tree(message: DecisionTreeResponse) -> dict[str, dict[str, bool]] | None:
    """Return the decisions of *message*, or None if one of them is odd."""
    tree: dict[str, dict[str, bool]] = {}
    for path, policy in message.path.fields.items():
        # An entry without a key or a value is shorter than protobuf writes it, and
        # could hide one that is longer.
        if not path or policy.WhichOneof("kind") != "struct_value":
            return None
        decisions = tree[path] = {}
        for name, value in policy.struct_value.fields.items():
            if not name or value.WhichOneof("kind") != "bool_value":
                return None
            decisions[name] = value.bool_value
    return tree


def _tree(response: bytes) -> dict[str, dict[str, bool]]:
    tree: dict[str, dict[str, bool]] = {}
    for path, policy in _map(b"".join(_values(response, 3, _LENGTH))):
        decisions = tree.setdefault(path, {})
        if {number for number, _, _ in _fields(policy)} != {_STRUCT}:
            raise TypeError(f"the answer for {path!r} is not a set of decisions")
        for name, value in _map(b"".join(_values(policy, _STRUCT, _LENGTH))):
            if {number for number, _, _ in _fields(value)} != {_BOOLEAN}:
                raise TypeError(f"the decision {name!r} of {path!r} is not a boolean")
            verdict = _all_true(_values(value, _BOOLEAN, _VARINT))
            decisions[name] = verdict and decisions.get(name, True)
    return tree


# The fields of `google.protobuf.Value` for what an answer holds.
_BOOLEAN, _STRUCT = 4, 5


def _map(struct: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield key and `Value` of each entry of a `google.protobuf.Struct`."""
    for entry in _values(struct, 1, _LENGTH):
        keys = _values(entry, 1, _LENGTH) or [b""]
        if len(keys) > 1:
            raise TypeError("the answer has an entry with more than one name")
        # Parts of one message that are joined are the message with all their fields.
        yield keys[0].decode(), b"".join(_values(entry, 2, _LENGTH))


def _all_true(values: list[int]) -> bool:
    if not {0, 1}.issuperset(values):
        raise TypeError("the answer has a boolean that is neither 0 nor 1")
    # Protobuf sends no field for False.
    return bool(values) and all(values)


def _values(data: bytes, number: int, kind: int) -> list[Any]:
    """
    Return all values of the field *number*, in their order.

    Raises:
        TypeError: One is of another type than *kind*.
    """
    values = []
    for found, of_kind, value in _fields(data):
        if found == number:
            if of_kind != kind:
                raise TypeError(f"the answer has a field {number} of a wrong type")
            values.append(value)
    return values


def _fields(data: bytes) -> Iterator[tuple[int, int, Any]]:
    """Yield number, type and value of each field on the wire."""
    # To a message without fields all fields are unknown, so none is dropped.
    for field in UnknownFieldSet(Empty.FromString(data)):
        yield field.field_number, field.wire_type, field.data
