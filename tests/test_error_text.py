"""How messages show errors."""

from __future__ import annotations

from fastapi_topaz import _error_text


class Sullen(Exception):  # noqa: N818
    """An error with no text of its own."""

    def __str__(self):
        raise RuntimeError("ask somebody else")

    @property
    def code(self):
        raise RuntimeError("ask somebody else")


def test_an_error_with_a_str_that_raises_is_shown_by_its_class_name():
    assert _error_text.safe_text(Sullen()) == "Sullen"
    assert _error_text.error_kind(Sullen()) == "Sullen"
