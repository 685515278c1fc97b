"""
What a question is about, as tags: its identity, its policy, each field of its resource.

A tag is a keyed hash, as a key is, so marks reveal nothing. Tags are computed from the
bytes that are sent, and only while there are marks. So an entry needs no room for them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aserto.authorizer.v2 import IsRequest
from google.protobuf.struct_pb2 import Struct

from fastapi_topaz._authorizer.messages import identity_context
from fastapi_topaz._authorizer.options import Identity
from fastapi_topaz._authorizer.rego import check_reference
from fastapi_topaz._authorizer.resource import fill


if TYPE_CHECKING:
    from fastapi_topaz._decisions.question import Question


__all__ = ["Tagger"]


class Tagger:
    """
    Makes tags.

    Args:
        secret: The key of the hash, 32 bytes. None, the default: a random one.

    Attributes:
        everything: The tag that stands for every question, in messages.
    """

    __slots__ = ("_secret", "everything")

    def __init__(self, secret: bytes | None = None) -> None:
        self._secret = os.urandom(32) if secret is None else secret
        self.everything = self._tag(b"everything", b"")

    def tags_of(self, question: Question) -> frozenset[bytes]:
        """Return all tags of *question*."""
        message = IsRequest.FromString(question.request)
        return frozenset(
            (
                self._identity(message.identity_context),
                self._policy(question.policy_path),
                *self._fields(message.resource_context),
            )
        )

    def concerned(
        self, identity: object, policy_path: object, resource: object
    ) -> list[frozenset[bytes]]:
        """
        Return the sets of tags for the arguments of `invalidate`; None is left out.

        Raises:
            TypeError, ValueError: An argument is wrong. The message names it.
        """
        found: list[frozenset[bytes]] = []
        if identity is not None:
            known = Identity.coerce(identity)
            found.append(frozenset({self._identity(identity_context(known))}))
        if policy_path is not None:
            path = check_reference("policy_path", policy_path)
            found.append(frozenset({self._policy(path)}))
        if resource is not None:
            if not isinstance(resource, Mapping):
                raise TypeError(
                    f"resource must be a mapping, got {type(resource).__name__}"
                )
            struct = Struct()
            fill(struct, resource)
            found.append(frozenset(self._fields(struct)))
        return found or [frozenset()]

    def _identity(self, context: Any) -> bytes:
        return self._tag(b"identity", context.SerializeToString(deterministic=True))

    def _policy(self, path: str) -> bytes:
        return self._tag(b"policy", path.encode())

    def _fields(self, struct: Any) -> list[bytes]:
        return [
            self._tag(
                b"resource",
                b"%d:%b" % (len(data := name.encode()), data)
                + value.SerializeToString(deterministic=True),
            )
            for name, value in struct.fields.items()
        ]

    def _tag(self, kind: bytes, data: bytes) -> bytes:
        return hashlib.blake2b(
            data, digest_size=16, key=self._secret, person=kind
        ).digest()
