"""
The response to a unary call: gRPC over HTTP/2, "Responses".

Fails closed: an answer counts only if it is one whole message in a `200` response of
the content type of gRPC, with trailers that have exactly one `grpc-status`, which is 0.
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
"""Bytes before each message of gRPC: the compressed flag and the length."""

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

_NUMBER = re.compile(rb"0|[1-9][0-9]{0,9}")

# What is of the protocol and not of the application.
_NO_METADATA: Final = frozenset(
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


def reset_error(code: int) -> EndedCall:
    """Return the error of a call whose stream the peer reset with *code*."""
    refused = code == ErrorCode.REFUSED_STREAM
    return EndedCall(
        Ending.REFUSED_STREAM if refused else Ending.RESET,
        _CODE_OF_RESET.get(code, _Code.UNKNOWN),  # type: ignore[call-overload]
        f"Received RST_STREAM with error code {code} ({code_name(code)})",
    )


class Response:
    """
    One response, as it comes in.

    When it is whole, or wrong, `outcome` is the message or the error. A violation of
    HTTP/2 is raised instead, and the connection makes it the outcome.
    """

    __slots__ = (
        "_expected",
        "_informational",
        "_initial",
        "_length",
        "_message",
        "_received",
        "_status",
        "outcome",
    )

    def __init__(self) -> None:
        self.outcome: bytes | Exception | None = None
        self._status = 0
        self._initial: Block | None = None
        self._informational = 0
        # The value of content-length, which must be the bytes of all DATA.
        self._length: int | None = None
        self._received = 0
        # The bytes of the message's prefix and of the message: whole ones are bytes.
        self._message: bytes | bytearray = b""
        self._expected = PREFIX_SIZE

    # -- HEADERS ----------------------------------------------------------------

    def headers(self, block: Block, *, end_stream: bool) -> None:
        """
        Take a header block: of a 1xx response, of the response, or the trailers.

        Raises:
            StreamViolation: It is malformed (RFC 9113, section 8.1.1).
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
                raise _malformed("a header block follows the headers and is no trailer")
            self._end(block)
            return
        status = _http_status(block)
        if status < 200:
            self._informational += 1
            # Section 8.6: 101 does not exist in HTTP/2.
            if end_stream or status == 101 or self._informational > MAX_INFORMATIONAL:
                raise _malformed(f"an informational response with status {status}")
            return
        self._status = status
        self._initial = block
        if end_stream and _is_refusal_of_nginx(block.known):
            self._end_with_error(block.known[b"grpc-status"], block)
            return
        if not self._is_grpc(block.known):
            return
        if end_stream:  # "Trailers-Only"
            self._end(block)
        elif b"grpc-status" in block.known:
            raise _malformed("grpc-status stands in the headers and not in trailers")

    def _is_grpc(self, known: Mapping[bytes, Sequence[bytes]]) -> bool:
        """Return whether the headers are of gRPC; if not, the call has ended."""
        types = known.get(b"content-type", ())
        if len(types) != 1 or _CONTENT_TYPE.fullmatch(types[0]) is None:
            self._fail_as_http(
                f"content type {_text(types[0])!r}" if types else "no content type"
            )
            return False
        encodings = known.get(b"grpc-encoding", ())
        if any(encoding != b"identity" for encoding in encodings):
            self._fail(
                _Code.INTERNAL,
                f"the server compresses its responses (grpc-encoding: "
                f"{_text(encodings[0])}), which this client neither asked for nor "
                "supports; turn compression off in the server or proxy",
            )
            return False
        self._length = _content_length(known)
        return True

    def _fail_as_http(self, what: str) -> None:
        """End with what the HTTP status says (gRPC, HTTP to gRPC status mapping)."""
        self.outcome = EndedCall(
            Ending.NO_STATUS,
            _CODE_OF_HTTP.get(self._status, _Code.UNKNOWN),
            f"the answer is not one of gRPC: HTTP status: {self._status}, {what}",
            _metadata(self._initial),
        )

    # -- DATA -------------------------------------------------------------------

    def data(self, payload: bytes) -> None:
        """
        Take a part of the body.

        Raises:
            StreamViolation: It comes before the headers.
        """
        if not self._status:
            raise _malformed("DATA come before the headers")
        self._received += len(payload)
        # Nearly each response is one message in one frame.
        if not self._message and len(payload) >= PREFIX_SIZE:
            self._message = payload
        else:
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
                "the message is compressed, which this client did not ask for",
            )
        elif flag:
            self._fail(_Code.INTERNAL, f"the message has the unknown flag {flag}")
        elif length > MAX_MESSAGE:
            # The connection is well, and so is its server.
            self._fail(
                _Code.RESOURCE_EXHAUSTED,
                f"the response has {length} bytes, and {MAX_MESSAGE} are allowed",
                Ending.STATUS,
            )

    def end_of_data(self) -> None:
        """Take the end of the stream by a DATA frame, which is no end for gRPC."""
        if self._status == 200:
            self._fail(_Code.UNKNOWN, "the response has no trailers")
        else:
            self._fail_as_http("no trailers")

    # -- the end ----------------------------------------------------------------

    def _end(self, trailers: Block) -> None:
        """Take the block that ends the response (gRPC, "Responses")."""
        if trailers.pseudo and trailers is not self._initial:
            raise _malformed("the trailers have a pseudo-header field")  # section 8.1
        values = trailers.known.get(b"grpc-status", ())
        if values != [b"0"]:
            self._end_with_error(values, trailers)
        elif self._status != 200:
            self._fail_as_http("grpc-status 0")
        else:
            self._end_well(trailers.known)

    def _end_well(self, trailers: Mapping[bytes, Sequence[bytes]]) -> None:
        initial = self._initial.known if self._initial is not None else {}
        if (
            b"grpc-status-details-bin" in initial
            or b"grpc-status-details-bin" in trailers
        ):
            self._fail(_Code.INTERNAL, "it has details of an error and the status OK")
            return
        length = _content_length(trailers)
        for each in (self._length, length):
            if each is not None and each != self._received:
                # RFC 9113, section 8.1.1.
                raise _malformed("content-length is not the length of the body")
        size = len(self._message)
        if size < PREFIX_SIZE or size != self._expected:
            self._fail(
                _Code.INTERNAL,
                "it has the status OK and no whole message" if size else "no message",
            )
            return
        self.outcome = bytes(self._message[PREFIX_SIZE:])

    def _end_with_error(self, values: Sequence[bytes], trailers: Block) -> None:
        if not values and self._status != 200:
            self._fail_as_http("no grpc-status")
            return
        if len(values) != 1 or _NUMBER.fullmatch(values[0]) is None:
            shown = ", ".join(map(_text, values[:4])) or "none"
            self._fail(_Code.UNKNOWN, f"it has no grpc-status that counts: {shown}")
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
        """End with *code*, because of a *fault* of the answer."""
        self.outcome = EndedCall(
            how,
            code,
            f"the answer breaks the protocol of gRPC: {fault}"
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


def _is_refusal_of_nginx(known: Mapping[bytes, Sequence[bytes]]) -> bool:
    """
    Return whether these headers are an error with a `grpc-status` and no content type.

    The error page that nginx documents for gRPC has the status 204, and nginx sends no
    content type with it. The `grpc-message` is the reason of the outage. OK is not
    accepted in this way.
    """
    return b"content-type" not in known and known.get(b"grpc-status", [b"0"]) != [b"0"]


def _http_status(block: Block) -> int:
    """Return `:status`, the only pseudo-header field of a response (section 8.3.2)."""
    values = block.pseudo.get(b":status", ())
    if len(values) != 1 or len(block.pseudo) != 1 or not block.pseudo_first:
        raise _malformed("the headers must begin with :status, once")  # section 8.3
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
    if len(values) > 1 or _NUMBER.fullmatch(values[0]) is None:
        raise _malformed(f"content-length is {_text(values[0])!r}")
    return int(values[0])


def _text(value: bytes) -> str:
    return value[:200].decode("ascii", "backslashreplace")


def _percent_decoded(message: bytes) -> str:
    """Return a `grpc-message`: an invalid sequence stays as it is ("Responses")."""
    return urllib.parse.unquote_to_bytes(message).decode("utf-8", "replace")


def _metadata(block: Block | None) -> tuple[tuple[str, str | bytes], ...]:
    """Return the metadata in *block* ("Custom-Metadata")."""
    if block is None:
        return ()
    return tuple(
        (
            name.decode(),
            _binary(field.value)
            if name.endswith(b"-bin")
            # The text of a field that nobody should send stays readable.
            else field.value.decode("utf-8", "backslashreplace"),
        )
        for field in block.fields()
        if (name := field.name)[:1] != b":" and name not in _NO_METADATA
    )


def _binary(value: bytes) -> bytes:
    """Return the bytes of a `-bin` field, whose base64 may lack its padding."""
    # Several values are joined by commas, and each has its own padding.
    parts = [part.rstrip(b"=") for part in value.split(b",")]
    try:
        return b",".join(
            base64.b64decode(part + b"=" * (-len(part) % 4)) for part in parts
        )
    except binascii.Error:
        return value
