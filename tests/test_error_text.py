"""How messages show errors."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest

from fastapi_topaz import ConnectFailed, _error_text


class Sullen(Exception):  # noqa: N818
    """An error with no text of its own."""

    def __str__(self):
        raise RuntimeError("ask somebody else")

    @property
    def code(self):
        raise RuntimeError("ask somebody else")


def error_of_grpc(details):
    none = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, none, none, details)


@pytest.mark.parametrize(
    "details, logged",
    [
        ("no upstream for jane.doe", "(details in the error)"),
        (
            "this is not a gRPC response: HTTP status: 502, no content type",
            "(HTTP status: 502; details in the error)",
        ),
        (
            "Received http2 header with status: 429",
            "(HTTP status: 429; details in the error)",
        ),
        # A server may use the same words.
        (
            "jane.doe: HTTP status: 502, HTTP status: jane.doe",
            "(HTTP status: 502; details in the error)",
        ),
        ("HTTP status: 4929901234567890", "(details in the error)"),
    ],
)
def test_the_log_shows_only_the_http_status_of_details(details, logged):
    error = ConnectFailed(f"the server is down: {details}")
    error.__cause__ = error_of_grpc(details)
    assert _error_text.log_text(error) == f"the server is down: {logged}"
    assert details in str(error)


def test_an_error_with_a_str_that_raises_is_shown_by_its_class_name():
    assert _error_text.safe_text(Sullen()) == "Sullen"
    assert _error_text.error_kind(Sullen()) == "Sullen"


@pytest.mark.parametrize(
    "text, short",
    [
        ("", ""),
        ("ab cd", "ab cd"),
        ("ab cdef", "ab …"),
        ("ab cd ef", "ab cd …"),
        ("ab\ncdef", "ab …"),
        ("abcdefgh", "…"),
    ],
)
def test_a_shortened_text_has_only_whole_words(text, short):
    assert _error_text.shortened(text, 5) == short
