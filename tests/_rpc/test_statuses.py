"""Test what the end of a call says about its connection and about a retry."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest

from fastapi_topaz import ConnectionLost, Verdict
from fastapi_topaz._rpc.statuses import (
    EndedCall,
    Ending,
    ending,
    is_unprocessed,
    is_worth_a_retry,
    status_number,
    verdict,
)


OTHERS = sorted(
    set(grpc.StatusCode)
    - {
        *(grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE),
        *(grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED),
    },
    key=str,
)


def ended(code, details="a text of the server"):
    metadata = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, metadata, metadata, details)


@pytest.mark.parametrize(
    "code, lost, expected",
    [
        (grpc.StatusCode.UNAVAILABLE, False, Verdict.REFUSED),
        (grpc.StatusCode.UNAVAILABLE, True, Verdict.BROKEN),
        (grpc.StatusCode.CANCELLED, False, Verdict.UNAVAILABLE),
        (grpc.StatusCode.CANCELLED, True, Verdict.BROKEN),
        (grpc.StatusCode.DEADLINE_EXCEEDED, False, Verdict.SILENT),
        *((code, False, Verdict.ANSWERED) for code in OTHERS),
        *((code, True, Verdict.ANSWERED) for code in OTHERS),
    ],
)
def test_a_status_of_the_server_gives_this_verdict(code, lost, expected):
    assert verdict(ended(code), lambda: lost) is expected


@pytest.mark.parametrize(
    "lost, expected", [(True, Verdict.UNAVAILABLE), (False, Verdict.REFUSED)]
)
def test_a_goaway_counts_only_if_the_connection_has_ended(lost, expected):
    """A proxy may quote the GOAWAY of its own connection."""
    code = grpc.StatusCode.UNAVAILABLE
    error = EndedCall(Ending.GOAWAY, code, "GOAWAY received")
    assert verdict(error, lambda: lost) is expected


@pytest.mark.parametrize("details", ["GOAWAY received", "Socket closed", "", None])
def test_a_text_alone_says_nothing(details):
    """A connector of the application may raise errors of grpc.aio itself."""
    error = ended(grpc.StatusCode.UNAVAILABLE, details)
    assert ending(error) is Ending.STATUS
    assert not is_unprocessed(error)
    assert verdict(error, lambda: False) is Verdict.REFUSED
    late = ended(grpc.StatusCode.DEADLINE_EXCEEDED, details)
    assert ending(late) is Ending.TIMED_OUT


def test_a_lost_connection_is_broken_and_other_errors_say_nothing():
    assert verdict(ConnectionLost("x"), lambda: False) is Verdict.BROKEN
    assert verdict(ValueError("x"), lambda: True) is None


@pytest.mark.parametrize("code", OTHERS)
def test_a_check_with_another_status_is_not_repeated(code):
    assert not is_worth_a_retry(ended(code))


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_the_number_of_a_status_is_that_of_grpc(code):
    assert status_number(ended(code)) == code.value[0]


class Foreign(Exception):  # noqa: N818
    """An error with a `code` of any kind, as other libraries have."""

    def __init__(self, code):
        self.code = code


def raising():
    raise LookupError("no code")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        ConnectionLost("x"),
        grpc.RpcError(),
        ended(None),
        Foreign(3),
        Foreign("E42"),
        Foreign(grpc.StatusCode.INTERNAL),  # not callable, as gRPC's is
        Foreign(lambda: 13),
        Foreign(lambda: "INTERNAL"),
        Foreign(raising),
    ],
)
def test_an_error_without_a_status_has_no_number(error):
    assert status_number(error) is None


def test_any_error_with_a_status_of_grpc_has_its_number():
    assert status_number(Foreign(lambda: grpc.StatusCode.ABORTED)) == 10
