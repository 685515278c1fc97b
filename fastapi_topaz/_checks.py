"""Checks of parameters. Each error names the parameter."""

from __future__ import annotations

import math


__all__ = [
    "check_count",
    "check_flag",
    "check_provider",
    "check_seconds",
    "check_text",
    "safe_repr",
]


def safe_repr(value: object) -> str:
    """Return the repr of *value*, or a placeholder if its repr raises an error."""
    try:
        return repr(value)
    except Exception:  # noqa: BLE001  (Python itself refuses numbers of 4,300 digits)
        return f"a {type(value).__name__} that cannot be shown"


def check_count(name: str, value: object, minimum: int) -> None:
    # isinstance() accepts a bool as an int, but `max_connections=True` is a mistake.
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be an int, got {safe_repr(value)} ({type(value).__name__})"
        )
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {safe_repr(value)}")


def check_seconds(
    name: str, value: object, *, zero: bool = True, infinite: bool = True
) -> float:
    """
    Return *value* as a float, if it is a valid number of seconds.

    Args:
        name: The name of the parameter.
        value: The value to check. NaN and negative numbers are invalid.
        zero: Whether 0 is valid.
        infinite: Whether infinity is valid.

    Raises:
        TypeError: *value* is not a number.
        ValueError: *value* is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"{name} must be a number of seconds, got {safe_repr(value)} "
            f"({type(value).__name__})"
        )
    given = value
    try:
        value = float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a number of seconds") from None
    if math.isnan(value) or value < 0 or (value == 0 and not zero):
        least = "at least 0" if zero else "more than 0"
        raise ValueError(f"{name} must be {least} seconds, got {given!r}")
    if math.isinf(value) and not infinite:
        raise ValueError(f"{name} must be a finite number of seconds, got {given!r}")
    return value


def check_text(name: str, value: object, *, optional: bool = True) -> None:
    """
    Check that *value* is a str that is not empty, or None if it is *optional*.

    Raises:
        TypeError: *value* is not a str.
        ValueError: *value* is empty, or contains only whitespace.
    """
    if value is None and optional:
        return
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be a str, got {safe_repr(value)} ({type(value).__name__})"
        )
    if not value.strip():
        raise ValueError(f"{name} must not be empty, got {value!r}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(
            f"{name} must be True or False, got {safe_repr(value)} "
            f"({type(value).__name__})"
        )


def check_provider(name: str, value: object, method: str, kind: str) -> None:
    """
    Raise TypeError if *value* is neither None nor a provider of OpenTelemetry.

    Args:
        name: The argument that the message names.
        value: The argument.
        method: The method that a provider has.
        kind: The class of the provider, for the message.
    """
    if value is not None and not callable(getattr(value, method, None)):
        raise TypeError(f"{name} must be a {kind}, got {safe_repr(value)}")
