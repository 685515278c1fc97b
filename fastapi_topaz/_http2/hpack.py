"""
Header blocks (RFC 7541) without a dynamic table: SETTINGS_HEADER_TABLE_SIZE is 0.

Without a dynamic table, the encoder and the decoder have no state. Equal bytes always
have the same meaning, so decoded blocks, names and values are cached. The encoder uses
the static table and literals, without Huffman coding.

The decoder decodes all names, but only the values that are read. topazd sends a new
`aserto-request-id` with each response. The decoder of the library `hpack` takes 51 us
for such a response. This decoder takes 2 us. The tables are those of the library.

One rule is not kept because of this: a malformed Huffman code in a value that is never
read is not detected (section 5.2). It cannot change the meaning of another field.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from hpack.exceptions import HPACKDecodingError
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from fastapi_topaz._http2.errors import ErrorCode, PeerViolation, StreamViolation
from fastapi_topaz._http2.limits import MAX_HEADER_LIST_SIZE


if TYPE_CHECKING:
    from collections.abc import Iterator


__all__ = [
    "Block",
    "Field",
    "decode_block",
    "encode_field",
    "encode_indexed",
    "encode_integer",
]


_STATIC: Final = tuple(HeaderTable.STATIC_TABLE)
"""The static table (appendix A). The index of its first entry is 1."""

_NAMES: Final = {
    name: number for number, (name, _) in reversed([*enumerate(_STATIC, 1)])
}


# -- encoding ---------------------------------------------------------------------


def encode_integer(value: int, prefix_bits: int, first_byte: int = 0) -> bytes:
    """
    Return the encoded integer *value* (section 5.1).

    Its prefix is the lower *prefix_bits* of the first byte. *first_byte* has the bits
    above the prefix.
    """
    full = (1 << prefix_bits) - 1
    if value < full:
        return bytes((first_byte | value,))
    out = bytearray((first_byte | full,))
    value -= full
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_indexed(name: bytes, value: bytes) -> bytes:
    """Return the indexed field for an entry of the static table (section 6.1)."""
    return encode_integer(_STATIC.index((name, value)) + 1, 7, 0x80)


def encode_field(name: bytes, value: bytes, *, never_indexed: bool = False) -> bytes:
    """
    Return a literal field without indexing (section 6.2.2).

    Args:
        name: The name, in lower case.
        value: The value. It is not Huffman-coded.
        never_indexed: Whether intermediaries must not index the field (section 6.2.3).
            Pass True for secrets (section 7.1.3).
    """
    first = 0x10 if never_indexed else 0x00
    index = _NAMES.get(name, 0)
    start = encode_integer(index, 4, first)
    if not index:
        start += encode_integer(len(name), 7) + name
    return start + encode_integer(len(value), 7) + value


# -- decoding ---------------------------------------------------------------------


class Field(NamedTuple):
    """A received field. Its value is decoded when `value` is read."""

    name: bytes
    raw: bytes
    is_huffman: bool

    @property
    def value(self) -> bytes:
        """
        The decoded value.

        Raises:
            PeerViolation: Its Huffman code is malformed.
        """
        return _decode_huffman(self.raw) if self.is_huffman else self.raw


class Block:
    """
    A decoded header block.

    Attributes:
        known: The values of the fields that `_KNOWN` names, by name.
        pseudo: The values of the pseudo-header fields, by name.
        pseudo_first: Whether all pseudo-header fields precede the other fields.
        role: The result of `responses` for this block; None until it is asked for.
    """

    __slots__ = ("_fields", "known", "pseudo", "pseudo_first", "role")

    def __init__(self, fields: list[tuple[bytes, bytes, bool]]) -> None:
        self._fields = fields
        self.role: object = None
        self.known: dict[bytes, list[bytes]] = {}
        self.pseudo: dict[bytes, list[bytes]] = {}
        self.pseudo_first = True
        regular = False
        for name, raw, is_huffman in fields:
            if name in _KNOWN:
                value = _decode_huffman(raw) if is_huffman else raw
                self.known.setdefault(name, []).append(value)
            elif name[0] == _COLON:
                value = _decode_huffman(raw) if is_huffman else raw
                self.pseudo.setdefault(name, []).append(value)
                self.pseudo_first &= not regular
                continue
            regular = True

    def with_last(self, field: tuple[bytes, bytes, bool]) -> Block:
        """Return a block with *field* in place of the last one; both are not read."""
        other = Block.__new__(Block)
        other._fields = [*self._fields[:-1], field]
        other.known = self.known
        other.pseudo = self.pseudo
        other.pseudo_first = self.pseudo_first
        other.role = self.role
        return other

    def fields(self) -> Iterator[Field]:
        """Yield all fields in their order."""
        return (Field(*field) for field in self._fields)


_KNOWN: Final = frozenset(
    {
        b"content-length",
        b"content-type",
        b"grpc-encoding",
        b"grpc-message",
        b"grpc-status",
        b"grpc-status-details-bin",
    }
)
_COLON: Final = ord(":")

# A name is a token (RFC 9110, section 5.6.2) without upper case (RFC 9113, section
# 8.2.1). The name of a pseudo-header field begins with a colon.
_NAME = re.compile(rb":?[!#$%&'*+\-.^_`|~0-9a-z]+")

# Connection-specific fields, which HTTP/2 forbids (RFC 9113, section 8.2.2).
_CONNECTION_SPECIFIC: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"te",  # only requests may have it
        b"transfer-encoding",
        b"upgrade",
    }
)

# RFC 9113, section 8.2.1. It also forbids whitespace at the ends of a value. But gRPC
# servers send `grpc-message` with such whitespace, and the status must not be lost.
_FORBIDDEN_IN_VALUES = re.compile(rb"[\0\r\n]")

_MOST_PER_BYTE: Final = 64
"""Each byte of a block adds less to its header list. The static table has up to 60."""


class _Template:
    """
    A block that ends with a literal field whose value is not read here.

    Topaz sends its `aserto-request-id` in this way. The next block differs only in that
    value, so the rest need not be decoded again: 1 us and not 6 us.
    """

    __slots__ = ("block", "name", "start")

    def __init__(self, start: bytes, name: bytes, block: Block) -> None:
        # All bytes before the value of the last field.
        self.start = start
        self.name = name
        self.block = block

    def match(self, block: bytes) -> Block | None:
        """Return the decoded *block* if it differs only in the last value."""
        start = self.start
        at = len(start)
        if not block.startswith(start) or len(block) == at:
            return None
        size = block[at]
        length = size & 0x7F
        if (
            length == 0x7F  # its length has more bytes (section 5.1)
            or at + 1 + length != len(block)
            or len(block) * _MOST_PER_BYTE > MAX_HEADER_LIST_SIZE
        ):
            return None
        raw, is_huffman = block[at + 1 :], size & 0x80 != 0
        if fault := _value_fault(self.name, raw, is_huffman):
            raise StreamViolation(ErrorCode.PROTOCOL_ERROR, fault)
        return self.block.with_last((self.name, raw, is_huffman))


_template: _Template | None = None


def decode_block(block: bytes) -> Block:
    """
    Decode *block*, a complete header block.

    Raises:
        PeerViolation: It cannot be decoded (RFC 9113, section 4.3).
        StreamViolation: A field is malformed (RFC 9113, section 8.1.1), or the header
            list is too large.
    """
    if _template is not None and (found := _template.match(block)) is not None:
        return found
    return _decode_block(block)


# grpc-go and C-core send the same blocks with each response. A cached block takes
# 0.1 us.
@lru_cache(maxsize=64)
def _decode_block(block: bytes) -> Block:
    # The whole block is read before its fields are checked: an undecodable block ends
    # the connection, a malformed field only its stream.
    try:
        fields, start = _walk(block)
    except IndexError:
        raise _undecodable("it ends within a field") from None
    for name, raw, is_huffman in fields:
        if fault := _name_fault(name) or _value_fault(name, raw, is_huffman):
            raise StreamViolation(ErrorCode.PROTOCOL_ERROR, fault)
    decoded = Block(fields)
    if len(block) * _MOST_PER_BYTE > MAX_HEADER_LIST_SIZE:
        _check_size(fields)
    elif start and _is_unread(fields[-1][0]):
        global _template  # noqa: PLW0603  (of the newest block, on any connection)
        _template = _Template(block[:start], fields[-1][0], decoded)
    return decoded


def _is_unread(name: bytes) -> bool:
    """Return whether the value of a field is metadata, which is not read here."""
    return name not in _KNOWN and name[0] != _COLON


def _walk(block: bytes) -> tuple[list[tuple[bytes, bytes, bool]], int]:
    """
    Return each field of *block*: name, raw value, and whether it is Huffman-coded.

    The second result is the position of the last value, or 0 if the last field is from
    the static table. Integers that fit into their prefix are read inline, because a
    function call for each of them takes 2 us per response.

    Raises:
        IndexError: *block* ends within a field.
        PeerViolation: *block* cannot be decoded.
    """
    fields: list[tuple[bytes, bytes, bool]] = []
    at, end = 0, len(block)
    start = 0
    while at < end:
        first = block[at]
        at += 1
        if first & 0x80:  # an indexed field (section 6.1)
            index = first & 0x7F
            if index == 0x7F:
                index, at = _integer(block, at, 0x7F)
            fields.append((*_entry(index), False))
            start = 0
            continue
        if first & 0xE0 == 0x20:  # a dynamic table size update (section 6.3)
            if first != 0x20 or fields:
                raise _undecodable(
                    "it has a size update of the dynamic table that is not allowed"
                )
            continue
        # A literal with incremental indexing (section 6.2.1) or without it (sections
        # 6.2.2 and 6.2.3). The table has no room, so it stays empty (section 4.4).
        mask = 0x3F if first & 0x40 else 0x0F
        index = first & mask
        if index == mask:
            index, at = _integer(block, at, mask)
        if index:
            name = _entry(index)[0]
        else:
            size = block[at]
            raw, at = _string(block, at + 1, size)
            name = _decode_huffman(raw) if size & 0x80 else raw
        start = at
        size = block[at]
        raw, at = _string(block, at + 1, size)
        fields.append((name, raw, size & 0x80 != 0))
    return fields, start


def _string(block: bytes, at: int, first: int) -> tuple[bytes, int]:
    """
    Return a string and the position after it (section 5.2).

    *first* is the first byte of the string. *at* is the position after that byte.
    """
    size = first & 0x7F
    if size == 0x7F:
        size, at = _integer(block, at, 0x7F)
    end = at + size
    if end > len(block):
        raise _undecodable("a string is cut off")
    return block[at:end], end


def _integer(block: bytes, at: int, value: int) -> tuple[int, int]:
    """
    Return the integer that continues at *at*, and the position after it (section 5.1).

    *value* is the prefix of the integer. All of its bits are ones.
    """
    shift = 0
    while True:
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 21:  # no index and no length in a block is larger
            raise _undecodable("an integer is too large")


def _entry(index: int) -> tuple[bytes, bytes]:
    if not 0 < index <= len(_STATIC):
        # Higher indices belong to the dynamic table, which is empty.
        raise _undecodable(f"it refers to the index {index}, which does not exist")
    return _STATIC[index - 1]


def _name_fault(name: bytes) -> str | None:
    """Return why *name* is malformed, or None."""
    return _fault_of_short(name) if len(name) <= _SHORT else _fault(name)


def _fault(name: bytes) -> str | None:
    if _NAME.fullmatch(name) is None:
        return f"the field name {_shown(name)} is malformed"
    if name in _CONNECTION_SPECIFIC:
        return f"the field {_shown(name)} is not allowed in an HTTP/2 response"
    return None


def _shown(name: bytes) -> str:
    return repr(name[:64].decode("latin-1"))


def _value_fault(name: bytes, raw: bytes, is_huffman: bool) -> str | None:
    """Return why the value of the field *name* is malformed, or None."""
    if is_huffman:
        # The codes of NUL, CR and LF begin with ten ones (appendix B). The search for
        # ten ones takes 0.5 us. The decoding of a request id takes 16 us.
        if not _has_ten_ones(raw):
            return None
        raw = _decode_huffman(raw)
    if _FORBIDDEN_IN_VALUES.search(raw) is None:
        return None
    return f"the value of the field {_shown(name)} has a line break or a NUL"


def _has_ten_ones(raw: bytes) -> bool:
    """Return whether *raw* has ten consecutive bits that are ones."""
    bits = int.from_bytes(raw)
    pairs = bits & bits >> 1
    fours = pairs & pairs >> 2
    eights = fours & fours >> 4
    return eights & pairs >> 8 != 0


def _check_size(fields: list[tuple[bytes, bytes, bool]]) -> None:
    size = 0
    for name, raw, is_huffman in fields:
        # The shortest Huffman code has five bits.
        size += len(name) + (len(raw) * 8 // 5 if is_huffman else len(raw)) + 32
    if size > MAX_HEADER_LIST_SIZE:
        # That was an estimate. The exact size needs the decoded values.
        size = sum(
            len(field.name) + len(field.value) + 32
            for field in map(Field._make, fields)
        )
    if size > MAX_HEADER_LIST_SIZE:
        raise StreamViolation(
            ErrorCode.ENHANCE_YOUR_CALM,
            f"the header list has {size} bytes, the limit is {MAX_HEADER_LIST_SIZE}",
        )


def _decode_huffman(raw: bytes) -> bytes:
    """Return the text of the Huffman-coded *raw* (section 5.2)."""
    return _short_huffman(raw) if len(raw) <= _SHORT else _huffman(raw)


def _huffman(raw: bytes) -> bytes:
    try:
        return decode_huffman(raw)
    except HPACKDecodingError as error:
        raise _undecodable(f"a Huffman code is malformed: {error}") from None


def _undecodable(reason: str) -> PeerViolation:
    return PeerViolation(
        ErrorCode.COMPRESSION_ERROR, f"a header block cannot be decoded: {reason}"
    )


# Servers send the same names each time, and mostly the same values. Only short ones are
# cached, so that a server cannot fill the memory.
_SHORT: Final = 64
_fault_of_short = lru_cache(maxsize=256)(_fault)
_short_huffman = lru_cache(maxsize=256)(_huffman)
