"""
Which answers are invalidated. Nothing is deleted: each question has a number.

A question takes its number before the authorizer is asked. An invalidation takes the
next number and marks what it is about. An answer is valid if its number is higher than
all marks that concern its question. So an answer under way cannot survive.
"""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING

import attrs

from fastapi_topaz._fork import current as process


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


__all__ = ["MOST_MARKS", "Invalidations"]


MOST_MARKS = 1000
"""Marks kept at once. One more, and a single mark for everything replaces them."""


@attrs.frozen
class Mark:
    """*number* invalidates each question that has all of *tags*."""

    tags: frozenset[bytes]
    number: int
    made_at: float


@attrs.frozen
class Marks:
    """All marks at one moment. Never changed, so threads need no lock to read them."""

    # Questions with this number, or a lower one, are all invalidated.
    everything: int = 0
    # By one of their tags.
    by_tag: Mapping[bytes, tuple[Mark, ...]] = attrs.Factory(dict)
    count: int = 0
    # From then on no mark matters, because the answers before it are too old.
    until: float = 0.0


class Invalidations:
    """
    Gives each question a number, and says up to which number it is invalidated.

    Args:
        retention: The age in seconds at which no answer is used any more.

    Attributes:
        marks: All marks.
        next_number: Returns the number of a new question.
    """

    def __init__(self, retention: float) -> None:
        self.retention = retention
        self.marks = Marks()
        # Taking the next number is atomic.
        self.next_number: Callable[[], int] = itertools.count(1).__next__
        self._pid = process.pid
        self._writing = threading.Lock()

    def valid_from(self, tags: frozenset[bytes], now: float) -> int:
        """
        Return the number up to which a question with these *tags* is invalidated.

        If there are no marks, this is `marks.everything`, whatever its tags.
        """
        marks = self.marks
        highest = marks.everything
        if now >= marks.until:
            return highest
        for tag in tags:
            for mark in marks.by_tag.get(tag, ()):
                if mark.number > highest and mark.tags <= tags:
                    highest = mark.number
        return highest

    def invalidate(self, concerned: list[frozenset[bytes]], now: float) -> None:
        """
        Invalidate all earlier questions that have all tags of one of *concerned*.

        Thread-safe. An empty set concerns every question.
        """
        if self._pid != process.pid:
            # Another thread may have held the lock when this process was forked.
            self._pid, self._writing = process.pid, threading.Lock()
        with self._writing:
            number = self.next_number()
            living = self._living(now)
            living |= {tags: Mark(tags, number, now) for tags in concerned}
            if len(living) > MOST_MARKS or not all(concerned):
                self.marks = Marks(everything=number)
                return
            by_tag: dict[bytes, tuple[Mark, ...]] = {}
            for mark in living.values():
                # Under its rarest tag, so that few marks are looked at.
                tag = min(mark.tags, key=lambda each: len(by_tag.get(each, ())))
                by_tag[tag] = (*by_tag.get(tag, ()), mark)
            everything, until = self.marks.everything, now + self.retention
            self.marks = Marks(everything, by_tag, len(living), until)

    def invalidate_all(self) -> None:
        """Invalidate all earlier questions. Thread-safe."""
        self.invalidate([frozenset()], 0.0)

    def _living(self, now: float) -> dict[frozenset[bytes], Mark]:
        """Return the marks that still matter."""
        return {
            mark.tags: mark
            for marks in self.marks.by_tag.values()
            for mark in marks
            if now - mark.made_at < self.retention
        }
