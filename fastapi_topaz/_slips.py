"""
Errors that show the right form if an object of the pool is used in a wrong one.

Python's own errors name a missing method, such as `__aenter__`. Type checkers must
still see that it is missing, so the methods here are hidden from them.
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
    """Refuses copy.copy(), copy.deepcopy() and pickle."""

    __slots__ = ()

    _copy_form: ClassVar[str]

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled: {self._copy_form}"
        )


class NotAsync:
    """Refuses `with`, which would have to be `async with`."""

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
    An attribute that objects of a class do not have, as `hasattr` tells.

    Args:
        what: Begins the error, and says what the object is.
        name: The name of the attribute.
    """

    def __init__(self, what: str, name: str) -> None:
        self._error = f"{what} and has no {name!r}: {LEASE_FORM}"

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise AttributeError(self._error)


def explain_absence(cls: type, what: str, names: Iterable[str]) -> None:
    """Give *cls* each public one of *names* that it lacks, as an `Absent`."""
    for name in names:
        # Not `__del__` and the like, which Python looks for by itself.
        if not name.startswith("_") and not hasattr(cls, name):
            setattr(cls, name, Absent(what, name))
