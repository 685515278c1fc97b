"""The metadata of gRPC calls."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

import grpc.aio


__all__ = [
    "Credentials",
    "Metadata",
    "checked_metadata",
    "frozen_metadata",
    "is_metadata",
]


Metadata = Sequence[tuple[str, str | bytes]]

Credentials: TypeAlias = Callable[[], Metadata | Awaitable[Metadata]]
"""Returns the metadata of one call. It may be a coroutine function."""

# The keys that gRPC allows: see "Requests" in "gRPC over HTTP2".
_KEY = re.compile(r"[0-9a-z_.-]+")

# A second value of these would change the call itself, or break HTTP/2 (RFC 9113,
# section 8.2.2).
_RESERVED = frozenset(
    {
        *("connection", "content-length", "content-type", "host", "keep-alive"),
        *("proxy-connection", "te", "transfer-encoding", "upgrade", "user-agent"),
        *("grpc-accept-encoding", "grpc-encoding", "grpc-timeout"),
    }
)


def _is_key(key: object) -> bool:
    """Return whether an application may send *key*."""
    return (
        isinstance(key, str)
        and _KEY.fullmatch(key) is not None
        and key not in _RESERVED
    )


def is_metadata(key: object, value: object) -> bool:
    """Return whether gRPC accepts the pair of *key* and *value* as text metadata."""
    return (
        _is_key(key)
        and not str(key).endswith("-bin")
        and isinstance(value, str)
        and value.isascii()
        and value.isprintable()
    )


def checked_metadata(metadata: object, name: str = "metadata") -> Metadata:
    """
    Return *metadata* as a sequence of pairs, if it can be sent.

    Errors show neither a value nor a key: if the caller swapped them, a key is secret.

    Args:
        metadata: Pairs of key and value, or a `grpc.aio.Metadata`. None, or any empty
            value, means none.
        name: What errors call it.

    Raises:
        TypeError: *metadata* does not consist of pairs, or a value has the wrong type.
        ValueError: gRPC does not accept a key or a value.
    """
    if not metadata:
        return ()
    if isinstance(metadata, grpc.aio.Metadata):  # it is not a Sequence
        metadata = tuple(metadata)
    if isinstance(metadata, str | bytes) or not isinstance(metadata, Sequence):
        raise TypeError(f"{name} must be pairs of str, got {type(metadata).__name__}")
    for number, pair in enumerate(metadata, 1):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"{name} must be pairs of str, got a {type(pair).__name__}")
        key, value = pair
        if not _is_key(key):
            raise ValueError(
                f"{name} keys must be of a-z, 0-9, '_', '-' and '.', and none that the "
                f"transport sets itself, such as 'te'; that of pair {number} is not"
            )
        if not isinstance(value, bytes if key.endswith("-bin") else str):
            raise TypeError(
                f"{name} values must be bytes if their key ends with -bin, otherwise a "
                f"str; that of pair {number} is a {type(value).__name__}"
            )
        if isinstance(value, str) and not (value.isascii() and value.isprintable()):
            raise ValueError(
                f"{name} values must be printable ASCII; that of pair {number} is not"
            )
    return metadata


def frozen_metadata(
    metadata: object, name: str = "metadata"
) -> tuple[tuple[str, str | bytes], ...]:
    """Return a copy of *metadata* that cannot change; see `checked_metadata`."""
    return tuple((key, value) for key, value in checked_metadata(metadata, name))
