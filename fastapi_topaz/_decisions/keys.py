"""
The key of a question: a keyed hash of everything that the authorizer is asked.

Protobuf writes type, length and value, so two questions that the authorizer can tell
apart have different bytes. In metadata, each part has its length before it, for the
same reason. Nothing is normalised, neither Unicode nor case, because Rego compares code
points. The hash has a random key of this process. So the key reveals neither identity
nor context, and a client cannot construct two questions that have the same key.
"""

from __future__ import annotations

import hashlib
import os
from struct import Struct
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from fastapi_topaz._decisions.question import Question
    from fastapi_topaz._rpc.metadata import Metadata


__all__ = ["Keys"]


VERSION = b"fastapi_topaz 1"

_LENGTH = Struct(">Q").pack


class Keys:
    """Makes the keys of questions, with a secret of its own."""

    __slots__ = ("_alone", "_with_metadata")

    def __init__(self) -> None:
        # Two secrets, so that a request with metadata never has the key of another one
        # without, whatever their bytes are.
        self._alone, self._with_metadata = (
            hashlib.blake2b(VERSION, digest_size=16, key=os.urandom(32))
            for _ in range(2)
        )

    def key_of(self, question: Question) -> bytes:
        """Return the key of *question*, 16 bytes."""
        if not question.metadata:
            digest = self._alone.copy()
            digest.update(question.request)
            return digest.digest()
        digest = self._with_metadata.copy()
        digest.update(_LENGTH(len(question.request)) + question.request)
        digest.update(_encoded(question.metadata))
        return digest.digest()


def _encoded(metadata: Metadata) -> bytes:
    parts: list[Any] = []
    # The order of different keys has no meaning in gRPC; that of equal keys has.
    for key, value in sorted(metadata, key=lambda pair: pair[0]):
        for part in (key, value):
            data = part if isinstance(part, bytes) else part.encode()
            parts += _LENGTH(len(data)), data
    return b"".join(parts)
