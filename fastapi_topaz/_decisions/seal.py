"""
The messages between processes: their format, their key, and their order. No I/O.

A message is a sequence of parts of 16 bytes: the seal, the sender, two numbers, and the
tags of one invalidation. The seal is a keyed hash of the rest. So a message that was
damaged, or has another key, is found. The tags are keyed hashes, too. So a message
reveals no identity, policy or resource.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Sequence
from struct import Struct
from typing import Literal, TypeAlias

import attrs


__all__ = [
    "MOST_SENDERS",
    "MOST_TAGS",
    "Heard",
    "Message",
    "Seal",
    "Senders",
    "derived",
]


VERSION = b"fastapi_topaz bus 2"
"""
It changes if tags change. Then processes with other tags reject each other's messages.
"""

SIZE = 16
"""Bytes of each part."""

MOST_TAGS = 64
"""Tags of one message. An invalidation with fewer tags concerns more questions."""

MOST_SENDERS = 4096
"""Other processes whose numbers are remembered."""

Heard: TypeAlias = Literal["next", "old", "gap", "joined"]

_NUMBERS = Struct(">QQ")


def derived(key: bytes, purpose: bytes) -> bytes:
    """Return a key for one *purpose*, at most 16 bytes, from that of an application."""
    return hashlib.blake2b(key, digest_size=32, person=purpose).digest()


class Unreadable(ValueError):  # noqa: N818
    """A message cannot be read. The text is a short reason without its contents."""


@attrs.frozen
class Message:
    """
    One message.

    Attributes:
        sender: A random name of the opening of a pool that sent it.
        beat: Numbers all messages of the sender.
        number: Numbers those with tags. One without tags has that of the last one.
        tags: What is invalidated: all questions that have all of these tags.
    """

    sender: bytes
    beat: int
    number: int
    tags: frozenset[bytes] = frozenset()


class Seal:
    """Writes and reads messages with the *key* of an application."""

    def __init__(self, key: bytes) -> None:
        self._key = derived(key, b"topaz bus seal")

    def close(self, message: Message) -> tuple[bytes, ...]:
        """Return the parts of *message*."""
        numbers = _NUMBERS.pack(message.beat, message.number)
        parts = (message.sender, numbers, *sorted(message.tags))
        return self._hash(parts), *parts

    def open(self, parts: object) -> Message:
        """
        Return the message with these *parts*.

        Raises:
            Unreadable: It has another format, or another key.
        """
        if isinstance(parts, str | bytes) or not isinstance(parts, Sequence):
            raise Unreadable("it is no sequence of parts")
        if not 3 <= len(parts) <= 3 + MOST_TAGS:
            raise Unreadable("it has too few or too many parts")
        found = tuple(parts)
        if not all(type(part) is bytes and len(part) == SIZE for part in found):
            raise Unreadable("a part has not 16 bytes")
        seal, *rest = found
        if not hmac.compare_digest(seal, self._hash(rest)):
            raise Unreadable("it has another key, or was changed")
        sender, numbers, *tags = rest
        beat, number = _NUMBERS.unpack(numbers)
        return Message(sender, beat, number, frozenset(tags))

    def _hash(self, parts: Sequence[bytes]) -> bytes:
        # All parts have one size, so joined they are still distinct.
        data = VERSION + b"".join(parts)
        return hashlib.blake2b(data, digest_size=SIZE, key=self._key).digest()


class Senders:
    """Knows which message of each other process comes next."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[bytes, int] = OrderedDict()

    def hear(self, message: Message) -> Heard:
        """
        Return what *message* is, after the earlier ones of its sender.

        Returns:
            `next`: none is missing. `old`: it came before, or too late. `gap`: others
            before it are missing. `joined`: its sender is new here, but has sent others
            before, so the same holds.
        """
        known = self._numbers.get(message.sender)
        number = message.number
        if known is not None and number < known + bool(message.tags):
            return "old"
        self._numbers[message.sender] = number
        self._numbers.move_to_end(message.sender)
        if len(self._numbers) > MOST_SENDERS:
            self._numbers.popitem(last=False)
        if number == (known or 0) + bool(message.tags):
            return "next"
        return "joined" if known is None else "gap"
