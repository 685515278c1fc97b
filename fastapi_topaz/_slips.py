"""
Error messages that show the correct usage if code uses a pool or a lease wrongly.

Without them, Python's error only names a missing method, such as `__aenter__`. Type
checkers must still report that method as missing, so it is hidden from them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NoReturn


if TYPE_CHECKING:
    from collections.abc import Iterable


__all__ = ["LEASE_FORM", "NotAsync", "NotCopied", "explain_absence"]


LEASE_FORM = (
    "write `async with pool.acquire() as conn:`, or `conn = await pool.acquire()` and "
    "later `await pool.release(conn)`"
)


class NotCopied:
    """A base class whose objects refuse copy.copy(), copy.deepcopy() and pickle."""

    __slots__ = ()

    _copy_form: ClassVar[str]

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled: {self._copy_form}"
        )


class NotAsync:
    """A base class whose objects refuse `with`, because they need `async with`."""

    __slots__ = ()

    _right_form: ClassVar[str]

    if not TYPE_CHECKING:

        def __enter__(self):  # noqa: ANN204
            raise TypeError(
                f"this needs `async with` instead of `with`: {self._right_form}"
            )

        def __exit__(self, *exc):  # noqa: ANN002, ANN204
            """Do nothing: `__enter__` always raises."""


class Absent:
    """
    A descriptor for a missing attribute, whose error shows the correct usage.

    `hasattr` returns False for the attribute.

    Args:
        what: The beginning of the error message. It says what the object is.
        name: The name of the attribute.
    """

    def __init__(self, what: str, name: str) -> None:
        self._error = f"{what} and has no {name!r}: {LEASE_FORM}"

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise AttributeError(self._error)


def explain_absence(cls: type, what: str, names: Iterable[str]) -> None:
    """Add an `Absent` to *cls* for each public name in *names* that it lacks."""
    for name in names:
        # Not for private names, because Python itself looks up `__del__` and others.
        if not name.startswith("_") and not hasattr(cls, name):
            setattr(cls, name, Absent(what, name))
