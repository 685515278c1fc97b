"""Header blocks: the vectors of RFC 7541, and the library `hpack` as the judge."""

from __future__ import annotations

import itertools

import hpack
import pytest
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hpack.table import HeaderTable
from hypothesis import given
from hypothesis import strategies as st

from fastapi_topaz._http2 import hpack as hpack_of_ours
from fastapi_topaz._http2.errors import ErrorCode, PeerViolation, StreamViolation
from fastapi_topaz._http2.hpack import (
    decode_block,
    encode_field,
    encode_indexed,
    encode_integer,
)
from fastapi_topaz._http2.limits import MAX_HEADER_LIST_SIZE


def fields_of(block):
    return [(field.name, field.value) for field in decode_block(block).fields()]


def judge():
    """Return a decoder of the library that allows what ours does: no table."""
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = decoder.header_table_size = 0
    return decoder


# -- RFC 7541, appendix C -------------------------------------------------


@pytest.mark.parametrize(
    "value, prefix, encoded",
    [(10, 5, "0a"), (1337, 5, "1f9a0a"), (42, 8, "2a")],
)
def test_integers_of_appendix_c_1(value, prefix, encoded):
    assert encode_integer(value, prefix).hex() == encoded


@pytest.mark.parametrize(
    "block, expected",
    [
        # C.2.2 to C.2.4. C.2.1 has a name in upper case only in its text.
        (
            "400a637573746f6d2d6b65790d637573746f6d2d686561646572",
            [(b"custom-key", b"custom-header")],
        ),
        ("040c2f73616d706c652f70617468", [(b":path", b"/sample/path")]),
        ("100870617373776f726406736563726574", [(b"password", b"secret")]),
        ("82", [(b":method", b"GET")]),
        # C.3.1 and C.4.1: the same request, without Huffman coding and with it.
        *(
            (
                block,
                [
                    (b":method", b"GET"),
                    (b":scheme", b"http"),
                    (b":path", b"/"),
                    (b":authority", b"www.example.com"),
                ],
            )
            for block in (
                "828684410f7777772e6578616d706c652e636f6d",
                "828684418cf1e3c2e5f23a6ba0ab90f4ff",
            )
        ),
        # C.5.1 and C.6.1: the same response.
        *(
            (
                block,
                [
                    (b":status", b"302"),
                    (b"cache-control", b"private"),
                    (b"date", b"Mon, 21 Oct 2013 20:13:21 GMT"),
                    (b"location", b"https://www.example.com"),
                ],
            )
            for block in (
                (
                    "4803333032580770726976617465611d4d6f6e2c203231204f63742032303133"
                    "2032303a31333a323120474d546e1768747470733a2f2f7777772e6578616d70"
                    "6c652e636f6d"
                ),
                (
                    "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a6"
                    "2d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3"
                ),
            )
        ),
    ],
)
def test_blocks_of_appendix_c(block, expected):
    assert fields_of(bytes.fromhex(block)) == expected


@pytest.mark.parametrize(
    "block",
    [
        "828684be58086e6f2d6361636865",  # C.3.2: index 62
        "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565",  # C.3.3: index 63
        "4883640effc1c0bf",  # C.6.2
    ],
)
def test_a_reference_to_the_dynamic_table_ends_the_connection(block):
    # Appendix C keeps a table, which our settings forbid.
    with pytest.raises(PeerViolation) as no:
        decode_block(bytes.fromhex(block))
    assert no.value.code is ErrorCode.COMPRESSION_ERROR
    assert not isinstance(no.value, StreamViolation)


# -- our own blocks -------------------------------------------------------


text = st.binary(max_size=300)


@given(st.binary(min_size=1, max_size=300), text, st.booleans())
def test_the_library_reads_our_fields(name, value, never):
    block = encode_field(name, value, never_indexed=never)
    (field,) = judge().decode(block, raw=True)
    assert field == (name, value)
    assert isinstance(field, hpack.NeverIndexedHeaderTuple) is never


@pytest.mark.parametrize("name, value", HeaderTable.STATIC_TABLE)
def test_the_library_reads_our_indexed_fields(name, value):
    assert judge().decode(encode_indexed(name, value), raw=True) == [(name, value)]
    (field,) = judge().decode(encode_field(name, b"v"), raw=True)
    assert field == (name, b"v")


# -- the decoder ----------------------------------------------------------

names = st.from_regex(
    rb"[!#$%&'*+\-.^_`|~0-9a-z]{1,40}", fullmatch=True
) | st.sampled_from([name for name, _ in HeaderTable.STATIC_TABLE])
values = st.binary(max_size=200)
FORBIDDEN = {b"connection", b"keep-alive", b"proxy-connection", b"te"} | {
    b"transfer-encoding",
    b"upgrade",
}


@given(
    st.lists(st.tuples(names, values, st.booleans()), max_size=20),
    st.booleans(),
)
def test_the_decoder_reads_what_the_library_writes(headers, huffman):
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    block = encoder.encode(headers, huffman=huffman)
    plain = [(name, value) for name, value, _ in headers]
    malformed = any(
        name in FORBIDDEN or not {0, 10, 13}.isdisjoint(value) for name, value in plain
    )
    if malformed:
        with pytest.raises(StreamViolation):
            decode_block(block)
    else:
        assert fields_of(block) == plain


def outcome(decode, block):
    try:
        return [tuple(field) for field in decode(block)]
    except StreamViolation:
        return None  # decoded, and malformed
    except (PeerViolation, hpack.HPACKError):
        return "undecodable"


pieces = st.sampled_from(
    [
        *(
            b"\x20",
            b"\x21",
            b"\x3f\xe1\x1f",
            b"\x80",
            b"\x88",
            b"\xbd",
            b"\xbe",
            b"\xff",
        ),
        *(b"\x00", b"\x40", b"\x10", b"\x0f\x10", b"\x01a", b"\x01b", b"\x7f\x00"),
        *(b"\x83\xff\xff\xff", b"\x82d\x02", b"\x84\xff\xff\xff\xff", b"\x7f\x81\x00"),
    ]
)


@given(st.lists(pieces | st.binary(max_size=3), max_size=12).map(b"".join))
def test_any_bytes_mean_the_same_to_the_library(block):
    ours = outcome(fields_of, block)
    theirs = outcome(lambda each: judge().decode(each, raw=True), block)
    if ours is None:
        assert theirs != "undecodable"
    else:
        assert ours == theirs


UNDECODABLE = {
    "index 0": "80",
    "the index after the static table": "be",
    "a name of the index after the static table": "7f00 0161",
    "a name of the index 62 without indexing": "0f2f 0161",
    "a name that is never indexed of the index 62": "1f2f 0161",
    "no index": "ff",
    "no end of an index": "ff80",
    "no name": "00",
    "no value": "000161",
    "a value without its last byte": "000161 05 62626262",
    "a name without its last byte": "0002 61",
    "no bytes of a value": "000161 01",
    "an integer of six bytes": "000161 7f8080808000" + "62" * 127,
    "an integer of 2 to the power of 35": "000161 7f8080808080017f",
    "padding of Huffman code that is too long": "000c677270632d6d657373616765 81 ff",
    "padding of Huffman code that is not ones": "000c677270632d6d657373616765 81 18",
    "the end of string in Huffman code": "000161 84 ffffffff",
    "a size of the table after a field": "88 20",
    "a table of one byte": "21",
    "a table of 31 bytes": "3f00",
}


@pytest.mark.parametrize("block", UNDECODABLE.values(), ids=UNDECODABLE)
def test_an_undecodable_block_ends_the_connection(block):
    with pytest.raises(PeerViolation) as no:
        decode_block(bytes.fromhex(block))
    assert no.value.code is ErrorCode.COMPRESSION_ERROR
    assert not isinstance(no.value, StreamViolation)


DECODABLE = {
    "an empty block": ("", []),
    "the last index of the static table": ("bd", [(b"www-authenticate", b"")]),
    "a name of the last index": ("0f2e 0161", [(b"www-authenticate", b"a")]),
    "a name of the last index, with indexing": (
        "7d 0161",
        [(b"www-authenticate", b"a")],
    ),
    "a name of the last index, never indexed": (
        "1f2e 0161",
        [(b"www-authenticate", b"a")],
    ),
    "an index with a prefix of ones": ("0f00 0161", [(b"accept-charset", b"a")]),
    "an integer of five bytes": (
        "000161 7f80808000" + "62" * 127,
        [(b"a", b"b" * 127)],
    ),
    "a length above its prefix": ("000161 7f01" + "62" * 128, [(b"a", b"b" * 128)]),
    "several sizes of the table": ("2020 88", [(b":status", b"200")]),
}


@pytest.mark.parametrize("block, expected", DECODABLE.values(), ids=DECODABLE)
def test_an_unusual_block_is_decoded(block, expected):
    assert fields_of(bytes.fromhex(block)) == expected
    assert judge().decode(bytes.fromhex(block), raw=True) == expected


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_a_field_of_http1_ends_the_stream(name):
    with pytest.raises(StreamViolation, match="not allowed in an HTTP/2 response"):
        decode_block(encode_field(name, b"trailers"))


# Their Huffman codes put zeros or ones on both sides of the byte.
@pytest.mark.parametrize("around", [b"0", b"ab", b"&", b"aaa", b"~~"])
def test_a_value_with_any_byte_is_found_out_in_both_codings(around):
    # Not a test for each byte: they take longer to collect than to run.
    for byte, huffman in itertools.product(range(256), (False, True)):
        value = around + bytes([byte]) + around
        encoder = hpack.Encoder()
        encoder.header_table_size = 0
        block = encoder.encode([(b"x-a", value)], huffman=huffman)
        if byte in {0, 10, 13}:
            with pytest.raises(StreamViolation, match="line break or a NUL"):
                decode_block(block)
        else:
            assert fields_of(block) == [(b"x-a", value)]


def test_ten_ones_begin_the_codes_of_all_forbidden_bytes():
    for byte in (0, 10, 13):
        length = REQUEST_CODES_LENGTH[byte]
        assert f"{REQUEST_CODES[byte]:0{length}b}".startswith("1" * 10)


@pytest.mark.parametrize(
    "name", [b"X-Up", b"a name", b"", b":", b"a:b", b"caf\xc3\xa9", b"\x7f"]
)
def test_a_malformed_name_ends_the_stream(name):
    with pytest.raises(StreamViolation) as no:
        decode_block(encode_field(name, b"x"))
    assert no.value.code is ErrorCode.PROTOCOL_ERROR


def test_an_undecodable_block_ends_the_connection_also_after_a_malformed_field():
    with pytest.raises(PeerViolation) as no:
        decode_block(encode_field(b"X-Up", b"x") + b"\x00")
    assert not isinstance(no.value, StreamViolation)


@pytest.mark.parametrize("huffman", [False, True])
def test_the_header_list_is_bounded_as_the_sender_counts_it(huffman):
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    room = MAX_HEADER_LIST_SIZE - len("x-a") - 32
    for byte in (b"a", b"~"):  # five bits, and thirteen
        most = encoder.encode([(b"x-a", byte * room)], huffman=huffman)
        assert fields_of(most) == [(b"x-a", byte * room)]
        more = encoder.encode([(b"x-a", byte * (room + 1))], huffman=huffman)
        with pytest.raises(StreamViolation, match="16385 bytes"):
            decode_block(more)


def test_a_bomb_of_short_fields_is_refused():
    # One byte each, and up to 60 in the list.
    for index in range(1, 62):
        with pytest.raises(StreamViolation):
            decode_block(bytes([0x80 | index]) * 1000)


# -- blocks that differ only in their last value ---------------------------------------


def outcome_of(decode, block):
    """Return the fields of *block*, or how it is refused."""
    try:
        decoded = decode(block)
        return (
            [(field.name, field.value) for field in decoded.fields()],
            decoded.known,
            decoded.pseudo,
            decoded.pseudo_first,
        )
    except (PeerViolation, StreamViolation) as error:
        return type(error), error.code


ID = b"aserto-request-id"
lasts = st.sampled_from([ID, b"grpc-message", b"content-length", b"x-bin"])


@given(
    st.lists(
        st.tuples(
            lasts, st.binary(max_size=8) | st.binary(max_size=300), st.booleans()
        ),
        min_size=2,
        max_size=5,
    ),
    st.binary(max_size=3),
)
def test_a_block_means_the_same_after_one_that_differs_only_in_its_last_value(
    values, rest
):
    first = encode_indexed(b":status", b"200")
    for name, value, is_huffman in values:
        literal = encode_field(name, b"")[:-1]
        coded = encode_integer(len(value), 7, 0x80 if is_huffman else 0) + value
        for block in (
            first + literal + coded,
            first + literal + coded + rest,
            first + literal + coded[:-1],
            first + literal,
        ):
            undisturbed = outcome_of(hpack_of_ours._decode_block.__wrapped__, block)
            assert outcome_of(decode_block, block) == undisturbed


@pytest.mark.parametrize("forbidden", [b"\0", b"\r", b"\n"])
def test_a_forbidden_byte_in_a_last_value_is_found_after_a_sound_block(forbidden):
    first = encode_indexed(b":status", b"200")
    assert decode_block(first + encode_field(ID, b"sound"))
    with pytest.raises(StreamViolation) as caught:
        decode_block(first + encode_field(ID, b"so" + forbidden + b"nd"))
    assert caught.value.code is ErrorCode.PROTOCOL_ERROR


def test_the_blocks_of_topaz_are_decoded_once():
    first = encode_indexed(b":status", b"200")
    decoded = [
        decode_block(first + encode_field(ID, f"request {number}".encode()))
        for number in range(3)
    ]
    assert decoded[0].known is decoded[1].known is decoded[2].known
    values = [[field.value for field in block.fields()] for block in decoded]
    assert values == [[b"200", b"request %d" % number] for number in range(3)]
