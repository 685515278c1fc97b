"""What an answer means: one message with status OK, or an error, and never both."""

from __future__ import annotations

import copy
import pickle

import grpc
import hpack
import pytest

from fastapi_topaz._http2.errors import ErrorCode, StreamViolation
from fastapi_topaz._http2.hpack import decode_block
from fastapi_topaz._http2.limits import MAX_MESSAGE
from fastapi_topaz._http2.responses import Response, reset_error
from fastapi_topaz._pool.connector import Verdict
from fastapi_topaz._rpc.statuses import (
    Ending,
    ending,
    is_from_service,
    is_unprocessed,
    lacks_status,
    verdict,
)
from kit.h2peer import HEAD, TAIL, message


Code = grpc.StatusCode
TYPE = HEAD[1]


def block(headers):
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    return decode_block(encoder.encode(headers))


YES = message(b"yes")


def response(head=HEAD, body=YES, tail=TAIL, *, end_of_data=False):
    """Return the outcome of a response, as the connection would find it."""
    found = Response()
    steps = [
        lambda: head is not None and found.headers(block(head), end_stream=False),
        lambda: body and found.data(body),
        lambda: end_of_data and found.end_of_data(),
        lambda: tail is not None and found.headers(block(tail), end_stream=True),
    ]
    for step in steps:
        step()
        if found.outcome is not None:
            break
    return found.outcome


def only_trailers(*fields):
    found = Response()
    found.headers(block([*HEAD, *fields]), end_stream=True)
    return found.outcome


def assert_failed(outcome, code, how, text=""):
    assert isinstance(outcome, grpc.aio.AioRpcError), outcome
    assert (outcome.code(), ending(outcome)) == (code, how)
    assert text in outcome.details()


# -- good answers ---------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        HEAD,
        [(":status", "200"), ("content-type", "application/grpc+proto")],
        [(":status", "200"), ("content-type", "application/grpc; charset=utf-8")],
        [*HEAD, ("grpc-encoding", "identity"), ("server", "envoy")],
        [*HEAD, ("content-length", "8")],
        [*HEAD, ("content-length", "0008")],
        # A message whose flag is 0 is not compressed, whatever the headers say.
        [*HEAD, ("grpc-encoding", "gzip")],
        [*HEAD, ("grpc-encoding", "deflate")],
    ],
)
def test_a_good_answer_is_its_message(head):
    assert response(head) == b"yes"


def test_an_empty_message_is_an_answer():
    assert response(body=message(b"")) == b""


def test_a_message_may_come_in_any_parts():
    whole = message(b"x" * 100)
    for cut in range(1, len(whole)):
        found = Response()
        found.headers(block(HEAD), end_stream=False)
        for part in (whole[:cut], whole[cut:]):
            found.data(part)
        found.headers(block(TAIL), end_stream=True)
        assert found.outcome == b"x" * 100


def test_informational_responses_come_before():
    found = Response()
    for status in ("100", "103"):
        found.headers(block([(":status", status)]), end_stream=False)
    found.headers(block(HEAD), end_stream=False)
    found.data(message(b"yes"))
    found.headers(block(TAIL), end_stream=True)
    assert found.outcome == b"yes"


# -- statuses of gRPC -----------------------------------------------------


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
def test_each_status_is_its_code(code):
    status = ("grpc-status", str(code.value[0]))
    for outcome in (response(tail=[status]), only_trailers(status)):
        assert_failed(outcome, code, Ending.STATUS)


@pytest.mark.parametrize("http", ["200", "204", "502"])
def test_an_error_of_nginx_needs_no_content_type(http):
    fields = ("grpc-status", "14"), ("grpc-message", "no healthy upstream")
    found = Response()
    found.headers(block([(":status", http), *fields]), end_stream=True)
    assert_failed(found.outcome, Code.UNAVAILABLE, Ending.STATUS, "no healthy upstream")


@pytest.mark.parametrize("http", ["200", "204"])
@pytest.mark.parametrize("values", [["0"], [], ["0", "14"], ["nonsense"]])
def test_without_a_content_type_nothing_else_is_a_status(http, values):
    fields = [("grpc-status", value) for value in values]
    found = Response()
    found.headers(block([(":status", http), *fields]), end_stream=True)
    assert_failed(found.outcome, Code.UNKNOWN, Ending.NO_STATUS)


@pytest.mark.parametrize("number", [17, 99, 4294967296])
def test_an_unknown_status_is_unknown(number):
    outcome = response(tail=[("grpc-status", str(number)), ("grpc-message", "odd")])
    assert_failed(outcome, Code.UNKNOWN, Ending.STATUS)
    assert outcome.details() == f"odd (the unknown grpc-status {number})"


@pytest.mark.parametrize(
    "value", ["", "-1", "abc", "00", "0x0", "0.0", "0,0", " 0", "+0", "OK", "9" * 11]
)
def test_what_is_no_number_is_no_status(value):
    outcome = response(tail=[("grpc-status", value)])
    assert_failed(outcome, Code.UNKNOWN, Ending.NO_STATUS, "no valid grpc-status")


@pytest.mark.parametrize("values", [("0", "7"), ("7", "0"), ("0", "0")])
def test_two_statuses_are_none(values):
    outcome = response(tail=[("grpc-status", value) for value in values])
    assert_failed(outcome, Code.UNKNOWN, Ending.NO_STATUS)


@pytest.mark.parametrize("tail", [[], [("x-a", "b")]])
def test_trailers_without_a_status_are_an_error(tail):
    assert_failed(response(tail=tail), Code.UNKNOWN, Ending.NO_STATUS)


@pytest.mark.parametrize(
    "sent, read",
    [
        ("plain", "plain"),
        ("caf%C3%A9 %25", "café %"),
        ("bad %", "bad %"),
        ("bad %zz %4", "bad %zz %4"),
        ("%ff", "�"),
        ("", ""),
        ("\\t\\ttest with whitespace%0D%0Aand Unicode BMP %E2%98%BA", None),
    ],
)
def test_the_message_of_an_error_is_percent_decoded(sent, read):
    outcome = response(tail=[("grpc-status", "3"), ("grpc-message", sent)])
    expected = (
        "\\t\\ttest with whitespace\r\nand Unicode BMP ☺" if read is None else read
    )
    assert outcome.details() == expected


def test_an_error_has_its_metadata():
    outcome = response(
        [*HEAD, ("x-a", "b")],
        tail=[
            ("grpc-status", "5"),
            ("x-c-bin", "AP/+"),
            ("x-d-bin", "YQ==,Yg, Yw== ,"),
            ("x-d-bin", "ZA"),
            ("x-e-bin", "!"),
            ("x-f-bin", "abcde"),
            ("x-g-bin", "a-_b"),
        ],
    )
    assert tuple(outcome.initial_metadata()) == (("x-a", "b"),)
    assert tuple(outcome.trailing_metadata()) == (
        ("x-c-bin", b"\0\xff\xfe"),
        # Joined by a comma or not, these are several values of one key.
        ("x-d-bin", b"a"),
        ("x-d-bin", b"b"),
        ("x-d-bin", b"c"),
        ("x-d-bin", b""),
        ("x-d-bin", b"d"),
        # What is not base64 stays as it is.
        ("x-e-bin", b"!"),
        ("x-f-bin", b"abcde"),
        ("x-g-bin", b"a-_b"),
    )


def test_the_metadata_of_trailers_alone_are_trailing():
    outcome = only_trailers(("grpc-status", "5"), ("x-a", "b"))
    assert tuple(outcome.initial_metadata()) == ()
    assert tuple(outcome.trailing_metadata()) == (("x-a", "b"),)


# -- answers of proxies ---------------------------------------------------


HTTP = {
    204: Code.UNKNOWN,
    302: Code.UNKNOWN,
    400: Code.INTERNAL,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.UNIMPLEMENTED,
    429: Code.UNAVAILABLE,
    500: Code.UNKNOWN,
    502: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    504: Code.UNAVAILABLE,
    999: Code.UNKNOWN,
}


@pytest.mark.parametrize("status, code", HTTP.items())
def test_a_page_of_a_proxy_is_the_code_of_its_status(status, code):
    head = [(":status", str(status)), ("content-type", "text/html")]
    # The body may be endless, so it is not read.
    outcome = response(head, b"<p>", None)
    assert_failed(outcome, code, Ending.NO_STATUS, f"HTTP status: {status}")
    # What says that all is well, with such a status.
    for head in ([(":status", str(status)), TYPE],):
        assert_failed(response(head), code, Ending.NO_STATUS)
        assert_failed(response(head, tail=[]), code, Ending.NO_STATUS)
        assert_failed(
            response(head, tail=None, end_of_data=True), code, Ending.NO_STATUS
        )


def test_a_status_of_the_service_counts_more_than_that_of_http():
    outcome = response([(":status", "503"), TYPE], b"", [("grpc-status", "7")])
    assert_failed(outcome, Code.PERMISSION_DENIED, Ending.STATUS)


@pytest.mark.parametrize(
    "types",
    [
        *([], ["text/html"], ["application/json"], ["application/grpc-web"], [""]),
        *(["application/grpc", "text/html"], ["application/grpcx"]),
    ],
)
def test_another_content_type_is_no_answer_of_grpc(types):
    head = [(":status", "200"), *(("content-type", value) for value in types)]
    outcome = response(head)
    assert_failed(outcome, Code.UNKNOWN, Ending.NO_STATUS, "content type")


# -- answers that break the rules -----------------------------------------


@pytest.mark.parametrize(
    "head, tail",
    [
        (HEAD[1:], TAIL),
        ([(":status", "500"), *HEAD], TAIL),
        ([TYPE, HEAD[0]], TAIL),
        ([*HEAD, (":path", "/")], TAIL),
        ([HEAD[0], (":path", "/"), TYPE], TAIL),
        ([HEAD[0], HEAD[0], TYPE], TAIL),
        ([*HEAD, (":unknown", "x")], TAIL),
        *(
            ([(":status", value), TYPE], TAIL)
            for value in ("", "0", "20", "2000", "-20", "abc", "099", "101")
        ),
        ([*HEAD, ("grpc-status", "7")], TAIL),
        ([*HEAD, ("content-length", "7")], TAIL),
        ([*HEAD, ("content-length", "x")], TAIL),
        ([*HEAD, ("content-length", "8"), ("content-length", "8")], TAIL),
        ([*HEAD, ("content-length", "7")], [("grpc-status", "7")]),
        ([*HEAD, ("content-length", "9" * 20)], TAIL),
        ([*HEAD, ("content-length", "")], TAIL),
        ([*HEAD, ("content-length", "-8")], TAIL),
        (HEAD, [("grpc-status", "7"), ("content-length", "9")]),
        (HEAD, HEAD),
        (HEAD, [*TAIL, ("content-length", "7")]),
        (HEAD, [*TAIL, (":status", "500")]),
    ],
)
def test_malformed_headers_break_the_stream(head, tail):
    with pytest.raises(StreamViolation) as no:
        response(head, tail=tail)
    assert no.value.code is ErrorCode.PROTOCOL_ERROR


def test_headers_that_are_neither_first_nor_last_break_the_stream():
    found = Response()
    found.headers(block(HEAD), end_stream=False)
    with pytest.raises(StreamViolation):
        found.headers(block(TAIL), end_stream=False)


def test_endless_informational_responses_break_the_stream():
    found = Response()
    for _ in range(16):
        found.headers(block([(":status", "103")]), end_stream=False)
    with pytest.raises(StreamViolation):
        found.headers(block([(":status", "103")]), end_stream=False)


def test_the_status_101_breaks_the_stream():
    # RFC 9113, section 8.6: HTTP/2 has no upgrades.
    with pytest.raises(StreamViolation):
        Response().headers(block([(":status", "101")]), end_stream=False)


def test_empty_data_are_no_part_of_the_body():
    found = Response()
    found.headers(block([*HEAD, ("content-length", "8")]), end_stream=False)
    for part in (b"", YES[:3], b"", YES[3:], b""):
        found.data(part)
    found.headers(block([*TAIL, ("content-length", "8")]), end_stream=True)
    assert found.outcome == b"yes"


def test_an_informational_response_that_ends_breaks_the_stream():
    with pytest.raises(StreamViolation):
        Response().headers(block([(":status", "103")]), end_stream=True)


def test_data_before_the_headers_break_the_stream():
    with pytest.raises(StreamViolation):
        response(None)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", message(b"yes")[:3], message(b"yes")[:5], message(b"yes")[:-1]),
        *(message(b"yes") * 2, message(b"yes") + b"\0", message(b"y", 1)),
        *(message(b"y", 2), message(b"y", 255), b'{"allowed": true}'),
    ],
)
def test_what_is_not_one_whole_message_is_an_error(body):
    assert_failed(response(body=body), Code.INTERNAL, Ending.NO_STATUS)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "secret", ""])
def test_a_compressed_answer_is_refused_with_the_remedy(encoding):
    head = [*HEAD, ("grpc-encoding", encoding)]
    outcome = response(head, message(b"yes", 1))
    assert_failed(outcome, Code.INTERNAL, Ending.NO_STATUS, "turn compression off")
    assert f"(grpc-encoding: {encoding or 'none'})" in outcome.details()


@pytest.mark.parametrize("encodings", [["secret"], [""], ["gzip", "secret"]])
def test_an_unknown_encoding_is_refused_also_without_compression(encodings):
    outcome = response([*HEAD, *(("grpc-encoding", value) for value in encodings)])
    assert_failed(outcome, Code.INTERNAL, Ending.NO_STATUS, "grpc-encoding is unknown")


@pytest.mark.parametrize("encoding", ["gzip", "secret"])
def test_an_error_of_a_server_that_compresses_keeps_its_status(encoding):
    status = ("grpc-status", "7")
    head = [*HEAD, ("grpc-encoding", encoding)]
    outcomes = response(head, None, [status]), only_trailers(head[-1], status)
    for outcome in outcomes:
        assert_failed(outcome, Code.PERMISSION_DENIED, Ending.STATUS)


def test_trailers_alone_with_a_content_length_are_malformed():
    with pytest.raises(StreamViolation):
        only_trailers(("grpc-status", "7"), ("content-length", "5"))
    outcome = only_trailers(("grpc-status", "7"), ("content-length", "0"))
    assert_failed(outcome, Code.PERMISSION_DENIED, Ending.STATUS)


@pytest.mark.parametrize("text", [" a", "a ", "\ta\t", " "])
def test_whitespace_around_a_value_is_kept(text):
    # RFC 9113, section 8.2.1 forbids it. But gRPC servers send a `grpc-message` as it
    # is, so a response that has it must keep its status.
    outcome = response(tail=[("grpc-status", "7"), ("grpc-message", text)])
    assert_failed(outcome, Code.PERMISSION_DENIED, Ending.STATUS)
    assert outcome.details() == text


def test_a_message_that_is_too_large_is_refused_at_its_prefix():
    most = message(b"x" * MAX_MESSAGE)
    assert response(body=most) == most[5:]
    head = message(b"x" * (MAX_MESSAGE + 1))[:5]
    outcome = response(body=head, tail=None)
    assert_failed(outcome, Code.RESOURCE_EXHAUSTED, Ending.STATUS, "4194305 bytes")


def test_an_answer_without_trailers_is_an_error():
    outcome = response(tail=None, end_of_data=True)
    assert_failed(outcome, Code.UNKNOWN, Ending.NO_STATUS, "no trailers")


@pytest.mark.parametrize("where", ["head", "tail"])
def test_details_of_an_error_contradict_ok(where):
    details = [("grpc-status-details-bin", "CAc=")]
    outcome = response(
        HEAD + details * (where == "head"), tail=TAIL + details * (where == "tail")
    )
    assert_failed(outcome, Code.INTERNAL, Ending.NO_STATUS)


def test_ok_in_trailers_alone_has_no_message():
    assert_failed(only_trailers(*TAIL), Code.INTERNAL, Ending.NO_STATUS, "no message")


# -- what the pool makes of it --------------------------------------------


RESETS = {
    ErrorCode.NO_ERROR: Code.INTERNAL,
    ErrorCode.REFUSED_STREAM: Code.UNAVAILABLE,
    ErrorCode.CANCEL: Code.CANCELLED,
    ErrorCode.ENHANCE_YOUR_CALM: Code.RESOURCE_EXHAUSTED,
    ErrorCode.INADEQUATE_SECURITY: Code.PERMISSION_DENIED,
    ErrorCode.STREAM_CLOSED: Code.UNKNOWN,
    77: Code.UNKNOWN,
}


@pytest.mark.parametrize("code, expected", RESETS.items())
def test_a_reset_is_the_status_that_grpc_gives_it(code, expected):
    error = reset_error(code)
    refused = code == ErrorCode.REFUSED_STREAM
    assert_failed(error, expected, Ending.REFUSED_STREAM if refused else Ending.RESET)
    assert is_unprocessed(error) is refused
    assert verdict(error, lambda: False) is Verdict.ANSWERED


def test_a_page_of_a_proxy_is_not_from_the_service():
    page = response([(":status", "502"), ("content-type", "text/html")])
    assert lacks_status(page)
    assert not is_from_service(page)
    assert verdict(page, lambda: False) is Verdict.REFUSED


def test_the_text_of_an_answer_decides_nothing():
    # grpcio has only texts, and a proxy may quote them.
    tail = [("grpc-status", "14"), ("grpc-message", "GOAWAY received; Socket closed")]
    outcome = response(tail=tail)
    assert_failed(outcome, Code.UNAVAILABLE, Ending.STATUS)
    assert not is_unprocessed(outcome)
    assert verdict(outcome, lambda: False) is Verdict.REFUSED


def test_an_error_survives_copy_and_pickle():
    outcome = response(tail=[("grpc-status", "5"), ("grpc-message", "no"), ("x", "y")])
    for twin in (copy.copy(outcome), pickle.loads(pickle.dumps(outcome))):
        assert_failed(twin, Code.NOT_FOUND, Ending.STATUS, "no")
        assert tuple(twin.trailing_metadata()) == (("x", "y"),)
