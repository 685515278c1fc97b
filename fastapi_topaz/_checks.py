"""Checks of what the user passes, each with an error that names the parameter."""

from __future__ import annotations

import math


__all__ = ["check_count", "check_flag", "check_seconds", "check_text", "safe_repr"]


def safe_repr(value: object) -> str:
    """Return the text of *value* for a message, whatever it is."""
    try:
        return repr(value)
    except Exception:  # noqa: BLE001  (Python itself refuses numbers of 4,300 digits)
        return f"a {type(value).__name__} that cannot be shown"


def check_count(name: str, value: object, minimum: int) -> None:
    # bool is an int to isinstance, but `max_connections=True` is a mistake.
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be an int, got {safe_repr(value)} ({type(value).__name__})"
        )
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {safe_repr(value)}")


def check_seconds(
    name: str, value: object, *, zero: bool = True, infinite: bool = True
) -> float:
    """Return *value* as a float of seconds, or say what is wrong with it."""
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
    """Return if *value* is a str with something in it, or say what is wrong with it."""
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
