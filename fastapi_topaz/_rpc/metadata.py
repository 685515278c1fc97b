"""The metadata of gRPC calls."""

from __future__ import annotations

import re
from collections.abc import Sequence


__all__ = ["Metadata", "check_metadata", "is_metadata"]


Metadata = Sequence[tuple[str, str | bytes]]

# The keys that gRPC allows: see "Requests" in "gRPC over HTTP2".
_KEY = re.compile(r"[0-9a-z_.-]+")

# RFC 9113, section 8.2.2: a request with one of these is malformed. Servers reset its
# stream, or end the connection.
_CONNECTION_SPECIFIC = frozenset(
    {"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"}
)


def _is_key(key: object) -> bool:
    """Return whether gRPC accepts *key*."""
    return isinstance(key, str) and _KEY.fullmatch(key) is not None


def is_metadata(key: object, value: object) -> bool:
    """Return whether gRPC accepts the pair of *key* and *value* as text metadata."""
    return (
        _is_key(key)
        and key not in _CONNECTION_SPECIFIC
        and not str(key).endswith("-bin")
        and isinstance(value, str)
        and value.isascii()
        and value.isprintable()
    )


def check_metadata(metadata: object) -> None:
    """
    Check that *metadata* can be sent.

    Errors never show a value, because it may be secret.

    Raises:
        TypeError: *metadata* does not consist of pairs, or a value has the wrong type.
        ValueError: gRPC does not accept a key or a value.
    """
    if not metadata:
        return
    if isinstance(metadata, str | bytes) or not isinstance(metadata, Sequence):
        raise TypeError(f"metadata must be pairs of str, got {type(metadata).__name__}")
    for pair in metadata:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(
                f"metadata must be pairs of str, got a {type(pair).__name__}"
            )
        key, value = pair
        if not _is_key(key):
            raise ValueError(
                f"metadata keys must be of a-z, 0-9, '_', '-' and '.', got {key!r}"
            )
        if key in _CONNECTION_SPECIFIC:
            raise ValueError(f"metadata {key!r} is not allowed in HTTP/2")
        if not isinstance(value, bytes if key.endswith("-bin") else str):
            raise TypeError(
                f"metadata {key!r} must be bytes if its key ends with -bin, otherwise "
                f"a str, got {type(value).__name__}"
            )
        if isinstance(value, str) and not (value.isascii() and value.isprintable()):
            raise ValueError(f"metadata {key!r} must be printable ASCII")
