"""
The response to a unary call ("Responses" in gRPC over HTTP/2).

It fails closed. A response is successful only if all of these hold: the HTTP status is
200, the content type is that of gRPC, the body is exactly one complete message, and the
trailers have exactly one `grpc-status`, which is 0.
"""

from __future__ import annotations

import base64
import binascii
import enum
import re
import urllib.parse
from typing import TYPE_CHECKING, Final

import grpc

from fastapi_topaz._http2.errors import ErrorCode, StreamViolation, code_name
from fastapi_topaz._http2.limits import MAX_INFORMATIONAL, MAX_MESSAGE
from fastapi_topaz._rpc.statuses import EndedCall, Ending


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastapi_topaz._http2.hpack import Block


__all__ = ["PREFIX_SIZE", "Response", "reset_error"]


PREFIX_SIZE: Final = 5
"""Bytes before each gRPC message: the compressed flag and the length."""

_Code = grpc.StatusCode

_CODES: Final = {code.value[0]: code for code in _Code}

# gRPC, doc/http-grpc-status-mapping.md. All others are UNKNOWN.
_CODE_OF_HTTP: Final = {
    400: _Code.INTERNAL,
    401: _Code.UNAUTHENTICATED,
    403: _Code.PERMISSION_DENIED,
    404: _Code.UNIMPLEMENTED,
    429: _Code.UNAVAILABLE,
    502: _Code.UNAVAILABLE,
    503: _Code.UNAVAILABLE,
    504: _Code.UNAVAILABLE,
}

# gRPC over HTTP/2, "HTTP2 Transport Mapping, Errors". All others are UNKNOWN.
_CODE_OF_RESET: Final = {
    ErrorCode.NO_ERROR: _Code.INTERNAL,
    ErrorCode.PROTOCOL_ERROR: _Code.INTERNAL,
    ErrorCode.INTERNAL_ERROR: _Code.INTERNAL,
    ErrorCode.FLOW_CONTROL_ERROR: _Code.INTERNAL,
    ErrorCode.SETTINGS_TIMEOUT: _Code.INTERNAL,
    ErrorCode.FRAME_SIZE_ERROR: _Code.INTERNAL,
    ErrorCode.REFUSED_STREAM: _Code.UNAVAILABLE,
    ErrorCode.CANCEL: _Code.CANCELLED,
    ErrorCode.COMPRESSION_ERROR: _Code.INTERNAL,
    ErrorCode.CONNECT_ERROR: _Code.INTERNAL,
    ErrorCode.ENHANCE_YOUR_CALM: _Code.RESOURCE_EXHAUSTED,
    ErrorCode.INADEQUATE_SECURITY: _Code.PERMISSION_DENIED,
}

_CONTENT_TYPE = re.compile(rb"application/grpc(?:[+;].*)?")

# The encodings of gRPC. They allow messages that are not compressed.
_ENCODINGS: Final = frozenset({b"identity", b"gzip", b"deflate"})

_NUMBER = re.compile(rb"0|[1-9][0-9]{0,9}")

# RFC 9110, section 8.6 allows any number of digits. No body needs more than 19.
_LENGTH = re.compile(rb"[0-9]{1,19}")

# Fields of the protocol, which are not metadata of the application.
_PROTOCOL_FIELDS: Final = frozenset(
    {
        b"content-type",
        b"content-length",
        b"grpc-encoding",
        b"grpc-accept-encoding",
        b"grpc-message",
        b"grpc-status",
        b"te",
        b"user-agent",
    }
)


def reset_error(code: int, *, has_begun: bool = False) -> EndedCall:
    """
    Return the error of a call whose stream the peer reset with *code*.

    *has_begun* says whether a part of the response was received. Then the peer has
    processed the call, even if it resets with REFUSED_STREAM (RFC 9113, section 8.7).
    """
    refused = code == ErrorCode.REFUSED_STREAM and not has_begun
    return EndedCall(
        Ending.REFUSED_STREAM if refused else Ending.RESET,
        _CODE_OF_RESET.get(code, _Code.UNKNOWN),  # type: ignore[call-overload]
        f"Received RST_STREAM with error code {code} ({code_name(code)})",
    )


class Response:
    """
    One response while it is received.

    At the end, `outcome` is the message or the error. A violation of HTTP/2 is raised
    instead, and the connection makes it the outcome.
    """

    __slots__ = (
        "_encodings",
        "_expected",
        "_informational",
        "_initial",
        "_length",
        "_message",
        "_received",
        "_status",
        "max_message",
        "outcome",
    )

    def __init__(self) -> None:
        self.outcome: bytes | Exception | None = None
        self.max_message = MAX_MESSAGE
        self._status = 0
        self._initial: Block | None = None
        self._informational = 0
        # The values of grpc-encoding. They apply only to messages with the flag.
        self._encodings: Sequence[bytes] = ()
        # The value of content-length. It must equal the bytes of all DATA.
        self._length: int | None = None
        self._received = 0
        # The prefix and the message. A bytearray if they arrive in several parts.
        self._message: bytes | bytearray = b""
        self._expected = PREFIX_SIZE

    @property
    def has_begun(self) -> bool:
        """Whether the headers of the response were received."""
        return self._status != 0

    # -- HEADERS ----------------------------------------------------------------

    def headers(self, block: Block, *, end_stream: bool) -> None:
        """
        Process a header block: an informational response, the headers, or the trailers.

        Raises:
            StreamViolation: The response is malformed (RFC 9113, section 8.1.1).
        """
        if not self._is_usual(block, end_stream=end_stream):
            self._take(block, end_stream=end_stream)

    def _is_usual(self, block: Block, *, end_stream: bool) -> bool:
        """
        Take the block of a usual answer, and return whether it was one.

        Servers repeat their blocks, so each is judged once. This saves 2 us a call.
        """
        role = block.role
        if role is None:
            role = block.role = _role(block)
        if role is _Role.HEADERS and not (self._status or end_stream):
            self._status = 200
            self._initial = block
            return True
        if (
            role is _Role.TRAILERS
            and end_stream
            and self._initial is not None
            and self._initial.role is _Role.HEADERS
            and self._expected == len(self._message) > PREFIX_SIZE
        ):
            self.outcome = bytes(self._message[PREFIX_SIZE:])
            return True
        return False

    def _take(self, block: Block, *, end_stream: bool) -> None:
        if self._status:
            if not end_stream:
                raise _malformed("trailers do not end the stream")
            if block.pseudo:
                raise _malformed("the trailers have a pseudo-header field")
            self._end(block)
            return
        status = _http_status(block)
        if status < 200:
            self._informational += 1
            # Section 8.6: 101 does not exist in HTTP/2.
            if end_stream or status == 101 or self._informational > MAX_INFORMATIONAL:
                raise _malformed(
                    f"an informational response with the status {status} is not allowed"
                )
            return
        self._status = status
        self._initial = block
        if end_stream and _is_nginx_error(block.known):
            self._end_with_error(block.known[b"grpc-status"], block)
            return
        if not self._is_grpc(block.known):
            return
        if end_stream:  # "Trailers-Only"
            self._end(block)
        elif b"grpc-status" in block.known:
            raise _malformed("grpc-status is in the headers and not in the trailers")

    def _is_grpc(self, known: Mapping[bytes, Sequence[bytes]]) -> bool:
        """Return whether the headers are those of gRPC. If not, the call has ended."""
        types = known.get(b"content-type", ())
        if len(types) != 1 or _CONTENT_TYPE.fullmatch(types[0]) is None:
            self._fail_as_http(
                f"content type {_text(types[0])!r}" if types else "no content type"
            )
            return False
        self._encodings = known.get(b"grpc-encoding", ())
        self._length = _content_length(known)
        return True

    def _fail_as_http(self, reason: str) -> None:
        """End with the code for the HTTP status (doc/http-grpc-status-mapping.md)."""
        self.outcome = EndedCall(
            Ending.NO_STATUS,
            _CODE_OF_HTTP.get(self._status, _Code.UNKNOWN),
            f"this is not a gRPC response: HTTP status: {self._status}, {reason}",
            _metadata(self._initial),
        )

    # -- DATA -------------------------------------------------------------------

    def data(self, payload: bytes) -> None:
        """
        Process a part of the body.

        Raises:
            StreamViolation: The headers were not received yet.
        """
        if not self._status:
            raise _malformed("DATA precede the headers")
        self._received += len(payload)
        # Nearly all responses are one message in one frame.
        if not self._message and len(payload) >= PREFIX_SIZE:
            self._message = payload
        elif payload:
            if isinstance(self._message, bytes):
                self._message = bytearray(self._message)
            self._message += payload
        if self._expected == PREFIX_SIZE and len(self._message) >= PREFIX_SIZE:
            self._read_prefix()
        if self.outcome is None and len(self._message) > self._expected:
            self._fail(_Code.INTERNAL, "the response has more than one message")

    def _read_prefix(self) -> None:
        flag = self._message[0]
        length = int.from_bytes(self._message[1:PREFIX_SIZE])
        self._expected = PREFIX_SIZE + length
        if flag == 1:
            self._fail(
                _Code.INTERNAL,
                f"the message is compressed (grpc-encoding: {self._encoding_text}); "
                "this client does not support compression and did not ask for it; turn "
                "compression off in the server or proxy",
            )
        elif flag:
            self._fail(_Code.INTERNAL, f"the message has the unknown flag {flag}")
        elif length > self.max_message:
            # The server and the connection work, so this counts as a status.
            self._fail(
                _Code.RESOURCE_EXHAUSTED,
                f"the response has {length} bytes, and max_message_bytes="
                f"{self.max_message} allows no more",
                Ending.STATUS,
            )

    @property
    def _encoding_text(self) -> str:
        return ", ".join(map(_text, self._encodings)) or "none"

    def end_of_data(self) -> None:
        """Process the end of the stream by a DATA frame: gRPC requires trailers."""
        if self._status == 200:
            self._fail(_Code.UNKNOWN, "the response has no trailers")
        else:
            self._fail_as_http("no trailers")

    # -- the end ----------------------------------------------------------------

    def _end(self, trailers: Block) -> None:
        """Process the header block that ends the response ("Responses")."""
        self._check_length(trailers)
        values = trailers.known.get(b"grpc-status", ())
        if values != [b"0"]:
            self._end_with_error(values, trailers)
        elif self._status != 200:
            self._fail_as_http("grpc-status 0")
        else:
            self._end_well(trailers.known)

    def _check_length(self, trailers: Block) -> None:
        """Compare content-length with the bytes of DATA (RFC 9113, section 8.1.1)."""
        for length in (self._length, _content_length(trailers.known)):
            if length is not None and length != self._received:
                raise _malformed("content-length differs from the length of the body")

    def _end_well(self, trailers: Mapping[bytes, Sequence[bytes]]) -> None:
        initial = self._initial.known if self._initial is not None else {}
        if (
            b"grpc-status-details-bin" in initial
            or b"grpc-status-details-bin" in trailers
        ):
            self._fail(_Code.INTERNAL, "the status is OK, but there are error details")
            return
        if not _ENCODINGS.issuperset(self._encodings):
            self._fail(
                _Code.INTERNAL, f"the grpc-encoding is unknown: {self._encoding_text}"
            )
            return
        size = len(self._message)
        if size != self._expected:
            self._fail(
                _Code.INTERNAL,
                "the status is OK, but the message is incomplete"
                if size
                else "the status is OK, but there is no message",
            )
            return
        self.outcome = bytes(self._message[PREFIX_SIZE:])

    def _end_with_error(self, values: Sequence[bytes], trailers: Block) -> None:
        if not values:
            self._fail_as_http("no grpc-status")
            return
        if len(values) != 1 or _NUMBER.fullmatch(values[0]) is None:
            shown = ", ".join(map(_text, values[:4])) or "none"
            self._fail(_Code.UNKNOWN, f"there is no valid grpc-status: {shown}")
            return
        number = int(values[0])
        messages = trailers.known.get(b"grpc-message")
        details = _percent_decoded(messages[0]) if messages else ""
        code = _CODES.get(number)
        if code is None:
            code = _Code.UNKNOWN
            details = f"{details} (the unknown grpc-status {number})".lstrip()
        initial = None if trailers is self._initial else self._initial
        self.outcome = EndedCall(
            Ending.STATUS, code, details, _metadata(initial), _metadata(trailers)
        )

    def _fail(
        self, code: grpc.StatusCode, fault: str, how: Ending = Ending.NO_STATUS
    ) -> None:
        """End with *code*, because the response has the *fault*."""
        self.outcome = EndedCall(
            how,
            code,
            f"the response violates the gRPC protocol: {fault}"
            if how is Ending.NO_STATUS
            else fault,
            _metadata(self._initial),
        )


class _Role(enum.Enum):
    """The place of a header block in a usual answer."""

    HEADERS = "the headers of an answer of gRPC"
    TRAILERS = "the trailers of an answer with the status OK"
    OTHER = "none; every rule has to be checked"


# Fields that need more checks.
_UNUSUAL: Final = frozenset(
    {b"content-length", b"grpc-encoding", b"grpc-status-details-bin"}
)


def _role(block: Block) -> _Role:
    known = block.known
    if not _UNUSUAL.isdisjoint(known):
        return _Role.OTHER
    if not block.pseudo:
        ok = known.get(b"grpc-status") == [b"0"]
        return _Role.TRAILERS if ok else _Role.OTHER
    types = known.get(b"content-type", [])
    is_grpc = len(types) == 1 and _CONTENT_TYPE.fullmatch(types[0]) is not None
    is_200 = block.pseudo == {b":status": [b"200"]} and block.pseudo_first
    if is_200 and is_grpc and b"grpc-status" not in known:
        return _Role.HEADERS
    return _Role.OTHER


def _malformed(fault: str) -> StreamViolation:
    """Return the error of a malformed message (RFC 9113, section 8.1.1)."""
    return StreamViolation(ErrorCode.PROTOCOL_ERROR, fault)


def _is_nginx_error(known: Mapping[bytes, Sequence[bytes]]) -> bool:
    """
    Return whether these headers are an error of nginx: no content type, not OK.

    The error page that nginx documents for gRPC has the HTTP status 204 and no content
    type. Its `grpc-message` is the reason for the outage. The status OK always needs a
    content type.
    """
    return b"content-type" not in known and known.get(b"grpc-status", [b"0"]) != [b"0"]


def _http_status(block: Block) -> int:
    """Return `:status`, the only pseudo-header field of a response (section 8.3.2)."""
    values = block.pseudo.get(b":status", ())
    if len(values) != 1 or len(block.pseudo) != 1 or not block.pseudo_first:
        raise _malformed("the headers must begin with exactly one :status")
    value = values[0]
    if value == b"200":
        return 200
    if re.fullmatch(rb"[1-9][0-9][0-9]", value) is None:
        raise _malformed(f":status is {_text(value)!r}")
    return int(value)


def _content_length(known: Mapping[bytes, Sequence[bytes]]) -> int | None:
    values = known.get(b"content-length")
    if values is None:
        return None
    if len(values) > 1 or _LENGTH.fullmatch(values[0]) is None:
        raise _malformed(f"content-length is {_text(values[0])!r}")
    return int(values[0])


def _text(value: bytes) -> str:
    return value[:200].decode("ascii", "backslashreplace")


def _percent_decoded(message: bytes) -> str:
    """Decode a `grpc-message`. Invalid sequences stay unchanged ("Responses")."""
    return urllib.parse.unquote_to_bytes(message).decode("utf-8", "replace")


def _metadata(block: Block | None) -> tuple[tuple[str, str | bytes], ...]:
    """Return the metadata in *block* ("Custom-Metadata")."""
    if block is None:
        return ()
    pairs: list[tuple[str, str | bytes]] = []
    for field in block.fields():
        name, value = field.name, field.value
        if name[:1] == b":" or name in _PROTOCOL_FIELDS:
            continue
        key = name.decode()
        if key.endswith("-bin"):
            # One field may carry several values, joined by commas.
            pairs += ((key, _binary(part)) for part in value.split(b","))
        else:
            # A value that is not ASCII is not allowed, but it stays readable.
            pairs.append((key, value.decode("utf-8", "backslashreplace")))
    return tuple(pairs)


def _binary(value: bytes) -> bytes:
    """Return the bytes of a `-bin` value, or *value* itself if it is not base64."""
    # The padding is optional.
    text = value.strip(b" \t").rstrip(b"=")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        return value
