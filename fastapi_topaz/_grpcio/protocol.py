"""
Responses that violate HTTP/2 or gRPC, although gRPC's core accepts them with status OK.

Only the parts that the core passes on can be checked here. It passes on neither
`:status` nor `content-type`, nor a `grpc-status` that another one follows: see
`docs/topaz.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from fastapi_topaz._rpc.statuses import EndedCall, Ending


if TYPE_CHECKING:
    from collections.abc import Iterable


__all__ = ["checked"]


# RFC 9113, section 8.2.2: a message with one of them is malformed.
_OF_HTTP_1 = frozenset(
    {"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"}
)
_NEVER_IN_A_VALUE = frozenset("\0\r\n")
_PREFIX = 5
"""Bytes before each message of gRPC: a flag and the length."""


def checked(
    answer: bytes, metadata: Iterable[tuple[str, str | bytes]]
) -> bytes | EndedCall:
    """Return *answer*, or an error if its *metadata* violates the protocol."""
    for key, value in metadata:
        if fault := _fault(key, value, len(answer)):
            return EndedCall(
                Ending.STATUS,
                grpc.StatusCode.INTERNAL,
                f"the answer breaks the protocol: {fault}",
            )
    return answer


def _fault(key: str, value: str | bytes, size: int) -> str | None:
    if key in _OF_HTTP_1:
        return f"the header {key!r} does not exist in HTTP/2"
    if key == "grpc-status-details-bin":
        return "it has the details of an error and the status OK"
    if key == "content-length" and value != str(_PREFIX + size):
        return "its length is not the one in 'content-length'"
    if isinstance(value, str) and not _NEVER_IN_A_VALUE.isdisjoint(value):
        return f"the value of the header {key!r} has more than one line"
    return None
