"""How errors are shown in messages."""

from __future__ import annotations

from fastapi_topaz import _error_text


class Sullen(Exception):  # noqa: N818
    """Says nothing of itself."""

    def __str__(self):
        raise RuntimeError("ask somebody else")

    @property
    def code(self):
        raise RuntimeError("ask somebody else")


def test_an_error_that_cannot_be_asked_is_called_by_its_class():
    assert _error_text.safe_text(Sullen()) == "Sullen"
    assert _error_text.error_kind(Sullen()) == "Sullen"
