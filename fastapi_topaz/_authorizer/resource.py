"""Converts a resource context to protobuf. Errors name the place, never the value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from google.protobuf.struct_pb2 import Struct, Value


__all__ = ["DEPTH", "EXACT", "ResourceContext", "fill", "text_of"]


ResourceContext = Mapping[str, Any]

# A protobuf parser accepts 100 nested messages. Each level of a Struct uses three.
DEPTH = 30
"""The most levels of a resource context."""
EXACT = 2**53
"""Largest exact whole number. A Struct stores floats, which round larger numbers."""


def text_of(name: str, value: object, *, show: bool = True) -> str:
    """
    Return *value* if it is a str that protobuf can encode.

    Args:
        name: The name of the parameter.
        value: The value to check.
        show: Whether the error may show the value.

    Raises:
        TypeError: *value* is not a str.
        ValueError: *value* contains a lone surrogate.
    """
    if not isinstance(value, str):
        given = repr(value) if show else type(value).__name__
        raise TypeError(f"{name} must be a str, got {given}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be text that UTF-8 can encode, but has a lone surrogate at "
            f"position {error.start}"
        ) from None
    return value


def fill(struct: Struct, context: ResourceContext) -> None:
    """
    Copy *context* into the empty *struct*.

    Raises:
        TypeError, ValueError: A value cannot be sent. The message names its place, but
            not the value, which may be personal.
    """
    # dict first, because isinstance() with an abstract class takes as long as the rest.
    if type(context) is not dict and not isinstance(context, Mapping):
        raise TypeError(
            f"resource_context must be a mapping, got {type(context).__name__}"
        )
    # An empty context is sent too.
    struct.SetInParent()
    _fill(struct, context, "resource_context", 1)


def _fill(struct: Struct, mapping: Mapping[str, Any], place: str, depth: int) -> None:
    if depth > DEPTH and mapping:
        raise ValueError(f"resource_context must not nest deeper than {DEPTH} levels")
    fields = struct.fields
    for key, value in mapping.items():
        if not isinstance(key, str):
            raise TypeError(f"{place} must have str keys, got a {type(key).__name__}")
        try:
            field = fields[key]
            # The common case. protobuf itself refuses text that UTF-8 cannot encode.
            if type(value) is str:
                field.string_value = value
                continue
        except ValueError:  # UnicodeEncodeError, if protobuf is not pure Python
            text_of(f"{place}[{text_of(place, key)!r}]", value, show=False)
            raise ValueError(f"{place}[{key!r}] cannot be sent") from None
        _put(field, value, f"{place}[{key!r}]", depth)


def _put(field: Value, value: Any, place: str, depth: int) -> None:
    if depth > DEPTH:
        raise ValueError(f"resource_context must not nest deeper than {DEPTH} levels")
    if value is None:
        field.null_value = 0  # type: ignore[assignment]
    elif isinstance(value, bool):
        field.bool_value = value
    elif isinstance(value, str):
        field.string_value = text_of(place, value, show=False)
    elif isinstance(value, int | float):
        field.number_value = _number(place, value)
    elif isinstance(value, Mapping):
        field.struct_value.SetInParent()
        _fill(field.struct_value, value, place, depth + 1)
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        values = field.list_value.values
        field.list_value.SetInParent()
        for index, item in enumerate(value):
            _put(values.add(), item, f"{place}[{index}]", depth + 1)
    else:
        raise TypeError(
            f"{place} must contain only JSON values, got {type(value).__name__}"
        )


def _number(place: str, value: float) -> float:
    if isinstance(value, int) and abs(value) > EXACT:
        raise ValueError(
            f"{place} must not be a whole number beyond 2**53, which would be rounded; "
            "send it as a str"
        )
    if not math.isfinite(value):
        raise ValueError(f"{place} must be a finite number, got {value!r}")
    return value
