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
