"""Test what the texts of gRPC's core mean."""

from __future__ import annotations

import pickle
import time

import grpc
import grpc.aio
import pytest

from fastapi_topaz import AuthorizerOptions
from fastapi_topaz._grpcio.failures import connect_failed, ended
from fastapi_topaz._rpc.statuses import EndedCall, Ending
from kit.configs import TOPAZ


# -- connections ----------------------------------------------------------------------


def test_an_unknown_reason_is_passed_on_unchanged():
    failed = connect_failed("the moon is full", TOPAZ.target)
    assert str(failed) == "cannot connect to topaz.test:8282: the moon is full"
    assert (failed.reason, failed.permanent) == ("other", False)


HANDSHAKE = "Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000"
NOT_SEEN = "Invalid certificate verification context: OK"


@pytest.mark.parametrize(
    "text, said",
    [
        # gRPC 1.80
        ("recvmsg:Connection reset by peer", "closed the connection"),
        ("Socket closed", "closed the connection"),
        (
            "Trying to connect an http1.x server (HTTP status 400)",
            "does not speak gRPC",
        ),
        # gRPC 1.85
        ("Handshake read failed (Socket closed)", "closed the connection"),
        ("Handshake read failed (recvmsg:Connection reset by peer (104))", "closed"),
        # grpc-go with TLS 1.2
        (f"{HANDSHAKE}412: SSLV3_ALERT_BAD_CERTIFICATE: OK", "client certificate"),
        (f"{HANDSHAKE}410: SSLV3_ALERT_HANDSHAKE_FAILURE: OK", "client certificate"),
        (f"{HANDSHAKE}410: SSLV3_ALERT_HANDSHAKE_FAILURE: {NOT_SEEN}", "ciphers"),
        ("something new", "something new"),
    ],
)
def test_error_texts_of_each_grpc_version_are_recognized(text, said):
    details = f"failed to connect to all addresses; last error: UNKNOWN: {text}"
    error = connect_failed(details, AuthorizerOptions().target)
    assert said in str(error)
    assert text in str(error)
    assert "insecure=True" not in str(error)


# -- calls ----------------------------------------------------------------------------


def error(code, details):
    metadata = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, metadata, metadata, details=details)


@pytest.mark.parametrize(
    "details, found",
    [
        ("Stream removed (Socket closed)", Ending.CUT_OFF),
        ("Socket closed", Ending.CUT_OFF),
        ("recvmsg:Connection reset by peer", Ending.CUT_OFF),
        ("Stream removed (Socket closed (GOAWAY received; x))", Ending.CUT_OFF),
        ("Stream removed (ping timeout)", Ending.CUT_OFF),
        ("Stream removed", Ending.CUT_OFF),
        ("Stream removed (GOAWAY received; Error code: 0)", Ending.GOAWAY),
        ("GOAWAY received; Error code: 0", Ending.GOAWAY),
        (
            "Stream removed (RST_STREAM (Received RST_STREAM with error code 7))",
            Ending.REFUSED_STREAM,
        ),
        ("Received RST_STREAM with error code 7", Ending.REFUSED_STREAM),
        ("Received RST_STREAM with error code 77", Ending.RESET),
        ("Received RST_STREAM with error code 2", Ending.RESET),
        ("Received http2 header with status: 502", Ending.NO_STATUS),
        ("No status received", Ending.NO_STATUS),
        ("upstream: Socket closed", Ending.STATUS),
        ("the text 'Stream removed'", Ending.STATUS),
        ("", Ending.STATUS),
        (None, Ending.STATUS),
    ],
)
def test_the_details_of_an_error_classify_how_its_call_ended(details, found):
    given = error(grpc.StatusCode.UNAVAILABLE, details)
    assert ended(given, None).how is found
    late = error(grpc.StatusCode.DEADLINE_EXCEEDED, details)
    assert ended(late, None).how is Ending.TIMED_OUT


def test_an_answer_rejected_by_grpc_itself_is_a_status():
    too_large = "Stream removed (CLIENT: Received message larger than max (9 vs. 4))"
    found = ended(error(grpc.StatusCode.RESOURCE_EXHAUSTED, too_large), None)
    assert found.how is Ending.STATUS


def test_the_error_of_a_call_keeps_what_grpc_said():
    initial, trailing = grpc.aio.Metadata(("a", "b")), grpc.aio.Metadata(("c", b"d"))
    given = grpc.aio.AioRpcError(
        grpc.StatusCode.NOT_FOUND, initial, trailing, "nothing", "in file x.cc"
    )
    found = ended(given, None)
    for error in (found, pickle.loads(pickle.dumps(found))):
        assert isinstance(error, EndedCall)
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert error.details() == "nothing"
        assert error.debug_error_string() == "in file x.cc"
        assert tuple(error.initial_metadata()) == (("a", "b"),)
        assert tuple(error.trailing_metadata()) == (("c", b"d"),)


def now():
    return time.clock_gettime(time.CLOCK_MONOTONIC)


@pytest.mark.parametrize("wall_clock", [0.0, 1e9, 4e9])
def test_a_stream_reset_at_its_deadline_is_deadline_exceeded(wall_clock, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: wall_clock)
    reset = error(grpc.StatusCode.CANCELLED, "Received RST_STREAM with error code 8")
    late = ended(reset, now() - 1)
    assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert late.how is Ending.TIMED_OUT
    for deadline in (now() + 60, None):
        early = ended(reset, deadline)
        assert early.code() is grpc.StatusCode.CANCELLED
        assert early.how is Ending.RESET
