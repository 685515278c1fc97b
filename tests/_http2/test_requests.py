"""The header blocks of requests, read by the library `hpack`."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_topaz._http2.requests import NO_TABLE, RequestBlocks


SECRETS = [("authorization", "basic secret"), ("x-api-key", "secret")]


def decoded(block):
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = 0
    return decoder.decode(NO_TABLE + block, raw=True)


def request(timeout=None, metadata=(), *, is_tls=True):
    blocks = RequestBlocks("topaz:8282", SECRETS, is_tls=is_tls)
    first = blocks.block("/a.B/C", timeout, metadata)
    assert blocks.block("/a.B/C", timeout, metadata) == first
    return first


def test_a_request_has_the_fields_of_grpc_in_their_order():
    fields = [tuple(field) for field in decoded(request(1.5)[0])]
    assert fields[:6] == [
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":path", b"/a.B/C"),
        (b":authority", b"topaz:8282"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    ]
    assert fields[6][0] == b"user-agent"
    assert fields[-1] == (b"grpc-timeout", b"1500m")


def test_plaintext_has_its_scheme():
    assert decoded(request(is_tls=False)[0])[1] == (b":scheme", b"http")


def test_metadata_are_never_indexed():
    fields = decoded(request(metadata=[("x-a", "b"), ("x-bin", b"\0\xff\xfe")])[0])
    found = {
        bytes(name): bytes(value)
        for field in fields
        if isinstance(field, hpack.NeverIndexedHeaderTuple)
        for name, value in [field]
    }
    assert found == {
        b"authorization": b"basic secret",
        b"x-api-key": b"secret",
        b"x-a": b"b",
        b"x-bin": b"AP/+",
    }


@pytest.mark.parametrize("key", ["content-type", "grpc-timeout", "te", "user-agent"])
def test_metadata_cannot_repeat_a_field_of_the_transport(key):
    with_it, without = (
        decoded(request(2.0, metadata)[0])
        for metadata in ([(key, "text"), ("x-a", "b")], [("x-a", "b")])
    )
    assert with_it == without


def test_whitespace_around_metadata_is_stripped():
    block, size = request(metadata=[("x-a", "  b c ")])
    assert decoded(block)[-1] == (b"x-a", b"b c")
    assert size == sum(len(name) + len(value) + 32 for name, value in decoded(block))


@pytest.mark.parametrize(
    "method", ["", "/", "a.B/C", "/a.B/C ", "/a\r\nb", "/a\0", "/é", "/a\x7f", "/a\n"]
)
def test_a_method_that_cannot_be_a_path_is_refused(method):
    blocks = RequestBlocks("topaz:8282", (), is_tls=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="method must be a full name"):
            blocks.block(method, None, ())


def test_the_blocks_of_few_methods_are_cached():
    blocks = RequestBlocks("topaz:8282", (), is_tls=False)
    for number in range(300):
        block, _ = blocks.block(f"/a.B/C{number}", None, ())
        assert decoded(block)[2] == (b":path", b"/a.B/C%d" % number)
    assert len(blocks._blocks) == 256


def test_binary_metadata_have_no_padding():
    assert decoded(request(metadata=[("x-bin", b"a")])[0])[-1] == (b"x-bin", b"YQ")


@given(
    st.none() | st.floats(0.001, 1e6),
    st.lists(st.tuples(st.just("x-a"), st.text("abc", max_size=200)), max_size=4),
)
def test_the_size_counts_all_fields(timeout, metadata):
    block, size = request(timeout, metadata)
    exact = sum(len(name) + len(value) + 32 for name, value in decoded(block))
    assert exact <= size <= exact + (0 if timeout is None else 8)


UNITS = {"u": 1e-6, "m": 1e-3, "S": 1}


@given(st.floats(1e-6, 3e8))
def test_the_timeout_is_rounded_up_and_not_far(seconds):
    value = decoded(request(seconds)[0])[-1][1].decode()
    assert len(value) <= 9
    sent = int(value[:-1]) * UNITS[value[-1]]
    if seconds <= 99_999_999:
        assert seconds <= sent * (1 + 1e-12)
        assert sent <= seconds * 1.011 + 2e-6
    else:
        assert value == "99999999S"


@pytest.mark.parametrize(
    "seconds, value",
    [(5.0, b"5000m"), (0.05, b"50000u"), (0.1, b"100m"), (1e9, b"99999999S")],
)
def test_the_timeout_has_few_values(seconds, value):
    assert decoded(request(seconds)[0])[-1] == (b"grpc-timeout", value)
