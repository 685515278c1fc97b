"""
What a question is about, as tags: its identity, its policy, each field of its resource.

A tag is a keyed hash, as a key is, so marks reveal nothing. Tags are computed from the
bytes that are sent, and only while there are marks. So an entry needs no room for them.
The tag of a field hashes one spelling of its value, so the type of the value does not
matter. All processes on a bus make tags in the same way.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aserto.authorizer.v2 import IsRequest

from fastapi_topaz._authorizer.messages import identity_context
from fastapi_topaz._authorizer.options import Identity
from fastapi_topaz._authorizer.rego import check_reference
from fastapi_topaz._authorizer.resource import text_of
from fastapi_topaz._decisions.values import MOST_SPELLINGS, fields_of, spellings


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
                *itertools.chain(*self._fields(fields_of(message.resource_context))),
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
            # One set for each combination of spellings.
            found += map(frozenset, itertools.product(*self._fields(resource)))
        return found or [frozenset()]

    def _identity(self, context: Any) -> bytes:
        return self._tag(b"identity", context.SerializeToString(deterministic=True))

    def _policy(self, path: str) -> bytes:
        return self._tag(b"policy", path.encode())

    def _fields(self, fields: Mapping[str, Any]) -> list[list[bytes]]:
        """
        Return the tags of each field, one for each spelling of its value.

        Fields are left out while there are more than `MOST_SPELLINGS` combinations. So
        an invalidation concerns more answers, and never fewer.
        """
        found: list[list[bytes]] = []
        for name, value in fields.items():
            if not isinstance(name, str):
                raise TypeError(
                    f"resource must have str keys, got a {type(name).__name__}"
                )
            data = text_of("resource", name).encode()
            known = spellings(f"resource[{name!r}]", value)
            if known is not None:
                head = b"%d:%b" % (len(data), data)
                found.append([self._tag(b"resource", head + each) for each in known])
        while math.prod(map(len, found)) > MOST_SPELLINGS:
            found.remove(max(found, key=len))
        return found

    def _tag(self, kind: bytes, data: bytes) -> bytes:
        return hashlib.blake2b(
            data, digest_size=16, key=self._secret, person=kind
        ).digest()
