"""
Reads decisions from answers, and checks every value in the answer.

If a field has several values, protobuf keeps only the last one. It skips a value whose
type is not the type of the field. So protobuf can read an answer with both "no" and
"yes" as "yes". This module returns True only if all values for a decision are true.
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


# Wire types of fields: see "Message Structure" in protobuf's encoding guide.
_VARINT, _LENGTH = 0, 2


def decided(response: bytes) -> dict[str, bool | None]:
    """
    Return the decisions of an `IsResponse` that protobuf can parse.

    Returns:
        A value for each decision name. False if any entry is false. Otherwise None if
        an entry is ambiguous, else True.

    Raises:
        TypeError: The answer is not an `IsResponse`.
    """
    found: dict[str, bool | None] = {}
    for entry in _values(response, 1, _LENGTH):
        # Protobuf checks the encoding of the last name only.
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
    Return the decisions of a `DecisionTreeResponse` that protobuf can parse.

    If the values of one decision differ, the decision is False.

    Raises:
        TypeError: The answer contains a value that is ambiguous or not a decision.
    """
    message: Any = DecisionTreeResponse.FromString(response)
    message.DiscardUnknownFields()
    # If protobuf dropped or skipped a value, the answer is longer than the parsed
    # message. Most answers have no such value. To read each field takes five times as
    # long.
    whole = message.ByteSize() == len(response)
    plain = _plain_tree(message) if whole else None
    return _tree(response) if plain is None else plain


def _plain_tree(message: DecisionTreeResponse) -> dict[str, dict[str, bool]] | None:
    """Return the decisions of *message*, or None if `_tree` must read the answer."""
    tree: dict[str, dict[str, bool]] = {}
    for path, policy in message.path.fields.items():
        # An entry without a key or value is shorter than protobuf writes it. The
        # difference could hide a longer entry.
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


# Field numbers of `google.protobuf.Value`.
_BOOLEAN, _STRUCT = 4, 5


def _map(struct: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the key and `Value` of each entry of a `google.protobuf.Struct`."""
    for entry in _values(struct, 1, _LENGTH):
        keys = _values(entry, 1, _LENGTH) or [b""]
        if len(keys) > 1:
            raise TypeError("the answer has an entry with more than one name")
        # Joined parts of a message are one message with all their fields.
        yield keys[0].decode(), b"".join(_values(entry, 2, _LENGTH))


def _all_true(values: list[int]) -> bool:
    if not {0, 1}.issuperset(values):
        raise TypeError("the answer has a boolean that is neither 0 nor 1")
    # Protobuf sends no field for False, so an empty list means False.
    return bool(values) and all(values)


def _values(data: bytes, number: int, kind: int) -> list[Any]:
    """
    Return all values of the field *number*, in order.

    Raises:
        TypeError: The wire type of a value is not *kind*.
    """
    values = []
    for found, of_kind, value in _fields(data):
        if found == number:
            if of_kind != kind:
                raise TypeError(f"the answer has a field {number} of a wrong type")
            values.append(value)
    return values


def _fields(data: bytes) -> Iterator[tuple[int, int, Any]]:
    """Yield the number, wire type and value of each field."""
    # `Empty` has no fields, so all fields are unknown to it and none is dropped.
    for field in UnknownFieldSet(Empty.FromString(data)):
        yield field.field_number, field.wire_type, field.data
